"""Near duplicates: documents of the validation side most of which also stands in a training document.

Each document is sketched where it is tokenised, so the work is spread over the processes that tokenise; the sketches
are compared once, when the corpus is whole.

Source:
    MinHash and bottom-k sketches: Broder, On the resemblance and containment of documents, 1997. Runs of five tokens
    and a MinHash index as in Lee et al. 2021 (arXiv:2107.06499).
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

SIMILARITY = 0.6
"""Jaccard similarity of the runs from which two documents are near duplicates: four fifths of each are the other's."""

_RUN_TOKENS = 5
# Of a longer document only the runs of smallest hash count: a fair sample of it, so that a book costs no more than a
# page. Of a short document inside a book of many pages it sees less, and so finds less.
_MOST_RUNS = 1024
_RUNS_AT_ONCE = 2**18
_NUM_PERMUTATIONS = 64  # standard error of an estimated similarity: 0.06
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads neighbouring token ids over all bits
_SEEN_BITS = 24  # 16 MB; a foreign run meets one of a million runs of held-out documents in 6% of all times
# Of a document the sketches of which agree in SIMILARITY (give or take 0.06) more than this share of its runs is held
# out; of another hardly ever so many.
_LEAST_SEEN = 0.3
_MISSED_WEIGHT = 0.9  # a candidate too many costs a comparison of 64 numbers, one too few is a duplicate not found

SKETCH_DTYPE = np.dtype([("content", "<u8"), ("text_bytes", "<u8"), ("minima", "<u4", (_NUM_PERMUTATIONS,))])
"""One document: hash of its tokens, bytes of its text, and the minima of its runs' hashes under each permutation."""


class Sketcher:
    """Sketches of documents, in order.

    Args:
        near: Whether near duplicates are looked for too; else the minima stay 0.
    """

    def __init__(self, near: bool = True) -> None:
        self._sketches: list[np.ndarray] = []
        self._near = near
        if not near:
            return
        from datasketch import MinHash  # here and not above: it imports scipy, and shards that are ready need none

        self._minhash = MinHash
        self._permutations = MinHash(_NUM_PERMUTATIONS).permutations

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Sketch one document: integers [tokens], without an end-of-document token."""
        tokens = tokens.astype("<u4")
        sketch = np.zeros((), SKETCH_DTYPE)
        sketch["content"] = _content_hash(tokens)
        sketch["text_bytes"] = text_bytes
        if self._near:
            sketch["minima"] = self.minima(_smallest_runs(tokens))
        self._sketches.append(sketch)

    def minima(self, runs: np.ndarray) -> np.ndarray:
        """Minima of the hashes of some runs under each permutation: uint32 [permutations]."""
        minhash = self._minhash(_NUM_PERMUTATIONS, permutations=self._permutations, hashfunc=int, scheme="affine32")
        minhash.update_batch(runs.tolist())
        return np.asarray(minhash.hashvalues)

    def sketches(self) -> np.ndarray:
        """``SKETCH_DTYPE`` [documents]."""
        return np.array(self._sketches, SKETCH_DTYPE)


class HeldOutDocuments:
    """Held-out documents in which those that are trained on are looked up, one at a time, by their tokens.

    Args:
        documents: Integers [tokens] of each, without an end-of-document token.
        near: Whether near duplicates are looked for too.
    """

    def __init__(self, documents: Iterable[np.ndarray], near: bool = True) -> None:
        self._sketcher = Sketcher(near)
        self._seen = np.zeros(2**_SEEN_BITS if near else 0, bool)
        for tokens in documents:
            self._sketcher.add(tokens, 0)
            if near:
                self._seen[_smallest_runs(tokens.astype("<u4")) >> (32 - _SEEN_BITS)] = True
        sketches = self._sketcher.sketches()
        self._numbers: dict[int, list[int]] = {}
        for number, content in enumerate(sketches["content"].tolist()):
            self._numbers.setdefault(content, []).append(number)
        self._index = _MinimaIndex(sketches["minima"]) if near else None

    def find(self, tokens: np.ndarray) -> tuple[list[int], list[int]]:
        """Numbers of the held-out documents that equal a document, and of those that equal or nearly equal it."""
        tokens = tokens.astype("<u4")
        exact = self._numbers.get(_content_hash(tokens), [])
        if self._index is None:
            return exact, exact
        runs = _smallest_runs(tokens)
        # Nearly all documents end here: their sketches would take most of the time.
        if self._seen[runs >> (32 - _SEEN_BITS)].mean() < _LEAST_SEEN:
            return exact, exact
        return exact, sorted({*exact, *self._index.find(self._sketcher.minima(runs)).tolist()})


def read_sketches(path: Path) -> np.ndarray:
    """``SKETCH_DTYPE`` [documents] of a file that was written with ``tofile``."""
    return np.fromfile(path, SKETCH_DTYPE)


def find_duplicates(
    held_out: np.ndarray, trained_on: Iterable[np.ndarray], near: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out documents that are also trained on.

    Args:
        held_out: Sketches [documents].
        trained_on: Sketches of the training documents, some at a time.
        near: Whether to look for near duplicates too.

    Returns:
        bool [documents] of those that are equal to a training document, and of those equal or nearly equal.
    """
    exact = np.zeros(len(held_out), bool)
    found = np.zeros(len(held_out), bool)
    index = _MinimaIndex(held_out["minima"]) if near else None
    for some in trained_on:
        exact |= np.isin(held_out["content"], some["content"])
        if index is not None:
            for minima in some["minima"]:
                found[index.find(minima)] = True
    return exact, exact | found


class _MinimaIndex:
    """Sketches among which those like another are found.

    Args:
        minima: uint32 [documents, permutations].
    """

    def __init__(self, minima: np.ndarray) -> None:
        from datasketch import MinHash, MinHashLSH

        permutations = MinHash(_NUM_PERMUTATIONS).permutations
        self._minhash = functools.partial(MinHash, permutations=permutations, scheme="affine32")
        self._lsh = MinHashLSH(SIMILARITY, _NUM_PERMUTATIONS, weights=(1 - _MISSED_WEIGHT, _MISSED_WEIGHT))
        self._minima = minima
        for number, one in enumerate(minima):
            self._lsh.insert(number, self._minhash(hashvalues=one))

    def find(self, minima: np.ndarray) -> np.ndarray:
        """int64, the numbers of those that are ``SIMILARITY`` or more like one sketch."""
        candidates = np.array(self._lsh.query(self._minhash(hashvalues=minima)), np.int64)
        return candidates[(self._minima[candidates] == minima).mean(axis=1) >= SIMILARITY]


def _content_hash(tokens: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(tokens.tobytes())


def _smallest_runs(tokens: np.ndarray) -> np.ndarray:
    """uint32, rising: the smallest hashes of runs of neighbouring tokens; of a shorter document, of the whole.

    A long document is hashed in blocks: of all its runs at once the hashes take 30 times the bytes of its tokens.
    """
    smallest = np.zeros(0, np.uint32)
    num_runs = max(1, len(tokens) - _RUN_TOKENS + 1)
    for start in range(0, num_runs, _RUNS_AT_ONCE):
        hashes = np.zeros(min(_RUNS_AT_ONCE, num_runs - start), np.uint64)
        for offset in range(start, start + min(_RUN_TOKENS, len(tokens))):
            hashes = (hashes + tokens[offset : offset + len(hashes)].astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
            hashes ^= hashes >> np.uint64(29)
        found = (hashes >> np.uint64(32)).astype(np.uint32)
        smallest = np.unique(np.concatenate([smallest, found]))[:_MOST_RUNS]
    return smallest
