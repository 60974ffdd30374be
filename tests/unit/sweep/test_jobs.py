"""Running jobs, with a stand-in for training: what is started, what is said of how it ended, and signals."""

import io
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_pretrain.config.load import load
from moe_pretrain.sweep import launcher, status
from moe_pretrain.sweep import running_job as job_module
from moe_pretrain.sweep.job_record import SweepJob, look, read_jobs
from moe_pretrain.sweep.launcher import SweepStopped, divide, objective, run_jobs, shares
from moe_pretrain.sweep.planned_jobs import Sweep
from moe_pretrain.sweep.running_job import RunningJob, RunsElsewhere, run_job
from moe_pretrain.sweep.status import Board, describe_sweep, fitting, read_progress
from moe_pretrain.system.files import write_json

FAKE = (sys.executable, "-S", str(Path(__file__).parents[2] / "helpers" / "fake_train.py"))


class Sweeping:
    """A sweep of jobs ``seed=1`` and so on, driven by a process that is this one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said = io.StringIO()
        folder.mkdir(exist_ok=True)
        write_json(folder / "sweep.json", {})

    def go(self, behaviour: dict[int, str], meanwhile: Callable[[], None] = lambda: None, **settings: object) -> None:
        """Run a job for each seed; ``meanwhile`` is called again and again."""
        write_json(self.folder / "behaviour.json", {f"seed={seed}": what for seed, what in behaviour.items()})
        sweep = Sweep(self.folder, (), "cache", replace(load().sweep, **settings))
        jobs = sweep.plan([[f"seed={seed}"] for seed in behaviour])

        class Watched(Board):
            def show(self) -> None:
                meanwhile()
                super().show()

        run_jobs(jobs, sweep, Watched(self.folder, self.said), FAKE)

    def states(self) -> dict[int, str]:
        return {int(job.name.removeprefix("seed=")): look(job.folder).state for job in read_jobs(self.folder)}

    def reason(self, seed: int) -> str:
        return look(self.folder / f"seed={seed}").reason

    def attempts(self) -> list[int]:
        return [look(job.folder).attempts for job in read_jobs(self.folder)]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    monkeypatch.setattr(launcher, "_POLL_SECONDS", 0.02)
    return Sweeping(tmp_path / "s")


BAD = {1: "fail", 2: "diverge", 3: "refuse", 4: "die", 5: "finish"}


def test_bad_jobs_are_marked_and_do_not_stop_the_others(sweep: Sweeping):
    sweep.go(BAD)
    assert sweep.states() == {1: "failed", 2: "diverged", 3: "failed", 4: "stopped", 5: "finished"}
    reasons = ["a failure", "loss=nan", "data.paths=missing must exist", "killed by SIGKILL", ""]
    assert [sweep.reason(seed) for seed in BAD] == reasons
    jobs = read_progress(sweep.folder)
    assert describe_sweep(jobs) == "5 jobs: 1 finished, 1 stopped, 2 failed, 1 diverged"
    objectives = [objective(job.state) for job in jobs]
    assert objectives == [math.inf, math.inf, math.inf, math.inf, 3.5]
    for seed, reason in zip(BAD, reasons, strict=True):
        (line,) = [line for line in sweep.said.getvalue().splitlines() if line.startswith(f"seed={seed}  ")][-1:]
        assert reason in line and sweep.states()[seed] in line


@pytest.mark.parametrize(
    "retry,attempts", [("none", [1, 1, 1, 2, 1]), ("failed", [2, 1, 2, 2, 1]), ("all", [2, 2, 2, 2, 1])]
)
def test_the_same_command_again_goes_on(sweep: Sweeping, retry: str, attempts: list[int]):
    sweep.go(BAD, parallel=5)
    before = (sweep.folder / "seed=5" / "metrics.jsonl").read_bytes()
    sweep.go(dict.fromkeys(BAD, "finish"), retry=retry, parallel=5)
    assert sweep.attempts() == attempts
    for seed, count in zip(BAD, attempts, strict=True):
        assert (sweep.states()[seed] == "finished") == (count == 2 or seed == 5)
    assert (sweep.folder / "seed=5" / "metrics.jsonl").read_bytes() == before


def test_jobs_run_side_by_side_each_with_its_share(sweep: Sweeping, monkeypatch: pytest.MonkeyPatch):
    """Each of the two waits for the other."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    sweep.go({1: "meet", 2: "meet"}, parallel=2)
    assert sweep.states() == {1: "finished", 2: "finished"}
    assert [(sweep.folder / f"seed={seed}" / "threads.txt").read_text() for seed in (1, 2)] == ["6", "6"]


def test_a_signal_reaches_the_jobs_and_the_rest_waits(sweep: Sweeping):
    asked: list[int] = []

    def ask() -> None:
        if not asked and (sweep.folder / "seed=2" / "metrics.jsonl").exists():
            asked.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SweepStopped) as stopped:
        sweep.go({1: "finish", 2: "wait", 3: "finish"}, ask)
    assert not stopped.value.is_killed
    assert sweep.states() == {1: "finished", 2: "stopped", 3: "waiting"}
    assert "checkpoint written" in sweep.reason(2)
    sweep.go({1: "fail", 2: "finish", 3: "finish"})
    assert sweep.states() == dict.fromkeys((1, 2, 3), "finished")
    assert sweep.attempts() == [1, 2, 1]


def test_a_second_interrupt_kills(sweep: Sweeping):
    def ask() -> None:
        if (sweep.folder / "seed=1" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SweepStopped) as stopped:
        sweep.go({1: "deaf", 2: "finish"}, ask)
    assert stopped.value.is_killed and sweep.states() == {1: "stopped", 2: "waiting"}
    assert sweep.reason(1) == "killed by SIGKILL"


def one_job(sweep: Sweeping, what: str) -> SweepJob:
    write_json(sweep.folder / "behaviour.json", {"seed=1": what})
    (job,) = Sweep(sweep.folder, (), "cache", load().sweep).plan([["seed=1"]])
    return job


def test_a_job_runs_once_at_a_time(sweep: Sweeping, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_module, "_LOCK_SECONDS", 0.2)
    job = one_job(sweep, "wait")
    running = RunningJob(job, program=FAKE)
    assert look(job.folder).state == "running"
    with pytest.raises(RunsElsewhere):
        RunningJob(job, program=FAKE)
    assert look(job.folder).attempts == 1
    running.process.kill()
    running.process.wait()
    state = look(job.folder)
    assert (state.state, state.reason) == ("stopped", "killed"), "nobody has written how it ended"
    write_json(sweep.folder / "behaviour.json", {"seed=1": "finish"})
    assert run_job(job, program=FAKE).state == "finished"


def test_what_the_run_recorded_wins(sweep: Sweeping):
    """A driver that is killed just after the run's end, and a run that is finished by hand."""
    job = one_job(sweep, "finish")
    RunningJob(job, program=FAKE).process.wait()
    state = look(job.folder)
    assert (state.state, state.validation_loss) == ("finished", 3.5)
    job = one_job(sweep, "refuse")
    (job.folder / "metrics.jsonl").unlink()
    assert run_job(job, program=FAKE).state == "failed"
    RunningJob(one_job(sweep, "finish"), program=FAKE).process.wait()
    assert look(job.folder).state == "finished"


def test_gpus_are_divided():
    gpus = ["4", "5", "6", "7", "8"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in divide(gpus, 2, 2)] == ["4,5", "6,7"]
    with pytest.raises(ValueError, match="sweep.parallel=3 must be at most 2: runs of 2 processes each, 5 GPUs"):
        divide(gpus, 3, 2)
    assert shares(1, [{}]) == [{}], "a job that has the machine to itself"


def test_a_low_terminal_shows_what_matters(sweep: Sweeping):
    sweep.go(BAD, parallel=5)
    jobs = read_progress(sweep.folder)
    assert len(fitting(jobs, 5)) == 5 and "more" not in "".join(fitting(jobs, 5))
    lines = fitting(jobs, 4)
    assert [line.split()[0] for line in lines] == ["seed=1", "seed=2", "seed=3", "..."] and "2 more" in lines[-1]


def test_a_terminal_shows_the_table_in_place(sweep: Sweeping, monkeypatch: pytest.MonkeyPatch):
    """What was drawn is drawn over: each drawing first goes up as many lines as it has."""
    monkeypatch.setattr(sweep.said, "isatty", lambda: True)
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(status, "_SECONDS_BETWEEN_READS", 0.0)
    sweep.go({1: "finish", 2: "refuse"})
    first, *others = sweep.said.getvalue().split("\033[3A")
    assert len(others) > 1 and "\033[3A" not in first
    for drawing in (first, *others):
        lines = drawing.removesuffix("\033[J").splitlines()
        assert len(lines) == 3 and all(len(line.removeprefix("\033[2K")) < 40 for line in lines)
    assert "2 jobs: 1 finished, 1 failed" in others[-1]


def test_a_folder_that_is_no_sweep_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="must be the folder of a sweep: it has no sweep.json"):
        read_progress(tmp_path)
