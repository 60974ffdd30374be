"""Another process's world, for what may depend on none: ranks, clocks and process ids."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed


@contextmanager
def elsewhere() -> Iterator[None]:
    """As another process sees the world: another rank by the launcher's variables and torch, a year later."""
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_RANK": "1"}
    year, pid = 31_536_001, os.getpid()
    clocks = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}
    clocks_in_ns = {name: getattr(time, name) for name in ("time_ns", "monotonic_ns", "perf_counter_ns")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(mock.patch.object(os, "getpid", lambda: pid + 1))
        for name, clock in clocks.items():
            stack.enter_context(mock.patch.object(time, name, lambda clock=clock: clock() + year))
        for name, clock in clocks_in_ns.items():
            stack.enter_context(mock.patch.object(time, name, lambda clock=clock: clock() + year * 10**9))
        for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
            stack.enter_context(mock.patch.object(torch.distributed, name, lambda *group, value=value: value))
        yield
