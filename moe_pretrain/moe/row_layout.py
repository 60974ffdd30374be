"""Layout of rows by expert: which source row each expert row is, and sums back to the sources.

Sums over a token's experts are gathers in token order, not ``index_add_``, so they are deterministic on every device
and accumulate in float32. Axis names: see ``types``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.compiled import one_kernel_on_cuda


@dataclass(frozen=True)
class ExpertRowLayout:
    """Layout of source rows for the experts: a gather, and its adjoint sum.

    Attributes:
        source_of_row: Source row of each expert row; rows are sorted by local expert, and padding comes last.
        rows_of_source: Expert rows of each source row, filled with -1 where a source has fewer than ``slots``.
        is_full: Whether ``rows_of_source`` has no -1.
        rows_per_expert: Rows of each local expert, on the device; padding is no one's.
    """

    source_of_row: Int[Tensor, "rows"]
    rows_of_source: Int[Tensor, "sources slots"]
    is_full: bool
    rows_per_expert: Int[Tensor, "local_experts"]

    def first(self, rows: int) -> "ExpertRowLayout":
        """The same without the rows after the first ``rows``, which are padding."""
        return replace(self, source_of_row=self.source_of_row[:rows])

    def split(self, rows: Sequence[int], sources: Sequence[int]) -> list["ExpertRowLayout"]:
        """Layouts of consecutive sources whose rows are consecutive too, each sorted by expert; without the padding.

        Args:
            rows: Rows of each.
            sources: Sources of each.
        """
        layouts: list[ExpertRowLayout] = []
        row = source = 0
        for size, count, of_experts in zip(rows, sources, self.rows_per_expert.view(len(rows), -1), strict=True):
            source_of_row = self.source_of_row[row : row + size]
            slots = self.rows_of_source[source : source + count]
            if layouts:
                source_of_row = source_of_row - source
                slots = slots - row if self.is_full else (slots - row).clamp_(min=-1)
            layouts.append(ExpertRowLayout(source_of_row, slots, self.is_full, of_experts))
            row, source = row + size, source + count
        return layouts


def order_by(
    key: Int[Tensor, "routes"],
    source: Int[Tensor, "routes"],
    num_sources: int,
    routes_per_source: int | None,
    rows_per_expert: Int[Tensor, "local_experts"],
    is_padded: bool = False,
    in_halves: bool = False,
) -> tuple[Int[Tensor, "routes"], ExpertRowLayout]:
    """Sort routes by ``key``, stably, and say how to gather and sum them.

    Args:
        key: What to sort by: the expert of each route, in halves those of the second after all those of the first.
        source: Source row of each route, ascending.
        num_sources: Number of source rows.
        routes_per_source: Routes of every source if all have the same number, else None.
        rows_per_expert: Number of routes of each key.
        is_padded: Whether routes may end in padding, whose key is the number of keys.
        in_halves: Whether half of the keys are experts of the first half of the sources, half those of the second.

    Returns:
        The permutation (route of each sorted row) and the ``ExpertRowLayout``.
    """
    # On a GPU a radix sort passes over the keys once for each of their bytes.
    route_of_row = torch.argsort(key.to(torch.int16) if key.is_cuda else key, stable=True)
    routes = key.shape[0]
    row_of_route, source_of_row = _inverse(route_of_row, source)
    if routes_per_source is not None:
        slots = row_of_route.view(num_sources, routes_per_source)
    else:
        is_route = (key < len(rows_per_expert)).long() if is_padded else torch.ones_like(source)
        counts = source.new_zeros(num_sources).scatter_add_(0, source, is_route)
        first = counts.cumsum(0) - counts
        rank = torch.arange(routes, device=key.device) - first[source]
        # No source has two routes to an expert. A GPU would be waited for to know better.
        num_experts = len(rows_per_expert) // (2 if in_halves else 1)
        most = num_experts if key.is_cuda else int(counts.max()) if num_sources else 0
        if is_padded:  # has a column of its own, which is cut off
            rank = torch.where(is_route > 0, rank, most)
        slots = row_of_route.new_full((num_sources, most + is_padded), -1)
        slots[source, rank] = row_of_route
        slots = slots[:, :most]
    order = ExpertRowLayout(source_of_row, slots, routes_per_source is not None, rows_per_expert)
    return route_of_row, order


@one_kernel_on_cuda
def _inverse(permutation: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, and ``values`` permuted."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse, values[permutation]


def gather(sources: Float[Tensor, "sources hidden"], order: ExpertRowLayout) -> Float[Tensor, "rows hidden"]:
    """The source row of each expert row; differentiable."""
    return _Gather.apply(sources, order)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sources: Tensor, order: ExpertRowLayout) -> Tensor:
        ctx.order = order
        return sources.index_select(0, order.source_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grads[0].contiguous(), ctx.order), None


def sum_rows(rows: Tensor, order: ExpertRowLayout, weight: Tensor | None = None) -> Tensor:
    """For each source the sum of its rows, each times its ``weight [rows]`` if given; float32 inside, no gradient.

    Without weights this is the adjoint of ``sources.index_select(0, order.source_of_row)``.
    """
    slots = order.rows_of_source
    if rows.shape[0] == 0 or slots.shape[1] == 0:
        return rows.new_zeros(slots.shape[0], rows.shape[1])
    if slots.shape[1] == 1 and order.is_full and weight is None:
        return rows.index_select(0, slots[:, 0])
    return _sum_slots(rows, slots, weight, order.is_full)


@one_kernel_on_cuda
def _sum_slots(rows: Tensor, slots: Tensor, weight: Tensor | None, is_full: bool) -> Tensor:
    total: Tensor | None = None
    for slot in slots.unbind(dim=1):
        index = slot if is_full else slot.clamp(min=0)
        part = rows.index_select(0, index).float()
        factor = None if weight is None else weight.index_select(0, index)
        if not is_full and rows.is_cuda:  # row 0 may be padding, of which experts write nothing
            part.masked_fill_(slot[:, None] < 0, 0.0)
        elif not is_full:  # on a CPU a product with zeros takes a tenth of the time of filling rows with them
            factor = (slot >= 0).float() if factor is None else factor.masked_fill(slot < 0, 0.0)
        if factor is not None:
            part.mul_(factor[:, None])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(rows.dtype)


def plain_sum(rows: Float[Tensor, "rows hidden"], order: ExpertRowLayout) -> Float[Tensor, "sources hidden"]:
    """For each source the sum of its rows; differentiable."""
    return _Sum.apply(rows, order)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: ExpertRowLayout) -> Tensor:
        ctx.order = order
        return sum_rows(rows, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous().index_select(0, ctx.order.source_of_row), None


def weighted_sum(
    rows: Float[Tensor, "rows hidden"], weight: Float[Tensor, "rows"], order: ExpertRowLayout
) -> Float[Tensor, "sources hidden"]:
    """For each source the sum of its rows, each times its ``weight``; differentiable in both, float32 inside."""
    return _WeightedSum.apply(rows, weight, order)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: ExpertRowLayout) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.order = order
        return sum_rows(rows, order, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows = grads[0].index_select(0, ctx.order.source_of_row)
        grad_weight = (grad_rows * rows).sum(dim=1, dtype=torch.float32)
        return grad_rows.mul_(weight[:, None]), grad_weight, None


@one_kernel_on_cuda
def scaled_rows(sources: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """Rows ``index`` of ``sources``, each times its ``factor [rows, 1]``: formed in float32 and rounded once."""
    return sources.index_select(0, index).mul_(factor)
