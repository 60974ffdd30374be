"""The three products of ``quack.gemm_interface`` as its documentation has them, in plain loops on any device.

What a kernel leaves unwritten is NaN here: rows past the last end.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def interleaved(matrix: Tensor) -> Tensor:
    """Halves of the axis that is not contiguous, as ``[first 0, second 0, first 1, ...]``."""
    axis = -2 if matrix.stride(-1) == 1 else -1
    return torch.stack(matrix.chunk(2, dim=axis), dim=axis if axis == -1 else -2).flatten(axis - 1, axis)


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    concat_layout: tuple[str, ...] = (),
    tuned: bool = True,
) -> Tensor:
    """Products of rows in groups with a matrix each, or of the rows of each group with each other."""
    assert not tuned, "kernels that were chosen by timing may differ between ranks"
    assert (A_idx is None or A_idx.dtype == torch.int32) and B.dtype == A.dtype == torch.bfloat16
    B = interleaved(B) if "B" in concat_layout else B
    if cu_seqlens_m is not None:
        assert cu_seqlens_m.dtype == torch.int32 and out is None
        rows = A if A_idx is None else A[A_idx.long()]
        product = rows.new_full((len(rows), B.shape[-1]), torch.nan)
        for group, part in enumerate(parts(cu_seqlens_m)):
            product[part] = (rows[part].float() @ B[group].float()).to(A.dtype)
        return product
    assert cu_seqlens_k is not None and cu_seqlens_k.dtype == torch.int32
    columns = A if A_idx is None else A[:, A_idx.long()]
    found = torch.stack([columns[:, part].float() @ B[part].float() for part in parts(cu_seqlens_k)]).to(A.dtype)
    if "out" in concat_layout:
        assert out is not None and out.stride(-1) != 1, "the halves lie along the axis that is not contiguous"
        found = torch.cat([found[..., ::2], found[..., 1::2]], dim=-1)
    return found if out is None else out.copy_(found)


def gemm_gated(A: Tensor, B: Tensor, activation: str, **words: Any) -> tuple[Tensor, Tensor]:
    """A product whose columns are gate, up, gate, ...; and ``silu(gate) * up``."""
    assert activation == "swiglu"
    before = gemm(A, B, **words)
    gate, up = before.float()[:, ::2], before.float()[:, 1::2]
    return before, (functional.silu(gate) * up).to(A.dtype)


def gemm_dgated(
    A: Tensor,
    B: Tensor,
    PreAct: Tensor,
    activation: str,
    colvec_scale: Tensor,
    colvec_reduce: bool,
    dynamic_scheduler: bool,
    **words: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the gated activation and the activation, both scaled; their dot product, of which none is."""
    assert activation == "swiglu" and colvec_reduce and not dynamic_scheduler and colvec_scale.dtype == torch.float32
    product = gemm(A, B, **words).float()
    gate, up = (PreAct.float()[:, start::2].detach().requires_grad_() for start in (0, 1))
    with torch.enable_grad():
        act = functional.silu(gate) * up
    scale = colvec_scale[:, None]
    grad_gate, grad_up = torch.autograd.grad(act, [gate, up], product * scale)
    grad_before = torch.stack([grad_gate, grad_up], dim=-1).flatten(1)
    act = act.detach()
    return grad_before.to(A.dtype), (act * scale).to(A.dtype), (act * product).sum(dim=1)


def parts(ends: Tensor) -> list[slice]:
    """Slices between ends, the first of which is 0."""
    assert int(ends[0]) == 0
    return [slice(*pair) for pair in itertools.pairwise(ends.tolist())]
