"""Bytes that training holds on one rank, by part, from the configuration alone.

Weights, gradients and optimizer are DeepSpeed 0.19's as it was measured to allocate them; activations are what the
modules of ``model`` and ``moe`` save for backward. Tests hold both to what a run on a CPU really keeps.
"""

from dataclasses import dataclass

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig
from moe_pretrain.plan.activations import Layers
from moe_pretrain.plan.local_parameters import BYTES, LocalParameters, local_parameters
from moe_pretrain.schedule.batch_plan import BatchPlan

_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: In the engine's dtype; routers in float32.
        optimizer: Moments and, under ZeRO, float32 master weights.
        carried: Gradients that are there when backward begins.
        stale: Those of the micro-batch before, which are there until backward begins.
        gradients: Gradients at their most, while the last micro-batch's are reduced.
        buckets: DeepSpeed's buffer for reducing gradients, there throughout backward.
        copies: Copies of gradients while they are reduced or cast.
        update: What the optimizer makes and drops while it updates.
        activations: What is saved for backward of one micro-batch, the gradients that the loss makes in forward among
            it.
        recomputed: The inside of one block, made again in backward.
        logits: One chunk's logits, and the float32 sum of the head's gradient.
        working: What the backward pass of one MoE layer holds at a time beside what was saved for it.
        exchange: Buffers of one layer's exchange between ranks, at the worst load.
    """

    weights: float
    optimizer: float
    carried: float
    stale: float
    gradients: float
    buckets: float
    copies: float
    update: float
    activations: float
    recomputed: float
    logits: float
    working: float
    exchange: float

    @property
    def total(self) -> float:
        """The peak: where backward begins, or where it ends and activations have given way to gradients."""
        layer = self.recomputed + max(self.working, self.exchange)  # rows travel before and after an expert works
        begins = self.carried + self.activations + max(layer, self.logits + self.stale)
        ends = self.gradients + max(self.copies, self.update)
        return self.weights + self.optimizer + self.buckets + max(begins, ends)


def memory_per_rank(
    config: Config,
    device: str,
    dtype: Dtype,
    plan: BatchPlan,
    ranks: int,
    worst_load: float,
    parameters: LocalParameters | None = None,
) -> Memory:
    """Estimate the peak of a training step on one rank.

    Args:
        config: The run.
        device: ``cuda`` or ``cpu``.
        dtype: The engine's, ``auto`` resolved.
        plan: How the batch is cut over ``ranks``.
        ranks: Number of ranks.
        worst_load: Rows on this rank over the mean, with expert parallelism, >= 1.
        parameters: Those of one rank, where they have been counted.
    """
    parameters = parameters or local_parameters(config)
    owned = parameters.owned(ranks, config.parallel.expert_parallel_size)
    layers = Layers(config, device, dtype, plan.micro_batch_size, worst_load)
    schemes = layers.schemes
    zero_stage = config.engine.stage(dtype, ranks)
    return Memory(
        weights=_weight_bytes(parameters, dtype),
        optimizer=_optimizer_bytes(parameters, ranks, config.parallel.expert_parallel_size, zero_stage),
        carried=_carried_bytes(parameters, owned, dtype, zero_stage, plan.accumulation),
        # ``BF16_Optimizer`` clears the last bfloat16 gradients when the next backward begins.
        stale=_weight_bytes(parameters, dtype)
        if (dtype, zero_stage) == ("bfloat16", 1) and plan.accumulation > 1
        else 0,
        gradients=_gradient_bytes(parameters, owned, dtype, zero_stage, plan.accumulation),
        buckets=_bucket_bytes(config.engine, dtype, zero_stage),
        copies=_copied_bytes(parameters, dtype, zero_stage),
        update=parameters.update_bytes,
        activations=layers.saved,
        recomputed=layers.recomputed,
        logits=schemes[0].logits,
        working=max(scheme.working for scheme in schemes),
        exchange=max(scheme.exchange for scheme in schemes),
    )


def _weight_bytes(parameters: LocalParameters, dtype: Dtype) -> float:
    """Weights as the forward pass reads them."""
    return BYTES[dtype] * (parameters.dense + parameters.expert) + 4 * parameters.kept


def _optimizer_bytes(parameters: LocalParameters, ranks: int, expert_parallel_size: int, zero_stage: int) -> float:
    """Moments and, where ZeRO copies them, float32 master weights, of the elements owned by this rank."""
    if zero_stage == 0:
        return parameters.moment_bytes + parameters.expert_moment_bytes
    place = (ranks, expert_parallel_size)
    return 4 * parameters.owned(*place) + parameters.owned_moment_bytes(*place)


def _gradient_bytes(
    parameters: LocalParameters, owned: float, dtype: Dtype, zero_stage: int, accumulation: int
) -> float:
    """Gradients at their most.

    Stage 0 has one float32 gradient. Stage 1 in bfloat16 (DeepSpeed's ``BF16_Optimizer``) keeps whole float32 sums
    beside the last backward's bfloat16 gradients; in float32 whole gradients and their owned part. Stage 2 copies the
    owned part as it comes, as the optimizer wants it and, in float32 with accumulation, as a sum.
    """
    if zero_stage == 0:
        return 4 * parameters.count
    if zero_stage == 1:
        return 4 * parameters.count + (_weight_bytes(parameters, dtype) if dtype == "bfloat16" else 4 * owned)
    return owned * (6 if dtype == "bfloat16" else 8 if accumulation == 1 else 12)


def _carried_bytes(
    parameters: LocalParameters, owned: float, dtype: Dtype, zero_stage: int, accumulation: int
) -> float:
    """Gradients that are there when backward begins.

    Sums over the accumulation; at stage 2 also a buffer for the owned part, made with the first gradient; at stage 1 in
    bfloat16 the float32 sums that ``BF16_Optimizer`` never frees.
    """
    if dtype == "bfloat16" and zero_stage == 1:
        return 4 * parameters.count
    sums = 0 if accumulation == 1 else 4 * (owned if zero_stage == 2 else parameters.count)
    return sums + (BYTES[dtype] * owned if zero_stage == 2 else 0)


def _bucket_bytes(engine: EngineConfig, dtype: Dtype, zero_stage: int) -> float:
    """One bucket, whole however small the model; ``BF16_Optimizer`` and stage 0 have none."""
    has_none = zero_stage == 0 or (zero_stage == 1 and dtype == "bfloat16")
    return 0 if has_none else BYTES[dtype] * engine.reduce_bucket_elements


def _copied_bytes(parameters: LocalParameters, dtype: Dtype, zero_stage: int) -> float:
    """Stage 0 reduces up to 500M elements at once, whatever is configured; bfloat16 casts tensor by tensor."""
    if zero_stage == 0:
        return 4 * min(_STAGE_0_BUCKET, max(parameters.dense + parameters.kept, parameters.expert))
    return 4 * parameters.largest if dtype == "bfloat16" else 0
