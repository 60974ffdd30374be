"""SwiGLU experts whose parameters are merged, one network for each segment of tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_pretrain.moe.experts.activation import SWIGLU, Activation, activate, activation_gradients
from moe_pretrain.moe.experts.grouped import join, row_blocks
from moe_pretrain.moe.types import ExpertShard

_CHUNK_NUMBERS = 2**24
"""Merged parameters, float32, that exist at a time."""


class MergedExperts(nn.Module):
    """All experts of a layer, of which this rank holds a slice along their inner width.

    The network of segment s has the parameters ``sum_e mixture[s, e] * theta_e``. No token moves between experts, so
    under expert parallelism each rank holds ``width / ranks`` inner units of every expert, merges these, and computes
    its part of every token's output; the parts add up.

    ``in_weight [width, 2, experts, hidden]`` (gate and up), ``out_weight [width, experts, hidden]``: the inner width
    leads, so that the ranks' slices, one after the other, are the whole tensor, as for experts of other kinds.
    """

    expert_axis = 2
    """Of ``in_weight``."""

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, shard: ExpertShard, activation: Activation = SWIGLU
    ):
        super().__init__()
        self.activation = activation
        self.expert_ids = range(num_experts)
        self.units = shard.local_experts(width)
        self.width = width
        local = len(self.units)
        self.in_weight = nn.Parameter(torch.empty(local, 2, num_experts, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(local, num_experts, hidden_size))

    def forward(
        self,
        sources: Float[Tensor, "tokens hidden"],
        mixture: Float[Tensor, "segments experts"],
        lengths: Int[Tensor, "segments"],
        ends: list[int] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """This rank's part of every token's output.

        Args:
            sources: Tokens, segment by segment.
            mixture: Share of each expert in the parameters of each segment's network, float32.
            lengths: Tokens of each segment.
            ends: Where each segment ends; None reads it from ``lengths``, for which a GPU is waited for.
        """
        ends = lengths.cumsum(0).tolist() if ends is None else ends
        weights = self.in_weight, self.out_weight
        return _MergedExpertsFunction.apply(sources, mixture, *weights, lengths, ends, self.activation)


class _MergedExpertsFunction(torch.autograd.Function):
    """Merging and the networks of all segments as one node.

    It keeps the sources, the pre-activations, the mixture and the experts' parameters; networks are merged again in
    backward, some segments at a time. Sums over experts are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sources: Tensor,
        mixture: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
        lengths: Tensor,
        ends: list[int],
        activation: Activation,
    ) -> Tensor:
        ctx.activation = activation
        merge = _Merge(mixture, in_weight, out_weight)
        befores, outputs = [], []
        ctx.parts = list(_parts(ends, in_weight.shape[0] * in_weight.shape[3]))
        for segments, rows in ctx.parts:
            of_gate, of_output = merge(segments)
            for block in row_blocks(lengths[segments], sources.dtype):
                before = block.times(sources[rows][block.rows], of_gate)
                befores.append(before)
                outputs.append(block.times(activate(before, activation), of_output))
        ctx.save_for_backward(sources, mixture, in_weight, out_weight, lengths, *befores)
        return join(outputs) if outputs else torch.zeros_like(sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources, mixture, in_weight, out_weight, lengths, *befores = ctx.saved_tensors
        merge = _Merge(mixture, in_weight, out_weight)
        before_of_block = iter(befores)
        grad_sources = []
        for segments, rows in ctx.parts:
            of_gate, of_output = merge(segments)
            grad_gate = grad_output = None
            for block in row_blocks(lengths[segments], sources.dtype):
                before, grad_rows = next(before_of_block), grads[0][rows][block.rows].contiguous()
                grad_act = block.times_transposed(grad_rows, of_output)
                act, grad_before, _ = activation_gradients(before, grad_act, ctx.activation)
                del grad_act
                grad_output = block.outer(grad_rows, act, grad_output)
                grad_gate = block.outer(grad_before, sources[rows][block.rows], grad_gate)
                grad_sources.append(block.times_transposed(grad_before, of_gate))
            assert grad_gate is not None and grad_output is not None
            merge.add_gradients(segments, grad_gate, grad_output)
            del of_gate, of_output, grad_gate, grad_output  # else they are there while the next part's are merged
        grad_source = join(grad_sources) if grad_sources else torch.zeros_like(sources)
        return grad_source, merge.grad_mixture, *merge.parameter_gradients(), None, None, None


def networks_merged_together(parameters: float) -> int:
    """Merged networks of so many parameters that exist at a time."""
    return max(1, int(_CHUNK_NUMBERS // parameters))


def _parts(ends: list[int], numbers: int) -> Iterator[tuple[slice, slice]]:
    """Segments that are merged together, and their tokens; a network has three matrices of ``numbers``."""
    together = networks_merged_together(3 * numbers)
    borders = [0, *ends]
    for first in range(0, len(ends), together):
        last = min(first + together, len(ends))
        yield slice(first, last), slice(borders[first], borders[last])


class _Merge:
    """Merging of some segments' networks as one matrix product per stacked parameter, and its gradient."""

    def __init__(self, mixture: Tensor, in_weight: Tensor, out_weight: Tensor):
        self._mixture, self._dtype = mixture, in_weight.dtype
        width, _, num_experts, hidden = in_weight.shape
        self._sizes = width, hidden
        # Expert by expert, as the products want them: [experts, 2 * width * hidden] and [experts, hidden * width].
        self._gate = in_weight.permute(2, 1, 0, 3).reshape(num_experts, -1).float()
        self._output = out_weight.permute(1, 2, 0).reshape(num_experts, -1).float()
        self.grad_mixture = torch.zeros_like(mixture)
        self._grad_gate: Tensor | None = None
        self._grad_output: Tensor | None = None

    def __call__(self, segments: slice) -> tuple[Tensor, Tensor]:
        """``[segments, 2 * width, hidden]`` and ``[segments, hidden, width]``."""
        width, hidden = self._sizes
        mixture = self._mixture[segments]
        of_gate = (mixture @ self._gate).view(-1, 2 * width, hidden)
        of_output = (mixture @ self._output).view(-1, hidden, width)
        return of_gate.to(self._dtype), of_output.to(self._dtype)

    def add_gradients(self, segments: slice, grad_gate: Tensor, grad_output: Tensor) -> None:
        """Add what the gradients of merged parameters are to mixture and experts."""
        gate, output = grad_gate.flatten(1).float(), grad_output.flatten(1).float()
        mixture = self._mixture[segments]
        self.grad_mixture[segments] = gate @ self._gate.t() + output @ self._output.t()
        of_gate, of_output = mixture.t() @ gate, mixture.t() @ output
        self._grad_gate = of_gate if self._grad_gate is None else self._grad_gate.add_(of_gate)
        self._grad_output = of_output if self._grad_output is None else self._grad_output.add_(of_output)

    def parameter_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients in the shape and dtype of the parameters; zero without segments."""
        width, hidden = self._sizes
        num_experts = self._mixture.shape[1]
        gate = torch.zeros_like(self._gate) if self._grad_gate is None else self._grad_gate
        output = torch.zeros_like(self._output) if self._grad_output is None else self._grad_output
        return (
            gate.view(num_experts, 2, width, hidden).permute(2, 1, 0, 3).to(self._dtype).contiguous(),
            output.view(num_experts, hidden, width).permute(2, 0, 1).to(self._dtype).contiguous(),
        )
