"""Causal grouped-query attention in which documents of a packed row do not see each other."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.model.attention_statistic import attention_statistic
from moe_pretrain.model.norms import RMSNorm
from moe_pretrain.model.rotary import apply_rotary, rotated_projection
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.types import AttentionStatistic

QKNorm = Literal["none", "head", "whole"]
"""RMSNorm of queries and keys: none, over each head, or over all heads together."""


@dataclass(frozen=True)
class DocumentMask:
    """Document borders for every layer's attention, made once per micro-batch.

    Attributes:
        first_key: Position in its row of the first token of each token's document.
        spans: Lengths of the documents of each row, in order. CPU only, else None.
        block_mask: FlexAttention's block mask. CUDA only, else None.
    """

    first_key: Int[Tensor, "batch sequence"]
    spans: list[list[int]] | None = None
    block_mask: Any = None


def document_mask(document_ids: Int[Tensor, "batch sequence"]) -> DocumentMask:
    """Build the mask for rows whose positions belong to the documents ``document_ids``.

    A document is a run of equal ids. On CUDA this is a FlexAttention block mask: building it once per micro-batch
    matters, it costs as much as a layer. On the CPU, FlexAttention has no backward and SDPA with a dense mask computes
    what is masked, so the lengths are taken to the host.
    """
    first_key = _first_keys(document_ids)
    if document_ids.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        batch, sequence = document_ids.shape
        same = _visible(document_ids)
        mask = create_block_mask(same, batch, None, sequence, sequence, device=str(document_ids.device))
        return DocumentMask(first_key, block_mask=mask)
    spans = []
    for row in document_ids:
        _, lengths = torch.unique_consecutive(row, return_counts=True)
        spans.append(lengths.tolist())
    return DocumentMask(first_key, spans=spans)


def _first_keys(document_ids: Int[Tensor, "batch sequence"]) -> Int[Tensor, "batch sequence"]:
    """Start of each token's document in its row."""
    begins = functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return (torch.arange(document_ids.shape[1], device=document_ids.device) * begins).cummax(dim=1).values


def _visible(document_ids: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function: keys of the same document, not later than the query."""
    return lambda batch, head, query, key: (document_ids[batch, query] == document_ids[batch, key]) & (key <= query)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention is only fast when compiled; one compilation serves all layers."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(
    query: Float[Tensor, "batch heads sequence head"],
    key: Float[Tensor, "batch kv_heads sequence head"],
    value: Float[Tensor, "batch kv_heads sequence head"],
    mask: DocumentMask,
) -> Float[Tensor, "batch heads sequence head"]:
    """Scaled dot-product attention within documents, causal; heads share keys in equal groups."""
    grouped = query.shape[1] != key.shape[1]
    if mask.block_mask is not None:
        flex = _compiled_flex_attention()
        return flex(query, key, value, block_mask=mask.block_mask, enable_gqa=grouped)
    assert mask.spans is not None
    sdpa = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
    if all(len(spans) == 1 for spans in mask.spans):
        return sdpa(query, key, value)
    # Neighbouring rows of one document each, as most are where rows are short, go together.
    blocks: list[list[list[int]]] = []
    for are_whole, group in itertools.groupby(mask.spans, key=lambda spans: len(spans) == 1):
        rows = list(group)
        blocks += [rows] if are_whole else [[spans] for spans in rows]
    sizes = [len(block) for block in blocks]
    taken = zip(*(tensor.split(sizes) for tensor in (query, key, value)), strict=True)
    attended = []
    for (spans, *_), block in zip(blocks, taken, strict=True):
        documents = zip(*(tensor.split(spans, dim=2) for tensor in block), strict=True)
        parts = [sdpa(*document) for document in documents]
        attended.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
    return torch.cat(attended)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; ``qkv_weight`` holds query, key and value rows in that order.

    With ``qk_norm`` queries and keys are normalised before they are rotated, so that their products stay bounded
    however the weights grow (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_size: int,
        qk_norm: QKNorm = "none",
        norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.head_size = head_size
        self.sizes = [num_heads * head_size, num_key_value_heads * head_size, num_key_value_heads * head_size]
        self.qkv_weight = nn.Parameter(torch.empty(sum(self.sizes), hidden_size))
        self.out_weight = nn.Parameter(torch.empty(hidden_size, num_heads * head_size))
        self.query_norm, self.key_norm = (
            None if qk_norm == "none" else RMSNorm(head_size if qk_norm == "head" else width, norm_epsilon)
            for width in self.sizes[:2]
        )
        self._norms_heads = qk_norm == "head"

    def project(
        self, hidden: Float[Tensor, "batch sequence hidden"], rotary: tuple[Tensor, Tensor]
    ) -> tuple[
        Float[Tensor, "batch heads sequence head"],
        Float[Tensor, "batch kv_heads sequence head"],
        Float[Tensor, "batch kv_heads sequence head"],
    ]:
        """Queries and keys, normed if so configured and rotated, and values."""
        projected = functional.linear(hidden, self.qkv_weight)
        if self.query_norm is None:
            return rotated_projection(projected, rotary, self.sizes, self.head_size)
        query, key, value = projected.split(self.sizes, dim=-1)
        query, key = self._by_head(query, self.query_norm), self._by_head(key, self.key_norm)
        return apply_rotary(query, rotary), apply_rotary(key, rotary), self._by_head(value, None)

    def _by_head(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is not None and not self._norms_heads:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_size))
        if norm is not None and self._norms_heads:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def forward(
        self,
        hidden: Float[Tensor, "batch sequence hidden"],
        rotary: tuple[Tensor, Tensor],
        mask: DocumentMask,
        statistic: AttentionStatistic | None = None,
    ) -> tuple[Float[Tensor, "batch sequence hidden"], Float[Tensor, "batch sequence"] | None]:
        """Attend; ``rotary`` comes from ``rotary_table``, ``mask`` from ``document_mask``.

        Returns:
            New hidden states, and the statistic if one was asked for (float32, no gradient).
        """
        query, key, value = self.project(hidden, rotary)
        attended = attend(query, key, value, mask)
        output = functional.linear(attended.transpose(1, 2).flatten(2), self.out_weight)
        if statistic is None:
            return output, None
        with part("router"):
            return output, attention_statistic(statistic, query, key, mask.first_key)
