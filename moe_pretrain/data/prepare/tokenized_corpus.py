"""A corpus whose token shards are ready: readers of both sides, tokenizer, counts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe_pretrain.data.corpus_changes import source_file_facts
from moe_pretrain.data.rows.mixture import DataConfig
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.shards.unit_shards import Counts
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

HELD_OUT = "held-out documents"
"""Name of the one validation set of a corpus that is no mixture; users' names have no blanks."""


class SingleCorpus:
    """The members of a ``TrainingCorpus`` that are the same for one corpus, prepared whole or streamed."""

    validation: ShardReader

    @property
    def sources(self) -> Mapping[str, "TokenizedCorpus"]:
        """Nothing: it is one corpus, and no mixture."""
        return {}

    @property
    def shares(self) -> Mapping[str, float]:
        """The whole for its one validation set."""
        return {HELD_OUT: 1.0}

    @property
    def stops_when_exhausted(self) -> bool:
        """False: where it ends, ``streaming.at_end`` says what follows, or the next epoch does."""
        return False

    def validation_sets(self) -> dict[str, ShardReader]:
        """The held-out documents."""
        return {HELD_OUT: self.validation}


@dataclass(frozen=True)
class TokenizedCorpus(SingleCorpus):
    """A corpus ready to train on.

    Attributes:
        train: Tokens to train on.
        validation: Tokens held out.
        tokenizer: What made them.
        fingerprint: Hash of all tokens and of the tokenizer; a run's data is a function of it.
        counts: Documents in and out.
    """

    train: ShardReader
    validation: ShardReader
    tokenizer: Tokenizer
    fingerprint: str
    counts: Counts

    @property
    def folders(self) -> list[Path]:
        """Folder in the cache."""
        return [self.train.folder.parent]

    @property
    def tokenizer_file(self) -> Path:
        """Path of the tokenizer, if it was learnt from this corpus."""
        return self.folders[0] / TOKENIZER_FILE

    @property
    def can_rewind(self) -> bool:
        """True: every row can be read at any time."""
        return True

    def training_sides(self) -> dict[str, ShardReader]:
        """The one training side."""
        return {HELD_OUT: self.train}

    def with_validation(self, validation: ShardReader) -> "TokenizedCorpus":
        """The corpus with less held out: the documents that are missing are on another side too."""
        left_out = self.counts.validation - validation.num_documents
        counts = dataclasses.replace(
            self.counts, validation=validation.num_documents, duplicate=self.counts.duplicate + left_out
        )
        fingerprint = fingerprint_of(self.train, validation)
        return dataclasses.replace(self, validation=validation, fingerprint=fingerprint, counts=counts)

    def train_token_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each token in the training text."""
        return {HELD_OUT: self.train.token_counts()}

    def facts(self, config: DataConfig) -> dict[str, Any]:
        """Plain values that decide and describe the tokens, for checkpoints: see ``explain_change``."""
        manifest = self.train.manifest
        return {
            "fingerprint": self.fingerprint,
            "source": manifest.source,
            "version": manifest.version,
            "tokenizer": self.tokenizer.fingerprint,
            "vocabulary": manifest.vocab_size,
            "training documents": self.train.num_documents,
            "validation documents": self.validation.num_documents,
            "training tokens": self.train.num_tokens,
            "validation tokens": self.validation.num_tokens,
            **source_file_facts(config),
        }

    def describe_size(self) -> str:
        """Size of the corpus, in a few words."""
        sizes = f"{self.train.num_tokens:,} training and {self.validation.num_tokens:,} validation tokens"
        return sizes + self.describe_duplicates()

    def describe_prepared(self, num_tokens: int) -> str:
        """Documents and tokens in and out: all of it is in the cache."""
        return self.describe_counts()

    def describe_counts(self) -> str:
        """Documents and tokens in and out, in one line whose numbers add up."""
        counts = self.counts
        repaired = f" ({counts.repaired:,} with bytes replaced)" if counts.repaired else ""
        tokens = self.train.num_tokens + self.validation.num_tokens
        return (
            f"documents: {counts.read:,} read = {counts.train:,} training + {counts.validation:,} validation"
            f"{counts.describe_left_out()}{repaired}; tokens: {tokens:,} = {self.train.num_tokens:,} training + "
            f"{self.validation.num_tokens:,} validation, ends of documents among them{self.describe_duplicates()}"
        )

    def describe_duplicates(self) -> str:
        """Held-out documents that are trained on too, in a clause; nothing where none is known."""
        counts = self.counts
        if not counts.near_duplicates:
            return ""
        what = "left out" if counts.duplicate else "kept (data.near_duplicates=drop leaves them out)"
        return (
            f"; {counts.near_duplicates:,} held-out documents are near duplicates of training documents "
            f"({counts.exact_duplicates:,} exact), {what}"
        )


def fingerprint_of(train: ShardReader, validation: ShardReader) -> str:
    """Hash of all tokens of both sides and of their tokenizer."""
    return xxhash.xxh3_128_hexdigest((train.fingerprint + validation.fingerprint).encode())
