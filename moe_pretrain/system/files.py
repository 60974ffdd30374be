"""Files written whole or not at all, and folders flushed to the disk."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


def flush_folder(path: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file that appears under its name whole, on the disk, or not at all."""
    with DurableFile(path) as file:
        file.write(data)


class DurableFile:
    """A file that appears under its name only when it is whole and on the disk.

    Attributes:
        checksum: xxh3-128 of the bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Of several processes that write the same file each has its own; the contents are the same.
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit
        self.checksum = xxhash.xxh3_128()

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.abandon()

    def write(self, data: bytes) -> None:
        """Append, and count it into the checksum."""
        self._file.write(data)
        self.checksum.update(data)

    def commit(self) -> None:
        """Flush to the disk and take the final name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write a file so that a reader finds the old values or the new ones, after a power cut too."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        json.dump(values, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of ``write_json``.

    Raises:
        ValueError: It is no such file any more.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): delete it to go on") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is broken: delete it to go on")
    return values
