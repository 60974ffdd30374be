"""Starts worker processes on this host when nobody else did.

torchrun would do, but for two habits: it kills workers 30 seconds after a signal, in the middle of a large checkpoint,
and it exits 1 even when every worker saved and stopped as asked (defect C35). Here signals are passed on and waited
for, workers die with their parent, and the exit code is the workers'. A worker that dies is named, with the step and
phase it was last seen in, and the others write their stacks.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

from moe_pretrain.parallel.heartbeat import STACK_SIGNAL, last_seen
from moe_pretrain.system.child_process import LAUNCHER, signal_main_thread
from moe_pretrain.system.exit_codes import INTERRUPTED, LOST_RANK
from moe_pretrain.system.stop_signals import HANDLED

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""How long the other workers may take after one has failed."""
_TRACEBACK = 1
"""Python's own exit code, also of a rank whose collective failed because another had left."""
_LOOPBACK_SECONDS = 5.0
_STACK_SECONDS = 2.0
"""How long workers may take to write their stacks."""


def run_workers(arguments: list[str], processes: int) -> int:
    """Run ``python -m moe_pretrain ARGUMENTS`` in ``processes`` workers with torchrun's variables; wait for them.

    Returns:
        0 if all workers exit with 0, else the first failing worker's code (128 + signal if a signal killed it); 130
        after a second SIGINT, which kills them.
    """
    _check_loopback(processes)
    # The parent holds the store, so there is no port to guess and none that another process can take meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    workers: list[subprocess.Popen[bytes]] = []

    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        _signal_all(workers, signal.SIGKILL if interrupts > 1 else number)

    before = {number: signal.signal(number, forward) for number in HANDLED}
    try:
        for rank in range(processes):
            variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "moe_pretrain", *arguments],
                    env=variables,
                    # Own sessions: a Ctrl-C reaches them once, through us.
                    start_new_session=True,
                )
            )
        code = _wait(workers, store, lambda: interrupts > 1)
        return INTERRUPTED if interrupts > 1 else code
    finally:
        for worker in workers:
            worker.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_loopback(processes: int) -> None:
    """Raise at once where the workers could not meet: torch tries for minutes, and then shows C++ stacks.

    Raises:
        ValueError: There is no 127.0.0.1, as in a network namespace whose ``lo`` is down.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"parallel.processes={processes}: the processes meet at 127.0.0.1, which this machine does not reach "
            f"({error.strerror or error}): bring it up (ip link set lo up), or use parallel.processes=1"
        ) from None


def _wait(workers: list[subprocess.Popen[bytes]], store: dist.TCPStore, is_interrupted: Callable[[], bool]) -> int:
    """Wait for all; once one has failed the others get ``_GRACE_SECONDS`` to end by themselves."""
    failed = 0
    deadline = float("inf")
    while time.monotonic() < deadline:
        # Every one of them is asked: the first may be stopped while another has ended.
        found = [worker.poll() for worker in workers]
        is_over = None not in found
        codes = {rank: code for rank, code in enumerate(found) if code}
        if codes and not failed:
            # One that was killed before those that then missed it.
            # Then one that found another stuck, before those whose collectives failed when it had left.
            rank, failed = min(codes.items(), key=lambda ended: (ended[1] > 0, ended[1] != LOST_RANK))
            deadline = time.monotonic() + _GRACE_SECONDS
            if failed < 0 and not is_interrupted():
                name = signal.Signals(-failed).name
                place = last_seen(store, rank)
                print(f"moe-pretrain: rank {rank} was killed by {name}, last seen at {place}", file=sys.stderr)
            if failed < 0 or failed == LOST_RANK:
                _write_stacks(workers)
                break
        if failed == _TRACEBACK and LOST_RANK in codes.values():
            failed = LOST_RANK
        if is_over:
            break
        time.sleep(_POLL_SECONDS)
    return failed if failed >= 0 else 128 - failed


def _write_stacks(workers: list[subprocess.Popen[bytes]]) -> None:
    """Have the workers that are left write their stacks, stopped ones too."""
    for worker in workers:
        if worker.poll() is None:
            signal_main_thread(worker.pid, STACK_SIGNAL)
    _signal_all(workers, signal.SIGCONT)
    deadline = time.monotonic() + _STACK_SECONDS
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _signal_all(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
