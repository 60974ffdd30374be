"""Sizes to ranks and groups. The only file beside ``pretrain.py`` that reads the environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.config import ParallelConfig
from moe_pretrain.parallel.deepspeed_moe import expert_groups, init_deepspeed_communication
from moe_pretrain.parallel.rendezvous import Rendezvous, launched_number, meet


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks.

    Attributes:
        rank: Rank in the world; all ranks are data-parallel ranks.
        world_size: Number of ranks.
        device: Device of this process.
        shard: Which experts this rank holds.
        expert_group: Ranks that together hold one copy of the experts.
        expert_data_group: Ranks that hold the same experts.
    """

    rank: int
    world_size: int
    device: torch.device
    shard: ExpertShard
    expert_group: dist.ProcessGroup
    expert_data_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The main rank's ``value``, on every rank; every rank must call it."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """The result of ``action`` on the main rank, on every rank; every rank must call it.

        Raises:
            Exception: The action has failed, on every rank: none waits for a main rank that has gone.
        """
        result: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                result = (action(), None)
            except (OSError, ValueError, RuntimeError) as error:
                result = (None, error)
        value, failure = self.share(result)
        if failure is not None:
            raise failure
        return value


def build_mesh(config: ParallelConfig, device_type: str, meeting: Rendezvous | None = None) -> Mesh:
    """Join or create the process group and the expert groups.

    Args:
        config: Sizes, already checked against the world size.
        device_type: ``cuda`` or ``cpu``.
        meeting: Where the ranks have met; by default they meet here.
    """
    local_rank = launched_number("LOCAL_RANK") or 0
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=config.collective_seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        met = meeting or meet(config)
        dist.init_process_group(
            backend,
            # Else ranks that torchrun has started again find the addresses of those that are gone.
            store=dist.PrefixStore(f"default_pg/{met.attempt}", met.store),
            rank=met.rank,
            world_size=met.world_size,
            timeout=timeout,
        )
        os.environ.update(RANK=str(met.rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(met.world_size))
    init_deepspeed_communication(device_type, config.collective_seconds)
    expert_group, expert_data_group = expert_groups(config.expert_parallel_size)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        shard=ExpertShard(dist.get_rank(expert_group), config.expert_parallel_size),
        expert_group=expert_group,
        expert_data_group=expert_data_group,
    )
