"""Status of the jobs of a sweep, from its files alone: a line for each, on this terminal or on another one."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_pretrain.metrics.console import TextStream
from moe_pretrain.run_folder.metrics_file import last_rows
from moe_pretrain.run_folder.paths import METRICS_FILE, SWEEP_FILE
from moe_pretrain.sweep.job_record import STATES, JobState, SweepJob, look, read_jobs
from moe_pretrain.system.words import short_duration

_SECONDS_BETWEEN_READS = 1.0
_SECONDS_BETWEEN_LINES = 60.0
"""Without a terminal, how long a job may go on before it is heard of again."""


@dataclass(frozen=True)
class JobProgress:
    """Progress of a job.

    Attributes:
        job: The job.
        state: Its state.
        step: Steps done.
        loss: Its last loss in words; empty before there is one.
        eta_seconds: Until its last step at the pace of its last rows; None unless it runs.
    """

    job: SweepJob
    state: JobState
    step: int
    loss: str
    eta_seconds: float | None

    def describe(self, width: int) -> str:
        """Its line, the name ``width`` wide."""
        steps = f"{self.step}/{self.job.num_steps}"
        parts = [f"{self.job.name:<{width}}  {self.state.state:<8}  {steps:>13}", self.loss]
        if self.eta_seconds is not None:
            parts.append(f"ETA {short_duration(self.eta_seconds)}")
        return "  ".join(part for part in [*parts, self.state.reason] if part)


def read_progress(sweep: Path, before: Mapping[str, JobProgress] | None = None) -> list[JobProgress]:
    """Every job of a sweep, in order.

    Args:
        sweep: Its folder.
        before: What was read before, by name, so that jobs whose state stands still are not read again.

    Raises:
        ValueError: It is no sweep, or a file of it is broken.
    """
    if not (sweep / SWEEP_FILE).exists():
        raise ValueError(f"FOLDER={sweep} must be the folder of a sweep: it has no {SWEEP_FILE}")
    return [_progress(job, (before or {}).get(job.name)) for job in read_jobs(sweep)]


def describe_sweep(jobs: Sequence[JobProgress]) -> str:
    """Number of jobs in each state."""
    counts = {state: sum(job.state.state == state for job in jobs) for state in STATES}
    states = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    return f"{len(jobs)} job{'s' if len(jobs) != 1 else ''}" + (f": {states}" if states else "")


def table(jobs: Sequence[JobProgress]) -> list[str]:
    """A line for each job."""
    width = max((len(job.job.name) for job in jobs), default=0)
    return [job.describe(width) for job in jobs]


def _progress(job: SweepJob, before: JobProgress | None) -> JobProgress:
    state = look(job.folder)
    if before is not None and before.state == state and state.state != "running":
        return before
    rows = last_rows(job.folder / METRICS_FILE)
    steps = [row for row in rows if row["kind"] != "event"]
    train = [row for row in rows if row["kind"] == "train" and row["attempt"] == rows[-1]["attempt"]]
    eta = None
    if state.state == "running" and len(train) > 1:
        first, last = train[0], train[-1]
        pace = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
        eta = pace * max(0, job.num_steps - last["step"])
    return JobProgress(job, state, steps[-1]["step"] if steps else 0, _loss(steps), eta)


def _loss(rows: list[dict[str, Any]]) -> str:
    """The last validation loss, else the last train loss."""
    for name in ("validation", "train"):
        losses = [row[f"{name}/loss"] for row in rows if f"{name}/loss" in row]
        if losses:
            return f"{name} loss " + ("not finite" if losses[-1] is None else f"{losses[-1]:.4f}")
    return ""


class Board:
    """Shows a sweep that runs: on a terminal the table, drawn again and again; elsewhere a line for what changes."""

    def __init__(self, sweep: Path, stream: TextStream | None = None):
        """Show nothing yet, and of what is so already only its changes."""
        self._sweep, self._stream = sweep, stream or sys.stderr
        self._drawn = 0
        self._last_read = -_SECONDS_BETWEEN_READS
        self._jobs = {job.job.name: job for job in read_progress(sweep)}
        self._said = {name: (job.state.state, 0.0) for name, job in self._jobs.items()}

    def show(self) -> None:
        """Bring what is shown up to date, at most once a second."""
        now = time.monotonic()
        if now - self._last_read < _SECONDS_BETWEEN_READS:
            return
        self._last_read = now
        self._jobs = {job.job.name: job for job in read_progress(self._sweep, self._jobs)}
        if self._stream.isatty():
            self._draw(list(self._jobs.values()))
        else:
            self._say_changes(now)

    def finish(self) -> None:
        """Show how it stands now."""
        self._last_read = -_SECONDS_BETWEEN_READS
        self.show()

    def _draw(self, jobs: list[JobProgress]) -> None:
        size = shutil.get_terminal_size()
        lines = [describe_sweep(jobs), *fitting(jobs, size.lines - 3)]
        up = f"\033[{self._drawn}A" if self._drawn else ""
        self._stream.write(up + "".join(f"\033[2K{line[: size.columns - 1]}\n" for line in lines) + "\033[J")
        self._stream.flush()
        self._drawn = len(lines)

    def _say_changes(self, now: float) -> None:
        for name, job in self._jobs.items():
            state, since = self._said.get(name, ("waiting", now))
            is_due = state == "running" and now - since >= _SECONDS_BETWEEN_LINES
            if job.state.state != state or is_due:
                self._stream.write(job.describe(0) + "\n")
                self._stream.flush()
                self._said[name] = (job.state.state, now)


def fitting(jobs: Sequence[JobProgress], height: int) -> list[str]:
    """The table; where a terminal is too low for it, the jobs that run, then those that need a look."""
    lines = table(jobs)
    if len(lines) <= height:
        return lines
    order = ("running", "failed", "diverged", "stopped", "waiting", "finished")
    first = sorted(range(len(jobs)), key=lambda at: order.index(jobs[at].state.state))[: max(1, height - 1)]
    return [*(lines[at] for at in sorted(first)), f"... and {len(lines) - len(first)} more: moe-pretrain sweep-status"]
