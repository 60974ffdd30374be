"""SwiGLU feed-forward networks: one dense module, and a stack of experts as one autograd node."""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.experts.activation import SWIGLU, Activation, activate, activation_gradients, gated
from moe_pretrain.moe.experts.fused_products import check_fused_products, run_fused_swiglu_experts
from moe_pretrain.moe.experts.grouped import join, row_blocks, take_rows
from moe_pretrain.moe.kernels import Kernels, liger_swiglu
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.row_layout import ExpertRowLayout, scaled_rows, sum_rows
from moe_pretrain.moe.types import ExpertShard


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out`` without biases (Shazeer 2020, arXiv:2002.05202, eq. 6).

    Used for dense layers and for shared experts. ``in_weight`` holds gate and up, in that order.

    Args:
        hidden_size: Model width.
        width: Inner width.
        activation: In place of ``silu(gate) * up``.
        has_output_gate: Whether the output is multiplied with ``sigmoid(x @ gate_weight.T)``, one number per token
            (the shared experts of Qwen2-MoE, arXiv:2407.10671, and of Qwen3-Next).
    """

    kernels: Kernels = "torch"

    def __init__(self, hidden_size: int, width: int, activation: Activation = SWIGLU, has_output_gate: bool = False):
        super().__init__()
        self.activation = activation
        self.in_weight = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(hidden_size, width))
        self.gate_weight = nn.Parameter(torch.empty(1, hidden_size)) if has_output_gate else None

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Apply the network to the last axis."""
        before = functional.linear(hidden, self.in_weight)
        is_ligers = self.kernels == "liger" and self.activation == SWIGLU
        inner = liger_swiglu(before) if is_ligers else gated(before, self.activation)
        output = functional.linear(inner, self.out_weight)
        if self.gate_weight is None:
            return output
        return output * functional.linear(hidden, self.gate_weight).sigmoid()


class SwiGLUExperts(nn.Module):
    """This rank's SwiGLU experts as two stacked weights.

    ``in_weight [local_experts, 2 * width, hidden]`` holds gate and up, ``out_weight
    [local_experts, hidden, width]`` the projection back; the layout of transformers 5, so exports map 1:1.
    """

    expert_axis = 0
    """Of ``in_weight``."""
    kernels: Kernels = "torch"

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, shard: ExpertShard, activation: Activation = SWIGLU
    ):
        super().__init__()
        self.activation = activation
        self.expert_ids = shard.local_experts(num_experts)
        local = len(self.expert_ids)
        self.in_weight = nn.Parameter(torch.empty(local, 2 * width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(local, hidden_size, width))

    def forward(
        self,
        sources: Float[Tensor, "sources hidden"],
        weight: Float[Tensor, "rows"],
        order: ExpertRowLayout,
        payload: None = None,
    ) -> Float[Tensor, "sources hidden"]:
        """Gather rows, run each through its expert, scale by ``weight`` (float32), sum back per source."""
        if self.kernels == "quack" and len(weight):
            return run_fused_swiglu_experts(sources, weight, self.in_weight, self.out_weight, order)
        return run_swiglu_experts(sources, weight, self.in_weight, self.out_weight, order, self.activation)

    def gate_norms(self, proxies: Float[Tensor, "proxies hidden"]) -> Float[Tensor, "local_experts proxies"]:
        """Norm of ``W_gate x`` of every expert for every row, float32."""
        gates = self.in_weight[:, : self.in_weight.shape[1] // 2]
        # Expanded by hand: ``@`` would fold the experts into rows, which copies their gates.
        inner = torch.bmm(proxies.to(gates.dtype).expand(len(gates), -1, -1), gates.mT)
        return torch.linalg.vector_norm(inner, dim=-1, dtype=torch.float32)

    def scores(
        self,
        sources: Float[Tensor, "sources hidden"],
        query: Float[Tensor, "sources key"],
        key_weight: Float[Tensor, "key width"],
        order: ExpertRowLayout,
    ) -> Float[Tensor, "rows"]:
        """``query . (key_weight @ h)`` of each row, ``h`` the inner activation of its expert; float32.

        The query goes through ``key_weight`` once per source, so that a row costs its first layer and a dot product.
        """
        factor = query @ key_weight
        return _ScoresFunction.apply(sources.to(self.in_weight.dtype), factor, self.in_weight, order, self.activation)


def run_swiglu_experts(
    sources: Float[Tensor, "sources hidden"],
    weight: Float[Tensor, "rows"],
    in_weight: Float[Tensor, "local_experts width2 hidden"],
    out_weight: Float[Tensor, "local_experts hidden width"],
    order: ExpertRowLayout,
    activation: Activation,
) -> Float[Tensor, "sources hidden"]:
    """Gather rows, run each through its expert, scale by ``weight`` (float32), sum back per source."""
    return _SwiGLUExpertsFunction.apply(sources, weight, in_weight, out_weight, order, activation)


def check_fused_experts(model: nn.Module, device: torch.device) -> None:
    """Compare quack's kernels on ``device`` with torch's, for experts of every size in ``model``.

    Raises:
        ValueError: They differ by more than rounding, or do not run.
    """
    plain = functools.partial(run_swiglu_experts, activation=SWIGLU)
    shapes = {experts.out_weight.shape[1:] for experts in model.modules() if isinstance(experts, SwiGLUExperts)}
    for hidden_size, width in sorted(shapes):
        check_fused_products(hidden_size, width, device, plain)


class _SwiGLUExpertsFunction(torch.autograd.Function):
    """Gather, two grouped products with SwiGLU between, and the weighted sum over routes, in one node.

    It saves the sources, the pre-activation ``[rows, 2 * width]`` and the weights, nothing else: the gathered rows
    and the activation are made again in backward, and the gradient of a route's weight is ``<dy W_out, act>``,
    so expert outputs need not be kept. That is about half of what separate operations save.

    A route's weight is a factor of its row, so it may be applied on either side of a product. It is
    applied on the side that is ``hidden`` wide, which costs a fraction of a pass over ``width``; on CUDA, where the
    gradient of the activation is one kernel, in there, which costs no pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sources: Tensor,
        weight: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
        order: ExpertRowLayout,
        activation: Activation,
    ) -> Tensor:
        ctx.activation = activation
        blocks = row_blocks(order.rows_per_expert, sources.dtype)
        befores, outputs = [], []
        for block in blocks:
            before = block.times(take_rows(sources, order, block), in_weight)
            befores.append(before)
            outputs.append(block.times(activate(before, ctx.activation), out_weight))
        ctx.save_for_backward(sources, weight, in_weight, out_weight, *befores)
        ctx.order, ctx.blocks = order, blocks
        with part("combine"):
            return sum_rows(join(outputs), order, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, weight, in_weight, out_weight, *befores = ctx.saved_tensors
        order: ExpertRowLayout = ctx.order
        grad_in_weight = grad_out_weight = None
        grad_weights, grad_inputs = [], []
        is_inside = _weighs_in_activation(sources)
        for block, before in zip(ctx.blocks, befores, strict=True):
            source_of_row, factor = order.source_of_row[block.rows], weight[block.rows, None]
            # Gradients of the rows' outputs before the route's weight; without it inside also down to grad_inputs.
            grad_rows = grads[0].index_select(0, source_of_row)
            grad_act = block.times_transposed(grad_rows, out_weight)
            inside = factor if is_inside else None
            act, grad_before, grad_weight = activation_gradients(before, grad_act, ctx.activation, inside)
            del grad_act
            if not is_inside:  # in place with a float32 factor: the product is formed in float32 and rounded once
                grad_rows.mul_(factor)
            grad_out_weight = block.outer(grad_rows, act, grad_out_weight)
            del act, grad_rows
            rows = sources.index_select(0, source_of_row) if is_inside else scaled_rows(sources, source_of_row, factor)
            grad_in_weight = block.outer(grad_before, rows, grad_in_weight)
            grad_weights.append(grad_weight)
            grad_inputs.append(block.times_transposed(grad_before, in_weight))
        grad_sources = sum_rows(join(grad_inputs), order, None if is_inside else weight)
        return grad_sources, join(grad_weights), grad_in_weight, grad_out_weight, None, None


def _weighs_in_activation(rows: Tensor) -> bool:
    return rows.is_cuda


class _ScoresFunction(torch.autograd.Function):
    """Gather, the first grouped product, SwiGLU, and a float32 dot product with the source's ``factor``.

    As ``_SwiGLUExpertsFunction`` it saves the sources, the pre-activation and the weights, and no activation.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Tensor, factor: Tensor, in_weight: Tensor, order: ExpertRowLayout, activation: Activation
    ) -> Tensor:
        ctx.activation = activation
        blocks = row_blocks(order.rows_per_expert, sources.dtype)
        befores, scores = [], []
        for block in blocks:
            source_of_row = order.source_of_row[block.rows]
            before = block.times(sources.index_select(0, source_of_row), in_weight)
            befores.append(before)
            scores.append(factor.index_select(0, source_of_row).mul_(activate(before, ctx.activation)).sum(dim=1))
        ctx.save_for_backward(sources, factor, in_weight, *befores)
        ctx.order, ctx.blocks = order, blocks
        return join(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, factor, in_weight, *befores = ctx.saved_tensors
        order: ExpertRowLayout = ctx.order
        grad_in_weight = None
        grad_factors, grad_inputs = [], []
        for block, before in zip(ctx.blocks, befores, strict=True):
            source_of_row, grad_rows = order.source_of_row[block.rows], grads[0][block.rows, None]
            grad_act = factor.index_select(0, source_of_row).mul_(grad_rows).to(before.dtype)
            act, grad_before, _ = activation_gradients(before, grad_act, ctx.activation)
            grad_factors.append(act.float().mul_(grad_rows))
            rows = sources.index_select(0, source_of_row)
            grad_in_weight = block.outer(grad_before, rows, grad_in_weight)
            grad_inputs.append(block.times_transposed(grad_before, in_weight))
        return sum_rows(join(grad_inputs), order), sum_rows(join(grad_factors), order), grad_in_weight, None, None
