"""THOR (arXiv:2110.04260): experts drawn at random, two passes held together by a consistency loss."""

from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import weighted_sum
from torch import Tensor


class TwoPassLoss(NamedTuple):
    """Scalars in nats; ``total = ce_first + ce_second + alpha * consistency``."""

    ce_first: Tensor
    ce_second: Tensor
    consistency: Tensor
    total: Tensor


def forward(x: Tensor, expert_index: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Each token through the one expert drawn for it, with weight 1.

    Args:
        x: [T, d]. expert_index: [T] int, the caller's draws (one value throughout for a draw per layer or sentence).
        w_gate: [E, h, d]. w_up: [E, h, d]. w_down: [E, d, h].

    Returns:
        Output [T, d] and mask [T, E] bool.
    """
    num_experts = w_gate.shape[0]
    mask = torch.tensor([[int(expert_index[t]) == e for e in range(num_experts)] for t in range(x.shape[0])])
    return weighted_sum(x, mask, mask.to(x.dtype), w_gate, w_up, w_down), mask


def two_pass_loss(
    logits_first: Tensor,
    logits_second: Tensor,
    targets: Tensor,
    alpha: float,
    valid: Tensor | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> TwoPassLoss:
    """Equation 5: ``CE(p1) + CE(p2) + alpha * sum_t 1/2 sum_v (p1 - p2)(log p1 - log p2)``.

    Args:
        logits_first: [T, V]. logits_second: [T, V]. targets: [T] int. alpha: Weight of the symmetric KL.
        valid: [T] bool, tokens that count; all if None.
        reduction: Over the valid tokens, the same for all three terms; the released code sums.
    """
    zero = torch.zeros_like(logits_first[0, 0])
    ce_first, ce_second, consistency, count = zero, zero, zero, 0
    for t in range(targets.shape[0]):
        if valid is not None and not valid[t]:
            continue
        log_first = logits_first[t] - torch.logsumexp(logits_first[t], dim=0)
        log_second = logits_second[t] - torch.logsumexp(logits_second[t], dim=0)
        ce_first = ce_first - log_first[targets[t]]
        ce_second = ce_second - log_second[targets[t]]
        for v in range(logits_first.shape[1]):
            difference = torch.exp(log_first[v]) - torch.exp(log_second[v])
            consistency = consistency + 0.5 * difference * (log_first[v] - log_second[v])
        count += 1
    if reduction == "mean":
        ce_first, ce_second, consistency = ce_first / count, ce_second / count, consistency / count
    return TwoPassLoss(ce_first, ce_second, consistency, ce_first + ce_second + alpha * consistency)
