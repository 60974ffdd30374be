"""Under torchrun: what its signals, its grace time, its death and its restarts do to a run (defect C35)."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import Program, rows_of, run, train_words, wait_for_step

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import train_state

LONG = ["budget.tokens=100000000", "evaluation.every_steps=100000", "checkpoint.keep_best=0"]
SPREAD = ["parallel.expert_parallel_size=2"]
ALONE = "parallel.expert_parallel_size=1"


def torchrun(home: Path, *words: str, options: tuple[str, ...] = (), grace: int = 60) -> Program:
    """torchrun with two ranks of ``moe_pretrain``; ``grace`` seconds from a signal to SIGKILL, 30 before torch 2.12."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options)
    return Program(home, (*launcher, "-m", "moe_pretrain", *words), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)})


def workers_of(process: Program) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(word) for file in children for word in file.read_text().split()]


def state(process: int) -> str:
    """The kernel's letter for what a process does; X when there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def newest_step(home: Path, name: str) -> int:
    warnings: list[str] = []
    found = store.newest(home / "outputs" / name / "checkpoints", warnings.append)
    assert found is not None and not warnings
    return train_state(found[1]).step


def test_a_signal_to_torchrun_saves_on_all_ranks(home: Path):
    name = "torchrun-signal"
    process = torchrun(home, *train_words(name, *LONG, *SPREAD))
    wait_for_step(home, name, 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, "torchrun's own code: it says nothing about the run"
    last = rows_of(home, name)[-1]["step"]
    assert rows_of(home, name, "event")[-1]["event"] == "stopped", (out, err)
    assert newest_step(home, name) == last and f"stopped at step {last}" in out


@pytest.mark.slow
def test_a_save_that_outlasts_torchruns_grace_leaves_the_last_good_checkpoint(home: Path):
    """A rank is stopped in the middle of the last save; torchrun kills all."""
    name = "torchrun-slow"
    slow = ["fault.point=save.file_half", "fault.action=stop", "fault.step=5", "fault.num_steps=1000000"]
    words = train_words(name, *LONG, *SPREAD, *slow, "fault.rank=1", "checkpoint.every_steps=4")
    process = torchrun(home, *words, grace=2)
    wait_for_step(home, name, 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert newest_step(home, name) == 4
    code, _, err = run(home, "train", f"run.name={name}", "fault.point=null", "budget.tokens=8192", ALONE)
    assert code == 0, err
    assert [row["step"] for row in rows_of(home, name)] == list(range(1, 9))


def test_ranks_die_with_torchrun(home: Path):
    """SIGUSR1 ends torchrun, as SIGKILL does, without a word to its workers; stopped ones cannot end by themselves."""
    name = "orphans"
    stuck = ["fault.point=train.update", "fault.action=stop", "fault.step=3", "fault.rank=-1"]
    process = torchrun(home, *train_words(name, *LONG, *SPREAD, *stuck))
    wait_for_step(home, name, 3, process)
    workers = workers_of(process)
    assert len(workers) == 2
    try:
        wait_until(lambda: all(state(worker) == "T" for worker in workers), "the ranks have stopped")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == -signal.SIGUSR1
        wait_until(lambda: all(state(worker) in "ZX" for worker in workers), "no rank outlives torchrun")
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("action,rank", [("hang", 1), ("stop", 0)])
@pytest.mark.fast("hang")
def test_a_stuck_or_stopped_rank_ends_the_run_and_is_named(home: Path, action: str, rank: int):
    name = f"torchrun-{action}"
    stuck = ["fault.point=train.backward", f"fault.action={action}", "fault.step=2", f"fault.rank={rank}"]
    limits = ["parallel.timeout_seconds=8" if action == "hang" else "parallel.heartbeat_seconds=4"]
    process = torchrun(home, *train_words(name, *LONG, *SPREAD, *stuck, *limits), grace=2)
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0, out
    what = "stuck, in one place of its loop for 8 s" if action == "hang" else "stuck or gone, no sign of life for 4 s"
    (line,) = [line for line in err.splitlines() if what in line]
    assert f": rank {rank} on" in line and "step 2, phase train.backward" in line


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_the_run_goes_on(home: Path):
    """A rank is killed once step 4 is saved; the new ones may meet at the same store, and must not find the old."""
    name = "restarted"
    deadly = ["fault.point=save.announced", "fault.action=kill", "fault.step=4", "fault.rank=1"]
    process = torchrun(home, *train_words(name, *SPREAD, *deadly), options=("--max-restarts", "1"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    rows = rows_of(home, name)
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["attempt"] == 1
