"""A process that has done the program's slow imports and forks Python programs: ``python -c`` of ``serve_forever``.

What it forks is the program in all but its start: own process, signals, exit code, environment, folder and output. What
imports print or change is not seen, and the seed of Python's hashes is that of the server; ``run_python`` is for that,
and for a rank's own start, as the tests of SLURM have it. Programs of ours that such a process starts in turn (the
ranks of a launcher or of torchrun, the jobs of a sweep, what a script runs) are forked from it as well.
"""

import atexit
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Start:
    """Words after ``python`` to run, where, with which environment and output files. The answer is its process id."""

    words: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    output: str
    errors: str


@dataclass(frozen=True)
class Poll:
    """A process to ask after. The answer is its exit code, minus the signal that killed it, or None while it runs."""

    process: int


def serve_forever(descriptor: int) -> None:
    """Serve the other end of a pipe; children are killed when that is closed."""
    import helpers.program_preload  # noqa: F401

    _fork_instead_of_starting()
    channel = Connection(descriptor)
    running: set[int] = set()
    while True:
        try:
            request = channel.recv()
        except EOFError:
            for process in running:
                os.kill(process, signal.SIGKILL)
            return
        if isinstance(request, Poll):
            found, status = os.waitpid(request.process, os.WNOHANG)
            running -= {found}
            channel.send(os.waitstatus_to_exitcode(status) if found else None)
            continue
        process = os.fork()
        if process == 0:
            channel.close()
            _become(request)
        running.add(process)
        channel.send(process)


def _become(request: Start) -> None:
    """The program, to its end but for the interpreter's: that would free each of the server's objects for itself.

    It takes two thirds of the time of a program that says one line. Threads are joined and ``atexit`` is heard.
    """
    os.chdir(request.folder)
    for descriptor, path in ((0, os.devnull), (1, request.output), (2, request.errors)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    code = _run(request.words, request.environment)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: Sequence[str], environment: dict[str, str]) -> int:
    """``python WORDS``, in this process: ``-m MODULE`` or a script's path, then their own words."""
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    if tuple(words[:2]) == ("-m", "moe_pretrain"):
        from moe_pretrain.cli import main

        sys.argv = list(words[1:])
        return main()
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
            return 1
        return exit.code or 0
    return 0


def _fork_instead_of_starting() -> None:
    """Have ``subprocess`` fork this process for each ``python -m moe_pretrain``, in this process and all it forks."""
    start = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def fork(
        self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, *rest: Any
    ) -> None:
        words = [] if isinstance(args, str | bytes | os.PathLike) else [str(word) for word in args]
        if words[1:2] == ["-u"]:
            del words[1]
        if words[:3] != [sys.executable, "-m", "moe_pretrain"]:
            return start(self, args, executable, preexec_fn, close_fds, pass_fds, *rest)
        cwd, environment, _, _, _, *pipes = rest[:11]
        new_session = rest[16]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return self._close_pipe_fds(*pipes)
        code = 1
        try:
            if new_session:
                os.setsid()
            _take_over(pipes[0], pipes[3], pipes[5], pass_fds)
            if cwd is not None:
                os.chdir(cwd)
            if preexec_fn is not None:
                preexec_fn()
            code = _run(words[1:], dict(os.environ if environment is None else environment))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not through the parent's frames, which may kill or wait for others

    subprocess.Popen._execute_child = fork  # type: ignore[attr-defined]


def _take_over(standard_input: int, output: int, errors: int, kept: Sequence[int]) -> None:
    """What an ``exec`` does: descriptors, signal handlers, and the state of Hydra that a sweep's driver has."""
    from hydra.core.global_hydra import GlobalHydra

    for target, source in enumerate((standard_input, output, errors)):
        if source not in (-1, target):
            os.dup2(source, target)
    first = 3
    for descriptor in (*sorted(kept), 4096):
        os.closerange(first, descriptor)
        first = descriptor + 1
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    GlobalHydra.instance().clear()
