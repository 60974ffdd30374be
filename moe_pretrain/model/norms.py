"""RMSNorm, alone and of a sum. ``hidden`` is the model's width, ``rows`` tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.kernels import Kernels, liger_added_norm, liger_rms_norm


class Norm(nn.Module):
    """``x / sqrt(mean(x ** 2) + epsilon) * weight`` over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    kernels: Kernels = "torch"

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon

    def normed(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Normalise; the statistics are float32 inside."""
        if self.kernels == "liger":
            return liger_rms_norm(hidden, self.weight, self.epsilon)
        return functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.epsilon)


class RMSNorm(Norm):
    """The norm as a layer."""

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """See ``normed``."""
        return self.normed(hidden)


class ResidualNorm(Norm):
    """The norm of the residual stream after a sum, one node; on CUDA one kernel, and one for the gradients."""

    def forward(
        self, hidden: Float[Tensor, "... hidden"], delta: Float[Tensor, "... hidden"] | None
    ) -> tuple[Float[Tensor, "... hidden"], Float[Tensor, "... hidden"]]:
        """``hidden + delta``, which is ``hidden`` where there is nothing to add, and its norm."""
        if self.kernels == "liger" and delta is not None:
            return liger_added_norm(hidden, delta, self.weight, self.epsilon)
        if self.kernels == "liger":
            return hidden, self.normed(hidden)
        return _ResidualNorm.apply(hidden, delta, self.weight, self.epsilon)


class _ResidualNorm(torch.autograd.Function):
    """Statistics, products and the gradient of the stream are float32 inside, and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = hidden.flatten(0, -2)  # the same kernel for every batch
        added, normed, scale = _normed_sum(rows, None if delta is None else delta.reshape(rows.shape), weight, epsilon)
        ctx.save_for_backward(rows if added is None else added, scale, weight)
        ctx.adds = delta is not None
        return hidden if added is None else added.view(hidden.shape), normed.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, scale, weight = ctx.saved_tensors
        of_sum, of_normed = grads
        if of_normed is None:
            return of_sum, of_sum if ctx.adds else None, None, None
        of_rows = None if of_sum is None else of_sum.reshape(total.shape)
        gradients = _normed_sum_gradients if _is_one_kernel(total) else _normed_sum_gradients_in_place
        gradient, of_weight = gradients(of_normed.reshape(total.shape), of_rows, total, scale, weight)
        gradient = gradient.view(of_normed.shape)
        return gradient, gradient if ctx.adds else None, of_weight, None


def _is_one_kernel(rows: Tensor) -> bool:
    return rows.is_cuda


@one_kernel_on_cuda
def _normed_sum(
    hidden: Float[Tensor, "rows hidden"],
    delta: Float[Tensor, "rows hidden"] | None,
    weight: Float[Tensor, "hidden"],
    epsilon: float,
) -> tuple[Float[Tensor, "rows hidden"] | None, Float[Tensor, "rows hidden"], Float[Tensor, "rows 1"]]:
    """The sum if there is one, its norm, and the inverse root mean square of each row."""
    total = hidden if delta is None else hidden + delta
    wide = total.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add(epsilon).rsqrt()
    return None if delta is None else total, (wide * scale * weight).to(total.dtype), scale


@one_kernel_on_cuda
def _normed_sum_gradients(
    of_normed: Float[Tensor, "rows hidden"],
    of_sum: Float[Tensor, "rows hidden"] | None,
    total: Float[Tensor, "rows hidden"],
    scale: Float[Tensor, "rows 1"],
    weight: Float[Tensor, "hidden"],
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "hidden"]]:
    """Gradients of what was added up, with that of the sum itself among it, and of the weight.

    The weight's is a sum over rows, for which a kernel may read them once more.
    """
    direction, wide = total.float() * scale, of_normed.float()
    of_direction = wide * weight
    along = (of_direction * direction).mean(dim=-1, keepdim=True)
    gradient = scale * (of_direction - direction * along)
    if of_sum is not None:
        gradient = gradient + of_sum
    return gradient.to(total.dtype), (wide * direction).sum(dim=0).to(weight.dtype)


def _normed_sum_gradients_in_place(
    of_normed: Float[Tensor, "rows hidden"],
    of_sum: Float[Tensor, "rows hidden"] | None,
    total: Float[Tensor, "rows hidden"],
    scale: Float[Tensor, "rows 1"],
    weight: Float[Tensor, "hidden"],
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "hidden"]]:
    """The same in few passes on a CPU, to the bit what autograd makes of ``rms_norm``: its terms in its order."""
    wide, of_wide = total.float(), of_normed.float()
    term = wide * scale
    of_weight = term.mul_(of_wide).sum(dim=0)
    gradient = of_wide * weight
    of_scale = torch.mul(gradient, wide, out=term).sum(dim=-1, keepdim=True)
    of_mean_square = -0.5 * of_scale * scale.pow(3) / wide.shape[-1]
    torch.mul(wide, 2 * of_mean_square, out=term)
    gradient.mul_(scale)
    if of_sum is not None and total.dtype == torch.float32:
        return gradient.add_(of_sum).add_(term), of_weight
    gradient = gradient.add_(term).to(total.dtype)
    return gradient if of_sum is None else gradient + of_sum, of_weight.to(weight.dtype)
