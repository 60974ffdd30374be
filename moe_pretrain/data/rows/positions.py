"""Rows by position in a run: of one corpus in its order, or of several that take turns.

Axis names:
    positions   positions of the run, in the caller's order
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from moe_pretrain.data.rows.interleave import Turns
from moe_pretrain.data.rows.packing import Rows
from moe_pretrain.data.rows.permutation import RowPermutation


@runtime_checkable
class Positions(Protocol):
    """A run's rows by position.

    Attributes:
        num_rows: Rows of one epoch over all sources.
        waste: Share of the places in a row that hold no token, on average over the run's beginning.
    """

    num_rows: int
    waste: float

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Places of the rows of int64 [positions], one entry each, for ``read``; cheaper for many at a time."""

    def read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens, document starts and tokens used of what ``find`` found, or of a part of it: see ``rows.Rows``."""


class Shuffled:
    """The rows of one corpus, in a new order each epoch."""

    def __init__(self, rows: Rows, seed: int, shuffle: bool) -> None:
        self.num_rows, self.waste = rows.num_rows, rows.waste
        self._rows = rows
        self._order = RowPermutation(rows.num_rows, seed, shuffle)

    def find(self, positions: np.ndarray) -> np.ndarray:
        """See ``Positions``."""
        return self._order.rows(positions)

    def read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See ``Positions``."""
        return self._rows.read(found)


@dataclass(frozen=True)
class SourceUse:
    """Rows, tokens and epochs that a run has taken from one source.

    Attributes:
        rows: Rows.
        epochs: How often all of the source's rows, 1.5 for one and a half times.
    """

    rows: int
    epochs: float


class Mixed:
    """The rows of several corpora that take turns; each has its own order and its own epochs.

    Args:
        rows: The corpora by name.
        turns: Which of them serves a position; its sources are the names in sorted order.
        seed: Key of the orders; each source's own is made of it and the name.
        shuffle: See ``RowPermutation``.
    """

    def __init__(self, rows: Mapping[str, Rows], turns: Turns, seed: int, shuffle: bool) -> None:
        self.names = sorted(rows)
        self._turns = turns
        self._sources = [Shuffled(rows[name], seed_of(seed, name), shuffle) for name in self.names]
        self.num_rows = sum(source.num_rows for source in self._sources)
        shares = np.array(turns.counts(self.num_rows)) / self.num_rows
        self.waste = float(sum(share * source.waste for share, source in zip(shares, self._sources, strict=True)))

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Source and row of each position, int64 [positions, 2]."""
        found = np.stack(self._turns.locate(positions), axis=1)
        for number, places in _places(found[:, 0]):
            found[places, 1] = self._sources[number].find(found[places, 1])
        return found

    def read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See ``Positions``."""
        by_source = list(_places(found[:, 0]))
        parts = [self._sources[number].read(found[places, 1]) for number, places in by_source]
        if len(parts) == 1:
            return parts[0]
        where = [places for _, places in by_source]
        tokens, starts, used = zip(*parts, strict=True)
        return _scatter(where, tokens), _scatter(where, starts), None if used[0] is None else _scatter(where, used)

    def use(self, position: int) -> dict[str, SourceUse]:
        """Use of each source by the run before ``position``."""
        counts = self._turns.counts(position)
        return {
            name: SourceUse(count, count / source.num_rows)
            for name, count, source in zip(self.names, counts, self._sources, strict=True)
        }

    def runs_out(self) -> dict[str, int | None]:
        """Position at which each source would serve its first row for the second time; None if that never comes."""
        return {
            name: self._turns.position(number, source.num_rows)
            for number, (name, source) in enumerate(zip(self.names, self._sources, strict=True))
        }


def seed_of(seed: int, name: str) -> int:
    """Seed of the order of one source: another for each name."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed)


def _places(source: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each source that occurs, and where."""
    for number in np.unique(source).tolist():
        yield number, np.flatnonzero(source == number)


def _scatter(where: Sequence[np.ndarray], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of ``parts[i]`` put at the places ``where[i]``, which are all places there are."""
    whole = np.empty((sum(map(len, where)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for places, part in zip(where, parts, strict=True):
        whole[places] = part
    return whole


class PositionedRows(Protocol):
    """Names of the rows at each position of a run.

    Attributes:
        num_rows: Rows in one epoch; None where that is not known yet.
        waste: Share of the row positions that hold no token.
    """

    num_rows: int | None
    waste: float

    def reach(self, start: int, stop: int, cancelled: Callable[[], bool]) -> bool:
        """Wait until positions ``[start, stop)`` can be read; False if the data ends before."""

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Places of the rows of int64 [positions], one entry each, for ``read``; cheaper for many at a time."""

    def read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """As ``rows.Rows.read``, of what ``find`` found, or of a part of it."""

    def release(self, position: int) -> None:
        """No rank reads a position below this one again."""

    def cursor(self, position: int) -> dict[str, Any] | None:
        """Entry that a checkpoint keeps to go on at a position; None if the position is enough."""

    def restore(self, cursor: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; raises ValueError if it was made with other settings."""


class WholeRows:
    """The rows of a corpus, or of several that are mixed, that are there whole, for ever."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.num_rows: int | None = positions.num_rows
        self.waste = positions.waste

    def reach(self, start: int, stop: int, cancelled: Callable[[], bool]) -> bool:
        """See ``PositionedRows``."""
        return True

    def find(self, positions: np.ndarray) -> np.ndarray:
        """See ``PositionedRows``."""
        return self.positions.find(positions)

    def read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See ``PositionedRows``."""
        return self.positions.read(found)

    def release(self, position: int) -> None:
        """See ``PositionedRows``."""

    def cursor(self, position: int) -> dict[str, Any] | None:
        """See ``PositionedRows``."""
        return None

    def restore(self, cursor: dict[str, Any] | None) -> None:
        """See ``PositionedRows``."""
        if cursor is not None:
            raise ValueError("streaming.mode: the checkpoint is of a run whose data was streamed; stream it here too")
