"""Interleaving of sources: the source that serves position n of a run; pure functions, whole numbers, no state.

Weights are whole parts; a pattern as long as their sum gives each source its parts and is repeated for ever, so
any position is found in the same time, and exactly.

How exact: in the first n positions of a phase (a stretch with the same weights) a source with the share w has more
than ``w*n - 1`` and fewer than ``w*n + 1`` rows, for every n. So a window that begins where a pattern begins is off by
less than one row, and any other window inside a phase by less than two; one over several phases adds up their errors.
Less than one row for every window is more than any order can give, with three or more sources and general
weights (Graham 1973, J. Combin. Theory A 15:354); parts of 3, 2 and 1 have none.

Axis names:
    positions   positions of the run, in the caller's order
    sources     sources of the mixture
    slots       places of one pattern
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MOST_PARTS = 1_000_000  # a pattern takes 6 bytes and a microsecond for each


def parts_of(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of ``weights``, each read as the decimal that it is written as.

    Raises:
        ValueError: They add up to more than ``MOST_PARTS``; or a weight is negative, not finite, or all are 0.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError("must be at least 0, and one of them above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    parts = [number // divisor for number in whole]
    if sum(parts) > MOST_PARTS:
        raise ValueError(f"come to {sum(parts):,} whole parts, which must be at most {MOST_PARTS:,}: give fewer digits")
    return parts


class Pattern:
    """The shortest order in which sources take turns by their parts.

    Row j of a source with a of q parts must lie in the slots from ``floor(j*q/a)`` to ``ceil((j+1)*q/a) - 1``, which
    is what keeps every prefix within one row. Each slot takes the waiting row whose last slot comes first, and
    that always works out.

    Source:
        Baruah, Cohen, Plaxton, Varvel 1996, "Proportionate progress" (Algorithmica 15:600), for one processor.

    Attributes:
        length: Slots; the sum of the parts.
        parts: Slots of each source.
        source: uint16 [slots], the source of each slot.
        rank: int32 [slots], how many slots before it have the same source.
        slots_of: For each source its slots, rising, int64.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        self.parts = list(parts)
        self.length = sum(parts)
        numbers = [np.arange(part, dtype=np.int64) for part in parts]
        first = np.concatenate([j * self.length // max(1, part) for j, part in zip(numbers, parts, strict=True)])
        last = np.concatenate(
            [-((-(j + 1) * self.length) // max(1, part)) for j, part in zip(numbers, parts, strict=True)]
        )
        owner = np.repeat(np.arange(len(parts)), parts)
        by_first = np.argsort(first, kind="stable")
        opens = [*first[by_first].tolist(), self.length]
        urgency = (last * len(parts) + owner)[by_first].tolist()
        waiting: list[int] = []
        source, known = np.empty(self.length, dtype=np.uint16), 0
        for slot in range(self.length):
            while opens[known] <= slot:
                heapq.heappush(waiting, urgency[known])
                known += 1
            source[slot] = heapq.heappop(waiting) % len(parts)
        self.source = source
        self.slots_of = [np.flatnonzero(source == number) for number in range(len(parts))]
        self.rank = np.empty(self.length, dtype=np.int32)
        for slots in self.slots_of:
            self.rank[slots] = np.arange(len(slots))


class Turns:
    """Turns of the sources: the one that serves each position of a run, and its number of rows before.

    Args:
        phases: First position of each stretch of the run and the parts of every source in it; the first begins at 0,
            the last never ends.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[int]]]) -> None:
        starts = [start for start, _ in phases]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"phases begin at {starts}: must be 0 first, then rise")
        self.num_sources = len(phases[0][1])
        self._starts = starts
        self._patterns = [Pattern(parts) for _, parts in phases]
        # Rows that each source has served before each phase [phases][sources].
        self._before = [[0] * self.num_sources]
        for start in starts[1:]:
            self._before.append(self.counts(start))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and how many earlier positions have the same source.

        Args:
            positions: int64 [positions], each at least 0.

        Returns:
            Two arrays int64 [positions].
        """
        source, index = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        phase = np.searchsorted(np.array(self._starts), positions, side="right") - 1
        for number in np.unique(phase).tolist():
            pattern, here = self._patterns[number], phase == number
            rounds, slot = np.divmod(positions[here] - self._starts[number], pattern.length)
            source[here] = own = pattern.source[slot].astype(np.int64)
            before, parts = np.array(self._before[number]), np.array(pattern.parts)
            index[here] = before[own] + rounds * parts[own] + pattern.rank[slot]
        return source, index

    def counts(self, position: int) -> list[int]:
        """Rows that each source has served before ``position``."""
        # Also called while the phases are put together: then only those so far are known.
        number = max(n for n in range(len(self._before)) if self._starts[n] < max(1, position))
        pattern = self._patterns[number]
        rounds, slot = divmod(position - self._starts[number], pattern.length)
        return [
            before + rounds * part + int(np.searchsorted(slots, slot))
            for before, part, slots in zip(self._before[number], pattern.parts, pattern.slots_of, strict=True)
        ]

    def position(self, source: int, index: int) -> int | None:
        """Position at which ``source`` serves its row number ``index``, or None if it never comes to it."""
        number = max(n for n, before in enumerate(self._before) if before[source] <= index)
        # A phase without this source has the same count at its end: the last such phase decides.
        pattern = self._patterns[number]
        if not pattern.parts[source]:
            return None
        rounds, rank = divmod(index - self._before[number][source], pattern.parts[source])
        return self._starts[number] + rounds * pattern.length + int(pattern.slots_of[source][rank])
