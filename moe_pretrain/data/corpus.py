"""``TrainingCorpus``: the common face of what a run can train on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moe_pretrain.data.prepare.tokenized_corpus import TokenizedCorpus
from moe_pretrain.data.rows.mixture import DataConfig, MixedShards
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.stream.shard_stream import ShardStream
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class TrainingCorpus(Protocol):
    """One corpus, a mixture or a stream, ready to train on; see the classes for what each member means there."""

    @property
    def train(self) -> ShardReader | MixedShards | ShardStream:
        """Tokens to train on."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of all of it."""

    @property
    def tokenizer_file(self) -> Path:
        """Place of the tokenizer, if it was learnt from this corpus."""

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and of the tokenizer; a run's data is a function of it."""

    def training_sides(self) -> Mapping[str, ShardReader]:
        """Tokens to train on by source; none of a stream, of which they are not there yet."""

    def train_token_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each token in the training text, int64 [vocab_size], by the names of ``validation_sets``."""

    @property
    def folders(self) -> list[Path]:
        """Folders in the cache."""

    @property
    def sources(self) -> Mapping[str, TokenizedCorpus]:
        """Parts of a mixture by name; empty for one corpus."""

    @property
    def shares(self) -> Mapping[str, float]:
        """Weight of each set of ``validation_sets`` in the validation loss; they add up to 1."""

    @property
    def can_rewind(self) -> bool:
        """Whether earlier rows can be read again in the same process."""

    @property
    def stops_when_exhausted(self) -> bool:
        """Whether the run ends before rows are read for the second time."""

    def validation_sets(self) -> dict[str, ShardReader]:
        """Held-out documents by name, one set for each source."""

    def describe_size(self) -> str:
        """Size of the corpus, in a few words."""

    def describe_prepared(self, num_tokens: int) -> str:
        """Documents and tokens in the cache, once ``num_tokens`` training tokens or all there are lie there."""

    def facts(self, config: DataConfig) -> dict[str, Any]:
        """Plain values that decide and describe the tokens, for checkpoints: see ``explain_change``.

        Args:
            config: Where the text comes from.
        """
