"""Hydra's launcher for this machine, and the function that any other launcher of Hydra's calls for a job.

Hydra takes plugins from a package ``hydra_plugins`` only; ``register`` enters ours under such a name by hand.
"""

import math
import os
import signal
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from moe_pretrain.sweep.job_record import JobState, SweepJob, correct, look
from moe_pretrain.sweep.planned_jobs import Sweep
from moe_pretrain.sweep.running_job import (
    PROGRAM,
    RunningJob,
    RunsElsewhere,
    passed_on,
    run_job,
)
from moe_pretrain.sweep.status import Board

_POLL_SECONDS = 0.2


class SweepStopped(Exception):
    """A signal ended the sweep; its jobs have ended."""

    def __init__(self, is_killed: bool):
        self.is_killed = is_killed
        super().__init__("killed" if is_killed else "stopped")


class TrainJob:
    """Task that Hydra calls: one job of a sweep, from its overrides; can be pickled."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def __getstate__(self) -> dict[str, Sweep]:
        return {"sweep": replace(self.sweep, _checked={}, _planned={})}  # each job needs only itself

    def __call__(self, config: DictConfig) -> float:
        """Run the job that Hydra's launcher has composed, as processes of its own, and wait for it."""
        words = HydraConfig.get().overrides.task
        fixed = [word for word in self.sweep.fixed if not word.startswith("hydra.")]  # Hydra keeps its own apart
        (job,) = self.sweep.plan([words[len(fixed) :]])
        state = look(job.folder)
        return objective(run_job(job) if must_run(state, self.sweep.settings.retry) else state)


class SweepLauncher(Launcher):
    """Launchers' common part: jobs are planned before any of them starts, and their results looked up."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Learn which sweep it is."""
        assert isinstance(task_function, TrainJob)
        self.sweep = task_function.sweep
        self.board = Board(self.sweep.folder)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is left to do of the jobs, once all of them are checked.

        Raises:
            ValueError: A job is wrong; one line that names it, and none is started.
            SweepStopped: A signal came.
        """
        jobs = self.sweep.plan(job_overrides)
        self.run(jobs)
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=objective(look(job.folder)))
            for words, job in zip(job_overrides, jobs, strict=True)
        ]

    @abstractmethod
    def run(self, jobs: Sequence[SweepJob]) -> None:
        """Run what is left to do of ``jobs``, and wait for it."""


class ProcessLauncher(SweepLauncher):
    """Runs the jobs of a batch on this machine, ``sweep.parallel`` at a time."""

    def __init__(self, program: Sequence[str] = PROGRAM):
        self._program = program

    def run(self, jobs: Sequence[SweepJob]) -> None:
        """Run what is left to do of ``jobs``; when a signal comes, those that run save and end."""
        run_jobs(jobs, self.sweep, self.board, self._program)


def must_run(state: JobState, retry: str) -> bool:
    """Whether the same command again starts a job in this state; ``retry`` is ``sweep.retry``."""
    if state.state == "diverged":
        return retry == "all"
    if state.state == "failed":
        return retry != "none"
    return state.state in ("waiting", "stopped")


def objective(state: JobState) -> float:
    """Value that a search minimises: the last validation loss, or infinity (keep away) where there is none."""
    return math.inf if state.validation_loss is None else state.validation_loss


def run_jobs(jobs: Sequence[SweepJob], sweep: Sweep, board: Board, program: Sequence[str] = PROGRAM) -> None:
    """Run what is left to do of ``jobs``; one that fails does not stop the others.

    Raises:
        ValueError: There are not enough GPUs.
        SweepStopped: A signal came; the jobs that ran have ended.
    """
    states = {job: correct(job.folder) for job in {job.folder: job for job in jobs}.values()}
    waiting = deque(job for job, state in states.items() if must_run(state, sweep.settings.retry))
    environments = shares(sweep.settings.parallel, [job.values for job in waiting])
    running: dict[int, RunningJob] = {}
    with passed_on(running.values) as signals:
        while running or (waiting and not signals):
            for slot in [slot for slot, job in running.items() if job.process.poll() is not None]:
                running.pop(slot).settle()
            for slot, environment in enumerate(environments):
                if waiting and slot not in running and not signals:
                    with suppress(RunsElsewhere):  # its state says so
                        running[slot] = RunningJob(waiting.popleft(), environment, program)
                    if signals and slot in running:  # one that came while it was started
                        running[slot].signal(signal.SIGTERM)
            board.show()
            time.sleep(_POLL_SECONDS)
        board.finish()
    if signals:
        raise SweepStopped(is_killed=signals.count(signal.SIGINT) > 1)


def shares(parallel: int, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Variables for each of ``parallel`` places at which jobs run at the same time.

    Args:
        parallel: Number of places; a job that has the machine to itself needs no share.
        jobs: The resolved configurations of the jobs that are to be run at them.

    Raises:
        ValueError: There are not enough GPUs.
    """
    if parallel == 1 or not jobs:
        return [{} for _ in range(parallel)]
    processes = max(values["parallel"]["processes"] for values in jobs)
    uses_gpus = torch.cuda.is_available() and any(values["engine"]["device"] != "cpu" for values in jobs)
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (parallel * processes))))
    gpus = divide(visible_gpus(), parallel, processes) if uses_gpus else [{} for _ in range(parallel)]
    return [{"OMP_NUM_THREADS": threads, **each} for each in gpus]


def visible_gpus() -> list[str]:
    """Names of this process's GPUs, as ``CUDA_VISIBLE_DEVICES`` has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def divide(gpus: Sequence[str], parallel: int, processes: int) -> list[dict[str, str]]:
    """``processes`` GPUs for each of ``parallel`` places, none for two of them: they would slow each other down."""
    if len(gpus) < parallel * processes:
        raise ValueError(
            f"sweep.parallel={parallel} must be at most {len(gpus) // processes}: runs of {processes} process"
            f"{'es' if processes > 1 else ''} each, {len(gpus)} GPUs"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * processes : (place + 1) * processes])}
        for place in range(parallel)
    ]
