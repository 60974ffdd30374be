"""SwiGLU feed-forward networks: one dense module, and a stack of experts as one autograd node."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.dispatch import gather_rows, sum_rows
from moe_pretrain.moe.experts.grouped import RowBlocks
from moe_pretrain.moe.types import ExpertShard, RowOrder


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out`` without biases (Shazeer 2020, arXiv:2002.05202, eq. 6).

    Used for dense layers and for shared experts. ``in_weight`` holds gate and up, in that order.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.in_weight = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(hidden_size, width))

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Apply the network to the last axis."""
        gate, up = functional.linear(hidden, self.in_weight).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.out_weight)


class SwiGLUExperts(nn.Module):
    """This rank's SwiGLU experts as two stacked weights.

    ``in_weight [local_experts, 2 * width, hidden]`` holds gate and up, ``out_weight
    [local_experts, hidden, width]`` the projection back; the layout of transformers 5, so exports map 1:1.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, shard: ExpertShard):
        super().__init__()
        self.expert_ids = shard.local_experts(num_experts)
        local = len(self.expert_ids)
        self.in_weight = nn.Parameter(torch.empty(local, 2 * width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(local, hidden_size, width))

    def forward(
        self, sources: Float[Tensor, "sources hidden"], weight: Float[Tensor, "rows"], order: RowOrder
    ) -> Float[Tensor, "sources hidden"]:
        """Gather rows, run each through its expert, scale by ``weight`` (float32), sum back per source."""
        return _SwiGLUExpertsFunction.apply(sources, weight, self.in_weight, self.out_weight, order)


class _SwiGLUExpertsFunction(torch.autograd.Function):
    """Gather, two grouped products with SwiGLU between, route weights and the sum over routes, in one node.

    It saves the sources, the pre-activation ``[rows, 2 * width]`` and the weights, nothing else: the gathered rows
    and the activation are made again in backward, and the gradient of a route's weight is ``<dy W_out, act>``,
    so expert outputs need not be kept. That is at most half of what separate operations save.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Tensor, weight: Tensor, in_weight: Tensor, out_weight: Tensor, order: RowOrder
    ) -> Tensor:
        blocks = RowBlocks(order.rows_per_expert, sources.dtype)
        before = blocks.times(gather_rows(sources, order), in_weight)
        gate, up = before.chunk(2, dim=1)
        rows = blocks.times(functional.silu(gate).mul_(up), out_weight)
        # In place with a float32 factor: the product is formed in float32 and rounded once.
        rows.mul_(weight[:, None])
        ctx.save_for_backward(sources, weight, in_weight, out_weight, before)
        ctx.order, ctx.blocks = order, blocks
        return sum_rows(rows, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, weight, in_weight, out_weight, before = ctx.saved_tensors
        order, blocks = ctx.order, ctx.blocks
        grad_rows = gather_rows(grads[0].contiguous(), order)  # of the weighted outputs
        grad_act = blocks.times_transposed(grad_rows, out_weight)  # still without the route's weight
        gate, up = before.chunk(2, dim=1)
        silu = functional.silu(gate)
        act = silu * up
        grad_weight = (grad_act * act).sum(dim=1, dtype=torch.float32)
        grad_out_weight = blocks.outer(grad_rows, act.mul_(weight[:, None]))
        del act, grad_rows
        grad_act.mul_(weight[:, None])
        grad_before = torch.empty_like(before)
        grad_gate, grad_up = grad_before.chunk(2, dim=1)
        torch.mul(grad_act, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
        del grad_act, silu
        rows = gather_rows(sources, order)
        grad_in_weight = blocks.outer(grad_before, rows)
        del rows
        grad_sources = sum_rows(blocks.times_transposed(grad_before, in_weight), order)
        return grad_sources, grad_weight, grad_in_weight, grad_out_weight, None
