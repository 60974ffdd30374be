"""Parameters that one rank holds, counted on a model without storage."""

from dataclasses import dataclass

import torch

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.types import ExpertShard, float32_parameters, sharded_parameters

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class LocalParameters:
    """Parameters that one rank holds.

    Attributes:
        dense: Replicated on every rank, in the engine's dtype.
        kept: Replicated and always float32: routers.
        expert: This rank's experts.
        largest: The largest tensor.
        moment_bytes: Bytes of the optimizer's moments of the first two.
        expert_moment_bytes: The same of this rank's experts.
        update_bytes: What an update needs beside.
    """

    dense: int
    kept: int
    expert: int
    largest: int
    moment_bytes: int
    expert_moment_bytes: int
    update_bytes: float

    @property
    def count(self) -> int:
        """All of them."""
        return self.dense + self.kept + self.expert

    def owned(self, ranks: int, expert_parallel_size: int) -> float:
        """Elements whose optimizer state is on this rank under ZeRO."""
        return (self.dense + self.kept) / ranks + self.expert * expert_parallel_size / ranks

    def owned_moment_bytes(self, ranks: int, expert_parallel_size: int) -> float:
        """Bytes of the moments of these elements."""
        return self.moment_bytes / ranks + self.expert_moment_bytes * expert_parallel_size / ranks


def local_parameters(config: Config) -> LocalParameters:
    """Count one rank's parameters on a model without storage."""
    with torch.device("meta"):
        model = DecoderLM(config.model, config.router, ExpertShard(0, config.parallel.expert_parallel_size))
    kept = sum(parameter.numel() for parameter in float32_parameters(model))
    of_experts = {id(p) for layer in model.moe_layers() for p in sharded_parameters(layer.experts)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    expert = sum(sizes[name] for name, parameter in model.named_parameters() if id(parameter) in of_experts)
    moments, roles = {False: 0, True: 0}, parameter_roles(model)
    for name, parameter in model.named_parameters():
        per_element = config.optimizer.state(roles[name]).bytes_per_element
        moments[id(parameter) in of_experts] += per_element * sizes[name]
    dense = sum(sizes.values()) - kept - expert
    update_bytes = config.optimizer.update_bytes(model)
    return LocalParameters(dense, kept, expert, max(sizes.values()), moments[False], moments[True], update_bytes)
