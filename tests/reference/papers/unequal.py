"""Experts of unequal width: HMoE (arXiv:2408.10681) and MoCE-IR's complexity experts (arXiv:2411.18466)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import swiglu
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor]  # w_gate [h_e, d], w_up [h_e, d], w_down [d, h_e]


class Routing(NamedTuple):
    """All [T, E]: softmax over all experts, chosen pairs (bool), mixture weights."""

    probs: Tensor
    mask: Tensor
    weights: Tensor


def route(logits: Tensor, top_k: int | None = None, top_p: float | None = None, strict: bool = False) -> Routing:
    """HMoE, section 3: top-k or top-p of the softmax, renormalised over the chosen experts.

    Args:
        logits: [T, E]. top_k: Number of experts per token.
        top_p: The fewest experts, best first, whose probabilities sum to at least this.
        strict: To more than this.
    """
    probs, masks, weights = [], [], []
    for t in range(logits.shape[0]):
        p = torch.softmax(logits[t], dim=0)
        ranked = sorted(range(len(p)), key=[-float(value) for value in p].__getitem__)
        chosen: list[int] = []
        for e in ranked:
            total = sum(float(p[i]) for i in chosen)
            if top_p is not None and (total > top_p if strict else total >= top_p):
                break
            if top_k is not None and len(chosen) == top_k:
                break
            chosen.append(e)
        mass = torch.stack([p[e] for e in chosen]).sum()
        probs.append(p)
        masks.append([e in chosen for e in range(len(p))])
        weights.append(torch.stack([p[e] / mass if e in chosen else p[e] * 0 for e in range(len(p))]))
    return Routing(torch.stack(probs), torch.tensor(masks), torch.stack(weights))


def mixture(x: Tensor, mask: Tensor, weights: Tensor, experts: Sequence[Expert]) -> Tensor:
    """``y_t = sum_e weights_te expert_e(x_t)`` for x [T, d] and experts of any widths; returns [T, d]."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e, expert in enumerate(experts):
            if mask[t, e]:
                y = y + weights[t, e] * swiglu(x[t], *expert)
        rows.append(y)
    return torch.stack(rows)


def p_penalty(probs: Tensor, mask: Tensor, widths: Sequence[int], normalise: bool = False) -> Tensor:
    """HMoE equation 4: ``N sum_i M_i P_i``, ``M_i = mean_t 1[i chosen] h_i``, P_i the mean probability.

    ``normalise`` divides h by its mean, so that equal widths give N sum f P with sum of f = k. M has no gradient.
    """
    mean_width = sum(widths) / len(widths) if normalise else 1.0
    total = torch.zeros_like(probs[0, 0])
    for e, width in enumerate(widths):
        total = total + mask[:, e].to(probs.dtype).mean() * (width / mean_width) * probs[:, e].mean()
    return len(widths) * total


def router_entropy_loss(probs: Tensor, printed: bool = True) -> Tensor:
    """HMoE equation 5: ``N sum_i P_i log P_i`` of each token, mean over tokens.

    As printed, a minimum is an even router. The stated intent (arXiv:2403.07652) is the opposite sign.
    """
    tokens, num_experts = probs.shape
    total = torch.zeros_like(probs[0, 0])
    for t in range(tokens):
        for e in range(num_experts):
            total = total + torch.xlogy(probs[t, e], probs[t, e])
    return (1 if printed else -1) * num_experts * total / tokens


def mean_active_parameters(mask: Tensor, experts: Sequence[Expert]) -> float:
    """Expert parameters that a token runs, mean over tokens."""
    sizes = [sum(matrix.numel() for matrix in expert) for expert in experts]
    return sum(float(mask[:, e].sum()) * size for e, size in enumerate(sizes)) / mask.shape[0]


class ComplexityRouting(NamedTuple):
    """MoCE-IR: gates [T, E] (softmax of the noisy logits at the chosen experts, not renormalised) and its loss."""

    mask: Tensor
    gates: Tensor
    importance: Tensor  # [E] sum_t softmax(z), without the bias
    load: Tensor  # [E] mean_t P(e stays chosen under new noise)
    aux_loss: Tensor  # 1/2 CV^2(b importance) + 1/2 CV^2(load)


def squared_cv(values: Tensor) -> Tensor:
    """Squared coefficient of variation with the unbiased variance."""
    mean = values.sum() / len(values)
    return ((values - mean) ** 2).sum() / (len(values) - 1) / mean**2


def complexity_route(
    logits: Tensor,
    noise: Tensor,
    parameters: Sequence[int] | None = None,
    scaling: Literal["max", "min"] = "max",
    top_k: int = 1,
) -> ComplexityRouting:
    """MoCE-IR, section 3.2 and released code.

    ``P_te = 1 - Phi((thr_t - z_te) E)`` with thr_t the k-th largest noisy logit and z without noise.

    Args:
        logits: z [T, E]. noise: [T, E] standard normal draws, divided here by E.
        parameters: Per expert, for the bias b of the importance; no bias if None (the code's default).
        scaling: b is parameters over their maximum or their minimum. CV does not see the difference.
    """
    tokens, num_experts = logits.shape
    reference = 1 if parameters is None else (max(parameters) if scaling == "max" else min(parameters))
    bias = [1.0] * num_experts if parameters is None else [p / reference for p in parameters]
    masks, gates = [], []
    importance = torch.zeros_like(logits[0])
    load = torch.zeros_like(logits[0])
    for t in range(tokens):
        noisy = logits[t] + noise[t] / num_experts
        ranked = sorted(range(num_experts), key=[-float(value) for value in noisy].__getitem__)
        threshold = noisy[ranked[top_k - 1]]
        mask = torch.tensor([e in ranked[:top_k] for e in range(num_experts)])
        masks.append(mask)
        gates.append(torch.softmax(noisy, dim=0) * mask)
        importance = importance + torch.softmax(logits[t], dim=0)
        load = load + 0.5 * torch.erfc((threshold - logits[t]) * num_experts / math.sqrt(2))
    load = load / tokens
    biased = importance * torch.tensor(bias, dtype=logits.dtype)
    aux_loss = 0.5 * squared_cv(biased) + 0.5 * squared_cv(load)
    return ComplexityRouting(torch.stack(masks), torch.stack(gates), importance, load, aux_loss)
