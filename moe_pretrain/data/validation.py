"""Validation rows: a stratified draw over the whole held-out text, the same for every run on a corpus.

Axis names:
    rows   rows that are read, rising
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, PADDING_POSITION, MicroBatch, build_micro_batch
from moe_pretrain.data.rows.packing import Concatenated, count_rows
from moe_pretrain.data.shards.reader import ShardReader

_ROWS_AT_ONCE = 64


def validation_rows(reader: ShardReader, sequence_length: int, max_rows: int | None) -> np.ndarray:
    """Numbers of the rows that are read, int64 [rows], rising; row r begins at the offset ``r * sequence_length``.

    The text is cut into ``max_rows`` stretches of equal length, and one row is drawn from each: neighbouring rows are
    of one document, so the first rows would be of few documents, and of one part of the corpus. The draw depends on
    the tokens of the set and on nothing else, so that all runs on a corpus are judged by the same text.

    Args:
        reader: The validation tokens.
        sequence_length: Input positions of a row.
        max_rows: Rows to read over all ranks, or None for all of them. All are read where there are no more.

    Raises:
        ValueError: The corpus is shorter than one row, or ``max_rows`` is not positive.
    """
    num_rows = count_rows(reader, sequence_length)
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1, or null for all rows")
    strata = num_rows if max_rows is None else min(num_rows, max_rows)
    edges = np.arange(strata + 1, dtype=np.int64) * num_rows // strata
    key = reader.fingerprint
    drawn = [xxhash.xxh3_64_intdigest(f"{key} {index}".encode()) for index in range(strata)]
    return edges[:-1] + (np.array(drawn, dtype=np.uint64) % np.diff(edges).astype(np.uint64)).astype(np.int64)


@dataclass(frozen=True)
class ValidationText:
    """Size and baseline of the text that one set is validated on.

    Attributes:
        rows: Rows that are read.
        held_out_rows: Rows of the whole set.
        tokens: Tokens that the loss is over.
        documents: Documents that these are of.
        unigram_cross_entropy: Their mean nats under the frequencies of the training text, each token counted once more
            than it occurs there, so that unseen ones have a probability. A model whose validation loss is not below
            it has learnt nothing from context.
    """

    rows: int
    held_out_rows: int
    tokens: int
    documents: int
    unigram_cross_entropy: float

    def describe(self, max_rows: int, sequence_length: int) -> str:
        """One line: how much of the set is read, and the baseline; it says where less is held out than asked for."""
        drawn = f"{self.rows:,} of {self.held_out_rows:,} rows, drawn over the whole held-out text"
        if self.rows == self.held_out_rows:
            short = f", fewer than evaluation.max_rows={max_rows:,}" if self.rows < max_rows else ""
            drawn = f"all {self.rows:,} rows of {sequence_length:,} tokens that are held out{short}"
        return (
            f"{drawn}: {self.tokens:,} tokens of {self.documents:,} documents, unigram cross-entropy "
            f"{self.unigram_cross_entropy:.3f} nats/token"
        )


def examine_validation(
    reader: ShardReader,
    train_token_counts: np.ndarray,
    sequence_length: int,
    max_rows: int,
    isolate_documents: bool,
) -> ValidationText:
    """Go through the rows that ``validation_batches`` gives to all ranks together.

    Args:
        reader: The validation tokens.
        train_token_counts: How often each token occurs in the training text, int64 [vocab_size].
        sequence_length: See ``validation_batches``.
        max_rows: See ``validation_rows``.
        isolate_documents: See ``packing.build_micro_batch``.
    """
    counts, documents = np.zeros(len(train_token_counts), dtype=np.int64), set()
    rows = validation_rows(reader, sequence_length, max_rows)
    for batch in validation_batches(reader, sequence_length, _ROWS_AT_ONCE, 0, 1, max_rows, isolate_documents):
        labels = batch.labels.numpy()
        counted = labels != IGNORE_INDEX
        counts += np.bincount(labels[counted], minlength=len(counts))
        targets = batch.row_positions.numpy()[:, None] * sequence_length + np.arange(1, sequence_length + 1)
        documents.update(np.searchsorted(reader.document_ends, targets[counted], side="right").tolist())
    nats = np.log(train_token_counts.sum() + len(train_token_counts)) - np.log(train_token_counts + 1)
    return ValidationText(
        rows=len(rows),
        held_out_rows=count_rows(reader, sequence_length),
        tokens=int(counts.sum()),
        documents=len(documents),
        unigram_cross_entropy=float(counts @ nats / max(1, counts.sum())),
    )


def validation_batches(
    reader: ShardReader,
    sequence_length: int,
    micro_batch_rows: int,
    rank: int,
    world_size: int,
    max_rows: int | None,
    isolate_documents: bool,
    reset_positions: bool | None = None,
) -> Iterator[MicroBatch]:
    """One pass over ``validation_rows``, in order, split over ranks; ``row_positions`` are the rows' numbers.

    Every rank yields the same number of micro-batches, as collectives need; rows that are
    missing at the end are padding. Tokens after the last whole row are left out.

    Args:
        reader: The validation tokens.
        sequence_length: Input positions of a row.
        micro_batch_rows: Rows of one forward pass on one rank.
        rank: This data-parallel rank.
        world_size: Number of data-parallel ranks.
        max_rows: See ``validation_rows``.
        isolate_documents: See ``packing.build_micro_batch``.
        reset_positions: See ``packing.build_micro_batch``.

    Raises:
        ValueError: The corpus is shorter than one row, or a size is not positive.
    """
    rows = validation_rows(reader, sequence_length, max_rows)
    if micro_batch_rows < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"micro_batch_rows={micro_batch_rows} must be at least 1 and rank={rank} must be "
            f"from 0 to world_size-1={world_size - 1}"
        )
    source = Concatenated(reader, sequence_length)
    return _batches(source, rows, micro_batch_rows, rank, world_size, isolate_documents, reset_positions)


def _batches(
    source: Concatenated,
    rows: np.ndarray,
    micro_batch_rows: int,
    rank: int,
    world_size: int,
    isolate_documents: bool,
    reset_positions: bool | None,
) -> Iterator[MicroBatch]:
    stride = world_size * micro_batch_rows
    for first in range(rank * micro_batch_rows, -(-len(rows) // stride) * stride, stride):
        own = rows[first : first + micro_batch_rows]
        missing = micro_batch_rows - len(own)
        positions = np.pad(own, (0, missing), constant_values=PADDING_POSITION)
        # A padding row needs some tokens; row 0 always exists and nothing of it is counted.
        tokens, starts, _ = source.read(np.pad(own, (0, missing)))
        yield build_micro_batch(tokens, starts, positions, isolate_documents, reset_positions)
