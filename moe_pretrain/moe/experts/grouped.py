"""Matrix products of row blocks with one matrix per expert, which depend on the device.

On CUDA in bfloat16 all rows are one block and a product is one ``torch.nn.functional.grouped_mm``: one launch,
the experts' ends stay on the device, no host synchronisation. Everywhere else each expert's rows are a block of
their own and a product is one ``torch.mm``, which on a CPU is what ``grouped_mm`` does inside, without its
restrictions on strides and dtypes. Working expert by expert keeps what one expert needs in the cache between the
products, and only one expert's temporaries exist at a time.
"""

import functools
import itertools

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.row_layout import ExpertRowLayout


class ExpertRows:
    """The rows of one expert."""

    def __init__(self, expert: int, rows: slice, num_experts: int):
        self.rows = rows
        self._expert = expert
        self._num_experts = num_experts

    def times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """``rows[r] @ matrices[expert of r].T``; ``matrices [local_experts, outer, inner]``."""
        return rows.mm(matrices[self._expert].t())

    def times_transposed(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """``rows[r] @ matrices[expert of r]``, the gradient of ``times`` with respect to its rows."""
        return rows.mm(matrices[self._expert])

    def outer(self, left: Tensor, right: Tensor, stack: Tensor | None) -> Tensor:
        """``left.T @ right`` per expert, exactly 0 for an expert without rows.

        Args:
            left: ``[rows, outer]``.
            right: ``[rows, inner]``.
            stack: What the previous block returned, None for the first.

        Returns:
            ``[local_experts, outer, inner]``, complete after the last block.
        """
        if stack is None:
            stack = left.new_empty(self._num_experts, left.shape[1], right.shape[1])
        torch.mm(left.t(), right, out=stack[self._expert])
        return stack


class AllRows:
    """The rows of all experts, sorted by expert; the same operations in one launch each."""

    def __init__(self, rows_per_expert: Int[Tensor, "local_experts"]):
        self.rows = slice(None)
        self._ends = rows_per_expert.cumsum(0).to(torch.int32)

    def times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """As ``ExpertRows.times``."""
        return functional.grouped_mm(rows, matrices.transpose(1, 2), offs=self._ends)

    def times_transposed(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """As ``ExpertRows.times_transposed``."""
        return functional.grouped_mm(rows, matrices, offs=self._ends)

    def outer(self, left: Tensor, right: Tensor, stack: Tensor | None) -> Tensor:
        """As ``ExpertRows.outer``; there is no previous block."""
        products = functional.grouped_mm(left.t(), right, offs=self._ends)
        if _leaves_empty_products(left.device):
            begins = functional.pad(self._ends[:-1], (1, 0))
            products.masked_fill_((self._ends == begins)[:, None, None], 0.0)
        return products


@functools.cache
def _leaves_empty_products(device: torch.device) -> bool:
    """Whether the kernel for ``device`` writes nothing for an expert without rows: Blackwell's (pytorch#172439).

    What memory held before would be that expert's gradient, and through the global norm everyone's.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def row_blocks(rows_per_expert: Int[Tensor, "local_experts"], dtype: torch.dtype) -> list[ExpertRows] | list[AllRows]:
    """Cut rows of ``dtype``, sorted by expert, into blocks; at least one."""
    if rows_per_expert.is_cuda and dtype == torch.bfloat16:
        return [AllRows(rows_per_expert)]
    sizes = rows_per_expert.tolist()
    ends = list(itertools.accumulate(sizes))
    return [
        ExpertRows(expert, slice(end - size, end), len(sizes))
        for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def take_rows(sources: Tensor, order: ExpertRowLayout, block: ExpertRows | AllRows) -> Tensor:
    """The source row of each row of ``block``."""
    with part("permute"):
        return sources.index_select(0, order.source_of_row[block.rows])


def join(parts: list[Tensor]) -> Tensor:
    """Rows of all blocks."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
