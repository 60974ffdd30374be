"""One folder, one run: a second start is refused before it writes anything, and hears who was first.

Every rank holds a shared lock on ``RUN/owner.lock`` while it lives. A run becomes the owner by getting the lock for
itself alone, which shows that no rank of an earlier attempt is left on any host, and by turning it into a shared one.
"""

import contextlib
import datetime
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_pretrain.run_folder.paths import OWNER_FILE
from moe_pretrain.system.file_lock import try_lock

_WAIT_SECONDS = 5.0
"""How long a start waits for what is left of the last attempt, which may be dying."""
_SECONDS_BETWEEN_TRIES = 0.1


class RunInUse(ValueError):
    """Another run, or what is left of it, holds the folder."""


@contextlib.contextmanager
def owned(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Own a run's folder; made if it is not there.

    Args:
        folder: The run's folder.
        report: Prints a line for the user.

    Raises:
        RunInUse: Another run holds it, and has not ended within a few seconds.
        ValueError: The folder cannot be made or written.
    """
    handle = _own(folder, report)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Hold the folder together with its owner, so that nobody else can own it before this process has ended."""
    try:
        handle = os.open(folder / OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        # Where there are no locks the owner has said so.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _own(folder: Path, report: Callable[[str], None]) -> int | None:
    """Handle of the owner's lock; None where the file system has no locks."""
    path = folder / OWNER_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise _unwritable(folder, error) from None
    deadline = time.monotonic() + _WAIT_SECONDS
    is_told = False
    while True:
        try:
            handle = _try_own(path)
        except OSError as error:
            report(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second start of this run away")
            return None
        if handle is not None:
            return handle
        if time.monotonic() > deadline:
            raise RunInUse(
                f"run.name={folder.name} must be another one, or wait: {folder} is in use by {_holder(path)}"
            )
        if not is_told:
            report(f"{folder} is in use by {_holder(path)}: waiting {_WAIT_SECONDS:.0f} s for it to end")
            is_told = True
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _try_own(path: Path) -> int | None:
    handle = try_lock(path)
    if handle is None:
        return None
    try:
        # Not one step for the kernel: another start may get it in between, and is the owner then.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    # A full disk must not keep the run from going on.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return handle


def _holder(path: Path) -> str:
    try:
        owner = path.read_text(encoding="utf-8").strip()
    except OSError:
        owner = ""
    return f"{owner or 'another process'}, or by ranks of that run which have not ended"


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"run.output_dir={folder.parent}: {folder} cannot be written: {error.strerror}")
