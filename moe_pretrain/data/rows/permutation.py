"""Order of rows: the row at position n of a run; pure functions, no tables, no state.

Position n counts the rows that a run consumes, over all epochs. Its epoch is ``n // num_rows``; in
each epoch the rows are permuted by a keyed Feistel network, so any position is found in the same
time whether it is the first or the 10**12th.

Axis names:
    positions   positions of the run, in the caller's order
"""

from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MAX_ROWS = 2**62  # beyond this the Feistel halves would not fit in 64 bits


@dataclass(frozen=True)
class RowPermutation:
    """The order of the rows of one corpus.

    A Feistel network permutes ``[0, 4**half_bits)``, the smallest such range that holds all
    rows. A value that lands outside ``[0, num_rows)`` is sent through again until it lands
    inside (cycle walking), which keeps the map a permutation; fewer than four passes are
    needed on average.

    Attributes:
        num_rows: Rows in one epoch, at least 1.
        seed: Any integer; the same seed gives the same order on every machine.
        shuffle: False gives the rows in their own order, each epoch alike.
    """

    num_rows: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= _MAX_ROWS:
            raise ValueError(f"num_rows={self.num_rows} must be from 1 to 2**62")

    def row(self, position: int) -> tuple[int, int]:
        """Epoch and row of one position."""
        row = self.rows(np.array([position], dtype=np.int64))[0]
        return position // self.num_rows, int(row)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of many positions.

        Args:
            positions: int64 [positions], each at least 0; any order, any epochs.

        Returns:
            int64 [positions], each in ``[0, num_rows)``.
        """
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} must be at least 0")
        epochs, offsets = np.divmod(positions.astype(np.int64), self.num_rows)
        if not self.shuffle:
            return offsets
        keys = self._round_keys(epochs.astype(np.uint64))
        rows = self._feistel(offsets.astype(np.uint64), keys)
        outside = np.flatnonzero(rows >= self.num_rows)
        while outside.size:
            rows[outside] = self._feistel(rows[outside], keys[:, outside])
            outside = outside[rows[outside] >= self.num_rows]
        return rows.astype(np.int64)

    def _round_keys(self, epochs: np.ndarray) -> np.ndarray:
        """Independent keys for every epoch and round, uint64 [rounds, positions]."""
        seed_key = _mix(np.array([self.seed % 2**64], dtype=np.uint64))
        # Scrambled seed plus plain epoch: were both treated alike, seed 1 would begin with the
        # second epoch of seed 0.
        epoch_key = _mix(seed_key + epochs)
        rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None]
        return _mix(epoch_key[None, :] ^ _mix(rounds))

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half_bits = np.uint64(max(1, -(-(self.num_rows - 1).bit_length() // 2)))
        mask = (np.uint64(1) << half_bits) - np.uint64(1)
        left, right = values >> half_bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half_bits) | right


def rank_positions(step: int, global_batch_rows: int, rank: int, world_size: int) -> range:
    """Positions that one rank consumes in one step: a contiguous part of the global batch.

    The global batch of ``step`` is ``[step * global_batch_rows, (step + 1) *
    global_batch_rows)`` whatever the number of ranks.

    Raises:
        ValueError: The batch cannot be split evenly, or the rank does not exist.
    """
    if global_batch_rows < 1 or global_batch_rows % world_size:
        raise ValueError(
            f"global_batch_rows={global_batch_rows} must be a positive multiple of world_size={world_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be from 0 to world_size-1={world_size - 1}")
    rows_per_rank = global_batch_rows // world_size
    first = step * global_batch_rows + rank * rows_per_rank
    return range(first, first + rows_per_rank)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words, one to one (the finaliser of SplitMix64, arithmetic mod 2**64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
