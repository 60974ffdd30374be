"""One attempt at writing a corpus' shards, which goes on from the attempts before it."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe_pretrain.data.documents.config import (
    CorpusConfig,
    HubCorpusConfig,
    LocalCorpusConfig,
    TokensCorpusConfig,
    can_be_on_both_sides,
    describe,
    version_and_licence,
    what_splits,
)
from moe_pretrain.data.documents.hub import START, Place
from moe_pretrain.data.documents.work_units import Unit, local_files, plan_units, stream_units, validation_files
from moe_pretrain.data.prepare import cache
from moe_pretrain.data.prepare.progress_line import ProgressLine
from moe_pretrain.data.prepare.worker_pool import (
    Task,
    TokenizeJob,
    WriteError,
    run_here,
    run_in_processes,
)
from moe_pretrain.data.shards import reader as shards
from moe_pretrain.data.shards.near_duplicates import find_duplicates
from moe_pretrain.data.shards.reader import Origin, ShardInfo
from moe_pretrain.data.shards.unit_shards import (
    NOTHING,
    SIDES,
    UNITS,
    Counts,
    UnitRecord,
    drop_from_validation,
    forget_unit,
    read_records,
    read_token_counts,
    read_unit_sketches,
    shard_is_whole,
)
from moe_pretrain.data.shards.writer import make_manifest, write_manifest
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from moe_pretrain.data.tokenizer.train import make_tokenizer
from moe_pretrain.system.files import sync_folder, write_whole

COUNTS_FILE = "counts.json"
DOCUMENT_BYTES_FILE = "document-bytes.bin"
"""uint64 [documents] of the validation side: bytes of each one's text, for a mixture that leaves some of them out."""


def is_complete(folder: Path, sides: tuple[str, ...]) -> bool:
    """Whether a prepared corpus has all its files."""
    return all(shards.is_complete(folder / side) for side in sides) and (folder / COUNTS_FILE).is_file()


def build(preparation: "Preparation") -> None:
    """Do the work unless it is done, or another process does it meanwhile."""
    folder, sides, report = preparation.folder, preparation.sides, preparation.report
    if not is_complete(folder, sides):
        with cache.locked(folder, report) as lock:
            cache.remove_stale(folder.parent, report)
            if not is_complete(folder, sides):
                preparation.lock = lock
                preparation.run()
    if cache.was_cut_off(folder):
        with contextlib.suppress(ValueError, OSError), cache.locked(folder, report):  # it may be read-only
            shutil.rmtree(folder / UNITS, ignore_errors=True)


class Preparation:
    """One attempt at preparing a corpus.

    Args:
        folder: Where the corpus will be; the work is done beside it.
        corpus: Where the text comes from.
        tokenizer: Which tokenizer.
        pretrained: That tokenizer, where it exists before the corpus.
        max_tokens: Training tokens at which a stream ends; None for all there are.
        sides: ``SIDES``, or the first alone for a corpus of which nothing is held out.
        workers: Processes; None for one on each core.
        report: Called with progress lines.

    Attributes:
        lock: Handle of the corpus' lock, which the workers keep too; set by ``build``.
    """

    lock: int

    def __init__(
        self,
        folder: Path,
        corpus: CorpusConfig,
        tokenizer: TokenizerConfig,
        pretrained: Tokenizer | None,
        max_tokens: int | None,
        sides: tuple[str, ...],
        workers: int | None,
        report: Callable[[str], None],
    ) -> None:
        self.folder, self.sides, self.report = folder, sides, report
        self._partial = cache.partial_folder(folder)
        self._corpus, self._tokenizer_config, self._pretrained = corpus, tokenizer, pretrained
        self._max_tokens, self._workers = max_tokens, workers or len(os.sched_getaffinity(0))
        self._records: dict[int, UnitRecord] = {}

    def run(self) -> None:
        """Write what is missing, then give the folder its name.

        Raises:
            ValueError: The source, the tokenizer or the disk cannot be used; one line.
        """
        for side in (*self.sides, UNITS):
            (self._partial / side).mkdir(parents=True, exist_ok=True)
        cache.remove_leftovers(self._partial)
        try:
            units = plan_units(self._corpus)
            tokenizer = self._pretrained or make_tokenizer(
                self._corpus, self._tokenizer_config, self._partial, self.report
            )
            self._records = self._good_records(2 if tokenizer.vocab_size <= 65536 else 4)
            if self._records:
                self.report(f"going on with {len(self._records)} finished shards in {self._partial}")
            if units is None:
                self._do_stream(tokenizer)
            else:
                self._do_units(tokenizer, units)
            self._finish(tokenizer)
        except WriteError:
            raise
        except OSError as error:
            raise ValueError(f"{self._partial}: {error.strerror}; the same command goes on from there") from None
        except ValueError:
            # The text must change before this can succeed, and then it is another corpus.
            if not isinstance(self._corpus, HubCorpusConfig):
                shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _good_records(self, token_bytes: int) -> dict[int, UnitRecord]:
        """Records whose shards are there."""
        good = {}
        for index, record in read_records(self._partial).items():
            shards_of = zip(SIDES, record.shards, strict=True)
            if all(shard_is_whole(self._partial, side, shard, token_bytes) for side, shard in shards_of):
                good[index] = record
            else:
                forget_unit(self._partial, index)
        return good

    def _do_units(self, tokenizer: Tokenizer, units: list[Unit]) -> None:
        missing = [unit for unit in units if unit.index not in self._records]
        sizes = {unit.index: unit.size_bytes for unit in missing}
        progress = ProgressLine(self.report, sizes, None, 0)
        for record in self._run(tokenizer, iter((unit, None) for unit in missing), len(missing), progress):
            self._records[record.index] = record
        progress.say()

    def _do_stream(self, tokenizer: Tokenizer) -> None:
        """Units of a stream, until it ends or the limit is reached: then the last unit is cut at it."""
        corpus = self._corpus
        assert isinstance(corpus, HubCorpusConfig)
        limit = float("inf") if self._max_tokens is None else self._max_tokens
        settled, place, tokens = 0, START, 0  # units in order, without a gap and below the limit

        def settle() -> bool:
            nonlocal settled, place, tokens
            while (record := self._records.get(settled)) and tokens + record.train_tokens < limit:
                settled, place = settled + 1, record.end or Place(place.rows + record.counts.read, None)
                tokens += record.train_tokens
                waiting.pop(record.index, None)
            return record is not None  # enough tokens

        waiting: dict[int, Unit] = {}
        enough = settle()
        if enough and self._records[settled].limited:
            return

        def tasks() -> Iterator[Task]:
            for unit in stream_units(corpus, place, settled):
                waiting[unit.index] = unit
                if enough:
                    return
                if unit.index not in self._records:
                    yield unit, None

        progress = ProgressLine(self.report, None, self._max_tokens, tokens)
        for record in self._run(tokenizer, tasks(), self._workers, progress):
            self._records[record.index] = record
            enough = settle()
        if enough:
            if settled not in waiting:
                waiting[settled] = next(stream_units(corpus, place, settled))
            for index in [index for index in self._records if index > settled]:
                del self._records[index]
                forget_unit(self._partial, index)
            last: Task = (waiting[settled], int(limit) - tokens)
            # In place: should this attempt end here, the next finds the whole unit and cuts it again.
            for record in self._run(tokenizer, iter([last]), 1, progress):
                self._records[record.index] = record
        progress.say()

    def _run(
        self, tokenizer: Tokenizer, tasks: Iterator[Task], most: int, progress: ProgressLine
    ) -> Iterator[UnitRecord]:
        fraction = self._corpus.validation_fraction if self.sides == SIDES else 0.0
        job = TokenizeJob(
            self._partial, self._corpus, fraction, self._tokenizer_config, tokenizer.fingerprint, self._sketched
        )
        processes = min(self._workers, most)
        if processes <= 1:
            records = run_here(job, tokenizer, tasks, progress.advance)
        else:
            records = run_in_processes(job, tasks, processes, progress.advance, self.lock)
        for record in records:
            progress.finish(record)
            yield record

    @property
    def _sketched(self) -> bool:
        """Whether documents that are held out are looked for among those that are trained on."""
        return self.sides == SIDES and can_be_on_both_sides(self._corpus)

    def _find_duplicates(self, tokenizer: Tokenizer) -> Counts:
        """Look for held-out documents in the training side, and leave them out where that is asked for.

        Returns:
            What is found and stays in.
        """
        records = [record for _, record in sorted(self._records.items())]
        held_out = [read_unit_sketches(self._partial, record.index, SIDES[1]) for record in records]
        edges = np.cumsum([len(some) for some in held_out])[:-1]
        self.report(f"looking for {sum(map(len, held_out)):,} held-out documents in the training side")
        trained_on = (read_unit_sketches(self._partial, record.index, SIDES[0]) for record in records)
        near_too = self._corpus.near_duplicates != "ignore"
        exact, near = find_duplicates(np.concatenate(held_out), trained_on, near_too)
        if self._corpus.near_duplicates != "drop":
            return dataclasses.replace(NOTHING, near_duplicates=int(near.sum()), exact_duplicates=int(exact.sum()))
        by_unit = zip(records, np.split(exact, edges), np.split(near, edges), strict=True)
        for record, exact_here, near_here in by_unit:
            if near_here.any():
                self._records[record.index] = drop_from_validation(
                    self._partial, record, near_here, int(exact_here.sum()), tokenizer.vocab_size,
                    tokenizer.end_of_document,
                )  # fmt: skip
        return NOTHING

    def _num_files(self) -> int:
        """Files of a corpus of local ones."""
        assert isinstance(self._corpus, LocalCorpusConfig)
        return len(local_files(self._corpus).files) + len(validation_files(self._corpus))

    def _finish(self, tokenizer: Tokenizer) -> None:
        """Write the manifests and give the folder its name."""
        corpus = self._corpus
        found_in_training = self._find_duplicates(tokenizer) if self._sketched and self._records else NOTHING
        records = [record for _, record in sorted(self._records.items())]
        counts = sum((record.counts for record in records), found_in_training)
        found = counts.train + counts.validation
        for side, number in (("training", counts.train), ("validation", counts.validation)):
            if not found:
                rows = f"{counts.read} rows read{counts.describe_left_out().replace(' +', ' =', 1)}"
                raise ValueError(f"data: no document with text in {describe(corpus)} ({rows})")
            if side == "validation" and not number and counts.duplicate:
                raise ValueError(
                    f"data.near_duplicates=drop leaves no validation document in {describe(corpus)}: training has the "
                    f"same or nearly the same of all {counts.duplicate}; count keeps them"
                )
            if not number and self.sides == SIDES:
                what, way_out = what_splits(corpus)
                raise ValueError(f"{what} leaves no {side} document of the {found} in {describe(corpus)}: {way_out}")
        tokens = sum(shard.tokens - shard.documents for record in records for shard in record.shards if shard)
        unknown = tokenizer.describe_unknown(counts.unknown, tokens, self._tokenizer_config.max_unknown)
        if unknown:
            self.report(unknown.removeprefix("; "))
        origin = Origin(describe(corpus), *version_and_licence(corpus))
        token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for record in records:
            token_counts += read_token_counts(self._partial, record.index)
        for number, side in enumerate(self.sides):
            infos: list[ShardInfo] = [shard for record in records if (shard := record.shards[number])]
            folder = self._partial / side
            manifest = make_manifest(
                folder, infos, token_counts, tokenizer.end_of_document, tokenizer.fingerprint, origin
            )
            write_manifest(folder, manifest, token_counts)
        if isinstance(corpus, TokensCorpusConfig) and counts.read == self._num_files():
            self.report(
                f"each of the {counts.read:,} files is one document: none has {tokenizer.end_token} "
                f"(id {tokenizer.end_of_document}), which ends a document of this tokenizer, before its end"
            )
        if counts.packed:
            assert isinstance(corpus, TokensCorpusConfig)
            self.report(
                f"packed documents: cut at {counts.packed:,} end-of-document tokens inside Megatron documents "
                "(data.megatron_documents=index keeps them whole)"
                if corpus.megatron_documents == "end_of_document"
                else f"packed documents: {counts.packed:,} Megatron documents have end-of-document tokens inside, and "
                "are kept whole (data.megatron_documents=end_of_document cuts them)"
            )
        if self._sketched:
            held_out = [read_unit_sketches(self._partial, record.index, SIDES[1]) for record in records]
            text_bytes = np.concatenate(held_out)["text_bytes"]
            write_whole(self._partial / SIDES[1] / DOCUMENT_BYTES_FILE, text_bytes.tobytes())
        write_whole(self._partial / COUNTS_FILE, json.dumps(dataclasses.asdict(counts)).encode())
        if self.folder.exists():
            shutil.rmtree(self.folder)  # published folders are complete: somebody removed files from it
        self._partial.rename(self.folder)
        sync_folder(self.folder.parent)
        shutil.rmtree(self.folder / UNITS, ignore_errors=True)
