"""Edits of weights between two steps: an expert that comes into use gets its weights and a new optimizer state."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_pretrain.engine.intervals import WEIGHT, pieces
from moe_pretrain.moe.counter_noise import start_noise
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import ExpertStart

if TYPE_CHECKING:
    from moe_pretrain.engine.engine import TrainEngine


@torch.no_grad()
def start_expert(engine: "TrainEngine", layer: MoELayer, start: ExpertStart) -> None:
    """Write the rows of ``start.slot``: weights, float32 master weights, and zeros into the optimizer's moments.

    Under ZeRO a weight alone would be overwritten by its master in the next step. Collective: every rank must call it.
    """
    rows: dict[int, Tensor | None] = {}  # by parameter: its new row, None to keep what is there
    for name in start.router_rows:
        parameter = layer.router.get_parameter(name)
        rows[id(parameter)] = parameter[start.slot].float()
    local = list(layer.experts.expert_ids)
    for number, parameter in enumerate(layer.experts.parameters()):
        value = None
        if start.sources is not None:
            value = _mean_of_experts(engine, parameter, local, start.sources)
            noise = start_noise(value.shape, engine.seed, start.key, layer.router.layer, number).to(value.device)
            value += start.noise * value.square().mean().sqrt() * noise
            if start.slot in local:
                parameter[local.index(start.slot)] = value.to(parameter.dtype)
        rows[id(parameter)] = value
    parameters = dict(engine.model.named_parameters())
    for piece in pieces(engine):
        parameter = parameters[piece.name]
        if id(parameter) not in rows:
            continue
        size = parameter[0].numel()
        first, stop = start.slot * size, (start.slot + 1) * size
        begin, end = max(first, piece.start), min(stop, piece.start + piece.master.numel())
        if begin >= end:
            continue
        owned, row = slice(begin - piece.start, end - piece.start), rows[id(parameter)]
        for kind, values in piece.arrays().items():
            if kind != WEIGHT:
                values[owned] = 0
            elif row is not None:
                values[owned] = row.reshape(-1)[begin - first : end - first]


def _mean_of_experts(engine: "TrainEngine", parameter: nn.Parameter, local: list[int], sources: Tensor) -> Tensor:
    """Mean of the ``sources``' parts of ``parameter`` over all ranks of a copy of the experts, float32.

    In float64 the sum does not depend on how the experts are spread, to a part in 2**29.
    """
    own = sources[local].to(parameter.device)
    total = parameter[own].double().sum(dim=0)
    dist.all_reduce(total, group=engine.mesh.expert_group)
    return (total / sources.sum().to(total)).float()
