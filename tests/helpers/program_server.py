"""A process that has done the program's slow imports and forks it: ``python -c`` of ``serve_forever``.

What it forks is the program in all but its start: own process, signals, exit code, environment, folder and output. What
imports print or change is not seen, and the seed of Python's hashes is that of the server; ``run_python`` is for that.
"""

import os
import random
import signal
import sys
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
    sys.argv = ["moe_pretrain", *request.words]
    from moe_pretrain.cli import main

    sys.exit(main())
