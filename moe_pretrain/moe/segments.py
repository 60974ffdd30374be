"""Segments of a micro-batch's rows: the stretches of tokens that share one merged network."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_pretrain.moe.routers.base import router_use
from moe_pretrain.moe.types import Merging, RoutingContext


@dataclass(frozen=True)
class Segments:
    """Rows cut at documents, and these at a fixed number of tokens; padding is a document of its own.

    Attributes:
        of_token: Segment of each token, ascending.
        lengths: Tokens of each segment.
        ends: Where each segment ends, on the host.
        continues: Whether a segment goes on with the document of the one before it.
    """

    of_token: Int[Tensor, "tokens"]
    lengths: Int[Tensor, "segments"]
    ends: list[int]
    continues: Bool[Tensor, "segments"]


def cut(context: RoutingContext, segment_tokens: int | None) -> Segments:
    """Segments of ``segment_tokens`` from each document's first token in its row, the last one shorter.

    A GPU is waited for only where the host does not know the documents.

    Args:
        context: Says where rows and documents are.
        segment_tokens: None for one segment per document and row.
    """
    documents = context.document_ids
    if documents is None:
        documents = torch.where(context.token_mask, 0, -1)
    starts, begins = _starts(documents.view(context.num_sequences, -1), segment_tokens)
    ends = _ends_on_host(starts, context.document_lengths, segment_tokens)
    first = torch.nonzero_static(starts, size=len(ends))[:, 0]
    lengths = torch.cat([first, first.new_full((1,), len(starts))]).diff()
    return Segments(starts.cumsum(0) - 1, lengths, ends, ~begins[first])


def _ends_on_host(
    starts: Bool[Tensor, "tokens"], document_lengths: list[int] | None, segment_tokens: int | None
) -> list[int]:
    """Ends of segments; read from the device where the host does not know the documents."""
    if document_lengths is None:
        return [*starts.nonzero()[:, 0].tolist(), len(starts)][1:]
    ends: list[int] = []
    end = 0
    for length in document_lengths:
        if segment_tokens is not None:
            ends += range(end + segment_tokens, end + length, segment_tokens)
        end += length
        ends.append(end)
    return ends


def _starts(
    documents: Int[Tensor, "rows sequence"], segment_tokens: int | None
) -> tuple[Bool[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """Flags of the tokens at which a segment starts, and of those at which a document does."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff(dim=1) != 0
    if segment_tokens is None:
        return begins.flatten(), begins.flatten()
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    offset = place - torch.where(begins, place, 0).cummax(dim=1).values
    return (offset % segment_tokens == 0).flatten(), begins.flatten()


def segment_means(hidden: Float[Tensor, "tokens hidden"], segments: Segments) -> Float[Tensor, "segments hidden"]:
    """Mean of each segment's tokens, float32; deterministic on every device."""
    return _SegmentMeans.apply(hidden, segments.of_token, segments.lengths)


class _SegmentMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, of_token: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(of_token, lengths)
        ctx.dtype = hidden.dtype
        if len(hidden) == 0:
            return hidden.new_zeros(0, hidden.shape[1], dtype=torch.float32)
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        of_token, lengths = ctx.saved_tensors
        return (grads[0] / lengths[:, None])[of_token].to(ctx.dtype), None, None


def merge_by(
    mixture: Float[Tensor, "segments experts"], segments: Segments, context: RoutingContext, is_training: bool
) -> Merging:
    """The decision to merge every segment's experts by its row of ``mixture``, with its statistics.

    A token counts for each expert with its share of the mixture, so that loads add up to tokens. ``RouterUse.sums``
    holds the number of segments of text in training.
    """
    num_tokens, num_experts = len(segments.of_token), mixture.shape[1]
    weight = mixture[segments.of_token]
    shares = weight.detach().double()
    counts = (shares * context.token_mask[:, None]).sum(dim=0)
    last = segments.lengths.cumsum(0) - 1
    merged = context.token_mask[last].sum(dtype=torch.float64)[None] if is_training else None
    token = torch.arange(num_tokens, device=mixture.device)
    return Merging(
        token.repeat_interleave(num_experts),
        torch.arange(num_experts, device=mixture.device).repeat(num_tokens),
        weight.flatten(),
        num_experts,
        router_use(counts, shares, context, merged),
        mixture=mixture,
        lengths=segments.lengths,
        ends=segments.ends,
    )
