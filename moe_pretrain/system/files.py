"""Files written whole or not at all: the one way in which a file of ours replaces another.

A new file is written beside its place under a temporary name, flushed to the disk, renamed, and the folder's entry
flushed too. A reader, a kill, a power cut or a full disk at any moment finds the old content or the new one.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

TEMPORARY_SUFFIX = ".tmp"
"""End of the names of files that are being written, or whose process was killed while it wrote them."""


_NO_SUCH_FLUSH = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS)


def is_being_written(temporary: Path) -> bool:
    """Whether a file with a temporary name belongs to a process of this host that lives.

    The clock does not tell: it may have jumped, and that of a file server is another.
    """
    owner = temporary.name.removesuffix(TEMPORARY_SUFFIX).rpartition(f".{socket.gethostname()}.")[2]
    return owner.isdecimal() and owner != temporary.name and Path(f"/proc/{owner}").exists()


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of a file that nobody but the caller writes."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


class FileIdentity(NamedTuple):
    """A file as it was: one that was changed, cut short or replaced since has another."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "FileIdentity":
        """The identity that a file had when it was looked at."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a rename alone may be undone by a power cut.

    Some network file systems know no flush of a folder, and do it with the rename.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_FLUSH:
            raise _naming(error, folder) from None
    finally:
        os.close(descriptor)


def _naming(error: OSError, path: Path) -> OSError:
    """The error with the file that it is about; what is done to an open file names none."""
    if error.filename is None:
        error.filename = str(path)
    return error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name whole and on the disk, or not at all; text is UTF-8.

    Raises:
        OSError: It cannot be written; what was there before is still there, and nothing else.
    """
    with WholeFile(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, whole or not at all; numbers must be finite, for JSON knows no others."""
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of ``write_json``.

    Raises:
        ValueError: It is no such file any more.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): delete it to go on") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is broken: delete it to go on")
    return values


PARTIAL_SUFFIX = ".partial"
"""End of the names of folders that are being written."""


def check_unused(folder: Path) -> None:
    """Refuse a folder that something is in.

    Raises:
        ValueError: It is not empty, or no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"FOLDER={folder} must be empty or not exist: nothing is replaced")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` at the end; after an exception nothing is left.

    Raises:
        ValueError: Something is in ``folder``.
    """
    check_unused(folder)
    work = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if work.exists():
        shutil.rmtree(work)  # of a process that was killed
    work.mkdir(parents=True)
    try:
        yield work
        sync_folder(work)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(folder.parent)


class WholeFile:
    """A file written in pieces that appears under its name only when it is whole and on the disk.

    As a context manager it commits at the end, and leaves nothing behind after an exception.

    Attributes:
        checksum: xxh3-128 of the bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Several processes may write one file, with equal content (ranks that share a cache): each has its own, also
        # those of two hosts or containers that have the same number.
        owner = f"{socket.gethostname()}.{os.getpid()}"
        self._temporary = path.with_name(f"{path.name}.{owner}{TEMPORARY_SUFFIX}")
        # Unbuffered: a full disk is heard of by the piece that does not fit, not by some later one.
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed by commit or abandon
        self.checksum = xxhash.xxh3_128()

    def __enter__(self) -> "WholeFile":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.abandon()

    def write(self, data: bytes | memoryview) -> None:
        """Append, and count it into the checksum."""
        self.checksum.update(data)
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]  # the kernel may take a part of it
        except OSError as error:
            raise _naming(error, self._path) from None

    def commit(self) -> None:
        """Flush to the disk and take the final name; a file that cannot is abandoned."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.rename(self._path)
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                raise _naming(error, self._path) from None
            raise
        sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Leave nothing behind, unless the disk refuses that too: what comes first is what is said."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
