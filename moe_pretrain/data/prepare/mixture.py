"""``prepare_mixture``: every source of a mixture in the cache, in the tokens of one tokenizer."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe_pretrain.data.documents.config import version_and_licence
from moe_pretrain.data.documents.work_units import content_identity, sample_texts
from moe_pretrain.data.prepare import across_sources, cache
from moe_pretrain.data.prepare.across_sources import FoundElsewhere
from moe_pretrain.data.prepare.prepare_corpus import check_prepared, naming, prepare_corpus
from moe_pretrain.data.prepare.tokenized_corpus import TokenizedCorpus
from moe_pretrain.data.rows.mixture import DataConfig, MixedShards, MixtureConfig
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.data.tokenizer.train import train_tokenizer
from moe_pretrain.system.files import sync_folder

_TOKENIZER_SAMPLE_BYTES = 20_000_000  # of all sources together, the same from each


@dataclass(frozen=True)
class RunLength:
    """Length of a run in rows and tokens.

    Attributes:
        num_steps: Its steps.
        rows_per_step: Rows of one step over all ranks.
        sequence_length: Input positions of a row.
    """

    num_steps: int
    rows_per_step: int
    sequence_length: int


@dataclass(frozen=True)
class TokenizedMixture:
    """A mixture ready to train on: what ``TokenizedCorpus`` is for one corpus.

    Attributes:
        sources: The corpora by name.
        config: How they take turns.
        shares: Share of each source in the rows of the whole planned run.
        tokenizer_file: Where the tokenizer is, if it was learnt from the sources.
        found: Held-out documents of each source that other sources train on.
    """

    sources: Mapping[str, TokenizedCorpus]
    config: MixtureConfig
    shares: Mapping[str, float]
    tokenizer_file: Path
    found: Mapping[str, FoundElsewhere]

    @property
    def folders(self) -> list[Path]:
        """Folders of the sources in the cache."""
        return [folder for source in self.sources.values() for folder in source.folders]

    @property
    def train(self) -> MixedShards:
        """Tokens to train on."""
        return MixedShards({name: source.train for name, source in self.sources.items()}, self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all sources."""
        return next(iter(self.sources.values())).tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of the sources' fingerprints and names."""
        facts = sorted((name, source.fingerprint) for name, source in self.sources.items())
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def training_sides(self) -> dict[str, ShardReader]:
        """The training side of each source."""
        return {name: source.train for name, source in self.sources.items()}

    def train_token_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each token in the training text of each source."""
        return {name: source.train.token_counts() for name, source in self.sources.items()}

    @property
    def can_rewind(self) -> bool:
        """True: every row can be read at any time."""
        return True

    @property
    def stops_when_exhausted(self) -> bool:
        """Whether the run ends before a source is read for the second time."""
        return self.config.when_exhausted == "stop"

    def validation_sets(self) -> dict[str, ShardReader]:
        """The held-out documents of each source."""
        return {name: source.validation for name, source in self.sources.items()}

    def facts(self, config: DataConfig) -> dict[str, Any]:
        """The facts of each source, under ``sources``."""
        return {"sources": {name: one.facts(self.config.sources[name]) for name, one in self.sources.items()}}

    def describe_size(self) -> str:
        """Size of the mixture, in a few words."""
        return f"a mixture of {len(self.sources)} sources; {across_sources.describe(self.found)}"

    def describe_prepared(self, num_tokens: int) -> str:
        """Documents and tokens in and out of every source: all of them are in the cache."""
        lines = [f"{name}: {source.describe_counts()}" for name, source in self.sources.items()]
        return "\n".join([*lines, across_sources.describe(self.found)])


def prepare_mixture(
    config: MixtureConfig,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    run: RunLength,
    workers: int | None,
    progress: Callable[[str], None] | None,
) -> TokenizedMixture:
    """Find or make the shards of every source: see ``prepare_corpus``.

    A tokenizer that is to be learnt is learnt first, from the same amount of text of each source, and kept in a folder
    of the cache that is named by what decides it.

    Raises:
        ValueError: A source, the tokenizer or the cached shards cannot be used; one line that names the source.
    """
    report = progress or (lambda line: None)
    if tokenizer.kind == "train":
        _build_tokenizer(config, tokenizer, cache_dir, report)

    def open_source(name: str, shared: TokenizerConfig, tokens_needed: int) -> TokenizedCorpus:
        return prepare_corpus(
            config.sources[name],
            shared,
            cache_dir,
            tokens_needed,
            workers,
            lambda line: report(f"{name}: {line}"),
        )

    return _open(config, tokenizer, cache_dir, run, open_source, report)


def check_mixture(
    config: MixtureConfig, tokenizer: TokenizerConfig, cache_dir: Path, run: RunLength
) -> TokenizedMixture:
    """Compare every checksum of every source.

    Raises:
        ValueError: A source is not prepared, or a shard is damaged; the line names both.
    """
    if tokenizer.kind == "train" and not (file := _tokenizer_file(config, tokenizer, cache_dir)).is_file():
        raise ValueError(f"{file}: this mixture is not prepared")

    def open_source(name: str, shared: TokenizerConfig, tokens_needed: int) -> TokenizedCorpus:
        return check_prepared(config.sources[name], shared, cache_dir, tokens_needed)

    return _open(config, tokenizer, cache_dir, run, open_source, lambda line: None)


def _open(
    config: MixtureConfig,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    run: RunLength,
    open_source: Callable[[str, TokenizerConfig, int], TokenizedCorpus],
    report: Callable[[str], None],
) -> TokenizedMixture:
    file = _tokenizer_file(config, tokenizer, cache_dir)
    shared = tokenizer if tokenizer.kind == "pretrained" else TokenizerConfig("pretrained", 0, str(file))
    rows = config.turns(run.rows_per_step).counts(run.num_steps * run.rows_per_step)
    sources: dict[str, TokenizedCorpus] = {}
    shares = {}
    for name, number in zip(sorted(config.sources), rows, strict=True):
        with naming(f"data.sources.{name}"):
            # At least one row, and the last row's last target.
            sources[name] = open_source(name, shared, max(1, number) * run.sequence_length + 1)
        shares[name] = number / sum(rows)
    sources, found = across_sources.look_across(sources, config.sources, cache_dir, report)
    return TokenizedMixture(sources, config, shares, file, found)


def _build_tokenizer(
    config: MixtureConfig, tokenizer: TokenizerConfig, cache_dir: Path, report: Callable[[str], None]
) -> None:
    file = _tokenizer_file(config, tokenizer, cache_dir)
    if file.is_file():
        return
    with cache.locked(file.parent, report):
        if file.is_file():
            return
        report(f"training a {tokenizer.vocab_size}-token tokenizer ({', '.join(sorted(config.sources))})")
        partial = cache.partial_folder(file.parent)
        partial.mkdir(parents=True, exist_ok=True)
        train_tokenizer(_sample_texts(config), tokenizer.vocab_size, partial / TOKENIZER_FILE)
        sync_folder(partial)
        partial.rename(file.parent)
        sync_folder(cache_dir)


def _tokenizer_file(config: MixtureConfig, tokenizer: TokenizerConfig, cache_dir: Path) -> Path:
    """Path of a learnt tokenizer, by a hash of what decides it."""
    facts = [asdict(tokenizer)]
    for name, source in sorted(config.sources.items()):
        with naming(f"data.sources.{name}"):
            identity = [content_identity(source), version_and_licence(source)]
            facts.append({"name": name, "corpus": asdict(source), "content": identity})
    return cache_dir / f"tokenizer-{xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())}" / TOKENIZER_FILE


def _sample_texts(config: MixtureConfig) -> Iterator[str]:
    each = _TOKENIZER_SAMPLE_BYTES // len(config.sources)
    for name, source in sorted(config.sources.items()):
        with naming(f"data.sources.{name}"):
            yield from sample_texts(source, each)
