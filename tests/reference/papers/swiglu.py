"""The expert that all the references share: a SwiGLU feed-forward network for one token."""

import torch
from torch import Tensor


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """``w_down @ (silu(w_gate @ x) * (w_up @ x))`` for x [d], w_gate and w_up [h, d], w_down [d, h]; returns [d]."""
    gate = w_gate @ x
    return w_down @ (gate * torch.sigmoid(gate) * (w_up @ x))


def weighted_sum(x: Tensor, mask: Tensor, weights: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """``y_t = sum_e weights_te * expert_e(x_t)`` over the assigned pairs.

    Args:
        x: [T, d]. mask: [T, E] bool, the assigned pairs. weights: [T, E].
        w_gate: [E, h, d]. w_up: [E, h, d]. w_down: [E, d, h].

    Returns:
        [T, d]; a token without an expert gives exactly 0.
    """
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e in range(mask.shape[1]):
            if mask[t, e]:
                y = y + weights[t, e] * swiglu(x[t], w_gate[e], w_up[e], w_down[e])
        rows.append(y)
    return torch.stack(rows)
