"""The tokens of one shard, read piece by piece, each piece against the checksums that were written with it.

Files are read and not mapped: a mapped file that is cut short under a run, or whose disk fails, ends the process with
SIGBUS, without a word. Beside ``shard-00000.bin`` lies

    shard-00000.sums  the xxh3-128 of the ``.bin`` file that it belongs to, then uint64, the xxh3-64 of each block of it

so that what another program changes under a run is found when it is read, at the cost of hashing what is read. A folder
of an earlier release has no sums; there a file must keep the size and the time of its last change.
"""

import functools
import os
import resource
from pathlib import Path

import numpy as np
import xxhash

from moe_pretrain.system.files import FileIdentity

BLOCK_BYTES = 2**14
"""Small, since a row makes whole blocks be read: a few kB, at random places."""
SUMS_DTYPE = np.dtype("<u8")
_DIGEST_BYTES = 16
_SHARE_OF_DESCRIPTORS = 4
_MOST_OPEN_FILES = 1024


class BlockSums:
    """The sums of a file that is being written."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._rest = b""

    def add(self, data: bytes) -> None:
        """Count what is appended to the file."""
        data = self._rest + data
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        self._sums += _digests(memoryview(data)[:whole])
        self._rest = data[whole:]

    def content(self, digest: bytes) -> bytes:
        """The file of sums, once all is written; ``digest`` is the xxh3-128 of the whole file."""
        return digest + np.array([*self._sums, *_digests(memoryview(self._rest))], dtype=SUMS_DTYPE).tobytes()

    def agree_with(self, path: Path, xxh3: str) -> bool:
        """Whether the sums beside the file ``path``, whose xxh3-128 is to be ``xxh3``, are these; true without any."""
        written = _read_sums(path, xxh3)
        return written is None or written == self.content(bytes.fromhex(xxh3))


class TokenFile:
    """Random access to the ``.bin`` file of a shard.

    Args:
        path: The file.
        dtype: Type of its tokens.
        xxh3: Its xxh3-128, hexadecimal.
    """

    def __init__(self, path: Path, dtype: np.dtype, xxh3: str) -> None:
        self._path, self._dtype, self._xxh3 = path, dtype, xxh3
        self._identity = FileIdentity.of(os.stat(path))
        self._sums: np.ndarray | None = None
        self._has_looked = False

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)`` of the file, which must lie in it.

        Raises:
            ValueError: The file cannot be read, is shorter than it was, or its content is another.
        """
        first, end = start * self._dtype.itemsize, stop * self._dtype.itemsize
        if not self._has_looked:
            self._sums, self._has_looked = self._read_sums(), True
        if self._sums is None:
            self._check_identity()
            return np.frombuffer(self._read_bytes(first, end), self._dtype)
        block, last_block = first // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        begin = block * BLOCK_BYTES
        data = self._read_bytes(begin, min(last_block * BLOCK_BYTES, self._identity.size))
        if _digests(memoryview(data)) != self._sums[block:last_block].tolist():
            raise damaged(self._path, f"bytes {begin} to {begin + len(data)} are not those that were written")
        return np.frombuffer(data, self._dtype, stop - start, first - begin)

    def _read_bytes(self, first: int, end: int) -> bytes:
        parts, place = [], first
        try:
            file = _open(str(self._path), self._identity)
            while place < end:
                part = os.pread(file.descriptor, end - place, place)  # at most 2 GiB at a time
                if not part:
                    size = os.fstat(file.descriptor).st_size
                    raise damaged(self._path, f"has {size} bytes, it had {self._identity.size} when the run opened it")
                parts.append(part)
                place += len(part)
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be read: {error.strerror}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_sums(self) -> np.ndarray | None:
        content = _read_sums(self._path, self._xxh3)
        if content is None:
            return None
        if len(content) != _DIGEST_BYTES + SUMS_DTYPE.itemsize * -(-self._identity.size // BLOCK_BYTES):
            raise ValueError(f"{self._path.with_suffix('.sums')}: damaged: has {len(content)} bytes; delete it")
        return np.frombuffer(content, SUMS_DTYPE, offset=_DIGEST_BYTES)

    def _check_identity(self) -> None:
        try:
            found = FileIdentity.of(os.stat(self._path))
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be read: {error.strerror}") from None
        if found != self._identity:
            raise damaged(
                self._path,
                f"was written after the run had opened it, {found.size} bytes now and {self._identity.size} then",
            )


def damaged(path: Path, what: str) -> ValueError:
    """The error of a file in the folder of a side, which is written anew with its whole corpus."""
    return ValueError(f"{path}: damaged: {what}; delete {path.parent.parent} to write it again")


def _read_sums(path: Path, xxh3: str) -> bytes | None:
    """Sums of the file ``path``; None in a folder of an earlier release, also where that left those of an older shard.

    Raises:
        ValueError: They cannot be read.
    """
    sums = path.with_suffix(".sums")
    try:
        content = sums.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{sums}: cannot be read: {error.strerror}") from None
    return content if content[:_DIGEST_BYTES].hex() == xxh3 else None


def _digests(data: memoryview) -> list[int]:
    hash_of = xxhash.xxh3_64_intdigest
    return [hash_of(data[place : place + BLOCK_BYTES]) for place in range(0, len(data), BLOCK_BYTES)]


class _OpenFile:
    """A descriptor that is closed with its last user, which may be a thread in the middle of a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open(path: str, identity: FileIdentity) -> _OpenFile:
    return _opened()(path, identity)


@functools.cache
def _opened() -> "functools._lru_cache_wrapper[_OpenFile]":
    """The files that are open now: a corpus may have more than a process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    kept = min(_MOST_OPEN_FILES, max(8, limit // _SHARE_OF_DESCRIPTORS))
    return functools.lru_cache(maxsize=kept)(lambda path, identity: _OpenFile(path))
