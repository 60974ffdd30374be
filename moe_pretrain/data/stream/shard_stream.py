"""A corpus that is trained on while it is tokenised: its shards, as every rank sees them appear.

The first rank has a writer process (``stream_writer``) that puts shards into a folder which all ranks read, so on
several nodes ``run.cache_dir`` must be one folder for all of them; ``agree`` makes sure. A shard is a work unit
of ``prepare``, written by the same code, and the rows of a run follow from the shards alone: see ``stream_rows``.

Folder, beside those of prepared corpora:
    train, validation   shards, as ``prepare`` writes them
    units               a record for each shard, which stays when the cache is bounded and the shard is removed
    end.json            how many shards the source has; there once its end was seen
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import xxhash

from moe_pretrain.data.documents.config import CorpusConfig, describe, version_and_licence
from moe_pretrain.data.documents.hub import Place
from moe_pretrain.data.shards.reader import Origin, ShardInfo, ShardReader
from moe_pretrain.data.shards.unit_shards import (
    NOTHING,
    SIDES,
    Counts,
    UnitRecord,
    read_record,
    read_token_counts,
    record_path,
    shard_is_whole,
)
from moe_pretrain.data.shards.writer import make_manifest
from moe_pretrain.data.stream.config import StreamingConfig
from moe_pretrain.data.tokenizer.load import load_pretrained, load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig

END_FILE = "end.json"
_POLL_SECONDS = 0.02
_LONGEST_SILENCE_SECONDS = 60.0
Found = TypeVar("Found")


@runtime_checkable
class Writer(Protocol):
    """First rank's side of the process that writes."""

    status: str

    def check(self) -> None:
        """Hear from the process, start it again if it died; raises ValueError if it cannot go on."""

    def demand(self, kept: int, last: int) -> None:
        """Shards are read from ``kept`` to ``last``, places in the order of reading over all epochs."""

    def start_from(self, shard: int, place: Place | None, num_shards: int | None) -> None:
        """Position of the source before a shard, and the number of shards if that is known."""

    def close(self) -> None:
        """End the process."""


class Cancelled(Exception):
    """Whoever waited does not need it any more."""


class ShardStream:
    """The shards of a stream, waited for.

    Args:
        folder: Where they appear.
        corpus: The corpus.
        config: How it is streamed.
        writer: On the first rank, who writes them; None elsewhere.
        report: Called with lines for the user; may be replaced.
    """

    def __init__(
        self,
        folder: Path,
        corpus: CorpusConfig,
        config: StreamingConfig,
        writer: Writer | None,
        report: Callable[[str], None],
    ) -> None:
        self.folder, self.config, self.report = folder, config, report
        self._corpus, self._writer = corpus, writer
        self._tokenizer: Tokenizer | None = None
        self._records: dict[int, UnitRecord] = {}
        self._num_shards: int | None = None
        self._expected: dict[int, str | None] = {}
        self._kept, self._last = 0, -1
        self._counts, self._next_said, self._next_twice = NOTHING, 1, 1

    def load_tokenizer(self, config: TokenizerConfig) -> None:
        """Wait for the tokenizer, if it is learnt from the corpus, and load it: first of all."""
        file = self.folder / TOKENIZER_FILE
        if config.kind == "train":
            self.wait(lambda: file.is_file() or None, f"the tokenizer of {describe(self._corpus)}", lambda: False)
        self._tokenizer = load_tokenizer_file(file) if config.kind == "train" else load_pretrained(config)

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the stream."""
        assert self._tokenizer is not None
        return self._tokenizer

    def settings(self) -> dict[str, Any]:
        """Settings on which the order of rows depends, beside the text and the seed."""
        names = ("shard_bytes", "window_shards", "validation_shards", "at_end")
        return {name: getattr(self.config, name) for name in names}

    def start_from(
        self, epoch: int, shard: int, place: Place | None, num_shards: int | None, expected: dict[int, str | None]
    ) -> None:
        """Go on at a shard, of which and of some after it the checksums are known."""
        self._expected, self._num_shards = expected, num_shards
        self._kept = epoch * (num_shards or 0) + shard
        for known in self._records:
            self._compare(known)
        if self._writer is not None:
            self._writer.start_from(shard, place, num_shards)

    def num_shards(self) -> int | None:
        """Shards of the source, as soon as its end was seen."""
        if self._num_shards is None and (path := self.folder / END_FILE).is_file():
            self._num_shards = int(json.loads(path.read_bytes())["shards"])
        return self._num_shards

    def checksum(self, shard: int) -> str | None:
        """Checksum of the training tokens of a shard that was read; None if it has none."""
        info = self._records[shard].shards[0]
        return info.bin_xxh3 if info else None

    def place_after(self, shard: int) -> Place | None:
        """Position of the source after a shard; None for corpora of local files, which need none."""
        record = self._record(shard)
        return record.end if record else None

    def wait_for_record(self, shard: int, turn: int, cancelled: Callable[[], bool]) -> UnitRecord | None:
        """The record of a shard; None if the source ends before it. ``turn``: see ``Writer.demand``."""

        def ready() -> tuple[UnitRecord | None] | None:
            record = self._record(shard)
            if record is not None:
                return (record,)
            num_shards = self.num_shards()
            return (None,) if num_shards is not None and shard >= num_shards else None

        self._demand(turn)
        return self.wait(ready, f"shard {shard} of {describe(self._corpus)}", cancelled)[0]

    def wait_for_tokens(self, shard: int, turn: int, cancelled: Callable[[], bool]) -> None:
        """Until a shard that has a record lies on the disk."""
        self._demand(turn)
        self._wait_for_files(shard, SIDES[0], cancelled)

    def keep(self, turn: int) -> None:
        """Nothing before this place in the order of reading is read again."""
        self._kept = turn
        self._demand(max(turn, self._last))

    def wait(self, ready: Callable[[], Found | None], what: str, cancelled: Callable[[], bool]) -> Found:
        """Look until something is there; say what is missing when it takes long.

        Raises:
            ValueError: The writer cannot go on.
        """
        started = time.monotonic()
        silence = self.config.stall_seconds
        said = started
        while (found := ready()) is None:
            if cancelled():
                raise Cancelled
            if self._writer is not None:
                self._writer.check()
            now = time.monotonic()
            if now - said > silence:
                doing = f"; {self._writer.status}" if self._writer is not None else ""
                self.report(f"waiting for {what}, {now - started:.0f} s so far{doing}")
                said, silence = now, min(max(2 * silence, 1.0), _LONGEST_SILENCE_SECONDS)
            time.sleep(_POLL_SECONDS)
        return found

    def check_end(self, num_rows: int, rows_before: int | None, sequence_length: int) -> None:
        """The source has ended: say so, and refuse one that has not a row or has changed."""
        if num_rows < 1:
            raise ValueError(f"model.sequence_length={sequence_length} must be below the tokens in {self.folder}")
        if rows_before is not None and num_rows != rows_before:
            raise ValueError(f"{describe(self._corpus)}: has {num_rows} rows now, {rows_before} in the epoch before")
        if rows_before is None:
            then = "its next epoch follows" if self.config.at_end == "repeat" else "the run ends with it"
            self.report(f"{describe(self._corpus)}: ends after {num_rows:,} rows in {self.num_shards()} shards; {then}")

    def open(self, shards: range) -> ShardReader:
        """A reader of neighbouring shards, whose checksums are compared."""
        infos = [info for shard in shards if (info := self._records[shard].shards[0])]
        return self._reader(SIDES[0], infos, np.ones(self.tokenizer.vocab_size, dtype=np.int64))

    def validation(self, cancelled: Callable[[], bool]) -> tuple[ShardReader, np.ndarray, Counts]:
        """Documents held out of the first shards, token counts of the training text there, and what was counted.

        Raises:
            ValueError: There is none, or no document to train on.
        """
        head: list[UnitRecord] = []
        while len(head) < self.config.validation_shards:
            record = self.wait_for_record(len(head), -1, cancelled)
            if record is None:
                break
            self._wait_for_files(len(head), SIDES[1], cancelled)
            head.append(record)
        counts = sum((record.counts for record in head), NOTHING)
        where = f"the first {len(head)} shards of {describe(self._corpus)}"
        if not counts.train + counts.validation:
            raise ValueError(f"data: no document with text in {where} ({counts.read} rows read)")
        for side, number in (("training", counts.train), ("validation", counts.validation)):
            if not number:
                raise ValueError(
                    f"data.validation_fraction={self._corpus.validation_fraction} leaves no {side} document of the "
                    f"{counts.train + counts.validation} in {where} (streaming.validation_shards)"
                )
        token_counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for record in head:
            token_counts += read_token_counts(self.folder, record.index)
        reader = self._reader(SIDES[1], [info for record in head if (info := record.shards[1])], token_counts)
        return reader, token_counts, counts

    def count_tokens(self, shards: range) -> int:
        """Tokens of both sides of the shards of which there is a record, without ends of documents."""
        records = [self._records[shard] for shard in shards if shard in self._records]
        return sum(info.tokens - info.documents for record in records for info in record.shards if info)

    def fingerprint(self) -> str:
        """Hash of the first shards and of what the order depends on."""
        first = [
            self._records[shard].shards for shard in range(self.config.validation_shards) if shard in self._records
        ]
        sums = [[info.bin_xxh3 if info else None for info in shards] for shards in first]
        facts = [self.settings(), self.tokenizer.fingerprint, sums]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def agree(self, number: int) -> None:
        """Make sure that all ranks see one folder: the first leaves a number of the run, the others look for it.

        Raises:
            ValueError: It is not there.
        """
        path = self.folder / f"run-{number}.tmp"  # removed with other leftovers
        if self._writer is not None:
            path.touch()
        elif not path.is_file():
            raise ValueError(
                f"run.cache_dir={self.folder.parent} must be one folder for all ranks when data is streamed: what the "
                "first rank wrote there is not here"
            )

    def close(self) -> None:
        """End the writer."""
        if self._writer is not None:
            self._writer.close()

    def _demand(self, turn: int) -> None:
        if self._writer is not None and turn >= 0:
            self._last = max(turn, self._last)
            self._writer.demand(self._kept, self._last)

    def _wait_for_files(self, shard: int, side: str, cancelled: Callable[[], bool]) -> None:
        info = self._records[shard].shards[SIDES.index(side)]
        token_bytes = 2 if self.tokenizer.vocab_size <= 65536 else 4

        def ready() -> bool | None:
            return shard_is_whole(self.folder, side, info, token_bytes) or None

        self.wait(ready, f"shard {shard} of {describe(self._corpus)} to be written again", cancelled)

    def _record(self, shard: int) -> UnitRecord | None:
        if shard not in self._records and (record := read_record(record_path(self.folder, shard))) is not None:
            self._records[shard] = record
            self._compare(shard)
            self._say_counts(record)
        return self._records.get(shard)

    def _say_counts(self, record: UnitRecord) -> None:
        """Say how many rows are left out, or validated on too, whenever they have become ten times as many."""
        self._counts += record.counts
        counts = self._counts
        where = f"{describe(self._corpus)}: of the {counts.read:,} rows of the shards read so far"
        left_out = counts.read - counts.train - counts.validation
        if left_out >= self._next_said:
            self._next_said = 10 ** len(str(left_out))
            self.report(f"{where}, left out:" + counts.describe_left_out().replace(" +", "", 1))
        if not counts.duplicate and counts.near_duplicates >= self._next_twice:
            self._next_twice = 10 ** len(str(counts.near_duplicates))
            self.report(
                f"{where}, {counts.near_duplicates:,} to train on are near duplicates of documents of the validation "
                f"set ({counts.exact_duplicates:,} exact), kept (data.near_duplicates=drop leaves them out)"
            )

    def _compare(self, shard: int) -> None:
        if shard in self._expected and self._expected[shard] != self.checksum(shard):
            raise ValueError(
                f"{describe(self._corpus)}: shard {shard} is not what it was when the checkpoint was made: the source "
                "has changed; choose another run.name to start anew"
            )

    def _reader(self, side: str, infos: list[ShardInfo], token_counts: np.ndarray) -> ShardReader:
        origin = Origin(describe(self._corpus), *version_and_licence(self._corpus))
        manifest = make_manifest(
            self.folder / side, infos, token_counts, self.tokenizer.end_of_document, self.tokenizer.fingerprint, origin
        )
        reader = ShardReader(self.folder / side, manifest)
        reader.verify()
        return reader
