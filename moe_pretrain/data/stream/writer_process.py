"""First rank's side of the process that writes a stream's shards: it asks, listens and replaces it."""

import dataclasses
import subprocess
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from moe_pretrain.data.documents.hub import Place
from moe_pretrain.data.prepare.worker_pool import WriteError
from moe_pretrain.data.stream.writer import Demand, StreamJob
from moe_pretrain.system.child_process import start_helper

ReportLine = Callable[[str], None]
_MOST_DEATHS = 3  # of the process, with no shard finished between them


class WriterProcess:
    """The process, from outside. See ``streaming.Writer``."""

    def __init__(self, job: StreamJob, report: ReportLine) -> None:
        self.status = "the writer starts"
        self._job, self._report = job, report
        self._demand = Demand()
        self._failure: tuple[str, int | None] | None = None  # of a WriteError
        self._deaths = 0
        self._lock = threading.Lock()  # the prefetching thread and the training loop both call
        self._process, self._connection = self._start()

    def check(self) -> None:
        """See ``streaming.Writer``."""
        with self._lock:
            self._listen()
            if self._failure is not None:
                raise WriteError(*self._failure)

    def demand(self, kept: int, last: int) -> None:
        """See ``streaming.Writer``."""
        with self._lock:
            self._tell(dataclasses.replace(self._demand, kept=kept, last=last))

    def start_from(self, shard: int, place: Place | None, num_shards: int | None) -> None:
        """See ``streaming.Writer``."""
        with self._lock:
            self._tell(dataclasses.replace(self._demand, num_shards=num_shards, base_shard=shard, base_place=place))

    def close(self) -> None:
        """See ``streaming.Writer``."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _tell(self, demand: Demand) -> None:
        self._listen()  # also for its own sake: a pipe that nobody reads from fills up
        if demand != self._demand:
            self._demand = demand
            self._send()

    def _send(self) -> None:
        try:
            self._connection.send(self._demand)
        except OSError:
            pass  # it died: the next time we listen another starts

    def _listen(self) -> None:
        try:
            while self._connection.poll():
                kind, text = self._connection.recv()
                if kind == "failed":
                    self._failure = text
                elif kind == "say":
                    self._report(text)
                else:
                    self.status, self._deaths = text, 0 if kind == "done" else self._deaths
        except (EOFError, OSError):
            if self._failure is None:
                self._replace()

    def _replace(self) -> None:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._deaths += 1
        if self._deaths > _MOST_DEATHS:
            text = (
                f"the process that writes shards ended {how} {self._deaths} times in a row (out of memory?); finished "
                "shards are kept, the same command goes on from there"
            )
            self._failure = (text, None)
            return
        self._report(f"the process that writes shards ended {how}: starting another")
        self._connection.close()
        self._process, self._connection = self._start()
        self._send()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        words = [str(theirs.fileno()), str(self._job.threads)]
        process = start_helper("moe_pretrain.data.stream.writer", words, [theirs.fileno()])
        ours.send(self._job)  # before our copy of its end is closed: it may have died already
        theirs.close()
        return process, ours
