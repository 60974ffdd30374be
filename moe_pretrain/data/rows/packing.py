"""Packing of a stream of documents into rows of ``sequence + 1`` tokens, in two ways: the tokens of row r.

``Concatenated`` cuts the stream every ``sequence`` tokens and wastes nothing; a document may be cut anywhere.
``BestFit`` keeps every document that fits into a row whole and pads the rows.

Axis names:
    batch      rows asked for
    pieces     whole documents, or parts of those that are longer than a row
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from moe_pretrain.data.rows.micro_batch import mark_document_starts
from moe_pretrain.data.shards.reader import ShardReader


@runtime_checkable
class Rows(Protocol):
    """A way to pack.

    Attributes:
        num_rows: Rows in one epoch.
        waste: Share of the row positions that hold no token.
    """

    num_rows: int
    waste: float

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens and document starts [batch, sequence + 1] of rows [batch], and how many tokens of each count.

        None for the last says: all.
        """


class Concatenated:
    """Row r is the ``sequence + 1`` tokens from ``r * sequence`` on.

    Neighbouring rows share one token, the last of one is the first of the next, so every token is a target once.

    Raises:
        ValueError: There is not even one row.
    """

    def __init__(self, reader: ShardReader, sequence_length: int) -> None:
        self.num_rows = count_rows(reader, sequence_length)
        self.waste = 0.0
        self._reader = reader
        self._sequence_length = sequence_length

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See ``Rows``."""
        first_tokens = rows * self._sequence_length
        tokens = self._reader.read_rows(first_tokens, self._sequence_length + 1)
        return tokens, mark_document_starts(self._reader.document_ends, first_tokens, self._sequence_length), None


class BestFit:
    """Rows of whole documents, longest first, each where it leaves the least room.

    A document of more than ``sequence + 1`` tokens is cut into pieces that share one token, as neighbouring rows of
    ``Concatenated`` do, so no target is lost. Documents of one length are alike to the packing, so it is worked out
    on the lengths' histogram, in a time that hardly depends on the number of documents; the index that is
    kept takes 24 bytes for each piece.

    Source:
        Best-fit packing: Ding et al. 2024 (arXiv:2404.10830); packing of the histogram: Krell et al. 2021
        (arXiv:2107.02027), who take the row with the most room where we take that with the least.
    """

    def __init__(self, reader: ShardReader, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        self._reader = reader
        self._sequence_length = sequence_length
        starts, lengths = _pieces(reader.document_ends, sequence_length)
        order, self._first_piece = _pack(lengths, sequence_length + 1)
        # [pieces] in row order; row r has those from first_piece[r] to first_piece[r + 1].
        self._starts, self._lengths = starts[order], lengths[order]
        self.num_rows = len(self._first_piece) - 1
        self.waste = 1.0 - float(lengths.sum()) / (self.num_rows * (sequence_length + 1))

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See ``Rows``."""
        shape = (len(rows), self._sequence_length + 1)
        tokens = np.zeros(shape, dtype=self._reader.manifest.dtype)
        starts = np.zeros(shape, dtype=bool)
        used = np.zeros(len(rows), dtype=np.int64)
        for index, row in enumerate(rows.tolist()):
            place = 0
            for piece in range(self._first_piece[row], self._first_piece[row + 1]):
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                tokens[index, place : place + length] = self._reader.read(start, start + length)
                starts[index, place] = place > 0
                place += length
            used[index] = place
        return tokens, starts, used


def count_rows(reader: ShardReader, sequence_length: int) -> int:
    """Whole rows of ``Concatenated``: each needs ``sequence_length`` tokens, the last one more.

    Raises:
        ValueError: There is not even one.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    num_rows = (reader.num_tokens - 1) // sequence_length
    if num_rows < 1:
        raise ValueError(
            f"sequence_length={sequence_length} must be below the {reader.num_tokens} tokens in {reader.folder}"
        )
    return num_rows


def _pieces(document_ends: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and length of each piece, in stream order, int64 [pieces]."""
    first = np.concatenate([[0], document_ends[:-1]])
    lengths = document_ends - first
    count = np.maximum(1, -(-(lengths - 1) // sequence_length))
    document = np.repeat(np.arange(len(first)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    starts = first[document] + number * sequence_length
    return starts, np.minimum(sequence_length + 1, document_ends[document] - starts)


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, longest first.

    Returns:
        The pieces in row order [pieces], and the place of each row's first piece in it [rows + 1].
    """
    histogram = np.bincount(lengths, minlength=capacity + 1)
    # Rows by the room that is left: each entry is the lengths already in them, and how many such rows there are.
    room: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(capacity + 1)]
    for length in range(capacity, 0, -1):
        remaining = int(histogram[length])
        place = length
        while remaining:
            while place <= capacity and not room[place]:
                place += 1
            if place > capacity:  # no open row has room: new ones, as full of this length as they get
                each = min(capacity // length, remaining)
                rows = remaining // each
                room[capacity - each * length].append(((length,) * each, rows))
                remaining -= rows * each
                place = length
                continue
            held, rows = room[place].pop()
            taken = min(rows, remaining)
            if taken < rows:
                room[place].append((held, rows - taken))
            # The row may have room for this length once more, and then it is the tightest: look from there again.
            room[place - length].append(((*held, length), taken))
            remaining -= taken
            place = length
    return _assign(lengths, [entry for entries in room for entry in entries])


def _assign(lengths: np.ndarray, patterns: list[tuple[tuple[int, ...], int]]) -> tuple[np.ndarray, np.ndarray]:
    """Give each row of each pattern its pieces: those of one length are handed out in stream order."""
    by_length = np.argsort(lengths, kind="stable")
    next_piece = np.searchsorted(lengths[by_length], np.arange(lengths.max() + 2))
    order, sizes = [], []
    for held, rows in patterns:
        columns = []
        for length in held:
            columns.append(by_length[next_piece[length] : next_piece[length] + rows])
            next_piece[length] += rows
        order.append(np.stack(columns, axis=1).ravel())
        sizes.append(np.full(rows, len(held)))
    return np.concatenate(order), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


@dataclass(frozen=True)
class PackingConfig:
    """Packing: the way in which documents share a row.

    Attributes:
        method: ``concatenate`` cuts the stream of documents into rows and wastes nothing; ``best_fit`` keeps each
            document that fits into a row whole and pads the rows. Validation rows are always ``concatenate``, so that
            their loss compares.
        isolate_documents: Documents of a row do not attend to each other, and the step from one document to the next is
            not a target.
        reset_positions: Positions start again at each document; False counts them through the row.
    """

    method: Literal["concatenate", "best_fit"]
    isolate_documents: bool
    reset_positions: bool
