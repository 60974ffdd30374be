"""Methods that say which experts of a layer stay, or which become one. Pure functions; ties go to the lower index."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MERGING = ("uncurl", "grouping")
METHODS = ("uncurl", "seer", "router_norm", "grouping", "reap", "frequency", "random")


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that become one.

    Attributes:
        members: Their indices, rising.
        shares: Weight of each in the sum; they add up to 1.
        is_aligned: Whether hidden units are matched to those of the expert with the largest share first.
    """

    members: list[int]
    shares: list[float]
    is_aligned: bool = False


def keep_highest(scores: Float[Tensor, "experts"], keep: int) -> list[ExpertGroup]:
    """The ``keep`` experts of the highest scores, each by itself, in rising order."""
    order = scores.sort(descending=True, stable=True).indices[:keep].sort().values
    return [ExpertGroup([index], [1.0]) for index in order.tolist()]


def merged(
    groups: Sequence[list[int]], frequency: Float[Tensor, "experts"] | None, is_aligned: bool
) -> list[ExpertGroup]:
    """Groups with shares by ``frequency``; equal ones without, or where no token went to the group."""
    found = []
    for members in groups:
        usage = torch.ones(len(members)) if frequency is None else frequency[members]
        total = float(usage.sum())
        shares = (usage / total).tolist() if total > 0 else [1 / len(members)] * len(members)
        found.append(ExpertGroup(list(members), shares, is_aligned))
    return found


def router_norm_change(
    before: Float[Tensor, "experts hidden"], after: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "experts"]:
    """Signed change of the norm of each expert's row of the router; the largest stay.

    Source:
        Chowdhury et al. 2024 (arXiv:2405.16646).
    """
    return after.double().norm(dim=1) - before.double().norm(dim=1)


def spectral_groups(similarity: Float[Tensor, "experts experts"], groups: int) -> list[list[int]]:
    """Normalised spectral clustering of ``max(similarity, 0)``, with K-means from farthest-first centres.

    Args:
        similarity: Symmetric, 1 on the diagonal.
        groups: Clusters, in [1, experts]; none is empty.

    Source:
        UNCURL (arXiv:2409.01483) clusters experts by the correlation of their logits; the affinity and the start of
        K-means are ours, without a random number.
    """
    affinity = np.clip(similarity.numpy(), 0.0, None)
    np.fill_diagonal(affinity, 1.0)
    scale = 1 / np.sqrt(affinity.sum(axis=1))
    _, vectors = np.linalg.eigh(scale[:, None] * affinity * scale[None, :])
    points = vectors[:, -groups:]
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = points[:1]
    while len(centres) < groups:
        distance = _squares(points, centres).min(axis=1)
        centres = np.concatenate([centres, points[[int(distance.argmax())]]])
    labels = np.zeros(len(points), dtype=np.int64)
    for _ in range(100):
        labels = _squares(points, centres).argmin(axis=1)
        labels = _without_empty(labels, groups)
        centres = np.stack([points[labels == group].mean(axis=0) for group in range(groups)])
    return sorted(np.flatnonzero(labels == group).tolist() for group in range(groups))


def _squares(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres[None]) ** 2).sum(axis=2)


def _without_empty(labels: np.ndarray, groups: int) -> np.ndarray:
    """Labels in which an empty cluster has taken the last member of the largest one."""
    labels = labels.copy()
    for group in range(groups):
        if not (labels == group).any():
            largest = np.bincount(labels, minlength=groups).argmax()
            labels[np.flatnonzero(labels == largest)[-1]] = group
    return labels


def agglomerate(similarity: Float[Tensor, "experts experts"], groups: int) -> list[list[int]]:
    """Join the two groups of the largest mean similarity until ``groups`` are left.

    Source:
        Zhang et al. 2024 (arXiv:2407.09590): experts of similar outputs are grouped; the linkage is ours.
    """
    parts = [[index] for index in range(len(similarity))]
    while len(parts) > groups:
        pairs = [(a, b) for a in range(len(parts)) for b in range(a + 1, len(parts))]
        links = [float(similarity[parts[a]][:, parts[b]].mean()) for a, b in pairs]
        first, second = pairs[max(range(len(pairs)), key=links.__getitem__)]
        parts[first] = sorted(parts[first] + parts.pop(second))
    return sorted(parts)


def align_units(anchor: Float[Tensor, "width numbers"], other: Float[Tensor, "width numbers"]) -> Int[Tensor, "width"]:
    """Order of ``other``'s hidden units that lies nearest to ``anchor``'s, by the sum of squared distances.

    Args:
        anchor: All weights of each unit in a row: of the gate, of the values, and of the way back.
        other: Likewise.
    """
    # Squared norms are the same for every assignment: only products decide.
    return torch.from_numpy(linear_sum_assignment((-anchor @ other.T).numpy())[1])
