"""The process that writes a stream's shards ahead of the run.

A fresh interpreter without torch that sees no GPU, connected by a pipe; the kernel ends it with its parent. It is told
which shards are read and works on the first one that is missing from there on. ``writer_process`` is its other end.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

from moe_pretrain.data.documents.config import CorpusConfig, HubCorpusConfig, can_be_on_both_sides, describe
from moe_pretrain.data.documents.hub import START, Place, Retries
from moe_pretrain.data.documents.work_units import Unit, plan_units, stream_units
from moe_pretrain.data.prepare import cache
from moe_pretrain.data.shards.near_duplicates import HeldOutDocuments
from moe_pretrain.data.shards.unit_shards import (
    SIDES,
    UNITS,
    UnitRecord,
    forget_shards,
    held_out_documents,
    read_record,
    record_path,
    shard_is_whole,
    write_unit,
)
from moe_pretrain.data.stream.config import StreamingConfig
from moe_pretrain.data.stream.shard_stream import END_FILE
from moe_pretrain.data.tokenizer.tokenizer import TokenizerConfig
from moe_pretrain.data.tokenizer.train import make_tokenizer
from moe_pretrain.system.child_process import die_with
from moe_pretrain.system.files import write_whole
from moe_pretrain.system.words import one_line


@dataclass(frozen=True)
class StreamJob:
    """Task of the process that writes.

    Attributes:
        folder: Where.
        corpus: The corpus.
        tokenizer: The tokenizer; a trained one is made first and left in ``folder``.
        config: How the corpus is streamed.
        threads: Threads of the tokenizer.
    """

    folder: Path
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    config: StreamingConfig
    threads: int


@dataclass(frozen=True)
class Demand:
    """Demand of the run: the shards that it reads, told anew whenever they change.

    Attributes:
        kept: First shard that may be read again, a place in the order of reading over all epochs.
        last: Last shard that is read now.
        num_shards: Shards of the source, None while not known.
        base_shard: A shard of which it is known where it begins.
        base_place: Where.
    """

    kept: int = 0
    last: int = -1
    num_shards: int | None = None
    base_shard: int = 0
    base_place: Place | None = None


class ShardsAhead:
    """The writing itself: one call of ``step`` writes one shard, or says that nothing is to be done.

    Args:
        job: What to write.
        send: Called with a kind of message (``say``, ``status``, ``done``) and its text.
        alive: Called while a shard is written; raises if nobody wants it any more.

    Raises:
        ValueError: The source or the tokenizer cannot be used.
    """

    def __init__(self, job: StreamJob, send: Callable[[str, str], None], alive: Callable[[], None]) -> None:
        self.demand = Demand()
        self._job, self._send, self._alive = job, send, alive
        for name in (*SIDES, UNITS):
            (job.folder / name).mkdir(parents=True, exist_ok=True)
        cache.remove_old_leftovers(job.folder)
        with cache.locked(job.folder, lambda line: send("status", line)):
            self._tokenizer = make_tokenizer(
                job.corpus, job.tokenizer, job.folder, lambda line: send("say", line), self._retries()
            )
        self._token_bytes = 2 if self._tokenizer.vocab_size <= 65536 else 4
        self._plan = plan_units(job.corpus, job.config.shard_bytes)
        if self._plan is not None:
            self._write_end(len(self._plan))
        self._stream: Iterator[Unit] = iter(())
        self._held_out: HeldOutDocuments | None = None
        self._next_in_stream: int | None = None  # shard that ``_stream`` gives next; None for no stream open
        self._cached = {int(path.stem.removeprefix("shard-")) for path in (job.folder / SIDES[0]).glob("shard-*.bin")}

    def step(self) -> bool:
        """Write the shard that is missing first; False if none is, or there is no room for it."""
        shard = self._next()
        if shard is None:
            self._send("status", f"the writer has written {self._job.config.shards_ahead} shards ahead and pauses")
            return False
        if self._held_out is None and can_be_on_both_sides(self._job.corpus):
            self._held_out = self._look_up_held_out()
        self._send("status", f"the writer reads the source for shard {shard}")
        unit = self._unit(shard)
        if unit is None:
            self._found_end(shard)
            return True
        self._send("status", f"the writer tokenises shard {shard}")
        before = self._record(shard)
        record = write_unit(
            self._job.folder,
            self._job.corpus,
            self._job.corpus.validation_fraction,
            unit,
            self._tokenizer,
            None,
            lambda tokens, characters: self._alive(),
            held_out=self._held_out,
        )
        if before is not None and before.shards != record.shards:
            raise ValueError(
                f"{describe(self._job.corpus)}: shard {shard} is not what it was when it was first written: the source "
                "has changed; choose another run.cache_dir and run.name to start anew"
            )
        if record.shards[0] is not None:
            self._cached.add(shard)
        self._send("done", f"the writer has written shard {shard}")
        return True

    def _look_up_held_out(self) -> HeldOutDocuments:
        """The documents of the validation set: they must be known before the first shard to train on is written."""
        self._send("status", "the writer reads the source for the validation set")
        units = itertools.takewhile(bool, map(self._unit, range(self._job.config.validation_shards)))
        documents = held_out_documents(self._job.corpus, cast(Iterator[Unit], units), self._tokenizer, self._alive)
        return HeldOutDocuments(documents, self._job.corpus.near_duplicates != "ignore")

    def _wanted(self) -> Iterator[tuple[int, bool]]:
        """Training shards in the order of reading, each with whether it is read now or only ahead."""
        demand, num_shards = self.demand, self._num_shards()
        if demand.last < 0:
            return
        for turn in range(demand.kept, demand.last + 1 + self._job.config.shards_ahead):
            if num_shards is not None and turn >= num_shards and self._job.config.at_end == "stop":
                return
            yield turn if num_shards is None else turn % num_shards, turn <= demand.last

    def _next(self) -> int | None:
        num_shards = self._num_shards()
        for shard in range(self._job.config.validation_shards):
            if num_shards is not None and shard >= num_shards:
                break
            if not self._has(shard, SIDES[1]):
                return shard if self._make_room(True) else None
        for shard, is_read in self._wanted():
            if not self._has(shard, SIDES[0]):
                return shard if self._make_room(is_read) else None
        return None

    def _has(self, shard: int, side: str) -> bool:
        record = self._record(shard)
        if record is None:
            return False
        return shard_is_whole(self._job.folder, side, record.shards[SIDES.index(side)], self._token_bytes)

    def _record(self, shard: int) -> UnitRecord | None:
        return read_record(record_path(self._job.folder, shard))

    def _num_shards(self) -> int | None:
        if self._plan is not None:
            return len(self._plan)
        path = self._job.folder / END_FILE
        return int(json.loads(path.read_bytes())["shards"]) if path.is_file() else self.demand.num_shards

    def _make_room(self, is_read: bool) -> bool:
        """Remove shards that the run is past until one more has room. One that is read now is written in any case."""
        most = self._job.config.cache_shards
        spared = self._spared()
        while most is not None and len(self._cached) >= most:
            past = self._cached - spared
            if not past:
                return is_read
            forget_shards(self._job.folder, min(past), SIDES[:1])
            self._cached.remove(min(past))
        return True

    def _spared(self) -> set[int]:
        """Shards that stay: what is demanded, and the window after it, whose demand may be on its way.

        The run reads a shard that lies there at once, so one must not go between its demand and the hearing of it.
        """
        demand, config = self.demand, self._job.config
        first, last = (demand.kept, demand.last) if demand.last >= 0 else (demand.base_shard, demand.base_shard - 1)
        turns = range(first, last + 1 + max(config.shards_ahead, config.window_shards))
        num_shards = self._num_shards()
        return {turn if num_shards is None else turn % num_shards for turn in turns}

    def _unit(self, shard: int) -> Unit | None:
        """The unit of a shard; None if the source ends before it."""
        corpus = self._job.corpus
        if not isinstance(corpus, HubCorpusConfig):
            assert self._plan is not None
            return self._plan[shard] if shard < len(self._plan) else None
        if self._next_in_stream != shard:
            known, place = self._known_place(shard)
            if self._next_in_stream is None or not known <= self._next_in_stream <= shard:
                self._stream = stream_units(corpus, place, known, self._job.config.shard_bytes, self._retries())
                self._next_in_stream = known
        while (unit := next(self._stream, None)) is not None and unit.index < shard:
            self._next_in_stream = unit.index + 1
            self._alive()
        self._next_in_stream = None if unit is None else shard + 1
        return unit

    def _known_place(self, shard: int) -> tuple[int, Place]:
        """The nearest shard up to this one of which it is known where it begins, and where."""
        for known in range(shard, 0, -1):
            if known == self.demand.base_shard and self.demand.base_place is not None:
                return known, self.demand.base_place
            record = self._record(known - 1)
            if record is not None and record.end is not None:
                return known, record.end
        return 0, START

    def _found_end(self, shard: int) -> None:
        known = self._num_shards()
        if shard == 0 or (known is not None and known != shard):
            was = "" if known is None else f", it had {known}: the source has changed"
            raise ValueError(f"data: {describe(self._job.corpus)} ends after {shard} shards{was}")
        self._write_end(shard)

    def _write_end(self, num_shards: int) -> None:
        write_whole(self._job.folder / END_FILE, json.dumps({"shards": num_shards}).encode())

    def _retries(self) -> Retries:
        return Retries(self._job.config.retry_seconds, self._say_failure)

    def _say_failure(self, line: str) -> None:
        self._alive()
        self._send("say", line)
        self._send("status", line)


def serve(connection: Connection, alive: Callable[[], None]) -> None:
    """Read the job, then write what is demanded until the pipe closes or something cannot be mended."""
    try:
        job: StreamJob = connection.recv()
        try:
            shards = ShardsAhead(job, lambda kind, text: connection.send((kind, text)), alive)
            while True:
                worked = shards.step()
                while connection.poll(0 if worked else None):
                    shards.demand, worked = connection.recv(), True
        except (EOFError, ConnectionError):
            raise
        except OSError as error:
            reason = f"{job.folder}: cannot write shards: {one_line(error)}"
            text = f"{reason}; finished shards are kept, the same command goes on from there"
            connection.send(("failed", (text, error.errno)))
        except ValueError as error:
            connection.send(("failed", (" ".join(str(error).split()), None)))
    except (EOFError, ConnectionError):
        return  # nobody needs more


def main() -> None:
    """The process."""
    parent = os.getppid()
    die_with(parent)
    os.putenv("CUDA_VISIBLE_DEVICES", "")
    os.putenv("TOKENIZERS_PARALLELISM", "true")
    os.putenv("RAYON_NUM_THREADS", sys.argv[2])

    def alive() -> None:
        if os.getppid() != parent:
            raise EOFError

    serve(Connection(int(sys.argv[1])), alive)
