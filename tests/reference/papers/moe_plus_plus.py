"""MoE++ (arXiv:2410.07348): zero, copy and constant experts, and routing logits carried from layer to layer."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import swiglu
from torch import Tensor

Kind = Literal["ffn", "zero", "copy", "constant"]
Rule = Literal["drop_zero", "keep_zero", "softmax"]


class Layer(NamedTuple):
    """One layer's result; ``logits`` [T, N] is what the next layer's router gets."""

    y: Tensor  # [T, d]
    logits: Tensor  # [T, N] before the softmax, with the residual
    probs: Tensor  # [T, N] softmax over all N
    mask: Tensor  # [T, N] bool, the top-k, zero experts included
    weights: Tensor  # [T, N] after the zero expert's rule
    balance_loss: Tensor  # L_b, unweighted


def router_logits(x: Tensor, router: Sequence[Tensor], w_carry: Tensor | None, previous: Tensor | None) -> Tensor:
    """Equation 6: ``G_j = W_j x_j + W_g G_{j-1}``, without the second term in the first layer.

    Args:
        x: [T, d]. router: (W [N, d],), or the released code's two layers (W1 [8N, d], W2 [N, 8N]) with tanh between.
        w_carry: W_g [N, N]. previous: G_{j-1} [T, N], None in the first layer.
    """
    rows = []
    for t in range(x.shape[0]):
        g = router[0] @ x[t]
        if len(router) == 2:
            g = router[1] @ torch.tanh(g)
        if previous is not None:
            assert w_carry is not None
            g = g + w_carry @ previous[t]
        rows.append(g)
    return torch.stack(rows)


def gate_weights(
    logits: Tensor,
    kinds: Sequence[Kind],
    top_k: int = 2,
    rule: Rule = "drop_zero",
    logit_std: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, mask and weights [T, N] of the experts.

    ``drop_zero`` (default of the released code, "top-2 degrades to top-1"): softmax over all, top-k, the zero
    expert's weight to 0, renormalise; 0 for all where only zero experts were chosen. ``keep_zero`` (its mixtral
    path): softmax over the k logits. ``softmax`` (equation 1): the softmax over all, not renormalised.
    ``logit_std``: each token's logits are first scaled to this (unbiased) standard deviation; the carry is not.
    """
    all_probs, masks, all_weights = [], [], []
    for t in range(logits.shape[0]):
        g = logits[t] if logit_std is None else logits[t] * logit_std / logits[t].std()
        probs = torch.exp(g - g.max()) / torch.exp(g - g.max()).sum()
        chosen = sorted(range(len(kinds)), key=[-float(value) for value in g].__getitem__)[:top_k]
        kept = [e for e in chosen if not (rule == "drop_zero" and kinds[e] == "zero")]
        weights = [torch.zeros_like(probs[0]) for _ in kinds]
        for e in kept:
            weights[e] = probs[e] if rule == "softmax" else probs[e] / torch.stack([probs[i] for i in kept]).sum()
        all_probs.append(probs)
        masks.append([e in chosen for e in range(len(kinds))])
        all_weights.append(torch.stack(weights))
    return torch.stack(all_probs), torch.tensor(masks), torch.stack(all_weights)


def balance_loss(probs: Tensor, mask: Tensor, kinds: Sequence[Kind], tau: float) -> Tensor:
    """Equations 7 and 8: ``sum_i eta_i f_i P_i``, eta 1 for an FFN and tau for the rest, sum of f = k, no factor N."""
    total = torch.zeros_like(probs[0, 0])
    for e, kind in enumerate(kinds):
        fraction = mask[:, e].to(probs.dtype).mean()
        total = total + (1.0 if kind == "ffn" else tau) * fraction * probs[:, e].mean()
    return total


def expert_capacity(num_tokens: int, kinds: Sequence[Kind], tau: float, gamma: float = 1.1) -> list[float]:
    """Equation 8's tokens per expert: gamma tau T / (tau N_F + N_ZC) for an FFN, gamma T / (...) for the rest."""
    num_ffn = sum(kind == "ffn" for kind in kinds)
    scale = gamma * num_tokens / (tau * num_ffn + len(kinds) - num_ffn)
    return [scale * tau if kind == "ffn" else scale for kind in kinds]


def forward(
    x: Tensor,
    kinds: Sequence[Kind],
    router: Sequence[Tensor],
    w_carry: Tensor | None,
    previous: Tensor | None,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    w_constant: Tensor,
    constant: Tensor,
    tau: float,
    top_k: int = 2,
    rule: Rule = "drop_zero",
    logit_std: float | None = None,
    expert_input_scale: float = 1.0,
) -> Layer:
    """One layer.

    Args:
        x: [T, d]. kinds: N kinds in the order of the router's rows; the n-th "ffn" uses w_gate[n], and so on.
        w_gate: [N_F, h, d]. w_up: [N_F, h, d]. w_down: [N_F, d, h].
        w_constant: [N_C, 2, d], whose softmax mixes x and v. constant: v, [N_C, d].
        expert_input_scale: The released code multiplies the experts' input (not the router's) by top_k.
    """
    logits = router_logits(x, router, w_carry, previous)
    probs, mask, weights = gate_weights(logits, kinds, top_k, rule, logit_std)
    rows = []
    for t in range(x.shape[0]):
        inputs, y = expert_input_scale * x[t], torch.zeros_like(x[t])
        for e, kind in enumerate(kinds):
            n = kinds[:e].count(kind)
            if not mask[t, e] or kind == "zero":
                continue
            if kind == "ffn":
                out = swiglu(inputs, w_gate[n], w_up[n], w_down[n])
            elif kind == "copy":
                out = inputs
            else:
                alpha = torch.softmax(w_constant[n] @ inputs, dim=0)
                out = alpha[0] * inputs + alpha[1] * constant[n]
            y = y + weights[t, e] * out
        rows.append(y)
    return Layer(torch.stack(rows), logits, probs, mask, weights, balance_loss(probs, mask, kinds, tau))
