"""The limit of open files, which sockets between ranks count against."""

import resource

_OF_ONE_PROCESS = 192
_FOR_EACH_OTHER_RANK = 8
"""Sockets to one other rank: one for each group of ranks that both are in."""


def allow_open_files(world_size: int) -> None:
    """Raise the soft limit as far as the system lets a process do that by itself.

    Raises:
        ValueError: That is less than a rank of ``world_size`` needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _OF_ONE_PROCESS + _FOR_EACH_OTHER_RANK * (world_size - 1)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"the limit of open files, ulimit -n {hard}, must be at least {needed} for {world_size} "
            f"rank{'s' if world_size > 1 else ''}: raise it (ulimit -Hn, or limits.conf)"
        )
