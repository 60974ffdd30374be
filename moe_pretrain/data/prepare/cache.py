"""The folder of prepared corpora: one builder at a time, nothing half done under a final name, no rubbish left.

NAME            a prepared corpus, complete
NAME.partial    one that is being prepared, or was when its process was killed
.NAME.lock      held by the process that prepares it and by its workers; the kernel lets go of it when the last of them
                is dead, so what a killed one still has under way is never written into the next one's work
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_pretrain.system.file_lock import try_lock
from moe_pretrain.system.files import TEMPORARY_SUFFIX, is_being_written

_PARTIAL = ".partial"
_SECONDS_BETWEEN_TRIES = 0.5
_OLD_SECONDS = 3600.0
_STALE_SECONDS = 7 * 24 * 3600.0


def partial_folder(folder: Path) -> Path:
    """Folder in which a corpus is prepared before it gets its name."""
    return folder.with_name(folder.name + _PARTIAL)


@contextlib.contextmanager
def locked(folder: Path, report: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of a corpus; waits, and says so, while another process has it.

    Yields:
        Handle of the lock, for processes that must keep it while they live.

    Raises:
        ValueError: The cache folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = _lock_file(folder)
        while (handle := try_lock(path)) is None:
            report(f"another process prepares {folder}: waiting for it")
            time.sleep(_SECONDS_BETWEEN_TRIES)
    except OSError as error:
        raise ValueError(f"run.cache_dir={folder.parent}: {error.strerror}") from None
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def remove_stale(cache_dir: Path, report: Callable[[str], None]) -> None:
    """Remove what killed processes left and nobody went on with for a week."""
    for partial in cache_dir.glob(f"*{_PARTIAL}"):
        folder = partial.with_name(partial.name.removesuffix(_PARTIAL))
        if time.time() - _last_change(partial) < _STALE_SECONDS:
            continue
        lock = _lock_file(folder)
        handle = try_lock(lock)
        if handle is None:
            continue
        report(f"removing {partial}, which nobody went on with for a week")
        shutil.rmtree(partial, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(handle)


def was_cut_off(folder: Path) -> bool:
    """Whether the process that gave the corpus its name was killed before it had let go of the lock."""
    return _lock_file(folder).exists()


def remove_leftovers(partial: Path) -> None:
    """Remove the temporary files of processes that were killed; call it under the lock."""
    for path in partial.rglob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def remove_old_leftovers(folder: Path) -> None:
    """Remove temporary files that nobody has written to for an hour, but none of a process that lives here."""
    for path in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS and not is_being_written(path):
                path.unlink()


def _last_change(folder: Path) -> float:
    paths = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return max(path.stat().st_mtime for path in paths)
