"""Signs of life: what a rank tells the others of itself, which rank they say is waited for, and their words."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

Sign = dict[str, Any]
"""Sign of life of a rank: host, count, phase, step, line of the program, collectives begun in each group, whether it
has ended, and by what failure."""

NEVER = ", never heard of"


def find_awaited(signs: dict[int, Sign]) -> list[int]:
    """Ranks that others wait for in a collective and that wait in none themselves.

    A rank that has begun more collectives of a group than another waits for that one, by itself or through others.

    Args:
        signs: By rank, with ``collectives``: how many it has begun in each of its groups.
    """
    begun: dict[str, dict[int, int]] = {}
    for rank, sign in signs.items():
        for group, number in (sign.get("collectives") or {}).items():
            begun.setdefault(group, {})[rank] = number
    waiting = {rank for ranks in begun.values() for rank, number in ranks.items() if number > min(ranks.values())}
    awaited = {rank for ranks in begun.values() for rank, number in ranks.items() if number < max(ranks.values())}
    return sorted(awaited - waiting)


def begun_collectives() -> dict[str, int]:
    """Number of collectives that this rank has begun in each group, by the group's name, the same on all its ranks.

    torch counts them in every backend; its flight recorder compares ranks by the same numbers.
    """
    if not dist.is_initialized():
        return {}
    begun: dict[str, int] = {}
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # not agreed on yet
            begun[str(group.group_name)] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # stubs
    return begun


def line_of(thread: int) -> str:
    """The line of the program that ``thread`` is at: in the innermost function outside of torch's own files."""
    innermost = frame = sys._current_frames().get(thread)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def is_done(sign: Sign | None) -> bool:
    """Whether the rank has come to its end without a failure; another may be long at its report."""
    return sign is not None and sign["ended"] and not sign["failure"]


def name_together(described: dict[int, str]) -> str:
    """Ranks with what is said of them, those of which the same is said together."""
    together: dict[str, list[int]] = {}
    for rank, words in described.items():
        together.setdefault(words, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}{words}" for words, ranks in together.items()
    )


def describe_sign(sign: Sign | None, with_line: bool = False) -> str:
    """A rank's host, where it was last seen and its failure, to be said after its number."""
    if sign is None:
        return NEVER
    line = f", in {sign['line']}" if with_line and sign["line"] else ""
    failure = f", failed with {sign['failure']}" if sign["failure"] else ""
    return f" on {sign['host']}, last seen at {place_of(sign)}{line}{failure}"


def place_of(sign: Sign) -> str:
    """Place of the rank, in words."""
    return describe_place(sign["phase"], sign["step"])


def describe_place(phase: str, step: int) -> str:
    """A place of the loop, in words."""
    return f"step {step}, phase {phase}"
