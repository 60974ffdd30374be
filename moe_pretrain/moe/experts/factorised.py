"""SwiGLU experts with a factorised gate, as Autonomy-of-Experts has them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_pretrain.moe.experts.activation import SWIGLU, Activation, activate, activation_gradients
from moe_pretrain.moe.experts.grouped import join, row_blocks, take_rows
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.row_layout import ExpertRowLayout, scaled_rows, sum_rows
from moe_pretrain.moe.types import ExpertShard


def factorised_width(hidden_size: int, full_width: int, rank: int, multiple: int) -> int:
    """Width at which an expert with a gate of ``rank`` has as many weights as a SwiGLU expert of ``full_width``.

    Equation 5 of arXiv:2501.13074, ``(3 d d_ffn - d_low d) / (d_low + 2 d)``, to the nearest multiple of ``multiple``.
    """
    exact = (3 * hidden_size * full_width - rank * hidden_size) / (rank + 2 * hidden_size)
    return max(1, round(exact / multiple)) * multiple


def full_width(hidden_size: int, width: int, rank: int) -> int:
    """The ``full_width`` from which ``factorised_width`` makes ``width``: equation 5 the other way round."""
    return max(1, round((width * (rank + 2 * hidden_size) + rank * hidden_size) / (3 * hidden_size)))


class FactorisedExperts(nn.Module):
    """``(silu(x W_down W_up) * (x W_in)) W_out``; ``rank`` columns of ``x W_down`` lie between the two factors.

    ``up_weight [local_experts, width, rank]``, ``in_weight [local_experts, width, hidden]``, ``out_weight
    [local_experts, hidden, width]``. ``x W_down`` comes from where the scheme says: as the route's payload, when the
    router has computed it and lets it travel, with gradient; from a ``down_weight`` that the router holds, as a dense
    parameter of every rank; or, with ``owns_down``, from ``down_weight [local_experts, rank, hidden]`` of its own.

    Source:
        Lv et al. 2025 (arXiv:2501.13074), algorithm 2.
    """

    expert_axis = 0
    """Of ``in_weight``."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        rank: int,
        shard: ExpertShard,
        owns_down: bool = False,
        activation: Activation = SWIGLU,
    ):
        super().__init__()
        self.activation = activation
        self.expert_ids = shard.local_experts(num_experts)
        local = len(self.expert_ids)
        self.down_weight = nn.Parameter(torch.empty(local, rank, hidden_size)) if owns_down else None
        self.up_weight = nn.Parameter(torch.empty(local, width, rank))
        self.in_weight = nn.Parameter(torch.empty(local, width, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(local, hidden_size, width))

    def forward(
        self,
        sources: Float[Tensor, "sources hidden"],
        weight: Float[Tensor, "rows"],
        order: ExpertRowLayout,
        payload: Float[Tensor, "rows rank"] | None = None,
        down_weight: Float[Tensor, "local_experts rank hidden"] | None = None,
    ) -> Float[Tensor, "sources hidden"]:
        """Gather rows, run each through its expert, scale by ``weight``, sum back per source."""
        if payload is None:
            down = self.down_weight if down_weight is None else down_weight
            assert down is not None, "no payload and no down projection"
            payload = _DownProjection.apply(sources, down, order)
        weights = self.up_weight, self.in_weight, self.out_weight
        return _FactorisedExpertsFunction.apply(sources, weight, payload, *weights, order, self.activation)


class _DownProjection(torch.autograd.Function):
    """``x W_down`` of every row by its expert."""

    @staticmethod
    def forward(ctx: Any, sources: Tensor, down_weight: Tensor, order: ExpertRowLayout) -> Tensor:
        blocks = row_blocks(order.rows_per_expert, sources.dtype)
        ctx.save_for_backward(sources, down_weight)
        ctx.order, ctx.blocks = order, blocks
        return join([block.times(take_rows(sources, order, block), down_weight) for block in blocks])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        sources, down_weight = ctx.saved_tensors
        order: ExpertRowLayout = ctx.order
        grad_down_weight, grad_inputs = None, []
        for block in ctx.blocks:
            grad_rows = grads[0][block.rows].contiguous()
            rows = sources.index_select(0, order.source_of_row[block.rows])
            grad_down_weight = block.outer(grad_rows, rows, grad_down_weight)
            grad_inputs.append(block.times_transposed(grad_rows, down_weight))
        return sum_rows(join(grad_inputs), order), grad_down_weight, None


class _FactorisedExpertsFunction(torch.autograd.Function):
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
        order: ExpertRowLayout,
        activation: Activation,
    ) -> Tensor:
        ctx.activation = activation
        blocks = row_blocks(order.rows_per_expert, sources.dtype)
        befores, outputs = [], []
        for block in blocks:
            gate = block.times(payload[block.rows], up_weight)
            value = block.times(take_rows(sources, order, block), in_weight)
            before = torch.cat([gate, value], dim=1)
            befores.append(before)
            outputs.append(block.times(activate(before, activation), out_weight))
        ctx.save_for_backward(sources, weight, payload, up_weight, in_weight, out_weight, *befores)
        ctx.order, ctx.blocks = order, blocks
        with part("combine"):
            return sum_rows(join(outputs), order, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, weight, payload, up_weight, in_weight, out_weight, *befores = ctx.saved_tensors
        order: ExpertRowLayout = ctx.order
        grad_up_weight = grad_in_weight = grad_out_weight = None
        grad_weights, grad_payloads, grad_inputs = [], [], []
        for block, before in zip(ctx.blocks, befores, strict=True):
            source_of_row, factor = order.source_of_row[block.rows], weight[block.rows, None]
            # Gradients are those of the rows' outputs before the route's weight, which is applied on narrow sides.
            grad_rows = grads[0].index_select(0, source_of_row)
            grad_act = block.times_transposed(grad_rows, out_weight)
            act, grad_before, grad_weight = activation_gradients(before, grad_act, ctx.activation)
            del grad_act
            grad_gate, grad_value = (part.contiguous() for part in grad_before.chunk(2, dim=1))
            grad_out_weight = block.outer(grad_rows.mul_(factor), act, grad_out_weight)
            rows = scaled_rows(sources, source_of_row, factor)
            grad_in_weight = block.outer(grad_value, rows, grad_in_weight)
            weighted_payload = payload[block.rows].clone().mul_(factor)
            grad_up_weight = block.outer(grad_gate, weighted_payload, grad_up_weight)
            grad_weights.append(grad_weight)
            grad_payloads.append(block.times_transposed(grad_gate, up_weight).mul_(factor))
            grad_inputs.append(block.times_transposed(grad_value, in_weight))
        grad_sources = sum_rows(join(grad_inputs), order, weight)
        return (
            *(grad_sources, join(grad_weights), join(grad_payloads)),
            *(grad_up_weight, grad_in_weight, grad_out_weight, None, None),
        )
