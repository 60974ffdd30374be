"""Losses and gradients that are not finite: where the first one arises, and how to make one on purpose."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.system.faults import Faults


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, note module outputs and parameter gradients that are not finite, in the order they come.

    Slow, since it looks at every one: for the one step that is known to be sick.
    """
    found: list[str] = []

    def watch_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(tensor, Tensor) and not tensor.isfinite().all() for tensor in tensors):
                found.append(f"the output of {name or 'the model'}")

        return look

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                found.append(f"the gradient of {name}")

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch_output(name)).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_hook(watch_gradient(name)).remove)
        yield found


@contextmanager
def inject_sickness(model: DecoderLM, faults: Faults, step: int) -> Iterator[None]:
    """Within the block, the faults ``train.gradient`` and ``train.router``, if due.

    Raises:
        ValueError: No parameter has ``fault.parameter`` in its name.
    """
    if faults.due("train.router", step):
        for layer in model.moe_layers():
            for parameter in layer.router.parameters():
                parameter.data.zero_()  # all scores tie, so all tokens go to the same experts; the update undoes it
    if not faults.due("train.gradient", step):
        yield
        return
    parameters = [parameter for name, parameter in model.named_parameters() if faults.parameter in name]
    if not parameters:
        raise ValueError(f"fault.parameter={faults.parameter} must be part of a parameter's name")
    handle = parameters[0].register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    try:
        yield
    finally:
        handle.remove()
