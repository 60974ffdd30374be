"""Text in, micro-batches out. ``prepare`` makes token shards, ``TrainLoader`` reads them.

``prepare`` is the package's door: it finds a corpus' shards in the cache or writes them. Everything
behind it is a pure function of the shards, a seed and a position.
"""

import dataclasses
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moe_pretrain.data import shards
from moe_pretrain.data.corpora import (
    BuiltinCorpusConfig,
    CorpusConfig,
    Document,
    FilesCorpusConfig,
    HubCorpusConfig,
    content_identity,
    describe,
    documents,
    is_validation,
    sample_texts,
)
from moe_pretrain.data.loader import TrainLoader, count_rows, validation_batches
from moe_pretrain.data.order import RowOrder, rank_positions
from moe_pretrain.data.packing import IGNORE_INDEX, MicroBatch, wrap_to_int64
from moe_pretrain.data.shards import ShardReader, ShardWriter
from moe_pretrain.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerConfig,
    load_pretrained,
    load_tokenizer_file,
    train_tokenizer,
)

__all__ = [
    "IGNORE_INDEX",
    "BuiltinCorpusConfig",
    "CorpusConfig",
    "Document",
    "FilesCorpusConfig",
    "HubCorpusConfig",
    "MicroBatch",
    "RowOrder",
    "ShardReader",
    "ShardWriter",
    "TokenizedCorpus",
    "Tokenizer",
    "TokenizerConfig",
    "TrainLoader",
    "count_rows",
    "documents",
    "prepare",
    "rank_positions",
    "validation_batches",
    "wrap_to_int64",
]

_TOKENIZER_SAMPLE_BYTES = 20_000_000
_BATCH_BYTES = 2_000_000  # text handed to the tokenizer at once: enough for all its threads
_SECONDS_BETWEEN_REPORTS = 1.0


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
    """

    train: ShardReader
    validation: ShardReader
    tokenizer: Tokenizer
    fingerprint: str
    unigram_entropy: float


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    tokens_needed: int | None,
    progress: Callable[[str], None] | None,
) -> TokenizedCorpus:
    """Find the corpus' token shards in the cache, or tokenise the text and put them there.

    The folder is named by a hash of everything that decides its content, so a second call opens it
    at once. It appears under its name only when it is complete; of several processes that
    work at the same time one publishes its folder and the others use it.

    Args:
        corpus: Where the text comes from.
        tokenizer: Which tokenizer.
        cache_dir: Folder of prepared corpora; made if missing.
        tokens_needed: Training tokens that the run will read. Only a hub corpus looks at it:
            it stops there, unless ``corpus.max_tokens`` says where to stop.
        progress: Called with a short line about once a second while there is work to do.

    Raises:
        ValueError: The source, the tokenizer or the cached shards cannot be used; one line.
    """
    report = progress or (lambda line: None)
    max_tokens = None
    if isinstance(corpus, HubCorpusConfig):
        max_tokens = tokens_needed if corpus.max_tokens is None else corpus.max_tokens
    pretrained = load_pretrained(tokenizer) if tokenizer.kind == "pretrained" else None

    folder = cache_dir / _folder_name(corpus, tokenizer, pretrained, max_tokens)
    if not _is_complete(folder):
        work = cache_dir / f"{folder.name}.tmp-{uuid.uuid4().hex}"
        work.mkdir(parents=True)
        try:
            _build(work, corpus, tokenizer, pretrained, max_tokens, report)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return _open(folder, pretrained)


def _folder_name(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    pretrained: Tokenizer | None,
    max_tokens: int | None,
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
    return shards.is_complete(folder / "train") and shards.is_complete(folder / "validation")


def _build(
    work: Path,
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    pretrained: Tokenizer | None,
    max_tokens: int | None,
    report: Callable[[str], None],
) -> None:
    tokenizer = pretrained
    if tokenizer is None:
        report(f"training a {tokenizer_config.vocab_size}-token tokenizer ({describe(corpus)})")
        texts = sample_texts(corpus, _TOKENIZER_SAMPLE_BYTES)
        file = work / TOKENIZER_FILE
        train_tokenizer(texts, tokenizer_config.vocab_size, file)
        tokenizer = load_tokenizer_file(file)

    train, validation = (
        ShardWriter(
            work / side,
            tokenizer.vocab_size,
            tokenizer.end_of_document,
            tokenizer.fingerprint,
            describe(corpus),
        )
        for side in ("train", "validation")
    )
    try:
        _tokenise(corpus, tokenizer, train, validation, max_tokens, report)
        for side, writer in (("training", train), ("validation", validation)):
            if not writer.num_documents:
                documents_seen = train.num_documents + validation.num_documents
                raise ValueError(
                    f"data.validation_fraction={corpus.validation_fraction} leaves no {side} "
                    f"document of the {documents_seen} in {describe(corpus)}"
                )
            writer.close()
    finally:
        train.abort()
        validation.abort()


def _tokenise(
    corpus: CorpusConfig,
    tokenizer: Tokenizer,
    train: ShardWriter,
    validation: ShardWriter,
    max_tokens: int | None,
    report: Callable[[str], None],
) -> None:
    started = reported = time.monotonic()

    def report_progress() -> None:
        of = "" if max_tokens is None else f" of {max_tokens:,}"
        tokens_per_second = (train.num_tokens + validation.num_tokens) / (time.monotonic() - started)
        report(f"tokenising: {train.num_tokens:,}{of} training tokens, {tokens_per_second:,.0f} tokens/s")

    for batch in _batches(documents(corpus)):
        texts = [document.text for document in batch]
        for text, token_ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            held_out = is_validation(text, corpus.validation_fraction)
            (validation if held_out else train).add(token_ids, len(text.encode()))
            if max_tokens is not None and train.num_tokens >= max_tokens:
                report_progress()
                return
        if time.monotonic() - reported >= _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            report_progress()
    report_progress()


def _batches(rows: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in rows:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_BYTES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _publish(work: Path, folder: Path) -> None:
    """Give the finished folder its name, unless another process was faster."""
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)  # published folders are complete: somebody removed files from it
    try:
        os.rename(work, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _open(folder: Path, pretrained: Tokenizer | None) -> TokenizedCorpus:
    train, validation = ShardReader(folder / "train"), ShardReader(folder / "validation")
    tokenizer = pretrained or load_tokenizer_file(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != train.manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{folder}: the tokenizer now cuts text differently than when the shards were "
            "written (another version of tokenizers?); delete the folder to write them again"
        )
    return TokenizedCorpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=xxhash.xxh3_128_hexdigest((train.fingerprint + validation.fingerprint).encode()),
        unigram_entropy=train.manifest.unigram_entropy_nats,
    )
