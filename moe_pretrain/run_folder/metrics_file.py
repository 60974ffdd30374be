"""The rows of ``RUN/metrics.jsonl``, one JSON object per line: written, read, cleaned, reduced.

Keys of every row:
    kind      "train", "validation", "tasks" or "event"
    step      optimizer steps done
    tokens    tokens consumed so far
    seconds   wall time of this run, summed over its attempts
    attempt   0 for the first start, one more for every resume

Names are ``group/name_unit``. ``train/gradient_norm`` is the global norm before clipping;
``train/gradient_norm_router``, ``_experts`` and ``_rest`` are those of the routers' own weights, of the routed experts
and of all else. Per-layer names are ``moe/layer_03/NAME``. A number that is not finite is written as ``null`` (JSON has
no NaN) and an event row "non_finite" says so.
"""

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_pretrain.system.files import remove_leftovers, write_whole

_TAIL_BYTES = 400_000
"""How much of a growing metrics file is read: its last rows."""

MetricsRow = dict[str, Any]

_NOT_THERE = object()
_NEEDED: dict[str, tuple[type, ...]] = {"kind": (str,), "step": (int,)}
_NUMBER_OR_NULL = (float, int, type(None))
_NEEDED_OF_KIND: dict[str, dict[str, tuple[type, ...]]] = {
    "train": {"tokens": (int,), "train/loss": _NUMBER_OR_NULL},
    "validation": {"tokens": (int,), "validation/loss": _NUMBER_OR_NULL},
    "tasks": {"tokens": (int,)},
    "event": {"event": (str,), "message": (str,)},
}
"""Keys that readers of a row rely on."""


def read_rows(path: Path) -> list[MetricsRow]:
    """Read a metrics file that may still be growing.

    Args:
        path: The ``metrics.jsonl`` of a run; a missing file has no rows.

    Returns:
        All complete rows, in file order. A last line without its newline is a row that is being
        written, or was torn by a crash, and is left out. NaN and Infinity, which other programs write
        where JSON has no number, are None as those of a run are.

    Raises:
        ValueError: A complete line is not a row; the message names file and line.
    """
    if not path.exists():
        return []
    complete_lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(complete_lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda word: None)
        except ValueError:
            row = None
        if (problem := _problem_of(row)) is not None:
            raise ValueError(f"{path}, line {number}: {problem}; delete that line to go on")
        rows.append(row)
    return rows


def _problem_of(row: Any) -> str | None:
    """Reason why this is not a metrics row; None if it is. Kinds and keys of later releases may be there too."""
    if not isinstance(row, dict):
        return "not a JSON object"
    needed = {**_NEEDED, **_NEEDED_OF_KIND.get(str(row.get("kind")), {})}
    for key, kinds in needed.items():
        value = row.get(key, _NOT_THERE)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"{key} is missing" if value is _NOT_THERE else f"{key}={value!r} is no {kinds[0].__name__}"
    return None


class JsonlSink:
    """Appends rows to a file, one JSON object per line, each written through at once.

    A disk that refuses them does not stop the caller: rows wait in memory, in order, until it takes them again. A file
    that was deleted is written anew from what was written to it.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda line: None):
        """Open ``path`` for appending and drop a last line that a crash left half written.

        Args:
            path: The run's ``metrics.jsonl``.
            warn: Hears once when the disk begins to refuse rows, and once when it takes them again.
        """
        self.path = path
        self._warn = warn
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()  # ``sync`` is called while a checkpoint is written behind
        remove_leftovers(path)
        self._open()

    def _open(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        self._file = self.path.open("a+b", buffering=0)
        self._length = content.rfind(b"\n") + 1
        self._file.truncate(self._length)

    def write(self, row: MetricsRow) -> None:
        """Append one row, whose numbers must be finite (see ``replace_non_finite``)."""
        refused_before = bool(self._waiting)
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            if not refused_before:
                self._warn(f"metrics are kept in memory: {self.path} cannot be written: {error}")
            return
        if refused_before:
            self._warn(f"metrics: {self.path} is written again, and complete")

    def _write_waiting(self) -> None:
        with self._lock:
            if not self.path.exists():
                self._restore()
            while self._waiting:
                self._file.truncate(self._length)  # what a full disk left of a row
                line = memoryview(self._waiting[0])
                while line:
                    line = line[self._file.write(line) :]
                self._length += len(self._waiting.pop(0))

    def _restore(self) -> None:
        """Write the deleted file anew; its content is there as long as it is open."""
        self._file.seek(0)
        content = self._file.read(self._length)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, content)
        self._file.close()
        self._open()

    def truncate_after(self, step: int, is_validated: bool = True) -> list[MetricsRow]:
        """Remove the rows of steps that a resumed run will do again, event rows too.

        Args:
            step: Steps done in the loaded checkpoint; rows with a larger ``step`` go.
            is_validated: Whether the checkpoint knows of the validation at ``step``: else that is done again too.

        Returns:
            The rows that were kept.
        """
        kept = [
            row
            for row in read_rows(self.path)
            if row["step"] < step or (row["step"] == step and (is_validated or row["kind"] != "validation"))
        ]
        self._file.close()
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._open()
        return kept

    def sync(self) -> None:
        """Wait until every row that the disk takes is on it."""
        try:
            self._write_waiting()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(f"metrics: {self.path} cannot be flushed: {error}")

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()


def replace_non_finite(row: MetricsRow) -> tuple[MetricsRow, list[str]]:
    """Make a row writable as JSON.

    Args:
        row: Scalars and flat lists of scalars.

    Returns:
        The row with every NaN and infinity replaced by None, and the keys where that happened.
    """
    bad_keys = []

    def clean(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [clean(key, item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            if key not in bad_keys:
                bad_keys.append(key)
            return None
        return value

    return {key: clean(key, value) for key, value in row.items()}, bad_keys


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows at the end of a file that may be growing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]
    return [json.loads(line) for line in lines]
