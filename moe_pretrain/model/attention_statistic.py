"""Attention statistic for routers: one number per token of their block's attention, without the matrix of weights.

``A[h, t, j]`` is head ``h``'s weight of key ``j`` for query ``t``: the softmax over the keys that ``t`` sees, which are
the earlier ones of its document in its row and itself. Fused attention kernels never form ``A``, so its scores are made
once more here, a block of queries at a time. Everything is float32, without gradient, and a mean over heads.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.types import AttentionStatistic

MAX_SCORES = 2**25
"""Scores that exist at a time: 128 MiB, a quarter of the logits that the cross-entropy holds at once."""


@torch.no_grad()
def attention_statistic(
    name: AttentionStatistic,
    query: Float[Tensor, "batch heads sequence head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    first_key: Int[Tensor, "batch sequence"],
    max_scores: int = MAX_SCORES,
) -> Float[Tensor, "batch sequence"]:
    """The statistic ``name`` of every token; float32, all but ``received`` from earlier tokens only.

    With ``n`` the number of keys that token ``t`` sees:

    ==================================  ==========================================  ==============================
    name                                value, a mean over heads                    when ``t`` sees itself only
    ==================================  ==========================================  ==============================
    ``row_max``                         ``max_j A[t, j]``, in [1 / n, 1]            1
    ``corrected_row_max``               ``(m - 1 / n) / (1 - 1 / n)``, at least 0;  0, as whenever no key is left
                                        ``m`` the row maximum without the
                                        document's first key, where attention
                                        that has nothing to look for goes
    ``corrected_row_max_without_self``  the same without the token itself, too      0
    ``entropy``                         ``1 - H[t] / ln n``, ``H`` the entropy of   1
                                        the row in nats
    ``received``                        mean of ``A[i, t]`` over the queries ``i``  the mean over later tokens, too
                                        that see ``t``: **looks ahead**
    ==================================  ==========================================  ==============================

    Args:
        name: Which one.
        query: After the rotary positions.
        key: Likewise; heads share keys in equal groups. There may be more of them, earlier ones from a cache: the
            queries are the last positions. ``received`` wants as many.
        first_key: Position in its row of the first token of each token's document. Padding is a document of its own, so
            it enters no text token's value.
        max_scores: Most scores at a time; at least those of one query position are made.

    Returns:
        Values in [0, 1].
    """
    blocks = _attention_blocks(query, key, first_key, max_scores)
    if name == "received":
        return _received(blocks, first_key)
    return torch.cat([_OF_ROWS[name](block) for block in blocks], dim=1)


def check_attention_statistic(name: str) -> None:
    """Raise if there is no such statistic."""
    if name not in get_args(AttentionStatistic):
        raise ValueError(f"attention_statistic={name!r} must be one of {', '.join(get_args(AttentionStatistic))}")


class _Block(NamedTuple):
    """The rows of some queries of every sequence and head.

    Attributes:
        weights: ``A``, ``[batch, heads, queries, keys]``, 0 where a key is not seen; the keys up to the last query.
        visible: Which keys a query sees, ``[batch, queries, keys]``.
        key: Position of each key, ``[keys]``.
        query: Position of each query, ``[queries, 1]``.
        first_key: First key of each query's document, ``[batch, queries, 1]``.
    """

    weights: Tensor
    visible: Tensor
    key: Tensor
    query: Tensor
    first_key: Tensor


def _attention_blocks(query: Tensor, key: Tensor, first_key: Tensor, max_scores: int) -> Iterator[_Block]:
    """The attention weights, block by block, from the first query to the last."""
    batch, heads, sequence, size = query.shape
    cached = key.shape[2] - sequence
    queries = max(1, max_scores // (batch * heads * key.shape[2]))
    group = heads // key.shape[1]
    # The queries that share a key head are one matrix, so keys are not copied per query head.
    grouped = query.unflatten(1, (-1, group))
    keys, position = key.float().mT, torch.arange(cached + sequence, device=query.device)
    for first in range(0, sequence, queries):
        last = min(first + queries, sequence)
        part = grouped[:, :, :, first:last].float() / math.sqrt(size)
        seen = cached + last
        scores = (part.flatten(2, 3) @ keys[..., :seen]).unflatten(2, (group, -1)).flatten(1, 2)
        of_query, start = position[cached + first : seen, None], first_key[:, first:last, None]
        visible = (position[:seen] <= of_query) & (position[:seen] >= start)
        weights = scores.masked_fill_(~visible[:, None], -math.inf).softmax(dim=-1)
        yield _Block(weights, visible, position[:seen], of_query, start)


def _row_max(block: _Block) -> Tensor:
    return block.weights.amax(dim=-1).mean(dim=1)


def _corrected_row_max(block: _Block) -> Tensor:
    return _excess(block, block.key == block.first_key)


def _corrected_row_max_without_self(block: _Block) -> Tensor:
    return _excess(block, (block.key == block.first_key) | (block.key == block.query))


def _excess(block: _Block, excluded: Tensor) -> Tensor:
    """Largest weight that is not excluded: its distance from a uniform row, as a share of the largest one."""
    largest = block.weights.masked_fill(excluded[:, None], 0.0).amax(dim=-1).mean(dim=1)
    uniform = 1 / block.visible.sum(dim=-1)
    # Without a key left the largest is 0, the numerator negative and the value 0, also where the denominator is 0.
    return ((largest - uniform) / (1 - uniform).clamp(min=1e-6)).clamp(min=0)


def _entropy(block: _Block) -> Tensor:
    entropy = -torch.special.xlogy(block.weights, block.weights).sum(dim=-1).mean(dim=1)
    # One key has entropy 0, and any divisor gives 1.
    return (1 - entropy / block.visible.sum(dim=-1).clamp(min=2).log()).clamp(min=0)


def _received(blocks: Iterator[_Block], first_key: Tensor) -> Tensor:
    total = torch.zeros(first_key.shape, device=first_key.device)
    queries = torch.zeros_like(total)
    for block in blocks:
        seen = len(block.key)
        total[:, :seen] += block.weights.mean(dim=1).sum(dim=1)
        queries[:, :seen] += block.visible.sum(dim=1)
    return total / queries


_OF_ROWS: dict[str, Callable[[_Block], Tensor]] = {
    "row_max": _row_max,
    "corrected_row_max": _corrected_row_max,
    "corrected_row_max_without_self": _corrected_row_max_without_self,
    "entropy": _entropy,
}
