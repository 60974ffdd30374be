"""``prepare_corpus``: find a corpus' token shards in the cache, or write them there."""

import contextlib
import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import xxhash

from moe_pretrain.data.documents.config import CorpusConfig, FilesCorpusConfig, HubCorpusConfig, TokensCorpusConfig
from moe_pretrain.data.documents.work_units import content_identity, local_files
from moe_pretrain.data.prepare.across_sources import look_in_training
from moe_pretrain.data.prepare.attempt import COUNTS_FILE, Preparation, build, is_complete
from moe_pretrain.data.prepare.tokenized_corpus import TokenizedCorpus, fingerprint_of
from moe_pretrain.data.shards import reader as shards
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.shards.unit_shards import SIDES, Counts
from moe_pretrain.data.tokenizer.load import load_pretrained, load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.system.words import one_line

_VERIFIED_BYTES = 2**31  # checksums of smaller corpora are compared at every start: a second at most


@runtime_checkable
class TrainedOn(Protocol):
    """Corpus, or mixture, that is trained on, as an evaluation set must know it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    @property
    def tokenizer_file(self) -> Path:
        """Path of the tokenizer, if it was learnt from this corpus."""

    def training_sides(self) -> Mapping[str, ShardReader]:
        """Tokens to train on by source, where all of them are there before the first step."""


def prepare_corpus(
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
    folder = cache_dir / folder_name(corpus, tokenizer, pretrained, max_tokens, SIDES)
    if isinstance(corpus, FilesCorpusConfig | TokensCorpusConfig) and (again := local_files(corpus).describe_again()):
        report(again)
    in_cache = is_complete(folder, SIDES)
    if in_cache:
        made = datetime.datetime.fromtimestamp((folder / COUNTS_FILE).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        report(f"corpus in the cache: {folder}, prepared {made}")
    build(Preparation(folder, corpus, tokenizer, pretrained, max_tokens, SIDES, workers, report))
    prepared = _open(folder, pretrained)
    # Whoever prepared it may have allowed more unknown tokens than this run does.
    tokens = sum(side.num_tokens - side.num_documents for side in (prepared.train, prepared.validation))
    unknown = prepared.tokenizer.describe_unknown(prepared.counts.unknown, tokens, tokenizer.max_unknown)
    report(prepared.tokenizer.describe() + unknown * in_cache)
    return prepared


def prepare_evaluation_set(
    name: str,
    corpus: CorpusConfig,
    trained_on: TrainedOn,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    tokens_needed: int,
    workers: int | None,
    progress: Callable[[str], None] | None,
) -> ShardReader:
    """A corpus that is only evaluated on, all of it, in the tokens of the one that is trained on.

    Documents that are trained on too are counted and said; it is the user's choice of a text, and stays whole.

    Args:
        name: Name of the set, for errors.
        corpus: Where the text comes from; its ``validation_fraction`` has no meaning here.
        trained_on: The training corpus.
        tokenizer: Its tokenizer's configuration.
        cache_dir: As in ``prepare_corpus``.
        tokens_needed: As in ``prepare_corpus``.
        workers: As in ``prepare_corpus``.
        progress: As in ``prepare_corpus``.

    Raises:
        ValueError: As in ``prepare_corpus``; the line names the set.
    """
    if tokenizer.kind == "train":
        tokenizer = TokenizerConfig("pretrained", 0, str(trained_on.tokenizer_file))
    report = progress or (lambda line: None)
    max_tokens = _max_tokens(corpus, tokens_needed)
    with naming(f"evaluation.sets.{name}"):
        pretrained = trained_on.tokenizer
        folder = cache_dir / folder_name(corpus, tokenizer, pretrained, max_tokens, SIDES[:1])
        build(Preparation(folder, corpus, tokenizer, pretrained, max_tokens, SIDES[:1], workers, report))
        reader = _open_sides(folder, SIDES[:1])[0]
        if training := trained_on.training_sides():
            found = look_in_training(reader, training, corpus.near_duplicates != "ignore", cache_dir, report)
            if found.near:
                report(
                    f"evaluation.sets.{name}: {found.near:,} of {reader.num_documents:,} documents are near duplicates "
                    f"of training documents ({found.exact:,} exact), kept"
                )
        return reader


def check_prepared(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, cache_dir: Path, tokens_needed: int | None
) -> TokenizedCorpus:
    """Compare every checksum of a corpus that is prepared.

    Raises:
        ValueError: It is not prepared, or a shard is damaged; the line names it.
    """
    pretrained = load_pretrained(tokenizer) if tokenizer.kind == "pretrained" else None
    folder = cache_dir / folder_name(corpus, tokenizer, pretrained, _max_tokens(corpus, tokens_needed), SIDES)
    _require_complete(folder, SIDES)
    prepared = _open(folder, pretrained)
    prepared.train.verify()
    prepared.validation.verify()
    return prepared


def prepared_tokens(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, cache_dir: Path, tokens_needed: int | None
) -> int | None:
    """Training tokens of a corpus that is in the cache; None if it is not, or it would take a network to tell.

    Raises:
        ValueError: As in ``prepare_corpus``.
    """
    pretrained = None
    if tokenizer.kind == "pretrained":
        if not Path(str(tokenizer.path)).is_file():
            return None
        pretrained = load_pretrained(tokenizer)
    folder = cache_dir / folder_name(corpus, tokenizer, pretrained, _max_tokens(corpus, tokens_needed), SIDES)
    return ShardReader(folder / SIDES[0]).num_tokens if is_complete(folder, SIDES) else None


def check_evaluation_set(
    name: str,
    corpus: CorpusConfig,
    trained_on: TrainedOn,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    tokens_needed: int,
) -> ShardReader:
    """Compare every checksum of a set that ``prepare_evaluation_set`` has made.

    Raises:
        ValueError: As in ``check_prepared``; the line names the set.
    """
    with naming(f"evaluation.sets.{name}"):
        max_tokens = _max_tokens(corpus, tokens_needed)
        folder = cache_dir / folder_name(corpus, tokenizer, trained_on.tokenizer, max_tokens, SIDES[:1])
        _require_complete(folder, SIDES[:1])
        reader = ShardReader(folder / SIDES[0])
        reader.verify()
        return reader


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Put the place in the configuration before a complaint about what it holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _require_complete(folder: Path, sides: tuple[str, ...]) -> None:
    if not is_complete(folder, sides):
        raise ValueError(f"{folder}: this corpus is not prepared")


def _max_tokens(corpus: CorpusConfig, tokens_needed: int | None) -> int | None:
    if not isinstance(corpus, HubCorpusConfig):
        return None
    return tokens_needed if corpus.max_tokens is None else corpus.max_tokens


def folder_name(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    pretrained: Tokenizer | None,
    max_tokens: int | None,
    sides: tuple[str, ...],
    **more: Any,
) -> str:
    """Name of a corpus' folder: a hash of everything that decides its content."""
    values = dataclasses.asdict(corpus)
    values.pop("sha256", None)  # says which text it must be, not what becomes of it
    facts = {
        "format_version": shards.FORMAT_VERSION,
        "corpus": values,
        "content": content_identity(corpus),
        "python": platform.python_version() if corpus.source == "builtin" else None,
        "tokenizer": pretrained.fingerprint if pretrained else dataclasses.asdict(tokenizer),
        "max_tokens": max_tokens,
        "sides": sides,
        **more,
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
    return f"{corpus.source}-{digest}"


def _open_sides(folder: Path, sides: tuple[str, ...]) -> list[ShardReader]:
    """Readers of the sides; small corpora are compared with their checksums."""
    readers = [ShardReader(folder / side) for side in sides]
    if 4 * sum(reader.num_tokens for reader in readers) < _VERIFIED_BYTES:
        for reader in readers:
            reader.verify()
    return readers


def _open(folder: Path, pretrained: Tokenizer | None) -> TokenizedCorpus:
    train, validation = _open_sides(folder, SIDES)
    try:
        tokenizer = pretrained or load_tokenizer_file(folder / TOKENIZER_FILE)
        counts = Counts(**json.loads((folder / COUNTS_FILE).read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: damaged: {one_line(error)}; delete it to write it again") from None
    if tokenizer.fingerprint != train.manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{folder}: the tokenizer now cuts text differently than when the shards were "
            "written (another version of tokenizers?); delete the folder to write them again"
        )
    return TokenizedCorpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=fingerprint_of(train, validation),
        counts=counts,
    )
