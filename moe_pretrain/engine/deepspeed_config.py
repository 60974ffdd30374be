"""Our configuration to DeepSpeed's dictionary. Pure; every key that changes numbers is written out."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from moe_pretrain.moe.kernels import KernelChoice

Dtype = Literal["float32", "bfloat16"]
Determinism = Literal["topology", "elastic"]


@dataclass(frozen=True)
class EngineConfig:
    """The engine's numerics.

    Attributes:
        device: ``auto`` takes a GPU when there is one.
        dtype: ``auto`` is bfloat16 on a GPU that has it, else float32. bfloat16 keeps float32 master weights, float32
            gradient accumulation and reduction, and float32 routers.
        zero_stage: 0: nothing is partitioned; 1: optimizer states; 2: also gradients. ``auto`` is 0 on one rank in
            float32, where there is nobody to share with and copies cost a third of the memory, else 1.
        gradient_clipping: Largest global gradient norm; 0 switches clipping off.
        reduce_bucket_elements: Elements per gradient reduction.
        check_every_steps: Steps between checks that replicas are equal and experts differ; 0 switches them off.
        max_skipped_steps: How many steps in succession with a loss or gradient that is not finite are skipped, with a
            warning and without an update, before the run stops; 0 stops at the first.
        determinism: ``topology``: the same bits on the same ranks, expert parallel size, ZeRO stage and micro-batch
            size. ``elastic``: on any of the first three, in powers of two, at a fixed ``batch.micro_batch_size``, in
            float32 on CPUs of one kind; slower, for debugging and proofs (``engine/elastic.py``).
        kernels: Whose kernels run the loss, norms and dense networks (``moe/kernels.py``): ``auto`` takes
            liger-kernel's on a GPU where the extra ``kernels`` is installed; ``quack`` those of the extra ``quack`` for
            experts (``moe/experts/fused_products.py``). The same numbers to rounding.
    """

    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    zero_stage: int | Literal["auto"]
    gradient_clipping: NonNegativeFloat
    reduce_bucket_elements: Annotated[int, Field(ge=2)]
    check_every_steps: NonNegativeInt
    max_skipped_steps: NonNegativeInt
    determinism: Determinism
    kernels: KernelChoice = "auto"

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, "auto"):
            raise ValueError(
                f"engine.zero_stage={self.zero_stage} must be 0, 1 or 2, or auto: DeepSpeed refuses custom MoE layers "
                "at stage 3; experts are already spread by parallel.expert_parallel_size"
            )
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "engine.zero_stage=0 must be 1 or 2 with engine.dtype=bfloat16: DeepSpeed's stage 0 then uses another "
                "optimizer with other results"
            )

    def stage(self, dtype: Dtype, ranks: int) -> int:
        """``zero_stage`` with ``auto`` resolved for ``ranks`` ranks that compute in ``dtype``."""
        if self.zero_stage == "auto":
            return 0 if dtype == "float32" and ranks == 1 else 1
        return self.zero_stage


def clips_itself(config: EngineConfig) -> bool:
    """Whether our code clips instead of DeepSpeed's.

    At stage 0 DeepSpeed averages the norms of ranks that hold different experts (DeepSpeed#8475, defect C3), so
    there it is told not to clip. Its norm is summed by partition, so neither does it in elastic mode.
    """
    return config.zero_stage == 0 or config.determinism == "elastic"


def deepspeed_config(
    config: EngineConfig, dtype: Dtype, micro_batch_size: int, accumulation: int, world_size: int
) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Args:
        config: The engine's fields.
        dtype: ``config.dtype`` with ``auto`` resolved.
        micro_batch_size: Sequences per rank and forward pass.
        accumulation: Micro-batches per rank and step.
        world_size: Number of ranks.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
        # A gradient that is not finite must not reach the weights; in float32 DeepSpeed always looks.
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        # Accumulating or reducing gradients in bfloat16 loses small contributions.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0 if clips_itself(config) else config.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": config.reduce_bucket_elements,
            "allgather_bucket_size": config.reduce_bucket_elements // 2 * 2,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # On by default, it waits for the whole GPU twice in every micro-batch; ``metrics`` has the throughput.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
