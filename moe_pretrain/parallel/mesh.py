"""Sizes to ranks and groups. The only file beside ``pretrain.py`` that reads the environment."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.deepspeed_moe import expert_groups, init_deepspeed_communication
from moe_pretrain.parallel.rendezvous import interface_towards


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes train, and how experts are spread over them.

    Attributes:
        processes: Processes that ``train`` starts by itself. Under torchrun, ``deepspeed`` or SLURM the launcher's
            number of ranks counts instead.
        expert_parallel_size: Ranks over which one copy of the experts is spread; divides the number of ranks and
            the number of experts. Neighbouring ranks form a group, so the exchange stays inside a node while
            this is at most the node's number of GPUs.
        timeout_seconds: How long a collective may take before the run ends with an error.
        heartbeat_seconds: How long a rank may give no sign of life before the run ends and names it.
    """

    processes: int
    expert_parallel_size: int
    timeout_seconds: int
    heartbeat_seconds: int

    def __post_init__(self) -> None:
        for name in ("processes", "expert_parallel_size", "timeout_seconds", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")

    def check(self, world_size: int, num_experts: int) -> None:
        """Raise if the experts cannot be spread over ``world_size`` ranks; ``num_experts`` is 0 without routing."""
        size = self.expert_parallel_size
        if size > 1 and not num_experts:
            raise ValueError(f"parallel.expert_parallel_size={size} must be 1: router=dense has no experts to spread")
        if world_size % size:
            raise ValueError(
                f"parallel.expert_parallel_size={size} must divide the number of ranks={world_size}; valid: "
                f"{_divisors(world_size)}"
            )
        if num_experts % size:
            raise ValueError(
                f"parallel.expert_parallel_size={size} must divide model.moe.num_experts={num_experts}; valid: "
                f"{[d for d in _divisors(world_size) if num_experts % d == 0]}"
            )


def _divisors(value: int) -> list[int]:
    return [candidate for candidate in range(1, value + 1) if value % candidate == 0]


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


def launched_world_size() -> int | None:
    """Number of ranks if a launcher (torchrun, ``deepspeed``, SLURM with torchrun's variables) started this process."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def launched_rank() -> int:
    """Rank given by the launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Meeting:
    """Where the ranks have met, before any of them can wait for another in a collective.

    Attributes:
        store: What they share: the launcher's store, or the one that rank 0 holds.
        rank: Rank in the world.
        world_size: Number of ranks.
        attempt: How often torchrun has started the ranks again; they may meet at the same store.
    """

    store: dist.Store
    rank: int
    world_size: int
    attempt: int = 0


def meet(config: ParallelConfig) -> Meeting:
    """Meet the other ranks, as the launcher's variables say; a process group that exists already is joined.

    Raises:
        ValueError: They cannot be reached.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return Meeting(store, dist.get_rank(), dist.get_world_size(), attempt)
    if launched_world_size() is None:
        # One process by itself needs no port: a fixed or guessed one could be taken.
        return Meeting(dist.HashStore(), 0, 1)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise ValueError(f"MASTER_ADDR={host}, MASTER_PORT={port}: both must be set when RANK and WORLD_SIZE are")
    # gloo takes the interface of this host's name, which on many machines is the loopback's, where nobody else is.
    if (interface := interface_towards(host)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=config.timeout_seconds))))
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"MASTER_ADDR={host}, MASTER_PORT={port}: the ranks did not meet there within "
            f"parallel.timeout_seconds={config.timeout_seconds}: {reason}"
        ) from None
    return Meeting(store, rank, world_size, attempt)


def build_mesh(config: ParallelConfig, device_type: str, meeting: Meeting | None = None) -> Mesh:
    """Join or create the process group and the expert groups.

    Args:
        config: Sizes, already checked against the world size.
        device_type: ``cuda`` or ``cpu``.
        meeting: Where the ranks have met; by default they meet here.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=config.timeout_seconds)
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
    init_deepspeed_communication(device_type, config.timeout_seconds)
    expert_group, expert_data_group = expert_groups(config.expert_parallel_size)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        shard=ExpertShard(dist.get_rank(expert_group), config.expert_parallel_size),
        expert_group=expert_group,
        expert_data_group=expert_data_group,
    )
