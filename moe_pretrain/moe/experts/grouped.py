"""Matrix products of row blocks with one matrix per expert, and what else depends on the device.

On CUDA in bfloat16 this is ``torch.nn.functional.grouped_mm``: one launch, block ends stay on the device, no
host synchronisation. Everywhere else it is a loop of ``torch.mm(out=)``, which on a CPU is what
``grouped_mm`` does inside, without its restrictions on strides and dtypes. The loop never indexes a stacked weight
under autograd: that would zero-fill the gradient of the whole stack once per expert.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_kernel_on_cuda(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Compile an elementwise function of tensors for CUDA; call it as it is elsewhere.

    Between the products a layer is limited by memory: seven passes over ``[rows, width]`` become one. On a CPU the
    same takes a C++ compiler, which the machine may not have, for 5 % of the layer.
    """

    @functools.cache
    def compiled() -> Callable[_Arguments, _Result]:
        # dynamic: the number of rows changes with every batch under expert parallelism.
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0]
        on_cuda = isinstance(first, Tensor) and first.is_cuda
        return (compiled() if on_cuda else function)(*args, **kwargs)

    return call


class RowBlocks:
    """Rows sorted by expert, as consecutive blocks; multiplies each block with its expert's matrix."""

    def __init__(self, rows_per_expert: Int[Tensor, "local_experts"], dtype: torch.dtype):
        """Prepare for rows of ``dtype`` on the device of ``rows_per_expert``."""
        self._ends: Tensor | None = None
        self._sizes: list[int] = []
        if rows_per_expert.is_cuda and dtype == torch.bfloat16:
            self._ends = rows_per_expert.cumsum(0).to(torch.int32)
        else:
            self._sizes = rows_per_expert.tolist()

    def times(
        self, rows: Float[Tensor, "rows inner"], matrices: Float[Tensor, "local_experts outer inner"]
    ) -> Float[Tensor, "rows outer"]:
        """``rows[r] @ matrices[expert of r].T``."""
        return self._times(rows, matrices.transpose(1, 2))

    def times_transposed(
        self, rows: Float[Tensor, "rows outer"], matrices: Float[Tensor, "local_experts outer inner"]
    ) -> Float[Tensor, "rows inner"]:
        """``rows[r] @ matrices[expert of r]``, the gradient of ``times`` with respect to its rows."""
        return self._times(rows, matrices)

    def _times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        if self._ends is not None:
            return functional.grouped_mm(rows, matrices, offs=self._ends)
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        parts = zip(rows.split(self._sizes), matrices.unbind(0), out.split(self._sizes), strict=True)
        for block, matrix, target in parts:
            torch.mm(block, matrix, out=target)
        return out

    def outer(
        self, left: Float[Tensor, "rows outer"], right: Float[Tensor, "rows inner"]
    ) -> Float[Tensor, "local_experts outer inner"]:
        """``left_block.T @ right_block`` per expert, exactly 0 for an expert without rows."""
        if self._ends is not None:
            return functional.grouped_mm(left.t(), right, offs=self._ends)
        out = left.new_empty(len(self._sizes), left.shape[1], right.shape[1])
        parts = zip(left.split(self._sizes), right.split(self._sizes), out.unbind(0), strict=True)
        for left_block, right_block, target in parts:
            torch.mm(left_block.t(), right_block, out=target)
        return out
