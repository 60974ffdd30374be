"""Experts merged after training: UNCURL (arXiv:2409.01483) and CKA grouping (arXiv:2407.09590).

A bank of experts is (w_gate [E, h, d], w_up [E, h, d], w_down [E, d, h]); routers are [E, d]; groups are lists of
indices in rising order. Ties go to the lower index.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from reference.papers.pruning import Bank, keep_highest
from reference.papers.swiglu import swiglu
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# UNCURL (arXiv:2409.01483)


def logit_similarity(logits: Tensor) -> Tensor:
    """Pearson correlation [E, E] of the columns of logits [T, E]."""
    centred = [logits[:, e] - logits[:, e].mean() for e in range(logits.shape[1])]
    return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in centred]) for a in centred])


def spectral_groups(similarity: Tensor, groups: int) -> list[list[int]]:
    """Normalised spectral clustering of the affinity max(similarity, 0), k-means from farthest-first centres.

    The paper fixes neither affinity nor k-means; compare only where the groups are plain.
    """
    affinity = np.clip(similarity.detach().numpy(), 0, None)
    np.fill_diagonal(affinity, 1)
    scale = 1 / np.sqrt(affinity.sum(axis=1))
    _, vectors = np.linalg.eigh(scale[:, None] * affinity * scale[None, :])
    points = vectors[:, -groups:]
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    centres = points[:1]
    while len(centres) < groups:
        distance = np.min(((points[:, None] - centres[None]) ** 2).sum(axis=2), axis=1)
        centres = np.concatenate([centres, points[[int(distance.argmax())]]])
    labels = np.zeros(len(points), dtype=int)
    for _ in range(100):
        labels = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        centres = np.stack([points[labels == g].mean(axis=0) if (labels == g).any() else centres[g]
                            for g in range(groups)])  # fmt: skip
    return sorted([int(e) for e in np.flatnonzero(labels == g)] for g in range(groups))


def align(bank: Bank, anchor: int, other: int) -> list[int]:
    """Order of ``other``'s hidden units that lies nearest to ``anchor``'s (squared distance, all three matrices)."""
    w_gate, w_up, w_down = (theta.detach() for theta in bank)
    units = [torch.cat([w_gate[e], w_up[e], w_down[e].T], dim=1) for e in (anchor, other)]
    cost = ((units[0][:, None] - units[1][None]) ** 2).sum(dim=2)
    return [int(i) for i in linear_sum_assignment(cost.numpy())[1]]


def merge_groups(
    bank: Bank,
    w_router: Tensor,
    groups: Sequence[Sequence[int]],
    counts: Tensor | None = None,
    aligned: bool = False,
    router_row: Literal["mean", "anchor"] = "mean",
) -> tuple[Bank, Tensor, Tensor]:
    """Merge each group: ``theta_g = sum_e omega_e pi_e(theta_e)``.

    UNCURL: counts given, ``aligned``, omega by counts, the anchor is the most used. CKA grouping: neither, a mean.

    Args:
        counts: [E] routed tokens; None, or 0 throughout a group, gives equal omega.

    Returns:
        The bank of the groups, their router rows [G, d], and log |g| [G], the logit that restores a group's
        selection probability to the sum of its members' when their rows were equal.
    """
    merged: list[list[Tensor]] = [[], [], []]
    rows = []
    for group in groups:
        usage = torch.ones(len(group), dtype=w_router.dtype) if counts is None else counts[list(group)].to(w_router)
        omega = usage / usage.sum() if usage.sum() > 0 else torch.full_like(usage, 1 / len(group))
        anchor = group[keep_highest(usage, 1)[0]]
        sums = [torch.zeros_like(theta[0]) for theta in bank]
        row = torch.zeros_like(w_router[0])
        for e, share in zip(group, omega, strict=True):
            order = align(bank, anchor, e) if aligned else list(range(bank[0].shape[1]))
            sums[0] = sums[0] + share * bank[0][e][order]
            sums[1] = sums[1] + share * bank[1][e][order]
            sums[2] = sums[2] + share * bank[2][e][:, order]
            row = row + share * w_router[e]
        for parts, theta in zip(merged, sums, strict=True):
            parts.append(theta)
        rows.append(w_router[anchor] if router_row == "anchor" else row)
    gate, up, down = (torch.stack(parts) for parts in merged)
    sizes = torch.tensor([float(len(group)) for group in groups], dtype=w_router.dtype)
    return (gate, up, down), torch.stack(rows), sizes.log()


# Diversifying expert knowledge (arXiv:2407.09590)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centred outputs [T, d] on the same tokens."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def cka_matrix(x: Tensor, bank: Bank) -> Tensor:
    """CKA [E, E] of all experts' outputs on all of x [T, d]."""
    num_experts = bank[0].shape[0]
    outputs = [torch.stack([swiglu(r, bank[0][e], bank[1][e], bank[2][e]) for r in x]) for e in range(num_experts)]
    return torch.stack([torch.stack([linear_cka(a, b) for b in outputs]) for a in outputs])


def agglomerate(
    similarity: Tensor, groups: int, linkage: Literal["average", "complete"] = "average"
) -> list[list[int]]:
    """Join the two most similar groups until ``groups`` are left; between groups the mean or the least similarity.

    The paper's text in hand says "graph grouping, most similar together"; this is the plain reading of it.
    """
    parts = [[e] for e in range(similarity.shape[0])]
    while len(parts) > groups:
        best, pair = -float("inf"), (0, 1)
        for a in range(len(parts)):
            for b in range(a + 1, len(parts)):
                links = [float(similarity[i, j]) for i in parts[a] for j in parts[b]]
                value = min(links) if linkage == "complete" else sum(links) / len(links)
                if value > best:
                    best, pair = value, (a, b)
        parts[pair[0]] = sorted(parts[pair[0]] + parts.pop(pair[1]))
    return sorted(parts)
