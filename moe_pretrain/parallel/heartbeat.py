"""A rank that is stuck or gone is noticed and named, and the run ends, instead of waiting for it in a collective.

Every rank publishes where it is (step and phase) whenever that changes, and a count once a second, through the store
that the launcher holds, and watches the rank after it. When that one's count stands still, the watcher names it, with
all others that have fallen silent, and all ranks write the stacks of their threads into ``RUN/stacks`` and end. Where
the network is cut nothing tells the other side: no error comes from a socket for a quarter of an hour, and the ranks
that the store cannot reach end because it no longer answers them.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from moe_pretrain.parallel.rendezvous import Rendezvous
from moe_pretrain.run_folder.paths import stacks_file
from moe_pretrain.system.exit_codes import LOST_RANK

STACK_SIGNAL = signal.SIGUSR2
"""What makes a worker write the stacks of its threads."""

_PREFIX = "moe_pretrain/liveness"
_ALARM = "alarm"
_POLL_SECONDS = 1.0
_END_SECONDS = 5.0
"""How long telling the others and writing stacks may take; the network or the disk may be what is gone."""

Sign = dict[str, Any]
"""What a rank publishes: host, count, phase, step, whether it has ended, and by what failure."""


@dataclass(frozen=True)
class _Heard:
    """The last answers of the store: how many there were, the alarm, and the watched and the first rank's signs."""

    answers: int = 0
    alarm: str | None = None
    watched: Sign | None = None
    first: Sign | None = None


class Heartbeat:
    """Context of one rank: publishes where it is, and watches the next rank."""

    def __init__(self, meeting: Rendezvous, folder: Path, limit_seconds: float):
        """Nothing is watched yet.

        Args:
            meeting: Where the ranks have met; with one rank there is nobody to watch.
            folder: The run's folder.
            limit_seconds: How long a rank may give no sign of life.
        """
        self._meeting, self._rank, self._world_size = meeting, meeting.rank, meeting.world_size
        self._watched = (self._rank + 1) % self._world_size
        self._limit_polls = max(2, round(limit_seconds / _POLL_SECONDS))
        self._stacks = stacks_file(folder, self._rank)
        self._where: tuple[str, int] = ("start-up", 0)
        self._count = 0
        self._failure: str | None = None
        self._heard = _Heard()
        self._problem = ""
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def enter(self, phase: str, step: int) -> None:
        """Publish that this rank has come to ``phase`` of ``step``."""
        self._where = (phase, step)
        if self._threads:
            with contextlib.suppress(Exception):  # ``_watch`` decides when a silent store is the end
                self._publish()

    @property
    def where(self) -> str:
        """Place of this rank, in words."""
        return _describe(*self._where)

    def __enter__(self) -> "Heartbeat":
        self._stack_file = self._open_stacks()
        faulthandler.register(STACK_SIGNAL, file=self._stack_file, all_threads=True)
        if self._world_size > 1:
            base = _without_prefixes(self._meeting.store)
            self._store_name = f"{getattr(base, 'host', 'a file')}:{getattr(base, 'port', '')}".rstrip(":")
            # A connection of its own: the main thread may block in the other.
            store = base.clone()  # type: ignore[attr-defined]  # missing in the stubs
            store.set_timeout(timedelta(seconds=self._limit_polls * _POLL_SECONDS))
            self._store = _liveness_store(store, self._meeting.attempt)
            for body in (self._talk, self._watch):
                self._threads.append(threading.Thread(target=body, name=f"moe-pretrain-liveness{body.__name__}"))
                self._threads[-1].daemon = True
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # what collectives raise
            print(f"moe-pretrain: rank {self._rank} failed at {self.where}", file=sys.stderr, flush=True)
        if error is not None:
            self._failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._ending.set()
        for thread in self._threads:
            thread.join(self._limit_polls * _POLL_SECONDS)  # the store may be silent
        faulthandler.unregister(STACK_SIGNAL)
        if self._stack_file is not sys.stderr:
            self._stack_file.close()
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _open_stacks(self) -> TextIO:
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            return self._stacks.open("w", encoding="utf-8")
        except OSError:
            return sys.stderr

    def _talk(self) -> None:
        """Exchange signs of life with the store; when its host falls silent this blocks, and ``_watch`` notices."""
        while not self._ending.wait(_POLL_SECONDS):
            self._count += 1
            try:
                self._publish()
                self._heard = _Heard(
                    self._heard.answers + 1,
                    self._store.get(_ALARM).decode() if self._store.check([_ALARM]) else None,
                    _read(self._store, self._watched),
                    _read(self._store, 0),
                )
            except Exception as error:
                self._problem = f" ({' '.join(str(error).split())[:200]})"
        try:
            self._publish(ended=True)
        except Exception:
            return  # the run is over, and so is the store

    def _watch(self) -> None:
        before, silent_polls, silent_store_polls = self._heard, 0, 0
        signs: list[Sign | None] = []
        # Polls are counted and not seconds: after the whole job was paused, nobody is accused.
        while not self._ending.wait(_POLL_SECONDS):
            heard = self._heard
            if heard.alarm is not None:
                self._end(heard.alarm)
            if heard.answers == before.answers:
                silent_store_polls += 1
                if silent_store_polls >= self._limit_polls:
                    self._say(reason := self._describe_silent_store())
                    self._end(reason)
                continue
            silent_store_polls = 0
            silent_polls = silent_polls + 1 if heard.watched == before.watched and not _is_done(heard.watched) else 0
            before = heard
            if silent_polls == self._limit_polls // 2:
                signs = self._read_all()
            if silent_polls >= self._limit_polls:
                self._say(reason := self._describe_silent_ranks(signs))
                self._tell(reason)
                self._end(reason)

    def _describe_silent_store(self) -> str:
        first = self._heard.first
        rank_0 = f"; rank 0 on {first['host']} was last seen at {_place(first)}" if first else ""
        seconds = self._limit_polls * _POLL_SECONDS
        return (
            f"no answer for {seconds:.0f} s from the launcher's store at {self._store_name}: its host, or the "
            f"network between it and {socket.gethostname()}, is silent{self._problem}{rank_0}"
        )

    def _describe_silent_ranks(self, before: list[Sign | None]) -> str:
        """Name the watched rank and all others without a new sign since ``before``, those of one host together."""
        silent: dict[str, list[int]] = {}
        for rank, (old, new) in enumerate(zip(before, self._read_all(), strict=False)):
            if old == new and rank != self._rank and not _is_done(new):
                silent.setdefault(_describe_sign(new), []).append(rank)
        silent = silent or {_describe_sign(self._heard.watched): [self._watched]}
        named = "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}{described}"
            for described, ranks in silent.items()
        )
        return f"stuck or gone, no sign of life for {self._limit_polls * _POLL_SECONDS:.0f} s: {named}"

    def _read_all(self) -> list[Sign | None]:
        """Messages that all ranks publish; nothing when the store fails, which ``_talk`` finds out too."""
        found: list[Sign | None] = []
        _try_for_a_while(lambda: found.extend([_read(self._store, rank) for rank in range(self._world_size)]))
        return found

    def _publish(self, ended: bool = False) -> None:
        phase, step = self._where
        value = {
            "host": socket.gethostname(),
            "count": self._count,
            "phase": phase,
            "step": step,
            "ended": ended,
            "failure": self._failure,
        }
        self._store.set(f"rank_{self._rank}", json.dumps(value))

    def _say(self, reason: str) -> None:
        print(f"moe-pretrain: {reason}; stacks in {self._stacks.parent}", file=sys.stderr, flush=True)

    def _tell(self, reason: str) -> None:
        """Have the other ranks end too; those that cannot be told find out by themselves."""
        _try_for_a_while(lambda: self._store.set(_ALARM, reason))

    def _end(self, reason: str) -> None:
        """Write the stacks and leave; the main thread may wait in a collective for ever."""
        last_resort = threading.Timer(_END_SECONDS, os._exit, [LOST_RANK])
        last_resort.daemon = True
        last_resort.start()
        try:
            print(f"rank {self._rank}, at {self.where}: {reason}", file=self._stack_file, flush=True)
            faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
        except OSError:
            pass  # a full disk must not keep the rank alive
        os._exit(LOST_RANK)


def last_seen(store: dist.Store, rank: int) -> str:
    """Place of ``rank`` when it last published, in words; ``store`` is the launcher's."""
    seen = _read(_liveness_store(store, 0), rank)
    return _place(seen) if seen else "start-up"


def _liveness_store(store: dist.Store, attempt: int) -> dist.Store:
    return dist.PrefixStore(f"{_PREFIX}/{attempt}", store)


def _try_for_a_while(body: Callable[[], None]) -> None:
    """Call ``body``, which may fail or block for ever."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            body()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(_END_SECONDS)


def _read(store: dist.Store, rank: int) -> Sign | None:
    key = f"rank_{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


def _is_done(sign: Sign | None) -> bool:
    """Whether the rank has come to its end without a failure; another may be long at its report."""
    return sign is not None and sign["ended"] and not sign["failure"]


def _describe_sign(sign: Sign | None) -> str:
    if sign is None:
        return ", never heard of"
    failure = f", failed with {sign['failure']}" if sign["failure"] else ""
    return f" on {sign['host']}, last seen at {_place(sign)}{failure}"


def _place(sign: Sign) -> str:
    return _describe(sign["phase"], sign["step"])


def _describe(phase: str, step: int) -> str:
    return f"step {step}, phase {phase}"


def _without_prefixes(store: dist.Store) -> dist.Store:
    """The launcher's store without the prefixes of torch.distributed, which differ between launchers."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
