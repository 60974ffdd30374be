"""Threads of a run, all made at its start: in the middle of it, memory or the number of threads may be at a limit."""

import resource
import threading
from collections.abc import Callable


def start_thread(body: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        ValueError: The system gives no further thread; the line names the limits that are set.
    """
    thread = threading.Thread(target=body, name=f"moe-pretrain-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ValueError(f"thread {thread.name}: {error}: {_describe_limits()}") from None
    return thread


def _describe_limits() -> str:
    kinds = ((resource.RLIMIT_AS, "ulimit -v", 1024, " KiB of memory"), (resource.RLIMIT_NPROC, "ulimit -u", 1, ""))
    limits = [(flag, resource.getrlimit(kind)[0], unit, word) for kind, flag, unit, word in kinds]
    named = [f"{flag} {limit // unit}{word}" for flag, limit, unit, word in limits if limit != resource.RLIM_INFINITY]
    return f"raise {' or '.join(named)}" if named else "raise the job's limit of memory or of processes"
