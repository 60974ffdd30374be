"""``open_stream``: the door to a corpus that is trained on while it is tokenised."""

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_pretrain.data.documents.config import CorpusConfig, can_be_on_both_sides
from moe_pretrain.data.prepare.prepare_corpus import folder_name
from moe_pretrain.data.prepare.tokenized_corpus import HELD_OUT, SingleCorpus
from moe_pretrain.data.rows.mixture import DataConfig
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.shards.unit_shards import SIDES, Counts
from moe_pretrain.data.stream.config import StreamingConfig
from moe_pretrain.data.stream.shard_stream import ShardStream
from moe_pretrain.data.stream.writer import StreamJob
from moe_pretrain.data.stream.writer_process import WriterProcess
from moe_pretrain.data.tokenizer.load import load_pretrained
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class StreamedCorpus(SingleCorpus):
    """A streamed corpus of which the first shards are there. Beside ``TokenizedCorpus``, whose fields these are.

    Attributes:
        train: The stream of training shards.
        validation: Held out of the first ``streaming.validation_shards``.
        tokenizer: What makes the tokens.
        fingerprint: Hash of the first shards, of the tokenizer and of what else the order depends on.
        token_counts: How often each token occurs in the training text of the first shards, int64 [vocab_size].
        counts: Documents in and out of the first shards.
    """

    train: ShardStream
    validation: ShardReader
    tokenizer: Tokenizer
    fingerprint: str
    token_counts: np.ndarray
    counts: Counts

    @property
    def folders(self) -> list[Path]:
        """Folder in the cache."""
        return [self.train.folder]

    @property
    def tokenizer_file(self) -> Path:
        """Path of the tokenizer, if it was learnt from this corpus."""
        return self.train.folder / TOKENIZER_FILE

    def training_sides(self) -> dict[str, ShardReader]:
        """None: what will be trained on is not there yet."""
        return {}

    @property
    def can_rewind(self) -> bool:
        """False: a stream is read forwards; the next attempt can begin earlier."""
        return False

    def train_token_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each token in the training text of the first shards."""
        return {HELD_OUT: self.token_counts}

    def facts(self, config: DataConfig) -> dict[str, Any]:
        """Nothing: the stream's own position, which checkpoints keep, says what changed."""
        return {}

    def describe_prepared(self, num_tokens: int) -> str:
        """Fill the cache, and say how much is in it; see ``fill``."""
        return f"training tokens in the cache: {self.fill(num_tokens):,}; {self.describe_size()}"

    def fill(self, tokens: int) -> int:
        """Wait until so many training tokens, or all there are, lie in the cache.

        Returns:
            How many do.

        Raises:
            ValueError: The cache does not keep what it holds, or the source cannot be used.
        """
        if self.train.config.cache_shards is not None:
            raise ValueError(
                f"streaming.cache_shards={self.train.config.cache_shards} must be null to prepare a stream ahead"
            )
        found, shard = 0, 0
        while found < tokens and (record := self.train.wait_for_record(shard, shard, lambda: False)):
            found, shard = found + record.train_tokens, shard + 1
        return found

    def describe_size(self) -> str:
        """Size of the corpus, in a few words."""
        config = self.train.config
        return (
            f"streamed, rows shuffled in windows of {config.window_shards} shards of {config.shard_bytes:,} bytes; "
            f"{self.validation.num_tokens:,} validation tokens of the first {config.validation_shards} shards"
        )


def open_stream(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    config: StreamingConfig,
    cache_dir: Path,
    run_name: str,
    is_first: bool,
    number: int,
    threads: int,
    report: Callable[[str], None],
) -> StreamedCorpus:
    """Open a stream; returns when its first shards, of which the validation set is made, are there.

    Args:
        corpus: Where the text comes from.
        tokenizer: Which tokenizer; one that is trained is learnt from the first 20 MB of training documents.
        config: How to stream.
        cache_dir: Folder of prepared corpora; made if missing.
        run_name: Name of the run: one that removes shards has a folder of its own.
        is_first: Whether this is the first rank, whose writer process writes the shards.
        number: A number that the ranks of this run have in common, and no other run.
        threads: Threads of the tokenizer.
        report: Called with lines for the user.

    Raises:
        ValueError: The source or the tokenizer cannot be used, or nothing can be written; one line.
    """
    pretrained = load_pretrained(tokenizer) if tokenizer.kind == "pretrained" else None
    owner = None if config.cache_shards is None else run_name
    # What is counted in a shard and left out of it follows from the documents held out of the first so many.
    held_out = [config.validation_shards] if can_be_on_both_sides(corpus) else []
    name = folder_name(corpus, tokenizer, pretrained, None, SIDES, streamed=[config.shard_bytes, owner, *held_out])
    folder = cache_dir / f"stream-{name}"
    writer = None
    if is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.cache_dir={cache_dir}: {error.strerror}") from None
        writer = WriterProcess(StreamJob(folder, corpus, tokenizer, config, threads), report)
    stream = ShardStream(folder, corpus, config, writer, report)
    atexit.register(stream.close)
    try:
        stream.agree(number)
        stream.load_tokenizer(tokenizer)
        validation, token_counts, counts = stream.validation(lambda: False)
        tokens = stream.count_tokens(range(config.validation_shards))
        unknown = stream.tokenizer.describe_unknown(counts.unknown, tokens, tokenizer.max_unknown)
        report(stream.tokenizer.describe() + unknown)
    except BaseException:
        stream.close()
        raise
    return StreamedCorpus(stream, validation, stream.tokenizer, stream.fingerprint(), token_counts, counts)
