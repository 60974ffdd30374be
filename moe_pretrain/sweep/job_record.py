"""Jobs of a sweep as its folder tells of them, readable from anywhere, true after a kill at any moment.

The files are in the map of ``run_folder.paths``.
What the run itself recorded wins over ``job_state.json``: that is written a moment later, or by a process that is dead.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moe_pretrain.run_folder.paths import JOB_FILE, JOB_LOCK, METRICS_FILE, STATE_FILE
from moe_pretrain.run_folder.record import find_runs
from moe_pretrain.system.file_lock import try_lock
from moe_pretrain.system.files import read_json, write_json

State = Literal["waiting", "running", "finished", "stopped", "failed", "diverged"]
STATES: tuple[State, ...] = ("waiting", "running", "finished", "stopped", "failed", "diverged")


@dataclass(frozen=True, eq=False)
class SweepJob:
    """One run of a sweep.

    Attributes:
        folder: Its run folder.
        number: Its place among the sweep's jobs, from 0.
        words: All its overrides; ``train`` with them is the job.
        num_steps: Steps it is to make.
        values: Its resolved configuration.
    """

    folder: Path
    number: int
    words: tuple[str, ...]
    num_steps: int
    values: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    def write(self) -> None:
        """Make the job's folder and say in it what is to be done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"number": self.number, "words": self.words, "num_steps": self.num_steps, "values": self.values}
        write_json(self.folder / JOB_FILE, facts)


@dataclass(frozen=True)
class JobState:
    """Progress of a job.

    Attributes:
        state: ``waiting``: never started. ``running``. ``finished``: made its last step. ``stopped``: by a signal,
            goes on from its last checkpoint. ``failed``: ended by an error. ``diverged``: its loss did.
        reason: Why it stopped, failed or diverged, in one line.
        exit_code: Of its process; None before that ended.
        attempts: How often it was started.
        validation_loss: At its end, nats per token; None before, or where it is not finite.
    """

    state: State = "waiting"
    reason: str = ""
    exit_code: int | None = None
    attempts: int = 0
    validation_loss: float | None = None

    def write(self, folder: Path) -> None:
        """Put it into the job's folder."""
        write_json(folder / STATE_FILE, asdict(self))


def read_jobs(sweep: Path) -> list[SweepJob]:
    """The jobs of a sweep in their order; none where there is no such folder.

    Raises:
        ValueError: A file of theirs is broken.
    """
    return sorted((read_job(path.parent) for path in sweep.glob(f"*/{JOB_FILE}")), key=lambda job: job.number)


def read_job(folder: Path) -> SweepJob:
    """The job that a folder was made for."""
    facts = read_json(folder / JOB_FILE)
    return SweepJob(folder, **{**facts, "words": tuple(facts["words"])})


def written_state(folder: Path) -> JobState:
    """State that is written about a job, true or not."""
    path = folder / STATE_FILE
    return JobState(**read_json(path)) if path.exists() else JobState()


def look(folder: Path) -> JobState:
    """The state of a job: what is written about it, corrected by its lock and by what its run recorded since."""
    written = written_state(folder)
    if written.state == "finished":
        return written
    if is_running(folder):
        return replace(written, state="running", reason="")
    metrics, state = folder / METRICS_FILE, folder / STATE_FILE
    if written.state != "running" and (not metrics.exists() or _written_at(metrics) <= _written_at(state)):
        return written  # by somebody who saw the end of the run
    return judge(folder, written)


def correct(folder: Path) -> JobState:
    """Look at a job, and write down what it is if what is written is no longer true."""
    state = look(folder)
    if state != written_state(folder) and state.state != "running":
        state.write(folder)
    return state


def judge(folder: Path, otherwise: JobState) -> JobState:
    """The state of a job that does not run: what the run's own rows tell, else what is written."""
    if not (folder / METRICS_FILE).exists():
        return _stale(otherwise)
    (run,) = find_runs(folder)
    if run.is_complete:
        state: State = "diverged" if run.state == "diverged" else "finished"
        return replace(otherwise, state=state, reason=run.problem, validation_loss=run.final("validation/loss"))
    if run.state == "diverged" and otherwise.state in ("running", "failed"):
        return replace(otherwise, state="diverged", reason=run.problem)
    if run.state == "failed" and otherwise.state == "running":
        return replace(otherwise, state="failed", reason=run.problem)
    return _stale(otherwise)


def _written_at(path: Path) -> int:
    """Time at which a file was last written; before everything if there is none."""
    return path.stat().st_mtime_ns if path.exists() else -1


def _stale(written: JobState) -> JobState:
    """Whoever was to write the end of a running job is dead too."""
    return replace(written, state="stopped", reason="killed") if written.state == "running" else written


def is_running(folder: Path) -> bool:
    """Whether a process holds the job's lock."""
    path = folder / JOB_LOCK
    handle = try_lock(path) if path.exists() else None
    if handle is not None:
        os.close(handle)
    return path.exists() and handle is None
