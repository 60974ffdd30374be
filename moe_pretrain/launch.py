"""Starts worker processes on this host when nobody else did.

torchrun would do, but for two habits: it kills workers 30 seconds after a signal, in the middle of a large checkpoint,
and it exits 1 even when every worker saved and stopped as asked (defect C35). Here signals are passed
on and waited for, workers die with their parent, and the exit code is the workers'.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import torch.distributed as dist

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""How long the other workers may take after one has failed."""


def run_workers(arguments: list[str], processes: int) -> int:
    """Run ``python -m moe_pretrain ARGUMENTS`` in ``processes`` workers with torchrun's variables; wait for them.

    Returns:
        0 if all workers exit with 0, else the first failing worker's code (128 + signal if a signal killed it).
    """
    # The parent holds the store, so there is no port to guess and none that another process can take meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    workers: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        for rank in range(processes):
            variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "moe_pretrain", *arguments],
                    env=variables,
                    # Own sessions: a Ctrl-C reaches them once, through us.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )
        return _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed the others get ``_GRACE_SECONDS`` to end by themselves."""
    failed = 0
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        codes = [worker.returncode for worker in workers if worker.poll() is not None]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    failed = failed or next((worker.returncode for worker in workers if worker.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _die_with_parent() -> None:
    """Have the kernel kill this worker when its parent dies, so a killed launcher leaves no orphans (Linux)."""
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # not Linux: orphans are possible
