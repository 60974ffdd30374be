"""A process that has done the program's slow imports and forks it: ``python -c`` of ``serve_forever``.

What it forks is the program in all but its start: own process, signals, exit code, environment, folder and output. What
imports print or change is not seen, and the seed of Python's hashes is that of the server; ``run_python`` is for that,
and for a rank's own start, as the tests of torchrun, SLURM and sweeps have it.
"""

import os
import random
import signal
import sys
import traceback
import types
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Start:
    """A command to run, where, with which environment and output files. The answer is its process id."""

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
    """The program, to the interpreter's end."""
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    for descriptor, path in ((0, os.devnull), (1, request.output), (2, request.errors)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    random.seed()
    from moe_pretrain.cli import main
    from moe_pretrain.parallel import launcher as launch

    launch.subprocess = types.SimpleNamespace(Popen=ForkedWorker)  # type: ignore[assignment]
    sys.argv = ["moe_pretrain", *request.words]
    sys.exit(main())


class ForkedWorker:
    """What the launcher asks of ``subprocess.Popen`` for a rank, forked from the launcher: imports are done."""

    def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool):
        assert command[:3] == [sys.executable, "-m", "moe_pretrain"] and start_new_session
        self.returncode: int | None = None
        self._process = os.fork()
        if self._process == 0:
            self._run(command[3:], env)

    def _run(self, words: list[str], env: dict[str, str]) -> None:
        from moe_pretrain.cli import main
        from moe_pretrain.system.stop_signals import HANDLED

        code = 1
        try:
            os.setsid()
            os.closerange(3, 1024)  # as an exec would: the launcher's store among them
            for number in HANDLED:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            random.seed()
            sys.argv = ["moe_pretrain", *words]
            code = main()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not through the launcher's frames, which would kill the others

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self._process, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
