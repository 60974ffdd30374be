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
    """Input of one forward pass.

    Attributes:
        input_ids: int64 [batch, sequence].
        labels: int64 [batch, sequence], the next token, or ``IGNORE_INDEX``.
        document_ids: int64 [batch, sequence], 0, 1, 2.. within a row, never falling; -1 is
            padding, a whole row or the end of one.
        position_ids: int64 [batch, sequence], from 0 at each document's first token in the row,
            or from 0 on in each row.
        row_positions: int64 [batch], the run position of each row; -1 is padding.
        token_hash: Sum over the rows of xxh64(the row's ``sequence + 1`` tokens as little-endian
            integers of the width they came in: from shards uint16, or uint32 with more than
            65,536 tokens; seeded by its position), wrapped to signed 64 bits. Hashes of
            micro-batches add up, so a total does not depend on ranks or micro-batch size.
        document_lengths: Tokens of each run of one document id, all rows in order; kept on the host by ``to``, which
            takes the rows to where it would have to wait for them. None before.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    position_ids: Tensor
    row_positions: Tensor
    token_hash: int
    document_lengths: list[int] | None = None

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch with every tensor on ``device``."""
        lengths = self.document_lengths
        if lengths is None and self.document_ids.device.type == "cpu":
            lengths = _run_lengths(self.document_ids)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            row_positions=self.row_positions.to(device, non_blocking=True),
            document_lengths=lengths,
        )

    def num_valid_labels(self) -> int:
        """Number of labels that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def _run_lengths(document_ids: Tensor) -> list[int]:
    """Lengths of runs of equal ids, which end with their row."""
    ids = document_ids.numpy()
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return np.diff(np.flatnonzero(begins), append=ids.size).tolist()


def build_micro_batch(
    tokens: np.ndarray,
    is_document_start: np.ndarray,
    row_positions: np.ndarray,
    isolate_documents: bool,
    reset_positions: bool | None = None,
) -> MicroBatch:
    """Turn rows of tokens into one micro-batch.

    Args:
        tokens: Integers of any width, [batch, sequence + 1].
        is_document_start: bool [batch, sequence + 1], see ``mark_document_starts``.
        row_positions: int64 [batch]; ``PADDING_POSITION`` makes the whole row padding.
        isolate_documents: Split each row at document starts: the first token of a document
            is no target, since nothing before it belongs to it. False treats a row as one
            document.
        reset_positions: Positions start again at each document; None for as ``isolate_documents`` says.
    """
    reset = isolate_documents if reset_positions is None else reset_positions
    return build_micro_batches(
        tokens, is_document_start, row_positions, isolate_documents, reset, len(tokens), tokens_used=None
    )[0]


def build_micro_batches(
    tokens: np.ndarray,
    is_document_start: np.ndarray,
    row_positions: np.ndarray,
    isolate_documents: bool,
    reset_positions: bool,
    micro_batch_rows: int,
    tokens_used: np.ndarray | None,
) -> list[MicroBatch]:
    """Turn rows of tokens into micro-batches of ``micro_batch_rows``, views of the same tensors.

    All rows at once, because a call to numpy costs as much as some thousand tokens. ``tokens_used`` [batch] makes
    what follows in a row padding; None for no padding.
    """
    batch, sequence = tokens.shape[0], tokens.shape[1] - 1
    labels = tokens[:, 1:].astype(np.int64)
    if isolate_documents or reset_positions:
        row, column = np.divmod(np.flatnonzero(is_document_start), sequence + 1)
        row, column = row[column > 0], column[column > 0]
        if isolate_documents:
            labels.reshape(-1)[row * sequence + column - 1] = IGNORE_INDEX
        inside = column < sequence
        document_ids, position_ids = _number_documents(row[inside], column[inside], batch, sequence)
    if not isolate_documents:
        document_ids = np.zeros((batch, sequence), dtype=np.int64)
    if not reset_positions:
        position_ids = np.tile(np.arange(sequence), (batch, 1))
    padding = row_positions == PADDING_POSITION
    if tokens_used is not None or padding.any():
        used = np.where(padding, 0, sequence + 1 if tokens_used is None else tokens_used)[:, None]
        empty = np.arange(sequence) >= used
        labels[np.arange(1, sequence + 1) >= used] = IGNORE_INDEX
        document_ids[empty] = -1
        position_ids[empty] = 0
    hashes = _hash_rows(tokens, row_positions)
    input_ids = torch.from_numpy(tokens[:, :sequence].astype(np.int64))
    cuts = [slice(first, first + micro_batch_rows) for first in range(0, batch, micro_batch_rows)]
    return [
        MicroBatch(
            input_ids=input_ids[cut],
            labels=torch.from_numpy(labels[cut]),
            document_ids=torch.from_numpy(document_ids[cut]),
            position_ids=torch.from_numpy(position_ids[cut]),
            row_positions=torch.from_numpy(row_positions[cut].copy()),
            token_hash=wrap_to_int64(sum(hashes[cut])),
        )
        for cut in cuts
    ]


def mark_document_starts(document_ends: np.ndarray, first_tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    """Mark the places inside rows at which documents begin.

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


def wrap_to_int64(value: int) -> int:
    """The signed 64-bit number that ``value`` wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def _number_documents(row: np.ndarray, column: np.ndarray, batch: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and positions, int64 [batch, sequence], from where documents start inside rows.

    One value per document is worked out and then repeated, for a row has far fewer documents than tokens.

    Args:
        row: int64 [starts], not falling.
        column: int64 [starts], at least 1, rising within a row.
        batch: Rows.
        sequence: Input positions of a row.
    """
    # The documents of the batch laid end to end: each row's first, and those that start inside it.
    place = np.searchsorted(row, np.arange(batch), side="left")
    column = np.insert(column, place, 0)
    row = np.insert(row, place, np.arange(batch))
    first = row * sequence + column
    lengths = np.diff(first, append=batch * sequence)
    documents_before_row = place + np.arange(batch)
    document_ids = np.repeat(np.arange(len(first)) - documents_before_row[row], lengths).reshape(batch, sequence)
    position_ids = np.repeat(-column, lengths).reshape(batch, sequence)
    position_ids += np.arange(sequence)
    return document_ids, position_ids


def _hash_rows(tokens: np.ndarray, row_positions: np.ndarray) -> list[int]:
    tokens = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    return [
        0 if position == PADDING_POSITION else xxhash.xxh64_intdigest(row, seed=position)
        for row, position in zip(tokens, row_positions.tolist(), strict=True)
    ]
