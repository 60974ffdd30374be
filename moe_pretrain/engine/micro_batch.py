"""Routers' view of a micro-batch, made from the batch in one place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.model.decoder import LMOutput
from moe_pretrain.moe.types import RoutingContext


def routing_context(
    batch: MicroBatch,
    seed: int,
    step: int,
    sum_over_global_batch: Callable[[int, Tensor], Tensor] | None = None,
    global_tokens: int | None = None,
) -> RoutingContext:
    """The context of ``batch`` in optimizer step ``step`` of a run with ``seed``."""
    num_rows, length = batch.input_ids.shape
    offset = torch.arange(length, device=batch.input_ids.device)
    return RoutingContext(
        token_mask=(batch.document_ids >= 0).flatten(),
        token_position=(batch.row_positions[:, None] * length + offset).flatten(),
        num_sequences=num_rows,
        seed=seed,
        step=step,
        sum_over_global_batch=sum_over_global_batch,
        global_tokens=global_tokens,
        token_ids=batch.input_ids.flatten(),
        document_ids=batch.document_ids.flatten(),
        document_lengths=batch.document_lengths,
    )


@dataclass(frozen=True)
class GlobalCounts:
    """Sizes of the whole global batch, over all ranks and micro-batches.

    Attributes:
        labels: Counted targets.
        tokens: Text tokens (not padding).
    """

    labels: int
    tokens: int


def micro_batch_loss(
    output: LMOutput, aux_weights: dict[str, float], tokens: int, global_counts: GlobalCounts
) -> Tensor:
    """This micro-batch's share of the global batch's loss; the shares of all micro-batches sum to it.

    ``loss = cross_entropy_sum / N_labels + sum_i w_i * aux_i * tokens / N_tokens``, with ``N`` over the global batch,
    and the cross-entropies of several passes added up.
    So every counted token weighs the same however the batch is cut (defects C12, C20).

    Args:
        output: The model's output, aux losses unweighted.
        aux_weights: Coefficient of each aux loss.
        tokens: Text tokens of this micro-batch.
        global_counts: Sizes of the global batch.
    """
    loss = output.num_passes * output.loss_sum / max(global_counts.labels, 1)
    share = tokens / max(global_counts.tokens, 1)
    for name, value in output.aux.items():
        if aux_weights[name]:
            loss = loss + aux_weights[name] * share * value
    return loss
