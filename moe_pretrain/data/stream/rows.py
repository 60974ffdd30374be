"""Rows of a corpus that is still being written: position n names its row as soon as the shards it needs exist.

The training shards in order are one stream of tokens, of which row r is the ``sequence + 1`` tokens from
``r * sequence`` on, as ``rows.Concatenated`` has it. Shards make windows; a row belongs to the window in which its last
token lies. Positions name the rows of the first window, shuffled, then those of the second, and so on to the end of the
source. That is one epoch; the next has the same windows, shuffled anew. So the order follows from the shards, never
from when they were written, and each epoch has every row once.

Axis names:
    positions   positions of the run, in the caller's order
"""

import bisect
import itertools
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from moe_pretrain.data.documents.hub import Place
from moe_pretrain.data.rows.micro_batch import mark_document_starts
from moe_pretrain.data.rows.permutation import RowPermutation
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.stream.shard_stream import ShardStream

_OPEN_WINDOWS = 4


class Windows:
    """Rows of each window of one epoch, as far as the shards are known.

    Args:
        window_shards: Shards of a window.
        sequence_length: Input positions of a row.
        shard: The first shard that counts.
        tokens: Tokens of the stream before it.
        window: The first window that is asked for; ``shard`` is its first one or before it.

    Attributes:
        next_shard: The shard that ``add`` is to tell of.
        num_rows: Rows of the epoch; None until ``end``.
    """

    def __init__(
        self, window_shards: int, sequence_length: int, shard: int = 0, tokens: int = 0, window: int = 0
    ) -> None:
        self.next_shard = shard
        self.num_rows: int | None = None
        self._window_shards, self._sequence_length = window_shards, sequence_length
        self._first_shard, self._first_window = shard, window
        self._tokens = [tokens]  # of the stream before each shard from the first on
        self._starts: list[int] = []  # first row of each window from the first on
        self._mark()

    def add(self, tokens: int) -> None:
        """The next shard has so many tokens."""
        self._tokens.append(self._tokens[-1] + tokens)
        self.next_shard += 1
        self._mark()

    def end(self) -> None:
        """There is no next shard."""
        self.num_rows = self._rows_before_end()
        if self.next_shard % self._window_shards:
            self._starts.append(self.num_rows)

    def find(self, row: int) -> int | None:
        """The window of a row; None while it is not known, or if the epoch has no such row."""
        index = bisect.bisect_right(self._starts, row) - 1
        if index < 0 and self._starts:
            raise ValueError(f"state.stream is of another step: row {row} lies before the windows that it names")
        return None if index >= len(self._starts) - 1 else self._first_window + index

    def rows(self, window: int) -> range:
        """The rows of a window that is known."""
        index = window - self._first_window
        return range(self._starts[index], self._starts[index + 1])

    def shards(self, window: int) -> range:
        """The shards in which a window's rows lie: its own, and those before in which its first row begins."""
        first_token = self.rows(window).start * self._sequence_length
        before = bisect.bisect_right(self._tokens, first_token) - 1
        first = min(self._first_shard + before, window * self._window_shards)
        return range(first, min((window + 1) * self._window_shards, self.next_shard))

    def tokens_before(self, shard: int) -> int:
        """Tokens of the stream before a shard."""
        return self._tokens[shard - self._first_shard]

    def _mark(self) -> None:
        if self.next_shard % self._window_shards == 0 and self.next_shard >= self._first_window * self._window_shards:
            self._starts.append(self._rows_before_end())

    def _rows_before_end(self) -> int:
        return max(0, self._tokens[-1] - 1) // self._sequence_length


_MOST = 2**53
_COUNTS = ("epoch", "window", "shard", "tokens")
_COUNTS_OR_NONE = {"rows": 0, "epoch_rows": 1, "epoch_shards": 1}
"""Fields of a cursor that may be None, each with its least value."""


def _check_cursor(cursor: dict[str, Any]) -> None:
    """Raise ValueError unless every field of a cursor has its type and range: a checkpoint may hold anything."""

    def refuse(name: str, constraint: str) -> NoReturn:
        raise ValueError(f"state.stream.{name}={reprlib.repr(cursor.get(name))} must be {constraint}")

    def is_count(value: Any, least: int) -> bool:
        return type(value) is int and least <= value < _MOST

    for name in _COUNTS:
        if not is_count(cursor.get(name), 0):
            refuse(name, "a whole number of at least 0")
    for name, least in _COUNTS_OR_NONE.items():
        if cursor.get(name) is not None and not is_count(cursor[name], least):
            refuse(name, f"null or a whole number of at least {least}")
    if cursor["epoch"] and cursor.get("epoch_rows") is None:
        refuse("epoch_rows", "a number after the first epoch")
    if not isinstance(cursor.get("state"), dict | None):
        refuse("state", "null or a mapping")
    checksums = cursor.get("checksums")
    if not isinstance(checksums, list) or not all(isinstance(one, str | None) for one in checksums):
        refuse("checksums", "a list of text or null")
    if not isinstance(cursor.get("settings"), dict):
        refuse("settings", "a mapping")


class StreamedRows:
    """The rows at positions of a run, from a stream of shards. All ranks have the same, each reads its part.

    Args:
        stream: The shards.
        sequence_length: Input positions of a row.
        seed: Key of the order of rows.
        shuffle: False reads the rows in their own order.

    Attributes:
        num_rows: Rows in one epoch, or None while the end of the source has not been seen.
        waste: Share of the row positions that hold no token: none.
    """

    waste = 0.0

    def __init__(self, stream: ShardStream, sequence_length: int, seed: int, shuffle: bool) -> None:
        self.num_rows: int | None = None
        self._stream, self._sequence_length, self._seed, self._shuffle = stream, sequence_length, seed, shuffle
        self._base_epoch, self._base_shard = 0, 0
        self._base_place: Place | None = None
        self._based = self._from_start = self._new_windows()
        self._readers: dict[tuple[int, int], ShardReader] = {}

    def reach(self, start: int, stop: int, cancelled: Callable[[], bool]) -> bool:
        """Wait until positions ``[start, stop)`` can be read, whichever rank reads them.

        Returns:
            False if the source ends before and the run is to end with it.

        Raises:
            ValueError: The shards cannot be written, or are not what they were.
        """
        position = start
        while position < stop:
            place = self._locate(position, cancelled)
            if place is None:
                return False
            epoch, window = place
            windows = self._windows(epoch)
            for shard in windows.shards(window):
                self._stream.wait_for_tokens(shard, self._turn(epoch, shard), cancelled)
            position = epoch * (self.num_rows or 0) + windows.rows(window).stop
        return True

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Positions are read as they are."""
        return positions

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """Tokens and document starts [positions, sequence + 1]; None says that every token counts."""
        tokens: np.ndarray | None = None
        starts = np.zeros((len(positions), self._sequence_length + 1), dtype=bool)
        places = [self._located(position) for position in positions.tolist()]
        for place, group in itertools.groupby(range(len(positions)), key=places.__getitem__):
            own = np.array(list(group))
            rows, reader, tokens_before = self._window_rows(*place, positions[own])
            first_tokens = rows * self._sequence_length - tokens_before
            found = reader.read_rows(first_tokens, self._sequence_length + 1)
            tokens = np.empty((len(positions), self._sequence_length + 1), found.dtype) if tokens is None else tokens
            tokens[own] = found
            starts[own] = mark_document_starts(reader.document_ends, first_tokens, self._sequence_length)
        assert tokens is not None
        return tokens, starts, None

    def release(self, position: int) -> None:
        """No rank reads a position below this one again."""
        epoch, row = self._split(position)
        windows = self._windows(epoch)
        if (window := windows.find(row)) is not None:
            self._stream.keep(self._turn(epoch, windows.shards(window).start))

    def cursor(self, position: int) -> dict[str, Any]:
        """Entry that a checkpoint keeps to go on at ``position`` without the rows before, with or without the cache."""
        epoch, window = self._located(max(0, position - 1))
        windows = self._windows(epoch)
        shards = windows.shards(window)
        place = self._place_before(shards.start)
        return {
            "epoch": epoch,
            "window": window,
            "shard": shards.start,
            "tokens": windows.tokens_before(shards.start),
            "rows": place.rows if place else None,
            "state": place.state if place else None,
            "epoch_rows": self.num_rows,
            "epoch_shards": self._stream.num_shards(),
            "checksums": [self._stream.checksum(shard) for shard in shards],
            "settings": self._stream.settings(),
        }

    def restore(self, cursor: dict[str, Any] | None) -> None:
        """Go on from a cursor.

        Raises:
            ValueError: It was made with other settings.
        """
        if cursor is None:
            raise ValueError(
                "streaming.mode: the checkpoint is of a run whose data was not streamed; streaming.mode=never"
            )
        _check_cursor(cursor)
        for name, now in self._stream.settings().items():
            if (then := cursor["settings"].get(name)) != now:
                raise ValueError(
                    f"streaming.{name}={now} must stay {then}, with which the checkpoint was made; choose another "
                    "run.name to start anew"
                )
        if cursor["shard"] > cursor["window"] * self._stream.config.window_shards:
            raise ValueError(f"state.stream.shard={cursor['shard']} must be at most the first of its window")
        self.num_rows = cursor.get("epoch_rows")
        self._base_epoch, self._base_shard = cursor["epoch"], cursor["shard"]
        self._base_place = None if cursor.get("rows") is None else Place(cursor["rows"], cursor.get("state"))
        self._from_start = self._new_windows()
        self._based = self._new_windows(cursor["shard"], cursor["tokens"], cursor["window"])
        expected = dict(enumerate(cursor["checksums"], self._base_shard))
        self._stream.start_from(
            self._base_epoch, self._base_shard, self._base_place, cursor.get("epoch_shards"), expected
        )

    def _new_windows(self, *where: int) -> Windows:
        return Windows(self._stream.config.window_shards, self._sequence_length, *where)

    def _windows(self, epoch: int) -> Windows:
        return self._based if epoch == self._base_epoch else self._from_start

    def _split(self, position: int) -> tuple[int, int]:
        """Epoch and row number in it, before the shuffle."""
        return (0, position) if self.num_rows is None else divmod(position, self.num_rows)

    def _located(self, position: int) -> tuple[int, int]:
        """Epoch and window of a position that was reached."""
        epoch, row = self._split(position)
        window = self._windows(epoch).find(row)
        assert window is not None, f"position {position} was not reached"
        return epoch, window

    def _locate(self, position: int, cancelled: Callable[[], bool]) -> tuple[int, int] | None:
        """Epoch and window of a position, as soon as they are known; None if the run ends before."""
        while True:
            epoch, row = self._split(position)
            if epoch and self._stream.config.at_end == "stop":
                return None
            windows = self._windows(epoch)
            window = windows.find(row)
            if window is not None:
                return epoch, window
            shard = windows.next_shard
            record = self._stream.wait_for_record(shard, self._turn(epoch, shard), cancelled)
            if record is not None:
                windows.add(record.train_tokens)
                continue
            windows.end()
            assert windows.num_rows is not None
            self._stream.check_end(windows.num_rows, self.num_rows, self._sequence_length)
            self.num_rows = windows.num_rows

    def _turn(self, epoch: int, shard: int) -> int:
        """Place of a shard in the order in which the run reads them, over all epochs."""
        return shard + (epoch * (self._stream.num_shards() or 0))

    def _place_before(self, shard: int) -> Place | None:
        if shard == self._base_shard:
            return self._base_place
        return self._stream.place_after(shard - 1) if shard else None

    def _window_rows(self, epoch: int, window: int, positions: np.ndarray) -> tuple[np.ndarray, ShardReader, int]:
        windows = self._windows(epoch)
        rows, shards = windows.rows(window), windows.shards(window)
        offsets = positions - (0 if self.num_rows is None else epoch * self.num_rows) - rows.start
        # A key for each window: seeds are below 2**31.
        order = RowPermutation(len(rows), self._seed + window * 2**31, self._shuffle)
        key = (shards.start, shards.stop)
        if key not in self._readers:
            while len(self._readers) >= _OPEN_WINDOWS:
                del self._readers[next(iter(self._readers))]
            self._readers[key] = self._stream.open(shards)
        found = rows.start + order.rows(epoch * len(rows) + offsets)
        return found, self._readers[key], windows.tokens_before(shards.start)
