"""Plan of a run, and the checks of it before anything expensive: without a process group or a corpus."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_pretrain.checkpoint.store import complete_names, locate
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig
from moe_pretrain.engine.elastic import check_elastic
from moe_pretrain.engine.optimizers.base import check_optimizer
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.model.size import ModelSize
from moe_pretrain.moe.build import no_fused_products, sharded, width_problems
from moe_pretrain.moe.kernels import resolve_kernels
from moe_pretrain.run_folder.paths import CHECKPOINTS
from moe_pretrain.schedule.batch_plan import BatchPlan, plan_batches
from moe_pretrain.system.gpu import missing_compiler, unusable_gpu

_SMALLEST_HEAD_ON_CUDA = 16
"""FlexAttention's kernels multiply blocks that are no narrower."""
_BFLOAT16_CAPABILITY = 8
"""Ampere; older GPUs only emulate it, and have no grouped products."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a configuration and a number of ranks; made once for a run and handed on.

    Attributes:
        world_size: Number of ranks.
        device: Device type, ``cuda`` or ``cpu``.
        dtype: Type of forward and backward passes.
        batches: Micro-batches, accumulation and number of steps.
        size: Parameters and FLOPs of the model.
    """

    world_size: int
    device: str
    dtype: Dtype
    batches: BatchPlan
    size: ModelSize

    def with_steps(self, num_steps: int) -> "RunPlan":
        """The same plan for another number of optimizer steps, as when the data ends before the budget."""
        return replace(self, batches=replace(self.batches, num_steps=num_steps))


def preflight(config: Config, world_size: int) -> RunPlan:
    """Plan a run on ``world_size`` ranks, and refuse whatever can be refused this early.

    Raises:
        ValueError: One line naming the field.
    """
    plan, moe = plan_run(config, world_size), config.model.moe
    config.schedule.check(plan.batches.num_steps)
    config.parallel.check(world_size, *sharded(moe, config.router))
    if config.parallel.overlap_exchange == "always":
        _check_overlap(config)
    # One that has checkpoints goes on from those, also where what it began with is gone.
    if config.checkpoint.warm_start is not None and not complete_names(config.run.folder / CHECKPOINTS):
        source = Path(config.checkpoint.warm_start)
        if not (source / "config.json").is_file():  # else a Hugging Face folder, which is read when the run begins
            locate(source)
    if config.optimizer.trainable == "routers":
        model = meta_model(config.model, config.router)
        if not any(list(layer.router.parameters()) for layer in model.moe_layers()):
            raise ValueError(f"optimizer.trainable=routers must be all with router={config.router.name}: no weights")
    check_optimizer(config.optimizer, config.model, config.router)
    if resolve_kernels(config.engine.kernels, plan.device) == "quack" and plan.dtype != "bfloat16":
        raise ValueError(f"engine.kernels=quack must be auto or torch with engine.dtype={plan.dtype}: not bfloat16")
    if plan.dtype == "bfloat16" and config.engine.zero_stage == 0:
        raise ValueError("engine.zero_stage=0 must be 1 or 2 with engine.dtype=bfloat16")
    if config.engine.determinism == "elastic":
        check_elastic(config.model, config.router, config.batch, plan.batches, world_size, plan.device, plan.dtype)
    if plan.device == "cuda" and config.model.attention_head_size < _SMALLEST_HEAD_ON_CUDA:
        raise ValueError(
            f"{config.model.head_size_name} must be at least {_SMALLEST_HEAD_ON_CUDA} on CUDA, "
            f"whose attention kernels take no smaller heads: model.num_heads at most "
            f"{config.model.hidden_size // _SMALLEST_HEAD_ON_CUDA}, or another model.head_size"
        )
    if plan.device == "cuda" and plan.dtype == "bfloat16":
        for problem in width_problems(moe, config.router, config.model.hidden_size):
            raise ValueError(problem)
        slices = config.parallel.expert_parallel_size
        if config.router.merges_experts and (local := moe.expert_hidden_size // slices) % 8:
            raise ValueError(
                f"model.moe.expert_hidden_size={moe.expert_hidden_size} must be a multiple of {8 * slices} with "
                f"parallel.expert_parallel_size={slices} and router={config.router.name} on a GPU in bfloat16: "
                f"grouped_mm takes no {local} units of it"
            )
    return plan


def _check_overlap(config: Config) -> None:
    """Refuse ``parallel.overlap_exchange=always`` where no micro-batch can be halved."""
    reason = None
    if config.parallel.expert_parallel_size == 1:
        reason = "parallel.expert_parallel_size=1: nothing is exchanged"
    elif config.router.merges_experts:
        reason = f"router={config.router.name}: every token goes to all ranks at once"
    elif config.engine.determinism == "elastic":
        reason = "engine.determinism=elastic: the halves' gradients would be summed where experts are spread"
    if reason is not None:
        raise ValueError(f"parallel.overlap_exchange=always must be auto or never with {reason}")


def plan_run(config: Config, world_size: int, target: tuple[str, Dtype] | None = None) -> RunPlan:
    """Plan without the further checks: for tools that run a part of the configuration, or run it elsewhere.

    Args:
        config: Resolved configuration.
        world_size: Number of ranks.
        target: Device type and dtype of another machine; None takes those of this one.

    Raises:
        ValueError: The global batch does not divide, this machine has not the device that is asked for, or experts
            cannot run as the kernels that are.
    """
    batches = plan_batches(config.batch, config.model.sequence_length, world_size, config.num_steps)
    if config.engine.kernels == "quack" and (reason := no_fused_products(config.model.moe, config.router)):
        raise ValueError(f"engine.kernels=quack must be auto or torch: {reason}")
    device, dtype = target or _resolve_device(config.engine)
    size = config.size
    tokens = batches.micro_batch_size * config.model.sequence_length
    return RunPlan(
        world_size, device, dtype, batches, size.in_micro_batches(tokens, config.parallel.expert_parallel_size)
    )


def _resolve_device(config: EngineConfig) -> tuple[str, Dtype]:
    """``auto`` to what this machine has: a GPU, with bfloat16 if it knows that; else the CPU with float32."""
    device = config.device
    if device != "cpu" and (reason := unusable_gpu()):
        raise ValueError(f"engine.device={device} must be cpu, or the GPU of this machine made usable: {reason}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda must be auto or cpu: torch finds no CUDA device")
    has_bfloat16 = device == "cpu" or torch.cuda.get_device_capability()[0] >= _BFLOAT16_CAPABILITY
    if config.dtype == "auto":
        return device, "bfloat16" if device == "cuda" and has_bfloat16 else "float32"
    if config.dtype == "bfloat16" and not has_bfloat16:
        raise ValueError(
            f"engine.dtype=bfloat16 must be auto or float32: {torch.cuda.get_device_name()} has no bfloat16 arithmetic"
        )
    return device, config.dtype


def check_warm_up(config: Config, plan: RunPlan) -> None:
    """Refuse a run that would end before its learning rate is up.

    Not where the number of steps is an estimate, as in a budget of FLOPs, nor where an earlier release has begun it.

    Raises:
        ValueError: The warm-up is longer than the run.
    """
    odd = config.schedule.check(plan.batches.num_steps)
    if odd and config.budget.flops is None and not (config.run.folder / CHECKPOINTS).is_dir():
        raise ValueError(odd)


def check_devices(plan: RunPlan, local_ranks: int) -> None:
    """Refuse more ranks on this host than it has GPUs, and GPUs for which no kernel can be built.

    Raises:
        ValueError: There are fewer, or Triton lacks a compiler.
    """
    if plan.device == "cuda" and (devices := torch.cuda.device_count()) < local_ranks:
        raise ValueError(
            f"{local_ranks} ranks on this host must be at most its {devices} CUDA device{'s' if devices != 1 else ''}, "
            "one for each: parallel.processes or torchrun's --nproc-per-node (CUDA_VISIBLE_DEVICES says which it sees)"
        )
    if plan.device == "cuda" and (lacking := missing_compiler()):
        raise ValueError(
            f"engine.device={plan.device} must be cpu, or this machine have {lacking} for Triton's kernels"
        )
