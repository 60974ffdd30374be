"""Experts of Autonomy-of-Experts: SwiGLU with a factorised gate whose first factor ranks the experts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_pretrain.moe.dispatch import sum_rows
from moe_pretrain.moe.experts.grouped import join, row_blocks
from moe_pretrain.moe.experts.swiglu import activate, activation_gradients
from moe_pretrain.moe.types import ExpertShard, RowOrder


class AutonomyExperts(nn.Module):
    """``(silu(c W_up) * (x W_p)) W_out`` with ``c = x W_down`` of the route, computed once by the router.

    ``c`` is the route's payload: it travels with the token, with gradient, so an expert never computes
    it again (layout A: ``W_down`` is a dense parameter on every rank). ``up_weight [local_experts, width, low]``,
    ``in_weight [local_experts, width, hidden]``, ``out_weight [local_experts, hidden, width]``.

    Source:
        Lv et al. 2025 (arXiv:2501.13074), algorithm 2.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, low_size: int, shard: ExpertShard):
        super().__init__()
        self.expert_ids = shard.local_experts(num_experts)
        local = len(self.expert_ids)
        self.up_weight = nn.Parameter(torch.empty(local, width, low_size))
        self.in_weight = nn.Parameter(torch.empty(local, width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(local, hidden_size, width))

    def forward(
        self,
        sources: Float[Tensor, "sources hidden"],
        weight: Float[Tensor, "rows"],
        order: RowOrder,
        payload: Float[Tensor, "rows low"],
    ) -> Float[Tensor, "sources hidden"]:
        """Gather rows, run each with its payload through its expert, scale by ``weight``, sum back per source."""
        weights = self.up_weight, self.in_weight, self.out_weight
        return _AutonomyExpertsFunction.apply(sources, weight, payload, *weights, order)


class _AutonomyExpertsFunction(torch.autograd.Function):
    """As ``_SwiGLUExpertsFunction``, with the gate from the payload instead of the source."""

    @staticmethod
    def forward(
        ctx: Any,
        sources: Tensor,
        weight: Tensor,
        payload: Tensor,
        up_weight: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
        order: RowOrder,
    ) -> Tensor:
        blocks = row_blocks(order.rows_per_expert, sources.dtype)
        befores, outputs = [], []
        for block in blocks:
            rows = sources.index_select(0, order.source_of_row[block.rows])
            gate = block.times(payload[block.rows], up_weight)
            before = torch.cat([gate, block.times(rows, in_weight)], dim=1)
            befores.append(before)
            outputs.append(block.times(activate(before), out_weight))
        ctx.save_for_backward(sources, weight, payload, up_weight, in_weight, out_weight, *befores)
        ctx.order, ctx.blocks = order, blocks
        return sum_rows(join(outputs), order, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, weight, payload, up_weight, in_weight, out_weight, *befores = ctx.saved_tensors
        order: RowOrder = ctx.order
        grad_up_weight = grad_in_weight = grad_out_weight = None
        grad_weights, grad_payloads, grad_inputs = [], [], []
        for block, before in zip(ctx.blocks, befores, strict=True):
            source_of_row, factor = order.source_of_row[block.rows], weight[block.rows, None]
            # Gradients are those of the rows' outputs before the route's weight, which is applied on narrow sides.
            grad_rows = grads[0].index_select(0, source_of_row)
            act, grad_before, grad_weight = activation_gradients(before, block.times_transposed(grad_rows, out_weight))
            grad_gate, grad_value = (part.contiguous() for part in grad_before.chunk(2, dim=1))
            grad_out_weight = block.outer(grad_rows.mul_(factor), act, grad_out_weight)
            rows = sources.index_select(0, source_of_row).mul_(factor)
            grad_in_weight = block.outer(grad_value, rows, grad_in_weight)
            weighted_payload = payload[block.rows].clone().mul_(factor)
            grad_up_weight = block.outer(grad_gate, weighted_payload, grad_up_weight)
            grad_weights.append(grad_weight)
            grad_payloads.append(block.times_transposed(grad_gate, up_weight).mul_(factor))
            grad_inputs.append(block.times_transposed(grad_value, in_weight))
        grad_sources = sum_rows(join(grad_inputs), order, weight)
        return (
            *(grad_sources, join(grad_weights), join(grad_payloads)),
            *(grad_up_weight, grad_in_weight, grad_out_weight, None),
        )
