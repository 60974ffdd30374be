"""Saving while training goes on.

``save`` copies the state to host memory and returns; a thread writes it behind. All ranks' threads agree, over a group
of their own, on every stage: if one rank cannot write, no rank's checkpoint counts, all of them hear why, and the
run goes on with its last good checkpoint.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.host_copy import Staged, Staging
from moe_pretrain.checkpoint.manifest import CheckpointError, folder_name
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.checkpoint.write import (
    Reach,
    Retention,
    commit,
    make_work_folder,
    work_folder,
    write_part,
)
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.system.faults import NO_FAULTS, Faults
from moe_pretrain.system.threads import start_thread


@dataclass(frozen=True)
class Outcome:
    """Outcome of one save; the same on every rank, but for the times.

    Attributes:
        step: Finished steps of the state that was saved.
        path: The complete checkpoint, or None if it could not be written.
        problem: What went wrong, in one line; None if nothing did. With a ``path``, the checkpoint is good, and it was
            an older one that could not be removed.
        staging_seconds: How long the caller of ``save`` waited for the copy.
        seconds: From the call of ``save`` to the complete checkpoint.
        num_bytes: Bytes of this rank's file.
    """

    step: int
    path: Path | None
    problem: str | None
    staging_seconds: float
    seconds: float
    num_bytes: int


class Saver:
    """Writes the checkpoints of one run, one at a time."""

    def __init__(
        self,
        engine: TrainEngine,
        folder: Path,
        config: CheckpointConfig,
        timeout_seconds: float,
        faults: Faults = NO_FAULTS,
    ):
        """Every rank must make one, at the same time.

        Args:
            engine: Whose state is saved.
            folder: The run's folder of checkpoints.
            config: How, and how many stay.
            timeout_seconds: How long a rank may wait for the others.
            faults: What is injected into the save path.
        """
        self._folder, self._config, self._faults = folder, config, faults
        self._mesh = engine.mesh
        self._staging = Staging(engine)
        self._retention = Retention(folder, config) if engine.mesh.is_main else None
        # Of its own, on the CPU: the thread's messages must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._writes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._written = threading.Event()
        self._is_under_way = False
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        start_thread(self._work, "checkpoint")

    def went_on_from(self, step: int) -> None:
        """Learn which checkpoint the run went on from: nothing newer that lay there is ever removed."""
        if self._retention is not None:
            self._retention.went_on_from(step)

    def leave(self, step: int) -> None:
        """Take checkpoints of later steps out of the way, for the run goes on from ``step`` on another course."""
        if self._retention is not None:
            self._retention.leave(step)

    def save(self, state: TrainState, before_commit: Callable[[], None] = lambda: None) -> None:
        """Begin a checkpoint of the engine and ``state``; every rank must call it, after ``take`` of the one before.

        Args:
            state: Everything beside tensors that the run needs to go on.
            before_commit: Called on the main rank before the checkpoint counts, in the writing thread.
        """
        assert not self._is_under_way and self._outcome is None, "the outcome of the save before was not taken"
        started = time.perf_counter()
        step = state.step
        staged, problem = None, None
        try:
            self._faults.reach("save.begin", step)
            staged = self._staging.fill()
            self._faults.reach("save.staged", step)
        except OSError as error:
            problem = self._word(error)
        staging_seconds = time.perf_counter() - started

        def write() -> None:
            try:
                path, found = self._write(staged, problem, state, before_commit)
                size = len(staged.header) + len(staged.content) if staged else 0
                seconds = time.perf_counter() - started
                self._outcome = Outcome(step, path, found, staging_seconds, seconds, size)
            except BaseException as error:  # raised in the main thread by take()
                self._failure = error

        self._written.clear()
        self._is_under_way = True
        self._writes.put(write)
        if not self._config.asynchronous:
            self._written.wait()

    def take(self, wait: bool) -> Outcome | None:
        """The outcome of the last ``save``, once.

        Args:
            wait: Wait for it; else None while it is being written.

        Returns:
            The outcome, or None if there is none to take.
        """
        if not self._is_under_way or not (wait or self._written.is_set()):
            return None
        self._written.wait()
        self._is_under_way = False
        if self._failure is not None:
            raise self._failure
        outcome, self._outcome = self._outcome, None
        return outcome

    def _work(self) -> None:
        """Body of the thread: one save after the other."""
        while True:
            self._writes.get()()
            self._written.set()

    def _write(
        self, staged: Staged | None, problem: str | None, state: TrainState, before_commit: Callable[[], None]
    ) -> tuple[Path | None, str | None]:
        """The stages of a save, each agreed by all ranks."""
        target = self._folder / folder_name(state.step)
        work: Path | None = None
        part: Any = None

        def reach(point: str) -> None:
            self._faults.reach(point, state.step)

        if self._mesh.is_main and problem is None:
            work, problem = self._try(lambda: make_work_folder(target, reach))
        places, problem = self._agree(work, problem)
        if problem is None:
            work = places[0]
            part, problem = self._try(lambda: write_part(work, staged, reach))  # type: ignore[arg-type]  # both set
        parts, problem = self._agree(part, problem)
        if problem is None:
            _, problem = self._try(lambda: reach("save.reported"))
        if self._mesh.is_main and problem is None:
            _, problem = self._try(lambda: self._commit(work, target, parts, staged, state, before_commit, reach))
        _, problem = self._agree(None, problem)
        if problem is not None:
            if self._mesh.is_main:  # no rank writes any more; on a full disk the half-written files are in the way
                shutil.rmtree(work_folder(target), ignore_errors=True)
            return None, problem
        if self._retention is not None:
            retention = self._retention
            said, problem = self._try(lambda: retention.apply(state.step, reach))
            problem = problem or said
            problem = f"an old checkpoint could not be removed: {problem}" if problem else None
        _, problem = self._agree(None, problem)
        _, own = self._try(lambda: reach("save.announced"))
        return target, problem or own

    def _commit(self, work: Any, target: Path, parts: Any, staged: Any, state: Any, before: Any, reach: Reach) -> None:
        before()
        commit(work, target, parts, staged, state.to_json(), reach)

    def _try(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """The action's result, or what the disk said."""
        try:
            return action(), None
        except (OSError, CheckpointError) as error:
            return None, self._word(error)

    def _word(self, error: Exception) -> str:
        return f"rank {self._mesh.rank}: {' '.join(str(error).split())}"

    def _agree(self, value: Any, problem: str | None) -> tuple[list[Any], str | None]:
        """All ranks' values, and the first rank's problem if any has one."""
        gathered: list[Any] = [None] * self._mesh.world_size
        dist.all_gather_object(gathered, (value, problem), group=self._group)
        return [given for given, _ in gathered], next((found for _, found in gathered if found), None)
