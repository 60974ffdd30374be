"""Rows of tokens to micro-batches: labels, document ids and positions. Pure, no loop per token.

The corpus is one stream of tokens, each document followed by the end-of-document token. Row r is the
``sequence + 1`` tokens from ``r * sequence`` on: neighbouring rows share one token, the last of
one is the first of the next, so every token of the stream is a target exactly once.

Axis names:
    batch      rows of one micro-batch
    sequence   input positions of a row; a row itself has ``sequence + 1`` tokens
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from torch import Tensor

IGNORE_INDEX = -100  # what torch's cross-entropy leaves out by default
PADDING_POSITION = -1


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        input_ids: int64 [batch, sequence].
        labels: int64 [batch, sequence], the next token, or ``IGNORE_INDEX``.
        document_ids: int64 [batch, sequence], 0, 1, 2.. within a row, never falling; -1 is
            padding.
        position_ids: int64 [batch, sequence], from 0 at each document's first token in the row.
        row_positions: int64 [batch], the run position of each row; -1 is padding.
        token_hash: Sum over the rows of xxh64(the row's ``sequence + 1`` tokens as
            little-endian int64, seeded by its position), wrapped to signed 64 bits. Hashes of
            micro-batches add up, so a total does not depend on ranks or micro-batch size.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    position_ids: Tensor
    row_positions: Tensor
    token_hash: int

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch with every tensor on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            row_positions=self.row_positions.to(device, non_blocking=True),
        )

    def num_valid_labels(self) -> int:
        """How many labels count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def build_micro_batch(
    tokens: np.ndarray,
    is_document_start: np.ndarray,
    row_positions: np.ndarray,
    isolate_documents: bool,
) -> MicroBatch:
    """Turn rows of tokens into one micro-batch.

    Args:
        tokens: int64 [batch, sequence + 1].
        is_document_start: bool [batch, sequence + 1], see ``mark_document_starts``.
        row_positions: int64 [batch]; ``PADDING_POSITION`` makes the whole row padding.
        isolate_documents: Split each row at document starts: the first token of a document
            is no target, since nothing before it belongs to it. False treats a row as one
            document.
    """
    batch, sequence = tokens.shape[0], tokens.shape[1] - 1
    labels = tokens[:, 1:].copy()
    if isolate_documents:
        document_ids, position_ids = _number_documents(is_document_start[:, :sequence])
        labels[is_document_start[:, 1:]] = IGNORE_INDEX
    else:
        document_ids = np.zeros((batch, sequence), dtype=np.int64)
        position_ids = np.tile(np.arange(sequence), (batch, 1))
    padding = row_positions == PADDING_POSITION
    labels[padding] = IGNORE_INDEX
    document_ids[padding] = -1
    position_ids[padding] = 0
    return MicroBatch(
        input_ids=torch.from_numpy(tokens[:, :sequence].copy()),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(position_ids),
        row_positions=torch.from_numpy(row_positions.copy()),
        token_hash=_hash_rows(tokens[~padding], row_positions[~padding]),
    )


def mark_document_starts(document_ends: np.ndarray, first_tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    """Where documents begin inside rows.

    A row's own first token is never marked: whatever came before it is not in the row.

    Args:
        document_ends: int64 [documents], rising; the stream offset after each document, which
            is where the next one begins.
        first_tokens: int64 [batch], the stream offset of each row.
        sequence_length: Input positions of a row.

    Returns:
        bool [batch, sequence + 1].
    """
    first_end = np.searchsorted(document_ends, first_tokens, side="right")
    last_end = np.searchsorted(document_ends, first_tokens + sequence_length, side="right")
    ends_per_row = last_end - first_end
    # One entry per (row, document end inside it): its row, its place in document_ends.
    row = np.repeat(np.arange(len(first_tokens)), ends_per_row)
    entries_before_row = np.cumsum(ends_per_row) - ends_per_row
    index = np.arange(len(row)) + np.repeat(first_end - entries_before_row, ends_per_row)
    starts = np.zeros((len(first_tokens), sequence_length + 1), dtype=bool)
    starts[row, document_ends[index] - first_tokens[row]] = True
    return starts


def _number_documents(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and positions, int64 [batch, sequence]: one value per document is worked out, then repeated.

    Twice as fast as running sums over every token, for a row has few documents.
    """
    batch, sequence = starts.shape
    found = np.flatnonzero(starts[:, 1:] if sequence > 1 else starts[:, :0])
    row, column = np.divmod(found, max(1, sequence - 1))
    # First tokens of all documents of the batch laid end to end: of each row, and of each found start.
    row_of_document = np.concatenate([np.arange(batch), row])
    first_column = np.concatenate([np.zeros(batch, dtype=np.int64), column + 1])
    order = np.argsort(row_of_document * sequence + first_column)
    row_of_document, first_column = row_of_document[order], first_column[order]
    first = row_of_document * sequence + first_column
    lengths = np.diff(first, append=batch * sequence)
    documents_before_row = np.searchsorted(row_of_document, np.arange(batch))
    ids = np.arange(len(first)) - documents_before_row[row_of_document]
    document_ids = np.repeat(ids, lengths).reshape(batch, sequence)
    position_ids = np.repeat(first_column, lengths).reshape(batch, sequence)
    np.subtract(np.arange(sequence), position_ids, out=position_ids)
    return document_ids, position_ids


def wrap_to_int64(value: int) -> int:
    """The signed 64-bit number that ``value`` wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def _hash_rows(tokens: np.ndarray, row_positions: np.ndarray) -> int:
    tokens = np.ascontiguousarray(tokens, dtype="<i8")
    hashes = (
        xxhash.xxh64_intdigest(row.data, seed=position)
        for row, position in zip(tokens, row_positions.tolist(), strict=True)
    )
    return wrap_to_int64(sum(hashes))
