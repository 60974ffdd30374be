"""Comparison of what each rank finds out by itself, before ranks depend on each other."""

import json
import socket
from collections.abc import Mapping, Sequence
from itertools import groupby

from moe_pretrain.parallel.rendezvous import Rendezvous


def require_same(meeting: Rendezvous, found: Mapping[str, str]) -> None:
    """Refuse to begin where ranks have found different things; every rank must call it, with the same fields.

    It goes through the store, not a collective: ranks with and without a GPU have no process group in common.

    Args:
        meeting: Where the ranks have met.
        found: Fields of the configuration, and what ``auto`` became in the environment of this rank.

    Raises:
        ValueError: They differ; the same line on every rank, with ranks and hosts.
    """
    store, prefix = meeting.store, f"moe_pretrain/found/{meeting.attempt}"
    store.set(f"{prefix}/{meeting.rank}", json.dumps([socket.gethostname(), dict(found)]))
    if meeting.rank == 0:
        answers = [tuple(json.loads(store.get(f"{prefix}/{rank}"))) for rank in range(meeting.world_size)]
        differences = [_describe(field, answers) for field in found if len({own[field] for _, own in answers}) > 1]
        store.set(f"{prefix}/verdict", "; ".join(differences))
    if refusal := store.get(f"{prefix}/verdict").decode():
        raise ValueError(refusal)


def _describe(field: str, answers: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Ranks, by host, with the values of ``field`` that they have."""
    places: dict[str, dict[str, list[int]]] = {}
    for rank, (host, found) in enumerate(answers):
        places.setdefault(found[field], {}).setdefault(host, []).append(rank)
    said = [
        f"{value} on " + ", ".join(f"{_name(ranks)} ({host})" for host, ranks in by_host.items())
        for value, by_host in places.items()
    ]
    return (
        f"{field} must be the same on every rank, and is {' and '.join(said)}: give their hosts the same environment, "
        f"or set {field}"
    )


def _name(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 6``."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
