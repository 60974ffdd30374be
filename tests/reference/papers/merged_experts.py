"""SMEAR (arXiv:2306.03745) and Lory (arXiv:2405.03133): experts merged in parameter space, then one dense FFN."""

from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import swiglu
from torch import Tensor


class Merged(NamedTuple):
    """Outputs [B, L, d] and the mixtures that were applied: [B, E] (SMEAR) or [B, N, E] (Lory)."""

    y: Tensor
    mixture: Tensor
    own: Tensor  # as the router gave them: before dropout (SMEAR), before the shift by a segment (Lory)


def merge(theta: Tensor, mixture: Tensor) -> Tensor:
    """``sum_e mixture_e theta_e`` of any parameter theta [E, ...]."""
    out = torch.zeros_like(theta[0])
    for e in range(theta.shape[0]):
        out = out + mixture[e] * theta[e]
    return out


def layer_norm(v: Tensor, gain: Tensor | float, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    """LayerNorm of one vector, with the biased variance."""
    centred = v - v.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * gain + bias


def smear(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_gain: Tensor | float = 1.0,
    input_bias: Tensor | float = 0.0,
    router_gain: Tensor | float = 1e-2,
    router_bias: Tensor | float = 0.0,
    keep: Tensor | None = None,
    valid: Tensor | None = None,
    eps: float = 1e-5,
) -> Merged:
    """Section 3: per example ``p = softmax(LN(mean x) LN(W_r)^T + b_r)``, then the FFN of the merged parameters.

    Args:
        x: [B, L, d]. w_router: [E, d], each row through a LayerNorm of its own. b_router: [E].
        w_gate: [E, h, d]. w_up: [E, h, d]. w_down: [E, d, h].
        keep: [B, E] bool, the caller's draw of expert dropout: p is zeroed, then (p + 1e-10) renormalised.
        valid: [B, L] bool, tokens that count in the mean; all if None.
    """
    ys, mixtures, owns = [], [], []
    for b in range(x.shape[0]):
        rows = [x[b, s] for s in range(x.shape[1]) if valid is None or valid[b, s]]
        v = layer_norm(torch.stack(rows).mean(dim=0), input_gain, input_bias, eps)
        logits = [
            v @ layer_norm(w_router[e], router_gain, router_bias, eps) + b_router[e] for e in range(len(b_router))
        ]
        own = torch.softmax(torch.stack(logits), dim=0)
        p = own
        if keep is not None:
            p = own * keep[b] + 1e-10
            p = p / p.sum()
        ys.append(dense(x[b], p, w_gate, w_up, w_down))
        mixtures.append(p)
        owns.append(own)
    return Merged(torch.stack(ys), torch.stack(mixtures), torch.stack(owns))


def dense(x: Tensor, mixture: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """FFN [L, d] of the experts merged with ``mixture`` [E], for x [L, d]."""
    gate, up, down = merge(w_gate, mixture), merge(w_up, mixture), merge(w_down, mixture)
    return torch.stack([swiglu(x[s], gate, up, down) for s in range(x.shape[0])])


def lory(
    x: Tensor,
    w_router: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    segment_tokens: int,
    first: Literal["own_stop_gradient", "prior"] = "own_stop_gradient",
    prior_logits: Tensor | None = None,
) -> Merged:
    """Algorithm 1: segment n uses ``e_{n-1} = softmax(R(mean of segment n-1))``.

    Segment 0 uses its own e_0 without gradient, as published (its later tokens leak into its earlier ones), or a
    prior that sees no token, which is causal. The last segment may be shorter. A packed row is called per document.

    Args:
        x: [B, L, d]. w_router: R, [E, d]. segment_tokens: tokens of a segment.
        prior_logits: [E], for first="prior"; zeros give the uniform mixture.
    """
    ys, mixtures, owns = [], [], []
    for b in range(x.shape[0]):
        segments = [x[b, s : s + segment_tokens] for s in range(0, x.shape[1], segment_tokens)]
        own = [torch.softmax(w_router @ segment.mean(dim=0), dim=0) for segment in segments]
        if first == "prior":
            assert prior_logits is not None
            start = torch.softmax(prior_logits, dim=0)
        else:
            start = own[0].detach()
        used = [start, *own[:-1]]
        ys.append(torch.cat([dense(seg, e, w_gate, w_up, w_down) for seg, e in zip(segments, used, strict=True)]))
        mixtures.append(torch.stack(used))
        owns.append(torch.stack(own))
    return Merged(torch.stack(ys), torch.stack(mixtures), torch.stack(owns))


def lory_prompt_only(
    x: Tensor, prompt_tokens: int, w_router: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Merged:
    """Inference: x [B, L, d] through the one FFN that the mean of the first ``prompt_tokens`` positions chooses."""
    mixture = torch.stack([torch.softmax(w_router @ row[:prompt_tokens].mean(dim=0), dim=0) for row in x])
    y = torch.stack([dense(x[b], mixture[b], w_gate, w_up, w_down) for b in range(x.shape[0])])
    return Merged(y, mixture, mixture)
