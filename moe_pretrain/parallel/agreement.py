"""Comparison of what each rank was told or finds out by itself, before ranks depend on each other."""

import json
import socket
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch.distributed as dist

from moe_pretrain.parallel.rendezvous import Rendezvous

_MOST_SAID = 3
_NOT_THERE = "not there"
Answer = tuple[str, dict[str, str]]
"""Host of a rank, and what it has found."""


def require_same(meeting: Rendezvous, found: Mapping[str, str]) -> None:
    """Refuse to begin where ranks have found different things; every rank must call it.

    It goes through the store, not a collective: ranks with and without a GPU have no process group in common.

    Args:
        meeting: Where the ranks have met.
        found: Fields of the configuration, with what ``auto`` became on this rank, and other things, whose names are of
            several words.

    Raises:
        ValueError: They differ; the same line on every rank, with ranks and hosts.
    """
    store, prefix = meeting.store, f"moe_pretrain/found/{meeting.attempt}"
    store.set(f"{prefix}/{meeting.rank}", json.dumps([socket.gethostname(), dict(found)]))
    if meeting.rank == 0:
        answers = [tuple(json.loads(store.get(f"{prefix}/{rank}"))) for rank in range(meeting.world_size)]
        store.set(f"{prefix}/verdict", _describe_differences(answers))
    if refusal := store.get(f"{prefix}/verdict").decode():
        raise ValueError(refusal)


def require_same_text(found: Mapping[str, str], failure: Exception | None = None) -> None:
    """``require_same`` of ranks that have a process group, for what is known only then.

    Args:
        found: Names of several words, and what this rank has found.
        failure: Reason why it has found nothing: none waits for a rank that has gone.

    Raises:
        Exception: ``failure``.
        ValueError: Another rank has failed, or they differ; the same line on every rank.
    """
    told: list[tuple[Answer, str]] = [(("", {}), "")] * dist.get_world_size()
    dist.all_gather_object(told, ((socket.gethostname(), dict(found)), str(failure or "")))
    if failure is not None:
        raise failure
    for rank, ((host, _), reason) in enumerate(told):
        if reason:
            raise ValueError(f"rank {rank} ({host}): {reason}")
    if refusal := _describe_differences([answer for answer, _ in told]):
        raise ValueError(refusal)


def _describe_differences(answers: Sequence[Answer]) -> str:
    fields = dict.fromkeys(field for _, own in answers for field in own)
    differing = [field for field in fields if len({own.get(field) for _, own in answers}) > 1]
    said = [_describe(field, answers) for field in differing[:_MOST_SAID]]
    more = [f"and {len(differing) - _MOST_SAID} more differ"] if len(differing) > _MOST_SAID else []
    return "; ".join([*said, *more])


def _describe(field: str, answers: Sequence[Answer]) -> str:
    """Ranks, by host, with the values of ``field`` that they have."""
    places: dict[str, dict[str, list[int]]] = {}
    for rank, (host, found) in enumerate(answers):
        places.setdefault(found.get(field, _NOT_THERE), {}).setdefault(host, []).append(rank)
    said = [
        f"{value} on " + ", ".join(f"{_name(ranks)} ({host})" for host, ranks in by_host.items())
        for value, by_host in places.items()
    ]
    way_out = "" if " " in field else f", or set {field}"
    return (
        f"{field} must be the same on every rank, and is {' and '.join(said)}: give their hosts the same command, "
        f"files and environment{way_out}"
    )


def _name(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 6``."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
