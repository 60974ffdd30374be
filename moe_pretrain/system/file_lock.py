"""A lock that dies with its holder: the kernel lets go of it when the last process that has its handle is dead.

``flock``; between hosts it holds where the file system passes it on (NFS since Linux 2.6.12, Lustre mounted with
``flock``, GPFS, CephFS), and on the one host alone where it does not (``local_lock``, ``localflock``).
"""

import fcntl
import os
from pathlib import Path


def try_lock(path: Path) -> int | None:
    """Handle of the locked file, or None if another has it (or has just removed it).

    Raises:
        OSError: The file cannot be made, or its file system has no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder may have removed the file: a lock on a file without a name keeps nobody out.
        if os.stat(path).st_ino == os.fstat(handle).st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None
