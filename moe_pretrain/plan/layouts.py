"""Layouts of a run on its GPUs, the fastest that fits first: spread of experts, exchange, ZeRO, recomputation, rows."""

import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_pretrain.config.preflight import RunPlan, plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.block import Recompute
from moe_pretrain.moe.build import sharded, width_problems
from moe_pretrain.parallel.config import Overlap
from moe_pretrain.plan.local_parameters import LocalParameters, local_parameters
from moe_pretrain.plan.memory import Memory, memory_per_rank
from moe_pretrain.plan.step_time import Machine, StepTime, step_time

RECOMPUTE: tuple[Recompute, ...] = typing.get_args(Recompute)


@dataclass(frozen=True)
class Layout:
    """A way to place a run on its GPUs, and what it comes to.

    Attributes:
        config: The configuration with the layout.
        memory: Bytes on one rank.
        time: Seconds of a step.
    """

    config: Config
    memory: Memory
    time: StepTime

    @property
    def words(self) -> str:
        """The layout as overrides."""
        config = self.config
        overlap = f"parallel.overlap_exchange={config.parallel.overlap_exchange} "
        return (
            f"parallel.expert_parallel_size={config.parallel.expert_parallel_size} "
            f"{overlap if config.parallel.expert_parallel_size > 1 else ''}"
            f"engine.zero_stage={config.engine.zero_stage} model.recompute={config.model.recompute} "
            f"batch.micro_batch_size={config.batch.micro_batch_size}"
        )


def layouts(
    config: Config, target: tuple[str, Dtype], room: float, worst_load: float, machine: Machine
) -> list[Layout]:
    """Every layout of ``config.parallel.processes`` ranks that divides and fits, the fastest first.

    Micro-batches are powers of two; at equal times the layout of less memory comes first.

    Args:
        config: The run.
        target: Device and dtype of the machines.
        room: Bytes of one device that may be filled.
        worst_load: As in ``memory_per_rank``.
        machine: Rates of the devices.
    """
    found = []
    for placed, parameters in _placed(config, target):
        for stage, recompute in itertools.product(_stages(target[1]), RECOMPUTE):
            changed = replace(
                placed,
                engine=replace(placed.engine, zero_stage=stage),
                model=replace(placed.model, recompute=recompute),
            )
            for cut, run in _cut(changed, target):
                ranks = config.parallel.processes
                memory = memory_per_rank(cut, *target, run.batches, ranks, worst_load, parameters)
                if memory.total > room:
                    break  # a larger micro-batch needs more
                found.append(Layout(cut, memory, step_time(cut, run, parameters, machine)))
    return sorted(found, key=lambda layout: (layout.time.total, layout.memory.total))


def _placed(config: Config, target: tuple[str, Dtype]) -> Iterator[tuple[Config, LocalParameters]]:
    """The run at every size of expert parallelism that divides ranks and experts, and every way of its exchange."""
    if target == ("cuda", "bfloat16") and width_problems(config.model.moe, config.router, config.model.hidden_size):
        return
    for size in range(1, config.parallel.processes + 1):
        changed = replace(config, parallel=replace(config.parallel, expert_parallel_size=size))
        try:
            changed.parallel.check(config.parallel.processes, *sharded(config.model.moe, config.router))
        except ValueError:
            continue
        if target != ("cuda", "bfloat16") or not width_problems(
            config.model.moe, config.router, config.model.hidden_size
        ):
            parameters = local_parameters(changed)
            for overlap in _overlaps(changed, target[0]):
                yield replace(changed, parallel=replace(changed.parallel, overlap_exchange=overlap)), parameters


def _overlaps(config: Config, device: str) -> tuple[Overlap, ...]:
    """Ways of the exchange that differ: halves apart, as ``auto`` has it on a GPU, and all tokens at once."""
    is_elastic = config.engine.determinism == "elastic"
    has_one_way = config.parallel.expert_parallel_size == 1 or config.router.merges_experts or is_elastic
    return (config.parallel.overlap_exchange,) if has_one_way or device == "cpu" else ("auto", "never")


def _cut(config: Config, target: tuple[str, Dtype]) -> Iterator[tuple[Config, RunPlan]]:
    """The run with every power of two of rows in a micro-batch that divides the global batch, the smallest first."""
    rows = config.batch.global_batch_tokens // config.model.sequence_length // config.parallel.processes
    for size in (1 << power for power in range(max(rows, 1).bit_length())):
        cut = replace(config, batch=replace(config.batch, micro_batch_size=size))
        try:
            yield cut, plan_run(cut, config.parallel.processes, target)
        except ValueError:
            continue


def _stages(dtype: Dtype) -> tuple[int, ...]:
    return (1, 2) if dtype == "bfloat16" else (0, 1, 2)
