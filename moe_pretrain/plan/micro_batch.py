"""``batch.micro_batch_size=auto``: the largest micro-batch that the plan says fits."""

from dataclasses import replace

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.plan.local_parameters import local_parameters
from moe_pretrain.plan.memory import memory_per_rank
from moe_pretrain.schedule.batch_plan import plan_batches

USABLE = 0.92
"""Share of a GPU's memory that training may fill; the rest goes to the driver, NCCL and fragmentation."""
WORST_LOAD = 1.5
"""Rows on the busiest rank over the mean, under expert parallelism."""
_FIELD = "batch.micro_batch_size"


def with_largest_micro_batch(
    config: Config, ranks: int, target: tuple[str, Dtype], room: float, worst_load: float = WORST_LOAD
) -> Config:
    """``config`` with a number for ``auto``: the most rows that divide a rank's share and fit.

    Args:
        config: The run, with any micro-batch size.
        ranks: Number of ranks.
        target: Device and dtype of the machines.
        room: Bytes of one device that may be filled.
        worst_load: As in ``memory_per_rank``.

    Raises:
        ValueError: Not even one row fits, the global batch does not divide, or the device is a CPU.
    """
    if target[0] == "cpu":
        raise ValueError(f"{_FIELD}=auto must be a number or null on a CPU: only a GPU's memory is planned for")
    one = _cut(config, 1)
    rows = plan_batches(one.batch, config.model.sequence_length, ranks, config.num_steps).accumulation
    parameters = local_parameters(config)
    needed = {}
    for size in (size for size in range(1, rows + 1) if rows % size == 0):
        cut = _cut(config, size)
        plan = plan_batches(cut.batch, config.model.sequence_length, ranks, config.num_steps)
        needed[size] = memory_per_rank(cut, *target, plan, ranks, worst_load, parameters).total
    fitting = [size for size, total in needed.items() if total <= room]
    if not fitting:
        raise ValueError(
            f"{_FIELD}=auto: not even one row of model.sequence_length={config.model.sequence_length} fits: a rank "
            f"needs {min(needed.values()) / 2**30:.1f} GiB and may fill {room / 2**30:.1f}; more ranks, "
            f"engine.zero_stage=2 or model.recompute=full need less each (moe-pretrain plan says which layouts fit)"
        )
    return _cut(config, max(fitting))


def _cut(config: Config, size: int) -> Config:
    return replace(config, batch=replace(config.batch, micro_batch_size=size))
