"""Triton's kernels on a CPU, with the arithmetic of compiled ones where Triton's own interpreter has another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the interpreter in four things, in which it breaks off or computes what no GPU does.

    Arguments that are floats stay Python's instead of float32 scalars; bfloat16 is cut off instead of rounded; products
    of bfloat16 multiply the bits as integers; functions of CUDA's device library return nothing.
    """
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, rms_norm
    from triton.runtime import interpreter

    handle, builder, convert = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter._implicit_cvt
    cast, binary = builder.cast_impl, builder.binary_op

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    def cast_rounding(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            return handle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def binary_of_bfloat16(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        found = operation(_wide(left.data), _wide(right.data))
        return handle(found if found.dtype == np.bool_ else _rounded(found), tl.bfloat16)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(builder, "cast_impl", cast_rounding)
    monkeypatch.setattr(builder, "binary_op", binary_of_bfloat16)
    for module in (fused_add_rms_norm, rms_norm):
        monkeypatch.setattr(module, "rsqrt", lambda values: tl.math.rsqrt(values))


def _wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    narrow = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16()
    return narrow.view(torch.int16).numpy().view(np.uint16)
