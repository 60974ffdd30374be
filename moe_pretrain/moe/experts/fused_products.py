"""SwiGLU experts whose activation runs inside the grouped products: kernels of quack-kernels (extra ``quack``).

What torch's path does between the products, its kernels do in a product's epilogue while results are still in
registers, and rows are gathered as a product reads them. Gate and up are kept interleaved, as the epilogue pairs
neighbouring columns; weights and their gradients keep the layout of ``SwiGLUExperts``, which the kernels read and
write as it is (``concat_layout``).

Kernels are taken as configured, not tuned by timing: a tuner may choose another one for another number of rows or on
another rank, and bits would then depend on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.row_layout import ExpertRowLayout, order_by, sum_rows

_TOLERANCE = 0.03
"""Largest distance from torch's result as a share of its length: ``verify``'s in bfloat16; a wrong layout is 1 away."""


def run_fused_swiglu_experts(
    sources: Float[Tensor, "sources hidden"],
    weight: Float[Tensor, "rows"],
    in_weight: Float[Tensor, "local_experts width2 hidden"],
    out_weight: Float[Tensor, "local_experts hidden width"],
    order: ExpertRowLayout,
) -> Float[Tensor, "sources hidden"]:
    """As ``swiglu.run_swiglu_experts`` in bfloat16 on a Hopper or Blackwell GPU; at least one row."""
    return _FusedExpertsFunction.apply(sources, weight, in_weight, out_weight, order)


class _FusedExpertsFunction(torch.autograd.Function):
    """The six grouped products of a step, and the sums over routes; it saves what torch's path saves.

    Rows past the last expert's end are padding: kernels leave them unwritten, and nobody reads them.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Tensor, weight: Tensor, in_weight: Tensor, out_weight: Tensor, order: ExpertRowLayout
    ) -> Tensor:
        from quack.gemm_interface import gemm, gemm_gated

        ends = functional.pad(order.rows_per_expert.cumsum(0), (1, 0)).to(torch.int32)
        source_of_row = order.source_of_row.to(torch.int32)
        before, act = gemm_gated(
            sources,
            in_weight.mT,
            activation="swiglu",
            cu_seqlens_m=ends,
            A_idx=source_of_row,
            concat_layout=("B",),
            tuned=False,
        )
        outputs = gemm(act, out_weight.mT, cu_seqlens_m=ends, tuned=False)
        ctx.save_for_backward(sources, weight, in_weight, out_weight, before, ends, source_of_row)
        ctx.order = order
        return sum_rows(outputs, order, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from quack.gemm_interface import gemm, gemm_dgated

        sources, weight, in_weight, out_weight, before, ends, source_of_row = ctx.saved_tensors
        grad = grads[0].contiguous()
        # The route's weight is a factor of both results, and not of the gradient of itself.
        grad_before, scaled_act, grad_weight = gemm_dgated(
            grad,
            out_weight,
            before,
            activation="swiglu",
            colvec_scale=weight,
            colvec_reduce=True,
            cu_seqlens_m=ends,
            A_idx=source_of_row,
            dynamic_scheduler=False,
            tuned=False,
        )
        by_expert = {"cu_seqlens_k": ends, "A_idx": source_of_row, "tuned": False}
        grad_out_weight, grad_in_weight = torch.empty_like(out_weight), torch.empty_like(in_weight)
        gemm(grad.mT, scaled_act, out=grad_out_weight, **by_expert)
        del scaled_act
        gemm(sources.mT, grad_before, out=grad_in_weight.mT, concat_layout=("out",), **by_expert)
        grad_inputs = gemm(grad_before, in_weight, cu_seqlens_m=ends, concat_layout=("B",), tuned=False)
        return sum_rows(grad_inputs, ctx.order), grad_weight, grad_in_weight, grad_out_weight, None


def check_fused_products(hidden_size: int, width: int, device: torch.device, expected: Callable[..., Tensor]) -> None:
    """Compare the kernels with ``expected`` on this device: one expert without rows, one with a single one, padding.

    Nothing else has seen these kernels on this GPU, with this driver and this torch, when a run begins.

    Args:
        hidden_size: Of the rows.
        width: Of an expert.
        device: That the run is on.
        expected: torch's path, called as ``run_fused_swiglu_experts``.

    Raises:
        ValueError: A result differs by more than rounding, or the kernels do not run.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(shape, generator=draw)).to(device, torch.bfloat16)

    experts, tokens, padding = 5, 96, 7
    first = torch.where(torch.rand(tokens, generator=draw) < 0.8, 0, 3)
    first[17] = 1  # its only row; expert 2 has none
    expert = torch.stack([first, torch.full_like(first, 4)], dim=1)
    counts, rows = torch.bincount(expert.flatten(), minlength=experts), expert.numel()
    given = [
        normal(tokens, hidden_size),
        torch.rand(rows + padding, generator=draw).to(device),
        normal(experts, 2 * width, hidden_size, spread=hidden_size**-0.5),
        normal(experts, hidden_size, width, spread=width**-0.5),
    ]
    grad = normal(tokens, hidden_size)
    names = ("output", "gradient of rows", "of routes", "of in_weight", "of out_weight")

    def results(run: Callable[..., Tensor], padding: int = 0) -> list[Tensor]:
        key = torch.cat([expert.flatten(), torch.full((padding,), experts)])
        source = torch.cat([torch.arange(tokens).repeat_interleave(2), torch.zeros(padding, dtype=torch.int64)])
        _, order = order_by(key.to(device), source.to(device), tokens, None, counts.to(device), is_padded=padding > 0)
        leaves = [one.clone().requires_grad_() for one in (given[0], given[1][: rows + padding], *given[2:])]
        output = run(*leaves, order)
        found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        return [*found[:2], found[2][:rows], *found[3:]]

    # Memory that a kernel leaves unwritten is to show: an allocator hands out again what was freed last.
    for stack in given[2:]:
        torch.full_like(stack, torch.nan)
    try:
        ours = results(run_fused_swiglu_experts, padding)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{_REFUSED}: its kernels do not run here ({type(error).__name__}: {reason})") from error
    for name, fused, plain in zip(names, ours, results(expected), strict=True):
        away = float((fused.float() - plain.float()).norm() / plain.float().norm())
        if not away <= _TOLERANCE:
            raise ValueError(f"{_REFUSED}: {name} of its experts is {away:.2g} of its length away from torch's here")
        if name.endswith("_weight") and bool(fused[2].any()):
            raise ValueError(f"{_REFUSED}: {name} is not 0 for an expert without rows")


_REFUSED = "engine.kernels=quack must be auto or torch"
