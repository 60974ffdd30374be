"""Processes that help one rank with its data."""

import signal
import subprocess
import sys
from collections.abc import Sequence

_ASK_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


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
