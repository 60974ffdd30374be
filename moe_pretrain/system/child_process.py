"""No process of a run outlives the one that started it: an orphan would go on writing into the run's folder.

Imported before torch, whose import takes seconds in which the parent may die.
"""

import contextlib
import ctypes
import os
import signal

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
