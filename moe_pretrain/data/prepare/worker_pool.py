"""Processes that turn work units into shards.

Fresh interpreters that import neither torch nor the caller's ``__main__``, connected by one pipe each: a worker
whose parent is gone, by whatever signal and however early, ends by itself and writes nothing more. It holds the corpus'
lock until then.
"""

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from moe_pretrain.data.documents.config import CorpusConfig
from moe_pretrain.data.documents.work_units import Unit
from moe_pretrain.data.shards.unit_shards import UnitRecord, write_unit
from moe_pretrain.data.tokenizer.load import load_pretrained, load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.system.child_process import die_with, start_helper
from moe_pretrain.system.words import one_line

_SECONDS_BETWEEN_TICKS = 0.5
_UNITS_AHEAD = 2  # handed to a worker before it asks: it never waits for the parent


class WriteError(ValueError):
    """The shards cannot be written, or a worker died: what is finished stays good.

    Attributes:
        errno: The disk's own error, which a process that hears of it from another would not know; None for others.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True)
class TokenizeJob:
    """Settings that all units of one corpus have in common.

    Attributes:
        folder: Folder of the corpus being prepared.
        corpus: The corpus.
        validation_fraction: Share of documents held out; 0 for a corpus that is not trained on.
        tokenizer: The tokenizer; a trained one is a file in ``folder``.
        fingerprint: ``Tokenizer.fingerprint``, which a worker's must equal.
        sketch: Whether the documents are sketched, to find near duplicates.
    """

    folder: Path
    corpus: CorpusConfig
    validation_fraction: float
    tokenizer: TokenizerConfig
    fingerprint: str
    sketch: bool

    def load_tokenizer(self) -> Tokenizer:
        """The job's tokenizer, as every process reads it.

        Raises:
            ValueError: It cannot be read, or cuts text differently here.
        """
        if self.tokenizer.kind == "pretrained":
            tokenizer = load_pretrained(self.tokenizer)
        else:
            tokenizer = load_tokenizer_file(self.folder / TOKENIZER_FILE)
        if tokenizer.fingerprint != self.fingerprint:
            raise ValueError("tokenizer: it changed while the corpus was tokenised")
        return tokenizer


# Unit, and the training tokens at which it is to be cut short.
Task = tuple[Unit, int | None]
# Index of the unit, tokens and characters since the last call.
ReportProgress = Callable[[int, int, int], None]


def run_here(
    job: TokenizeJob, tokenizer: Tokenizer, tasks: Iterator[Task], report: ReportProgress
) -> Iterator[UnitRecord]:
    """Do the tasks in this process.

    Raises:
        ValueError: A unit cannot be tokenised or written.
    """
    for unit, max_tokens in tasks:
        index = unit.index
        yield _do(job, unit, max_tokens, tokenizer, lambda *amounts, index=index: report(index, *amounts))


def run_in_processes(
    job: TokenizeJob, tasks: Iterator[Task], processes: int, report: ReportProgress, lock: int
) -> Iterator[UnitRecord]:
    """Do the tasks in worker processes; records come as they are finished, in any order.

    Args:
        job: What they have in common.
        tasks: The tasks.
        processes: How many workers.
        report: Called with their progress.
        lock: Handle of the corpus' lock: it stays taken until the last worker is dead.

    Raises:
        ValueError: A unit cannot be tokenised or written, or a worker died.
    """
    workers = [_start_worker(job, lock) for _ in range(processes)]
    busy = {connection: 0 for _, connection in workers}

    def hand_out(connection: Connection) -> None:
        while busy[connection] < _UNITS_AHEAD and (task := next(tasks, None)) is not None:
            connection.send(task)
            busy[connection] += 1

    try:
        for connection in busy:
            hand_out(connection)
        while any(busy.values()):
            for ready in multiprocessing.connection.wait(
                [c for c, tasks_left in busy.items() if tasks_left], timeout=1
            ):
                connection = cast(Connection, ready)
                kind, *content = _receive(connection)
                if kind == "tick":
                    report(*content)
                elif kind == "done":
                    busy[connection] -= 1
                    hand_out(connection)
                    yield content[0]
                else:
                    raise (WriteError if kind == "write" else ValueError if kind == "user" else RuntimeError)(*content)
            report(-1, 0, 0)  # a sign of life while long units run
    finally:
        for process, connection in workers:
            connection.close()
            process.kill()
        for process, _ in workers:
            process.wait()


def _start_worker(job: TokenizeJob, lock: int) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = multiprocessing.Pipe()
    words = [str(theirs.fileno()), str(os.getpid())]
    process = start_helper("moe_pretrain.data.prepare.worker_pool", words, [theirs.fileno(), lock])
    theirs.close()
    ours.send(job)
    return process, ours


def _receive(connection: Connection) -> tuple[Any, ...]:
    try:
        return cast(tuple[Any, ...], connection.recv())
    except (EOFError, ConnectionError):
        raise WriteError(
            "a tokenising process died (out of memory?); finished shards are kept, the same command goes on from there"
        ) from None


def main() -> None:
    """A worker: read the job, then units until the pipe closes."""
    # The kernel ends us with our parent (PR_SET_PDEATHSIG): a unit that the next attempt does too is not done twice.
    # One that died before this line sent no signal, but its tasks are still in the pipe.
    parent = int(sys.argv[2])
    die_with(parent)
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # one process is one core
    connection = Connection(int(sys.argv[1]))
    try:
        job: TokenizeJob = connection.recv()
        tokenizer: Tokenizer | None = None
        while True:
            unit, max_tokens = connection.recv()
            try:
                tokenizer = tokenizer or job.load_tokenizer()
                record = _do(job, unit, max_tokens, tokenizer, _tick_sender(connection, unit.index, parent))
            except Exception as error:
                kind = "write" if isinstance(error, WriteError) else "user" if isinstance(error, ValueError) else "bug"
                text = str(error) if kind != "bug" else f"{type(error).__name__}: {error}"
                connection.send((kind, text, error.errno) if isinstance(error, WriteError) else (kind, text))
                return
            connection.send(("done", record))
    except (EOFError, ConnectionError):
        return  # the parent is gone or needs nothing more


def _tick_sender(connection: Connection, index: int, parent: int) -> Callable[[int, int], None]:
    tokens = characters = 0
    sent = time.monotonic()

    def tick(new_tokens: int, new_characters: int) -> None:
        nonlocal tokens, characters, sent
        tokens, characters = tokens + new_tokens, characters + new_characters
        if os.getppid() != parent:
            raise EOFError
        if time.monotonic() - sent >= _SECONDS_BETWEEN_TICKS:
            connection.send(("tick", index, tokens, characters))
            tokens, characters, sent = 0, 0, time.monotonic()

    return tick


def _do(
    job: TokenizeJob, unit: Unit, max_tokens: int | None, tokenizer: Tokenizer, tick: Callable[[int, int], None]
) -> UnitRecord:
    try:
        return write_unit(
            job.folder, job.corpus, job.validation_fraction, unit, tokenizer, max_tokens, tick, job.sketch
        )
    except (EOFError, ConnectionError):
        raise
    except OSError as error:
        raise WriteError(
            f"{job.folder}: cannot write shards: {one_line(error)}; finished shards are kept, the same command goes on "
            "from there",
            error.errno,
        ) from None
