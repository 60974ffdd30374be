"""Experts removed after training: SEER-MoE, router-norm change, REAP.

A bank of experts is (w_gate [E, h, d], w_up [E, h, d], w_down [E, d, h]); routers are [E, d]; kept experts are a list
of indices in rising order. Ties go to the lower index.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import swiglu
from torch import Tensor

Bank = tuple[Tensor, Tensor, Tensor]


def keep_highest(scores: Tensor, keep: int) -> list[int]:
    """The ``keep`` experts of the highest scores [E]."""
    return sorted(sorted(range(len(scores)), key=[-float(s) for s in scores].__getitem__)[:keep])


# SEER-MoE (arXiv:2404.05089)


def heavy_hitters(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Times each expert is among the top-k of logits [T, E] (sums to k T), and its summed softmax (sums to T)."""
    actual, soft = torch.zeros_like(logits[0]), torch.zeros_like(logits[0])
    for row in logits:
        actual[keep_highest(row, top_k)] += 1
        soft = soft + torch.softmax(row, dim=0)
    return actual, soft


def prune_globally(counts: Tensor, remove: int, keep_at_least: int) -> list[list[int]]:
    """Kept experts per layer after dropping the ``remove`` lowest of counts [layers, E], no layer below the floor."""
    kept = [list(range(counts.shape[1])) for _ in counts]
    pairs = [(layer, e) for layer in range(counts.shape[0]) for e in range(counts.shape[1])]
    for layer, e in sorted(pairs, key=lambda pair: float(counts[pair])):
        if remove > 0 and len(kept[layer]) > keep_at_least:
            kept[layer].remove(e)
            remove -= 1
    return kept


def router_entropy(logits: Tensor, kept: Sequence[int]) -> Tensor:
    """``mean_t -sum_e s log s`` in nats, s the softmax over the kept experts only; logits [T, E]."""
    total = torch.zeros_like(logits[0, 0])
    for row in logits:
        s = torch.softmax(row[list(kept)], dim=0)
        total = total - torch.xlogy(s, s).sum()
    return total / logits.shape[0]


# Router-norm change (arXiv:2405.16646)


def router_norm_change(pretrained: Tensor, finetuned: Tensor) -> Tensor:
    """Signed ``||w_e^ft|| - ||w_e^pre||`` [E] of router rows [E, d]; the largest are kept."""
    return torch.stack([f.norm() - p.norm() for p, f in zip(pretrained, finetuned, strict=True)])


def pruned_mixture(
    x: Tensor, logits: Tensor, top_k: int, kept: Sequence[int], bank: Bank, mode: Literal["zero", "renormalise"]
) -> Tensor:
    """Layer [T, d] with softmax weights renormalised over the top-k.

    "zero" (published): tokens still route to the pruned experts, which give 0. "renormalise": those are gone.
    """
    rows = []
    for t in range(x.shape[0]):
        candidates = list(kept) if mode == "renormalise" else list(range(logits.shape[1]))
        chosen = [candidates[i] for i in keep_highest(logits[t, candidates], top_k)]
        weights = torch.softmax(logits[t, chosen], dim=0)
        y = torch.zeros_like(x[t])
        for e, weight in zip(chosen, weights, strict=True):
            if e in kept:
                y = y + weight * swiglu(x[t], bank[0][e], bank[1][e], bank[2][e])
        rows.append(y)
    return torch.stack(rows)


# REAP (arXiv:2510.13999)


class ExpertStatistics(NamedTuple):
    """All [E]; 0 for an expert without a token."""

    frequency: Tensor  # routed tokens
    reap: Tensor  # mean over them of g ||E(x)||, g renormalised over the top-k
    mean_norm: Tensor  # mean over them of ||E(x)||
    norm_sum: Tensor  # sum over them of ||E(x)||


def expert_statistics(x: Tensor, logits: Tensor, top_k: int, bank: Bank) -> ExpertStatistics:
    """One calibration pass over x [T, d] with router logits [T, E]."""
    frequency, weighted, norms = (torch.zeros_like(logits[0]) for _ in range(3))
    for t in range(x.shape[0]):
        chosen = keep_highest(logits[t], top_k)
        for e, g in zip(chosen, torch.softmax(logits[t, chosen], dim=0), strict=True):
            norm = swiglu(x[t], bank[0][e], bank[1][e], bank[2][e]).norm()
            frequency[e] += 1
            weighted[e] += g * norm
            norms[e] += norm
    tokens = frequency.clamp(min=1)
    return ExpertStatistics(frequency, weighted / tokens, norms / tokens, norms)
