"""A rank that is stuck or gone is noticed and named, and the run ends, instead of waiting for it in a collective.

Every rank publishes where it is (step and phase) whenever that changes, and a count once a second, through the store
that the launcher holds, and watches the rank after it. When that one's count stands still, the watcher names it, and
all ranks write the stacks of their threads into ``RUN/stacks`` and end.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from moe_pretrain.parallel.mesh import Mesh

LOST_RANK = 69
"""Exit code of ranks that ended because another one was stuck or gone: EX_UNAVAILABLE."""

STACK_SIGNAL = signal.SIGUSR2
"""What makes a worker write the stacks of its threads."""

STACKS = "stacks"
_PREFIX = "moe_pretrain/liveness"
_ALARM = "alarm"
_POLL_SECONDS = 1.0


class Liveness:
    """Context of one rank: publishes where it is, and watches the next rank."""

    def __init__(self, mesh: Mesh, folder: Path, limit_seconds: float):
        """Nothing is watched yet.

        Args:
            mesh: This rank's place; with one rank there is nobody to watch.
            folder: The run's folder.
            limit_seconds: How long a rank may give no sign of life.
        """
        self._rank, self._world_size = mesh.rank, mesh.world_size
        self._limit_polls = max(2, round(limit_seconds / _POLL_SECONDS))
        self._stacks = folder / STACKS / f"rank_{mesh.rank:05d}.txt"
        self._where: tuple[str, int] = ("start-up", 0)
        self._count = 0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """Publish that this rank has come to ``phase`` of ``step``."""
        self._where = (phase, step)
        if self._thread is not None:
            self._publish()

    @property
    def where(self) -> str:
        """Where this rank is, in words."""
        return _describe(*self._where)

    def __enter__(self) -> "Liveness":
        self._stack_file = self._open_stacks()
        faulthandler.register(STACK_SIGNAL, file=self._stack_file, all_threads=True)
        if self._world_size > 1:
            # A connection of its own: the main thread may block in the other.
            store = _base_store().clone()  # type: ignore[attr-defined]  # missing in the stubs
            store.set_timeout(timedelta(seconds=self._limit_polls * _POLL_SECONDS))
            self._store = dist.PrefixStore(_PREFIX, store)
            self._thread = threading.Thread(target=self._watch, name="moe-pretrain-liveness", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # what collectives raise
            print(f"moe-pretrain: rank {self._rank} failed at {self.where}", file=sys.stderr, flush=True)
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        faulthandler.unregister(STACK_SIGNAL)
        if self._stack_file is not sys.stderr:
            self._stack_file.close()
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _open_stacks(self) -> TextIO:
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            return self._stacks.open("w")
        except OSError:
            return sys.stderr

    def _watch(self) -> None:
        watched = (self._rank + 1) % self._world_size
        last_seen, silent_polls, silent_store_polls = None, 0, 0
        while not self._ending.wait(_POLL_SECONDS):
            self._count += 1
            try:
                self._publish()
                if self._store.check([_ALARM]):
                    self._end(self._store.get(_ALARM).decode(), is_first=False)
                seen = _read(self._store, watched)
            except Exception as error:  # the store's host is silent
                silent_store_polls += 1
                if silent_store_polls >= self._limit_polls:
                    self._end(f"the launcher's store does not answer ({' '.join(str(error).split())[:200]})", True)
                continue
            silent_store_polls = 0
            if seen is not None and seen.get("ended"):
                continue
            # Polls are counted and not seconds: after the whole job was paused, nobody is accused.
            silent_polls = silent_polls + 1 if seen == last_seen else 0
            last_seen = seen
            if silent_polls >= self._limit_polls:
                place = _describe(seen["phase"], seen["step"]) if seen else "start-up"
                self._end(
                    f"rank {watched} is stuck or gone: no sign of life for {silent_polls * _POLL_SECONDS:.0f} s; "
                    f"it was last seen at {place}",
                    True,
                )
        try:
            self._publish(ended=True)
        except Exception:
            return  # the run is over, and so is the store

    def _publish(self, ended: bool = False) -> None:
        phase, step = self._where
        value = {"count": self._count, "phase": phase, "step": step, "ended": ended}
        self._store.set(f"rank_{self._rank}", json.dumps(value))

    def _end(self, reason: str, is_first: bool) -> None:
        """Write the stacks and leave; the main thread may wait in a collective for ever."""
        if is_first:
            print(f"moe-pretrain: {reason}; stacks in {self._stacks.parent}", file=sys.stderr, flush=True)
            try:
                self._store.set(_ALARM, reason)
            except Exception:
                pass  # nobody can be told; the others find out by themselves
        try:
            print(f"rank {self._rank}, at {self.where}: {reason}", file=self._stack_file, flush=True)
            faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
        except OSError:
            pass  # a full disk must not keep the rank alive
        os._exit(LOST_RANK)


def last_seen(store: dist.Store, rank: int) -> str:
    """Where ``rank`` was when it last published, in words; ``store`` is the launcher's."""
    seen = _read(dist.PrefixStore(_PREFIX, store), rank)
    return _describe(seen["phase"], seen["step"]) if seen else "start-up"


def _read(store: dist.Store, rank: int) -> dict[str, Any] | None:
    key = f"rank_{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


def _describe(phase: str, step: int) -> str:
    return f"step {step}, phase {phase}"


def _base_store() -> dist.Store:
    """The launcher's store without the prefixes of torch.distributed, which differ between launchers."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
