"""Cheap checks around the step that turn silent defects into an error naming the tensor and the step."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.parallel.deepspeed_moe import is_expert
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.system.faults import Faults

_CHUNK = 1 << 22
_BITS_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SanityError(RuntimeError):
    """Something that must always hold does not."""


@contextmanager
def every_parameter_gets_gradient(model: nn.Module, step: int) -> Iterator[None]:
    """Raise after the block if a trainable parameter got no gradient in it (defects C5, C10)."""
    reached: set[int] = set()

    def noting(key: int) -> Callable[[Tensor], None]:
        return lambda grad: reached.add(key)

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    handles = [
        # ZeRO takes the gradient away in its own hook, so ours only notes that it came by.
        parameter.register_hook(noting(id(parameter)))
        for parameter in parameters.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in parameters.items():
        if id(parameter) not in reached:
            raise SanityError(f"step {step}: parameter {name} got no gradient")


def check_optimizer_covers(model: nn.Module, optimizer_parameters: list[Tensor]) -> None:
    """Raise unless the optimizer holds exactly the trainable parameters, by identity (defect C10)."""
    held = {id(parameter) for parameter in optimizer_parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise SanityError(f"parameter {name} is not in the optimizer")
    if len(held) != len(optimizer_parameters) or len(held) != sum(1 for p in model.parameters() if p.requires_grad):
        raise SanityError("the optimizer holds parameters twice, or some that are not in the model")


def check_replicas(model: DecoderLM, mesh: Mesh, step: int) -> None:
    """Raise unless replicas are bitwise equal and experts differ (defects C2, C4, C30).

    Dense parameters are compared over all ranks, expert parameters over the ranks that hold the same experts; then all
    experts of a layer must have different weights. Collective: every rank must call it, and all raise together: a rank
    that went on alone would hang in its next collective.
    """
    complaints = _differences(model, mesh)
    found = torch.tensor(bool(complaints), dtype=torch.int32, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if found:
        raise SanityError(f"step {step}: {complaints[0] if complaints else 'replicas differ on other ranks'}")


def _differences(model: DecoderLM, mesh: Mesh) -> list[str]:
    """Faults that this rank sees; runs every collective whatever it finds."""
    complaints = []
    for expert, group in ((False, None), (True, mesh.expert_data_group)):
        named = [(name, p) for name, p in model.named_parameters() if is_expert(p) == expert]
        if not named:
            continue
        sums = torch.stack([checksum(parameter) for _, parameter in named])
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        for (name, _), differs in zip(named, (low != high).tolist(), strict=True):
            if differs:
                complaints.append(f"parameter {name} differs between ranks that must hold the same")
    for layer in model.moe_layers():
        each = [expert for stack in layer.stacks for expert in stack.in_weight.unbind(stack.expert_axis)]
        own = torch.stack([checksum(expert) for expert in each])
        gathered = [torch.empty_like(own) for _ in range(mesh.shard.size)]
        dist.all_gather(gathered, own, group=mesh.expert_group)
        values = torch.cat(gathered)
        if len(values.unique()) != len(values):
            complaints.append(f"two experts of layer {layer.router.layer} have the same weights")
    return complaints


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits and their order, int64 scalar on its device, the same for the same bits."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS_DTYPE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(start, start + chunk.numel(), device=tensor.device) * 2 + 1
        total += (chunk * odd).sum()
    return total


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[tuple[list[str], dict[str, float]]]:
    """Within the block, note module outputs and parameter gradients that are not finite, in the order they come.

    Slow, since it looks at every one: for the one step that is known to be sick.

    Returns:
        The notes; and for each parameter the largest element of its gradients.
    """
    found: list[str] = []
    largest: dict[str, float] = {}

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
            elif gradient.numel():
                largest[name] = max(largest.get(name, 0.0), float(gradient.abs().max()))

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch_output(name)).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_hook(watch_gradient(name)).remove)
        yield found, largest


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
