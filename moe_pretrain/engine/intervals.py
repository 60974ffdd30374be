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

from moe_pretrain.engine.optimizers.base import Fragment, OptimizerState
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.types import ExpertShard
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
    roles, state = parameter_roles(engine.model), engine.optimizer_config.state
    return {name: list(state(roles[name]).moments) for name, _ in engine.model.named_parameters()}


def updates_made(engine: "TrainEngine") -> int:
    """Number of updates that the optimizer has made: the steps so far, but for those that were skipped."""
    return max((int(piece.updates) for piece in pieces(engine)), default=0)


def fragments(engine: "TrainEngine") -> list[Fragment]:
    """Fragments of all parameters of this rank, those of which its optimizer owns nothing too."""
    roles, partitions = parameter_roles(engine.model), [group["params"][0] for group in engine.optimizer.param_groups]
    found = []
    for name, parameter in engine.model.named_parameters():
        owners = engine.mesh.expert_data_group if is_expert(parameter) else None
        shard = engine.mesh.shard if is_expert(parameter) else ExpertShard()
        whole = (0, parameter.numel(), parameter, 0)
        if engine.config.zero_stage == 0:
            is_replica = torch.distributed.get_rank(owners) > 0
            found.append(Fragment(name, parameter, roles[name], *whole, owners, is_replica, shard))
            continue
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by ZeRO; None: no part is here
        place = (0, 0, partitions[engine.group_of[parameter]], 0)
        if mapping is not None:
            local, own = mapping.lp_fragment_address, mapping.hp_fragment_address
            place = (local.start, own.numel, partitions[mapping.param_group_index], own.start)
        found.append(Fragment(name, parameter, roles[name], *place, owners, False, shard))
    return found


def pieces(engine: "TrainEngine") -> Iterator[OwnedInterval]:
    """Every interval this rank's optimizer owns, with optimizer states that exist even before the first step."""
    for fragment in fragments(engine):
        if not fragment.length:
            continue
        kept = engine.optimizer_config.state(fragment.role)
        yield OwnedInterval(
            fragment.name,
            global_start(engine, fragment.parameter) + fragment.start,
            fragment.partition.data.view(-1)[fragment.place],
            kept,
            kept.of(engine.client_optimizer, fragment.partition),
            fragment.partition_start,
            is_saved_here=not fragment.is_replica,
        )
