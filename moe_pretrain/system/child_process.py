"""No process of a run outlives the one that started it: an orphan would go on writing into the run's folder.

Imported before torch, whose import takes seconds in which the parent may die.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_ASK_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}

LAUNCHER = "MOE_PRETRAIN_LAUNCHER"
"""Variable with the process id of our own launcher, in the environment of its workers."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"


def is_worker() -> bool:
    """Whether our own launcher started this process, and holds the run's folder for it."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher dies, if that is torchrun or ours.

    A launcher that dies of a signal it does not handle (torchrun of SIGUSR1, any of SIGKILL) kills nobody by itself.
    """
    if LAUNCHER in os.environ or _TORCHRUN in os.environ:
        die_with(int(os.environ.get(LAUNCHER, os.getppid())))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` dies, and end now if that has happened already."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux); called before the process becomes a program."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: orphans are possible
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread of process ``pid``: a stopped one handles it before it goes on.

    A signal to the process is taken by whichever of its threads is woken first, while the main thread goes on.

    Raises:
        ProcessLookupError: There is no such process.
    """
    try:
        tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    except AttributeError:  # a C library without it
        os.kill(pid, number)
        return
    if tgkill(pid, pid, number):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def start_helper(module: str, words: Sequence[str], pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Call ``module.main()`` in a fresh interpreter that does not import the caller's ``__main__``.

    From its first instruction on it does not hear SIGINT, SIGTERM and SIGUSR1: a terminal sends the first and SLURM
    all of them to every process of a run, where they ask the ranks to stop. The ranks decide when their helpers end.

    Args:
        module: An importable module.
        words: Become ``sys.argv[1:]``.
        pass_fds: Open files that it inherits.
    """
    program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASK_TO_STOP)  # what is blocked here stays so in the child
    try:
        return subprocess.Popen([sys.executable, "-c", program, *words], pass_fds=pass_fds, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
