"""What routers may know of a micro-batch, made from the batch in one place."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_pretrain.data.rows.micro_batch import MicroBatch
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
    )
