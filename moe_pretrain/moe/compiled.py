"""Regions of elementwise operations that are one kernel on a GPU, and plain operations elsewhere."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_kernel_on_cuda(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Compile a function of tensors, elementwise and sums over the last axis, for CUDA; call it as it is elsewhere.

    Between the products a model is limited by memory: many passes over the same rows become one. On a CPU the same
    takes a C++ compiler, which the machine may not have, for 5 % of a layer.

    The first argument is a tensor. What a region computes for backward is compiled too, if its inputs have a gradient.
    """

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0]
        on_cuda = isinstance(first, Tensor) and first.is_cuda
        return (compiled(function) if on_cuda else function)(*args, **kwargs)

    return call


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as kernels; made once.

    Sizes are variables to the compiler: the number of rows changes with every batch under expert parallelism. What a
    test wraps around a function, a check of its shapes, is left out.
    """
    return torch.compile(inspect.unwrap(function), dynamic=True)
