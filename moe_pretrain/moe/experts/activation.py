"""The gated activation inside an expert, and its gradient made from the pre-activations alone."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda


@dataclass(frozen=True)
class Activation:
    """``(u + offset) * g * sigmoid(alpha * g)`` with ``g`` cut off above ``limit`` and ``u`` on both sides.

    Without arguments it is SwiGLU. With alpha 1.702, offset 1 and limit 7 it is that of gpt-oss (arXiv:2508.10925,
    sec. 2.2, and its code); SwiGLU with limit 10 is that of DeepSeek-V4. What is cut off has no gradient.
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float = math.inf


SWIGLU = Activation()


@one_kernel_on_cuda
def _swiglu(before: Float[Tensor, "rows width2"]) -> Float[Tensor, "rows width"]:
    gate, up = before.unflatten(1, (2, -1)).unbind(1)
    return functional.silu(gate).mul_(up)


@one_kernel_on_cuda
def _swiglu_gradients(
    before: Float[Tensor, "rows width2"],
    grad_act: Float[Tensor, "rows width"],
    factor: Float[Tensor, "rows 1"] | None = None,
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width2"], Float[Tensor, "rows"]]:
    gate, up = before.unflatten(1, (2, -1)).unbind(1)
    silu = functional.silu(gate)
    act = silu * up
    product = (grad_act * act).sum(dim=1, dtype=torch.float32)
    grad_gate = torch.ops.aten.silu_backward(grad_act * up, gate)
    grad_before = torch.cat([grad_gate, silu.mul_(grad_act)], dim=1)
    if factor is not None:
        act = (act * factor).to(act.dtype)
        grad_before = (grad_before * factor).to(grad_before.dtype)
    return act, grad_before, product


def _swiglu_gradients_in_place(
    before: Float[Tensor, "rows width2"], grad_act: Float[Tensor, "rows width"]
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width2"], Float[Tensor, "rows"]]:
    """The same on a CPU, to the bit, where new memory and joining take as long as the arithmetic."""
    gate, up = before.unflatten(1, (2, -1)).unbind(1)
    grad_before = torch.empty_like(before)
    grad_gate, grad_up = grad_before.unflatten(1, (2, -1)).unbind(1)
    silu = torch.ops.aten.silu.out(gate, out=grad_up)
    act = silu * up
    products = grad_act * act
    product = products.sum(dim=1, dtype=torch.float32)
    silu.mul_(grad_act)
    torch.ops.aten.silu_backward.grad_input(torch.mul(grad_act, up, out=products), gate, grad_input=grad_gate)
    return act, grad_before, product


@functools.cache
def _bounded(activation: Activation) -> tuple[Callable[[Tensor], Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """The function and its gradients for one choice of numbers, which are constants to a compiler."""
    alpha, offset, limit = activation.alpha, activation.offset, activation.limit

    def activate(before: Tensor) -> Tensor:
        gate, up = before.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + offset) * (gate * torch.sigmoid(alpha * gate))

    def gradients(before: Tensor, grad_act: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        raw_gate, raw_up = before.chunk(2, dim=-1)
        gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit) + offset
        opened = torch.sigmoid(alpha * gate)
        glu = gate * opened
        act = up * glu
        slope = opened * (1 + alpha * gate * (1 - opened))
        grad_gate = grad_act * up * slope * (raw_gate <= limit)
        grad_up = grad_act * glu * (raw_up.abs() <= limit)
        product = (grad_act * act).sum(dim=-1, dtype=torch.float32)
        grad_before = torch.cat([grad_gate, grad_up], dim=-1)
        if factor is not None:
            act = (act * factor).to(act.dtype)
            grad_before = (grad_before * factor).to(grad_before.dtype)
        return act, grad_before, product

    return one_kernel_on_cuda(activate), one_kernel_on_cuda(gradients)


def activate(before: Float[Tensor, "rows width2"], activation: Activation) -> Float[Tensor, "rows width"]:
    """``activation`` of ``before = [gate, up]``."""
    return _swiglu(before) if activation == SWIGLU else _bounded(activation)[0](before)


def activation_gradients(
    before: Float[Tensor, "rows width2"],
    grad_act: Float[Tensor, "rows width"],
    activation: Activation,
    factor: Float[Tensor, "rows 1"] | None = None,
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width2"], Float[Tensor, "rows"]]:
    """The activation again, the gradient of ``before``, and ``<grad_act, activation>`` per row in float32.

    The first two come times ``factor``, float32, where there is one.
    """
    if activation != SWIGLU:
        return _bounded(activation)[1](before, grad_act, factor)
    if before.is_cuda or factor is not None:
        return _swiglu_gradients(before, grad_act, factor)
    return _swiglu_gradients_in_place(before, grad_act)


def gated(before: Float[Tensor, "... width2"], activation: Activation) -> Float[Tensor, "... width"]:
    """``activate`` as a differentiable operation on the last axis; one that is not SwiGLU keeps ``before`` alone."""
    if activation == SWIGLU:
        gate, up = before.chunk(2, dim=-1)
        return functional.silu(gate) * up
    return _Gated.apply(before, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(before)
        ctx.activation = activation
        return _bounded(activation)[0](before)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (before,) = ctx.saved_tensors
        return _bounded(ctx.activation)[1](before, grads[0])[1], None


def activation_size(spread: float, activation: Activation = SWIGLU) -> float:
    """Root mean square of ``activation`` for independent normal gates and ups of standard deviation ``spread``."""
    alpha, offset, limit = activation.alpha, activation.offset, activation.limit
    points = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    density = torch.exp(-points.square() / 2)

    def mean_square(values: Tensor) -> float:
        return float((values.square() * density).sum() / density.sum())

    gate = (spread * points).clamp(max=limit)
    of_gate = functional.silu(gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)
    up = math.hypot(spread, offset)
    if math.isfinite(limit):
        up = math.sqrt(mean_square((spread * points).clamp(-limit, limit) + offset))
    return up * math.sqrt(mean_square(of_gate))
