"""The global batch to micro-batches and accumulation. Every divisibility error of the batch lives here."""

from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes: the tokens of a step, and of a pass.

    Attributes:
        global_batch_tokens: Tokens per optimizer step over all ranks; a multiple of the sequence length.
        micro_batch_size: Sequences per rank and forward pass; None for all of a rank's, without accumulation. ``auto``
            is what fits into a GPU, a number from the run's first start on.
    """

    global_batch_tokens: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"] | None


@dataclass(frozen=True)
class BatchPlan:
    """Division of one optimizer step into ranks and micro-batches.

    Attributes:
        rows_per_step: Sequences per optimizer step over all ranks.
        micro_batch_size: Sequences per rank and forward pass.
        accumulation: Micro-batches per rank and step.
        num_steps: Optimizer steps of the run.
        tokens_per_step: Tokens per optimizer step.
    """

    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    num_steps: int
    tokens_per_step: int


def plan_batches(config: BatchConfig, sequence_length: int, world_size: int, num_steps: int) -> BatchPlan:
    """Cut the global batch over ``world_size`` ranks, for a run of ``num_steps`` steps.

    Raises:
        ValueError: The global batch is not a whole number of sequences, or those are not a whole number of
            micro-batches on every rank; the message gives the nearest values that work.
    """
    if config.micro_batch_size == "auto":
        raise ValueError(
            "batch.micro_batch_size=auto must be a number here: only a single run of train, and plan, ask what fits"
        )
    per_round = sequence_length * (config.micro_batch_size or 1) * world_size
    if config.global_batch_tokens % per_round:
        below = config.global_batch_tokens // per_round * per_round
        nearest = " or ".join(str(value) for value in (below, below + per_round) if value > 0)
        micro = f"batch.micro_batch_size={config.micro_batch_size} * " if config.micro_batch_size else ""
        raise ValueError(
            f"batch.global_batch_tokens={config.global_batch_tokens} must be a multiple of {per_round} = "
            f"model.sequence_length={sequence_length} * {micro}{world_size} ranks; nearest: {nearest}"
        )
    rows = config.global_batch_tokens // sequence_length
    micro_batch_size = config.micro_batch_size or rows // world_size
    return BatchPlan(
        rows_per_step=rows,
        micro_batch_size=micro_batch_size,
        accumulation=rows // (micro_batch_size * world_size),
        num_steps=num_steps,
        tokens_per_step=config.global_batch_tokens,
    )
