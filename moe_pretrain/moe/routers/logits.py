"""Router logits: a float32 product that keeps no float32 copy of its input."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def router_logits(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "tokens experts"]:
    """``hidden @ weight.T`` in float32 for any input dtype.

    Autograd would keep ``hidden.float()``, a tenth of what the whole layer saves in bfloat16. Here the input is
    kept as it came, which costs nothing because the experts keep it too, and is cast again in backward.
    """
    return _RouterLogits.apply(hidden, weight)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return functional.linear(hidden.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = grads[0].mm(weight.float()).to(hidden.dtype)
        return grad_hidden, grads[0].t().mm(hidden.float()).to(weight.dtype)
