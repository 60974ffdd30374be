"""Intervals of the global tensors that this rank holds.

Every logical tensor (float32 master weight, and the optimizer's moments of it) is one flat array over all experts,
keyed by the parameter's name. What a ZeRO rank holds of it is an interval ``[start, start + length)``. A checkpoint is
a set of intervals that covers every array, so it does not depend on the number of ranks, the expert-parallel size or
the ZeRO stage it was saved with.

The private names of DeepSpeed that say where a rank's interval lies (``_hp_mapping``) are used in this file alone;
``tests/contract/test_deepspeed_seam.py`` holds them to what is assumed here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_pretrain.engine.optimizers import OptimizerState
from moe_pretrain.parallel.deepspeed_moe import is_expert

if TYPE_CHECKING:  # it edits what it owns by what is here
    from moe_pretrain.engine.engine import TrainEngine

WEIGHT = "weight"


@dataclass(frozen=True)
class OwnedInterval:
    """An interval of one parameter's global array that this rank's optimizer owns.

    Attributes:
        name: Name of the parameter.
        start: First element, in the global array over all experts.
        master: float32 master weights of the interval; a view, writing changes the optimizer.
        kept: State that the optimizer keeps of the parameter.
        state: The optimizer's entry that holds it.
        state_start: Where the interval begins in the entry's flat moments.
        is_saved_here: Whether this rank writes it; False for replicas of what another rank writes.
    """

    name: str
    start: int
    master: Tensor
    kept: OptimizerState
    state: dict[str, Tensor]
    state_start: int
    is_saved_here: bool

    def arrays(self) -> dict[str, Tensor]:
        """The interval of the weight and of each moment, by kind; views."""
        part = slice(self.state_start, self.state_start + self.master.numel())
        return {WEIGHT: self.master, **{kind: self.state[kind].view(-1)[part] for kind in self.kept.moments}}

    @property
    def updates(self) -> Tensor:
        """Number of updates the optimizer has made; a view."""
        return self.state[self.kept.counter]


def global_shape(engine: "TrainEngine", parameter: Tensor) -> list[int]:
    """Shape over all experts."""
    shape = list(parameter.shape)
    if is_expert(parameter):
        shape[0] *= engine.mesh.shard.size
    return shape


def global_start(engine: "TrainEngine", parameter: Tensor) -> int:
    """First element of this rank's slice of the global array."""
    return engine.mesh.shard.rank * parameter.numel() if is_expert(parameter) else 0


def kept_moments(engine: "TrainEngine") -> dict[str, list[str]]:
    """Names of the moments that the optimizer keeps of each parameter."""
    state = engine.optimizer_config.state
    return {name: list(state(name, parameter).moments) for name, parameter in engine.model.named_parameters()}


def updates_made(engine: "TrainEngine") -> int:
    """Number of updates that the optimizer has made: the steps so far, but for those that were skipped."""
    return max((int(piece.updates) for piece in pieces(engine)), default=0)


def pieces(engine: "TrainEngine") -> Iterator[OwnedInterval]:
    """Every interval this rank's optimizer owns, with optimizer states that exist even before the first step."""
    optimizer = engine.client_optimizer
    if engine.config.zero_stage == 0:
        for name, parameter in engine.model.named_parameters():
            kept = engine.optimizer_config.state(name, parameter)
            group = engine.mesh.expert_data_group if is_expert(parameter) else None
            yield OwnedInterval(
                name,
                global_start(engine, parameter),
                parameter.data.view(-1),
                kept,
                kept.of(optimizer, parameter),
                0,
                is_saved_here=torch.distributed.get_rank(group) == 0,
            )
        return
    partitions = [group["params"][0] for group in optimizer.param_groups]
    for name, parameter in engine.model.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by ZeRO; None: no part is here
        if mapping is None:
            continue
        kept = engine.optimizer_config.state(name, parameter)
        yield OwnedInterval(
            name,
            global_start(engine, parameter) + mapping.lp_fragment_address.start,
            mapping.hp_fragment.data,
            kept,
            kept.of(optimizer, partitions[mapping.param_group_index]),
            mapping.hp_fragment_address.start,
            is_saved_here=True,
        )
