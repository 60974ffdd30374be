"""Which intervals of which global tensors this rank holds.

Every logical tensor (float32 master weight, and AdamW's two moments) is one flat array over all experts, keyed by the
parameter's name. What a ZeRO rank holds of it is an interval ``[start, start + length)``. A checkpoint is a set of
intervals that covers every array, so it does not depend on the number of ranks, the expert-parallel size or the
ZeRO stage it was saved with.

The private names of DeepSpeed that say where a rank's interval lies (``_hp_mapping``) are used in this file alone;
``tests/contract/test_deepspeed_seam.py`` holds them to what is assumed here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.parallel.deepspeed_moe import is_expert

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedInterval:
    """An interval of one parameter's global array that this rank's optimizer owns.

    Attributes:
        name: Name of the parameter.
        start: First element, in the global array over all experts.
        master: float32 master weights of the interval; a view, writing changes the optimizer.
        state: The optimizer's state that holds the interval's moments.
        state_start: Where the interval begins in the state's flat moments.
        is_saved_here: Whether this rank writes it; False for replicas of what another rank writes.
    """

    name: str
    start: int
    master: Tensor
    state: dict[str, Tensor]
    state_start: int
    is_saved_here: bool

    def moment(self, kind: str) -> Tensor:
        """The interval of ``exp_avg`` or ``exp_avg_sq``; a view."""
        return self.state[kind].view(-1)[self.state_start : self.state_start + self.master.numel()]


def global_shape(engine: TrainEngine, parameter: Tensor) -> list[int]:
    """Shape over all experts."""
    shape = list(parameter.shape)
    if is_expert(parameter):
        shape[0] *= engine.mesh.shard.size
    return shape


def global_start(engine: TrainEngine, parameter: Tensor) -> int:
    """First element of this rank's slice of the global array."""
    return engine.mesh.shard.rank * parameter.numel() if is_expert(parameter) else 0


def pieces(engine: TrainEngine) -> Iterator[OwnedInterval]:
    """Every interval this rank's optimizer owns, with optimizer states that exist even before the first step."""
    adamw = engine.adamw
    if engine.config.zero_stage == 0:
        for name, parameter in engine.model.named_parameters():
            expert = is_expert(parameter)
            group = engine.mesh.expert_data_group if expert else None
            yield OwnedInterval(
                name,
                global_start(engine, parameter),
                parameter.data.view(-1),
                _state(adamw, parameter),
                0,
                is_saved_here=torch.distributed.get_rank(group) == 0,
            )
        return
    partitions = [group["params"][0] for group in adamw.param_groups]
    for name, parameter in engine.model.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by ZeRO; None: no part is here
        if mapping is None:
            continue
        yield OwnedInterval(
            name,
            global_start(engine, parameter) + mapping.lp_fragment_address.start,
            mapping.hp_fragment.data,
            _state(adamw, partitions[mapping.param_group_index]),
            mapping.hp_fragment_address.start,
            is_saved_here=True,
        )


def _state(adamw: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of ``parameter``, made as AdamW would make it if there was no step yet."""
    state = adamw.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter.data)
    return state
