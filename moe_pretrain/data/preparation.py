"""``prepare``: find a corpus' token shards in the cache, or write them there."""

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from moe_pretrain.data import cache, shards
from moe_pretrain.data.corpora import CorpusConfig, HubCorpusConfig, describe, version_and_licence
from moe_pretrain.data.progress import Progress
from moe_pretrain.data.shard_writer import sync_folder, write_durably, write_manifest
from moe_pretrain.data.shards import Origin, ShardInfo, ShardReader
from moe_pretrain.data.sources import Unit, content_identity, plan_units, sample_texts, stream_units
from moe_pretrain.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerConfig,
    load_pretrained,
    load_tokenizer_file,
    train_tokenizer,
)
from moe_pretrain.data.units import (
    NOTHING,
    SIDES,
    UNITS,
    Counts,
    UnitRecord,
    forget_unit,
    read_records,
    read_token_counts,
)
from moe_pretrain.data.workers import Job, Task, WriteError, run_here, run_in_processes

_TOKENIZER_SAMPLE_BYTES = 20_000_000
_COUNTS_FILE = "counts.json"
_VERIFIED_BYTES = 2**31  # checksums of smaller corpora are compared at every start: a second at most


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready to train on.

    Attributes:
        train: Tokens to train on.
        validation: Tokens held out.
        tokenizer: What made them.
        fingerprint: Hash of all tokens and of the tokenizer; a run's data is a function of it.
        unigram_entropy: Entropy of the training tokens' frequencies, nats per token. A model
            whose loss is not below it has learnt nothing from context.
        counts: Documents in and out.
    """

    train: ShardReader
    validation: ShardReader
    tokenizer: Tokenizer
    fingerprint: str
    unigram_entropy: float
    counts: Counts

    def describe_counts(self) -> str:
        """Documents and tokens in and out, in one line whose numbers add up."""
        counts = self.counts
        left_out = "".join(
            f" + {number:,} {words}"
            for number, words in (
                (counts.empty, "empty"),
                (counts.invalid_utf8, "not UTF-8"),
                (counts.invalid_json, "not JSON"),
            )
            if number
        )
        repaired = f" ({counts.repaired:,} with bytes replaced)" if counts.repaired else ""
        tokens = self.train.num_tokens + self.validation.num_tokens
        return (
            f"documents: {counts.read:,} read = {counts.train:,} training + {counts.validation:,} validation"
            f"{left_out}{repaired}; tokens: {tokens:,} = {self.train.num_tokens:,} training + "
            f"{self.validation.num_tokens:,} validation, ends of documents among them"
        )


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    tokens_needed: int | None,
    workers: int | None,
    progress: Callable[[str], None] | None,
) -> TokenizedCorpus:
    """Find the corpus' token shards in the cache, or tokenise the text and put them there.

    The folder is named by a hash of everything that decides its content, so a second call opens it
    at once. It appears under its name only when it is complete; of several processes that ask for it
    one works and the others wait. A killed one leaves its finished shards, and the next goes on from there.

    Args:
        corpus: Where the text comes from.
        tokenizer: Which tokenizer.
        cache_dir: Folder of prepared corpora; made if missing.
        tokens_needed: Training tokens that the run will read. Only a hub corpus looks at it:
            it stops there, unless ``corpus.max_tokens`` says where to stop.
        workers: Processes that tokenise; None for one on each core. The result does not depend on it.
        progress: Called with a short line about once a second while there is work to do.

    Raises:
        ValueError: The source, the tokenizer or the cached shards cannot be used; one line.
    """
    report = progress or (lambda line: None)
    max_tokens = _max_tokens(corpus, tokens_needed)
    pretrained = load_pretrained(tokenizer) if tokenizer.kind == "pretrained" else None
    folder = cache_dir / _folder_name(corpus, tokenizer, pretrained, max_tokens)
    if not _is_complete(folder):
        with cache.locked(folder, report):
            cache.remove_stale(cache_dir, report)
            if not _is_complete(folder):
                workers = workers or len(os.sched_getaffinity(0))
                _Preparation(folder, corpus, tokenizer, pretrained, max_tokens, workers, report).run()
    return _open(folder, pretrained)


def check_prepared(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, cache_dir: Path, tokens_needed: int | None
) -> TokenizedCorpus:
    """Compare every checksum of a corpus that is prepared.

    Raises:
        ValueError: It is not prepared, or a shard is damaged; the line names it.
    """
    pretrained = load_pretrained(tokenizer) if tokenizer.kind == "pretrained" else None
    folder = cache_dir / _folder_name(corpus, tokenizer, pretrained, _max_tokens(corpus, tokens_needed))
    if not _is_complete(folder):
        raise ValueError(f"{folder}: this corpus is not prepared")
    prepared = _open(folder, pretrained)
    prepared.train.verify()
    prepared.validation.verify()
    return prepared


def _max_tokens(corpus: CorpusConfig, tokens_needed: int | None) -> int | None:
    if not isinstance(corpus, HubCorpusConfig):
        return None
    return tokens_needed if corpus.max_tokens is None else corpus.max_tokens


def _folder_name(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, pretrained: Tokenizer | None, max_tokens: int | None
) -> str:
    facts = {
        "format_version": shards.FORMAT_VERSION,
        "corpus": dataclasses.asdict(corpus),
        "content": content_identity(corpus),
        "python": platform.python_version() if corpus.source == "builtin" else None,
        "tokenizer": pretrained.fingerprint if pretrained else dataclasses.asdict(tokenizer),
        "max_tokens": max_tokens,
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
    return f"{corpus.source}-{digest}"


def _is_complete(folder: Path) -> bool:
    return all(shards.is_complete(folder / side) for side in SIDES) and (folder / _COUNTS_FILE).is_file()


def _open(folder: Path, pretrained: Tokenizer | None) -> TokenizedCorpus:
    train, validation = (ShardReader(folder / side) for side in SIDES)
    tokenizer = pretrained or load_tokenizer_file(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != train.manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{folder}: the tokenizer now cuts text differently than when the shards were "
            "written (another version of tokenizers?); delete the folder to write them again"
        )
    if 4 * (train.num_tokens + validation.num_tokens) < _VERIFIED_BYTES:
        train.verify()
        validation.verify()
    return TokenizedCorpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=xxhash.xxh3_128_hexdigest((train.fingerprint + validation.fingerprint).encode()),
        unigram_entropy=train.manifest.unigram_entropy_nats,
        counts=Counts(**json.loads((folder / _COUNTS_FILE).read_bytes())),
    )


class _Preparation:
    """One attempt at preparing a corpus, which goes on from an earlier one."""

    def __init__(
        self,
        folder: Path,
        corpus: CorpusConfig,
        tokenizer: TokenizerConfig,
        pretrained: Tokenizer | None,
        max_tokens: int | None,
        workers: int,
        report: Callable[[str], None],
    ) -> None:
        self._folder, self._partial = folder, cache.partial_folder(folder)
        self._corpus, self._tokenizer_config, self._pretrained = corpus, tokenizer, pretrained
        self._max_tokens, self._workers, self._report = max_tokens, workers, report
        self._records: dict[int, UnitRecord] = {}

    def run(self) -> None:
        for side in (*SIDES, UNITS):
            (self._partial / side).mkdir(parents=True, exist_ok=True)
        cache.remove_leftovers(self._partial)
        try:
            units = plan_units(self._corpus)
            tokenizer = self._tokenizer()
            self._records = self._good_records(2 if tokenizer.vocab_size <= 65536 else 4)
            if self._records:
                self._report(f"going on with {len(self._records)} finished shards in {self._partial}")
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

    def _tokenizer(self) -> Tokenizer:
        if self._pretrained is not None:
            return self._pretrained
        file = self._partial / TOKENIZER_FILE
        if not file.exists():
            self._report(
                f"training a {self._tokenizer_config.vocab_size}-token tokenizer ({describe(self._corpus)})",
            )
            half_written = file.with_name(f"{TOKENIZER_FILE}.tmp")
            texts = sample_texts(self._corpus, _TOKENIZER_SAMPLE_BYTES)
            train_tokenizer(texts, self._tokenizer_config.vocab_size, half_written)
            half_written.rename(file)
        return load_tokenizer_file(file)

    def _good_records(self, token_bytes: int) -> dict[int, UnitRecord]:
        """Records whose shards are there; a machine that lost power may keep one without the other."""
        good = {}
        for index, record in read_records(self._partial).items():
            paths = [
                (self._partial / side / f"{shard.name}.bin", shard.tokens * token_bytes)
                for side, shard in zip(SIDES, record.shards, strict=True)
                if shard
            ]
            if all(path.is_file() and path.stat().st_size == size for path, size in paths):
                good[index] = record
            else:
                forget_unit(self._partial, index)
        return good

    def _do_units(self, tokenizer: Tokenizer, units: list[Unit]) -> None:
        missing = [unit for unit in units if unit.index not in self._records]
        sizes = {unit.index: unit.size_bytes for unit in missing}
        progress = Progress(self._report, sizes, None, 0)
        for record in self._run(tokenizer, iter((unit, None) for unit in missing), len(missing), progress):
            self._records[record.index] = record
        progress.say()

    def _do_stream(self, tokenizer: Tokenizer) -> None:
        """Units of a stream, until it ends or the limit is reached: then the last unit is cut at it."""
        corpus = self._corpus
        assert isinstance(corpus, HubCorpusConfig)
        limit = float("inf") if self._max_tokens is None else self._max_tokens
        settled, rows_done, tokens = 0, 0, 0  # units in order, without a gap and below the limit

        def settle() -> bool:
            nonlocal settled, rows_done, tokens
            while (record := self._records.get(settled)) and tokens + record.train_tokens < limit:
                settled, rows_done = settled + 1, rows_done + record.counts.read
                tokens += record.train_tokens
                waiting.pop(record.index, None)
            return record is not None  # enough tokens

        waiting: dict[int, Unit] = {}
        enough = settle()
        if enough and self._records[settled].limited:
            return

        def tasks() -> Iterator[Task]:
            for unit in stream_units(corpus, rows_done, settled):
                waiting[unit.index] = unit
                if enough:
                    return
                if unit.index not in self._records:
                    yield unit, None

        progress = Progress(self._report, None, self._max_tokens, tokens)
        for record in self._run(tokenizer, tasks(), self._workers, progress):
            self._records[record.index] = record
            enough = settle()
        if enough:
            if settled not in waiting:
                waiting[settled] = next(stream_units(corpus, rows_done, settled))
            for index in [index for index in self._records if index > settled]:
                del self._records[index]
                forget_unit(self._partial, index)
            last: Task = (waiting[settled], int(limit) - tokens)
            # In place: should this attempt end here, the next finds the whole unit and cuts it again.
            for record in self._run(tokenizer, iter([last]), 1, progress):
                self._records[record.index] = record
        progress.say()

    def _run(self, tokenizer: Tokenizer, tasks: Iterator[Task], most: int, progress: Progress) -> Iterator[UnitRecord]:
        job = Job(self._partial, self._corpus, self._tokenizer_config, tokenizer.fingerprint)
        processes = min(self._workers, most)
        if processes <= 1:
            records = run_here(job, tokenizer, tasks, progress.advance)
        else:
            records = run_in_processes(job, tasks, processes, progress.advance)
        for record in records:
            progress.finish(record)
            yield record

    def _finish(self, tokenizer: Tokenizer) -> None:
        """Write the manifests and give the folder its name."""
        corpus = self._corpus
        records = [record for _, record in sorted(self._records.items())]
        counts = sum((record.counts for record in records), NOTHING)
        found = counts.train + counts.validation
        for side, number in (("training", counts.train), ("validation", counts.validation)):
            if not found:
                raise ValueError(f"data: no document with text in {describe(corpus)} ({counts.read} rows read)")
            if not number:
                raise ValueError(
                    f"data.validation_fraction={corpus.validation_fraction} leaves no {side} "
                    f"document of the {found} in {describe(corpus)}"
                )
        origin = Origin(describe(corpus), *version_and_licence(corpus))
        token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for record in records:
            token_counts += read_token_counts(self._partial, record.index)
        for number, side in enumerate(SIDES):
            infos: list[ShardInfo] = [shard for record in records if (shard := record.shards[number])]
            write_manifest(
                self._partial / side, infos, token_counts, tokenizer.end_of_document, tokenizer.fingerprint, origin
            )
        write_durably(self._partial / _COUNTS_FILE, json.dumps(dataclasses.asdict(counts)).encode())
        sync_folder(self._partial)
        if self._folder.exists():
            shutil.rmtree(self._folder)  # published folders are complete: somebody removed files from it
        self._partial.rename(self._folder)
        sync_folder(self._folder.parent)
        shutil.rmtree(self._folder / UNITS, ignore_errors=True)
