"""Network interface of this machine that leads to the other hosts."""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moe_pretrain.parallel.config import ParallelConfig

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_NAME_BYTES = 15
_ANY_PORT = 9


def interface_towards(host: str) -> str | None:
    """Name of the interface through which this machine reaches ``host``, by IPv4; None if that cannot be found out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))  # of a datagram socket: chooses the way, sends nothing
        except OSError:
            return None
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == own_address:
                return name
    return None


def launched_world_size() -> int | None:
    """Number of ranks if a launcher (torchrun, ``deepspeed``, SLURM with torchrun's variables) started this process."""
    rank, world_size = launched_number("RANK"), launched_number("WORLD_SIZE")
    return None if rank is None else world_size


def launched_rank() -> int:
    """Rank given by the launcher; 0 without one."""
    return launched_number("RANK") or 0


def launched_number(name: str) -> int | None:
    """A number that a launcher left in the environment; None where it left nothing, or an empty text.

    Raises:
        ValueError: It is no number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}={text} in the environment must be a whole number, as torchrun sets it, or not be set")
    return int(text)


@dataclass(frozen=True)
class Rendezvous:
    """Meeting of the ranks, before any of them can wait for another in a collective.

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


def meet(config: ParallelConfig) -> Rendezvous:
    """Meet the other ranks, as the launcher's variables say; a process group that exists already is joined.

    Raises:
        ValueError: They cannot be reached.
    """
    attempt = launched_number("TORCHELASTIC_RESTART_COUNT") or 0
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return Rendezvous(store, dist.get_rank(), dist.get_world_size(), attempt)
    if launched_world_size() is None:
        # One process by itself needs no port: a fixed or guessed one could be taken.
        return Rendezvous(dist.HashStore(), 0, 1)
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
    return Rendezvous(store, rank, world_size, attempt)
