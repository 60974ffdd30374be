"""A rank that is stuck or gone is noticed and named, and the run ends, instead of waiting for it in a collective.

Every rank publishes where its loop is, how many collectives it has begun in each group, and a count once a second,
through the store that the launcher holds. Four things are watched:

* the count of the rank after this one: when it stands still, that process is stopped or gone. The watcher names it,
  with all others that have fallen silent;
* the rank's own loop, which may be stuck while its threads are well: when it neither begins a collective nor comes to
  another place for the longer limit, the rank that the others wait for is named, and where in the program it is. That
  is one that has begun fewer collectives of a group than another, and waits in no other group itself;
* the interpreter itself, by a process outside (``system/outside_watch.py``): code that keeps its lock stops the
  threads that watch;
* the store: where the network is cut nothing tells the other side, no error comes from a socket for a quarter of an
  hour, and the ranks that the store cannot reach end because it no longer answers them.

All ranks then write the stacks of their threads into ``RUN/stacks`` and end. No thread is started once the run is under
way: memory may be at its limit, and what ends the process must need none.
"""

import contextlib
import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from moe_pretrain.parallel.rendezvous import Rendezvous
from moe_pretrain.parallel.signs_of_life import (
    NEVER,
    Sign,
    begun_collectives,
    describe_place,
    describe_sign,
    find_awaited,
    is_done,
    line_of,
    name_together,
    place_of,
)
from moe_pretrain.run_folder.paths import stacks_file
from moe_pretrain.system.exit_codes import LOST_RANK
from moe_pretrain.system.outside_watch import OutsideWatch, Watched
from moe_pretrain.system.threads import start_thread

STACK_SIGNAL = signal.SIGUSR2
"""Signal that makes a worker write the stacks of its threads."""

_PREFIX = "moe_pretrain/liveness"
_ALARM = "alarm"
_POLL_SECONDS = 1.0
_START_SECONDS = 120.0
"""Least limit of a rank's start-up, which imports packages from a disk that may be slow."""
_END_SECONDS = 5.0
"""How long telling the others and writing stacks may take; the network or the disk may be what is gone."""


@dataclass(frozen=True)
class _Heard:
    """The last answers of the store: how many there were, the alarm, and the watched and the first rank's signs."""

    answers: int = 0
    alarm: str | None = None
    watched: Sign | None = None
    first: Sign | None = None


class Heartbeat:
    """Context of one rank: publishes where it is, and watches the next rank and its own loop."""

    def __init__(self, meeting: Rendezvous, folder: Path, limit_seconds: float, stuck_seconds: float):
        """Nothing is watched yet.

        Args:
            meeting: Where the ranks have met; with one rank only its own loop is watched.
            folder: The run's folder.
            limit_seconds: How long a rank may give no sign of life.
            stuck_seconds: How long a rank's loop may stay in one place.
        """
        self._meeting, self._rank, self._world_size = meeting, meeting.rank, meeting.world_size
        self._watched = (self._rank + 1) % self._world_size
        self._limit_polls = max(2, round(limit_seconds / _POLL_SECONDS))
        self._stuck_polls = max(2, round(stuck_seconds / _POLL_SECONDS))
        self._stacks = stacks_file(folder, self._rank)
        self._where: tuple[str, int] = ("start-up", 0)
        self._main_thread = threading.main_thread().ident or 0
        self._entered = 0
        self._count = 0
        self._failure: str | None = None
        self._heard = _Heard()
        self._problem = ""
        self._ending = threading.Event()
        self._fate: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._errands: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._outside: OutsideWatch | None = None

    def enter(self, phase: str, step: int) -> None:
        """Publish that this rank has come to ``phase`` of ``step``."""
        self._where = (phase, step)
        self._entered += 1
        if self._outside is not None:
            self._outside.tell(self.where)
        if self._threads and self._world_size > 1:
            with contextlib.suppress(Exception):  # ``_watch`` decides when a silent store is the end
                self._publish()

    @property
    def where(self) -> str:
        """Place of this rank, in words."""
        return describe_place(*self._where)

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
            self._threads.append(start_thread(self._talk, "liveness-talk"))
        name = f"rank {self._rank} on {socket.gethostname()}"
        start_polls = max(self._stuck_polls, round(_START_SECONDS / _POLL_SECONDS))
        limits = self._stuck_polls, start_polls
        self._outside = OutsideWatch(Watched(name, *limits, STACK_SIGNAL, self._stacks, LOST_RANK))
        start_thread(self._run_errands, "errands")
        start_thread(self._end_at_last, "last-resort")
        self._threads.append(start_thread(self._watch, "liveness-watch"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # what collectives raise
            waited = self._describe_awaited() if self._world_size > 1 else ""
            print(f"moe-pretrain: rank {self._rank} failed at {self.where}{waited}", file=sys.stderr, flush=True)
        if error is not None:
            self._failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._ending.set()
        self._errands.put(None)
        self._fate.put(False)
        if self._outside is not None:
            self._outside.close()
            self._outside = None
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
                    _reason_of(self._store.get(_ALARM).decode()) if self._store.check([_ALARM]) else None,
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
        """Until the run is over: end this process when it, or another rank, is stuck or gone."""
        hearing, own = _Stillness(self._limit_polls), _Stillness(self._stuck_polls)
        neighbour = _Stillness(self._limit_polls)
        signs: list[Sign | None] = []
        failures = 0
        # Polls are counted and not seconds: after the whole job was paused, nobody is accused.
        while not self._ending.wait(_POLL_SECONDS):
            try:
                if (outside := self._outside) is not None:
                    outside.tell()
                is_stuck = own.is_too_long((self._entered, begun_collectives()))
                if is_stuck and (self._entered or own.polls >= _START_SECONDS / _POLL_SECONDS):
                    self._end_with(self._describe_stuck(self._read_all()))
                failures = 0
                if self._world_size == 1:
                    continue
                heard = self._heard
                if heard.alarm is not None:
                    self._end(heard.alarm)
                if hearing.is_too_long(heard.answers):
                    self._end_with(self._describe_silent_store(), tell=False)
                if hearing.polls:
                    continue
                is_silent = neighbour.is_too_long(None if is_done(heard.watched) else heard.watched)
                if is_done(heard.watched):
                    neighbour.polls = 0
                if neighbour.polls == self._limit_polls // 2:
                    signs = self._read_all()
                # One that was never heard of may still import packages.
                if is_silent and (heard.watched is not None or neighbour.polls >= _START_SECONDS / _POLL_SECONDS):
                    self._end_with(self._describe_silent_ranks(signs))
            except Exception as error:  # out of memory, say
                failures += 1
                if failures >= self._limit_polls:
                    self._end(f"its watcher cannot go on: {type(error).__name__}: {error}")

    def _describe_stuck(self, signs: Sequence[Sign | None]) -> str:
        """Name the ranks that the others wait for; where none is known, say where each rank is."""
        known = {rank: sign for rank, sign in enumerate(signs) if sign is not None and not is_done(sign)}
        known[self._rank] = self._sign()
        stuck = find_awaited(known) or (list(known) if len(known) == 1 else [])
        seconds = self._stuck_polls * _POLL_SECONDS if self._entered else max(self._stuck_polls, _START_SECONDS)
        limit = f"for {seconds:.0f} s (parallel.timeout_seconds)"
        if stuck:
            named = name_together({rank: describe_sign(known[rank], True) for rank in stuck})
            return f"stuck, in one place of its loop {limit}: {named}"
        named = name_together({rank: describe_sign(sign, True) for rank, sign in known.items()})
        return f"no rank has come forward {limit}, and no single one is waited for: {named}"

    def _describe_awaited(self) -> str:
        """After a collective has failed: the ranks that this one waited for."""
        known = {rank: sign for rank, sign in enumerate(self._read_all()) if sign is not None}
        known[self._rank] = self._sign()
        ranks = [rank for rank in find_awaited(known) if rank != self._rank]
        named = name_together({rank: describe_sign(known[rank], True) for rank in ranks})
        return f"; behind the others: {named}" if ranks else ""

    def _describe_silent_store(self) -> str:
        first = self._heard.first
        rank_0 = f"; rank 0 on {first['host']} was last seen at {place_of(first)}" if first else ""
        seconds = self._limit_polls * _POLL_SECONDS
        return (
            f"no answer for {seconds:.0f} s from the launcher's store at {self._store_name}: its host, or the "
            f"network between it and {socket.gethostname()}, is silent{self._problem}{rank_0}"
        )

    def _describe_silent_ranks(self, before: list[Sign | None]) -> str:
        """Name the watched rank and all others without a new sign since ``before``, those of one host together."""
        silent: dict[int, str] = {}
        for rank, (old, new) in enumerate(zip(before, self._read_all(), strict=False)):
            if old == new and rank != self._rank and not is_done(new):
                silent[rank] = describe_sign(new)
        named = name_together(silent or {self._watched: describe_sign(self._heard.watched)})
        seconds = self._limit_polls * _POLL_SECONDS
        if NEVER in named:
            seconds = max(seconds, _START_SECONDS)
        return f"stuck or gone, no sign of life for {seconds:.0f} s: {named}"

    def _read_all(self) -> list[Sign | None]:
        """Messages that all ranks publish; nothing when the store fails, which ``_talk`` finds out too."""
        found: list[Sign | None] = []
        if self._world_size > 1:
            self._try_for_a_while(lambda: found.extend([_read(self._store, rank) for rank in range(self._world_size)]))
        return found

    def _sign(self, ended: bool = False) -> Sign:
        phase, step = self._where
        return {
            "host": socket.gethostname(),
            "count": self._count,
            "phase": phase,
            "step": step,
            "line": line_of(self._main_thread),
            "collectives": begun_collectives(),
            "ended": ended,
            "failure": self._failure,
        }

    def _publish(self, ended: bool = False) -> None:
        self._store.set(f"rank_{self._rank}", json.dumps(self._sign(ended)))

    def _end_with(self, reason: str, tell: bool = True) -> None:
        """Have the other ranks end too, say the reason unless one of them has, and leave.

        Those that cannot be told find out by themselves.
        """
        own = f"{self._rank} {reason}"
        told = [own]
        if tell and self._world_size > 1:
            self._try_for_a_while(lambda: told.append(self._store.compare_set(_ALARM, "", own).decode()))
        if told[-1] == own:
            print(f"moe-pretrain: {reason}; stacks in {self._stacks.parent}", file=sys.stderr, flush=True)
        self._end(_reason_of(told[-1]))

    def _end(self, reason: str) -> None:
        """Write the stacks and leave; the main thread may wait in a collective for ever."""
        try:
            self._fate.put(True)
            print(f"rank {self._rank}, at {self.where}: {reason}", file=self._stack_file, flush=True)
            faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
        finally:  # neither a full disk nor a lack of memory must keep the rank alive
            os._exit(LOST_RANK)

    def _end_at_last(self) -> None:
        """Leave where ``_end`` cannot, as when the disk that holds the stacks hangs."""
        if self._fate.get():
            time.sleep(_END_SECONDS)
            os._exit(LOST_RANK)

    def _run_errands(self) -> None:
        while (errand := self._errands.get()) is not None:
            body, is_done = errand
            with contextlib.suppress(Exception):
                body()
            is_done.set()

    def _try_for_a_while(self, body: Callable[[], None]) -> None:
        """Have ``body`` called, which may fail or block for ever."""
        is_done = threading.Event()
        self._errands.put((body, is_done))
        is_done.wait(_END_SECONDS)


class _Stillness:
    """For how many polls a value has been the same."""

    def __init__(self, limit: int):
        self.polls, self._limit = 0, limit
        self._before: Any = None

    def is_too_long(self, value: Any) -> bool:
        """Count a poll; whether the value has been the same for as many as the limit."""
        self.polls = self.polls + 1 if value == self._before else 0
        self._before = value
        return self.polls >= self._limit


def last_seen(store: dist.Store, rank: int) -> str:
    """Place of ``rank`` when it last published, in words; ``store`` is the launcher's."""
    seen = _read(_liveness_store(store, 0), rank)
    return place_of(seen) if seen else "start-up"


def _liveness_store(store: dist.Store, attempt: int) -> dist.Store:
    return dist.PrefixStore(f"{_PREFIX}/{attempt}", store)


def _read(store: dist.Store, rank: int) -> Sign | None:
    key = f"rank_{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


def _reason_of(alarm: str) -> str:
    """An alarm without the rank that raised it, which keeps two alarms of the same words apart."""
    return alarm.partition(" ")[2]


def _without_prefixes(store: dist.Store) -> dist.Store:
    """The launcher's store without the prefixes of torch.distributed, which differ between launchers."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
