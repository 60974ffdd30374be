"""Runs that fall ill, as processes: what is said, what is left, and the exit code."""

import json
import re
import resource
import signal
import time
from pathlib import Path

import pytest
from helpers.runs import rows_of, run, start, train_words, wait_for_step

TWO = ["parallel.processes=2", "parallel.expert_parallel_size=2"]


def fault(point: str, action: str, step: int, rank: int = 0, **more: object) -> list[str]:
    words = {"point": point, "action": action, "step": step, "rank": rank, **more}
    return [f"fault.{name}={value}" for name, value in words.items()]


def test_a_skipped_step_is_an_event_and_its_rows_are_kept(home: Path):
    words = fault("train.gradient", "not_finite", 3, rank=1, parameter="blocks.1.feed_forward.experts.in_weight")
    code, _, err = run(home, *train_words("skipped", *TWO, *words))
    assert code == 0, err
    (event,) = [row for row in rows_of(home, "skipped", "event") if row["event"] == "step_skipped"]
    assert event["step"] == 4 and "gradient of blocks.1.feed_forward.experts.in_weight on rank 1" in event["message"]
    assert event["message"] in err
    facts = json.loads((home / "outputs" / "skipped" / "sick_steps" / "step_00000003.json").read_text())
    assert (facts["step"], facts["first_row"], facts["last_row"]) == (3, 48, 63)
    rows = rows_of(home, "skipped")
    assert rows[-1]["step"] == 12 and rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_too_many_sick_steps_stop_the_run_in_one_line(home: Path):
    words = fault("train.loss", "not_finite", 5, num_steps=99)
    code, _, err = run(home, *train_words("stopped", *words, "engine.max_skipped_steps=1"))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "step 6: loss=nan" in last and "engine.max_skipped_steps=1" in last and "step_00000006.json" in last
    assert "Traceback" not in err
    kept = sorted(path.name for path in (home / "outputs" / "stopped" / "checkpoints").iterdir())
    assert kept == ["step_00000004"], "the last good one stays, and none is written of a sick step"
    code, _, err = run(home, "train", "run.name=stopped", "fault.point=null")
    assert code == 0, err


def test_a_collapsed_router_is_warned_of_by_name(home: Path):
    words = fault("train.router", "collapse", 3, num_steps=6)
    more = ["metrics.router_health_steps=3", "engine.check_every_steps=0", "run.report=true"]
    code, _, err = run(home, *train_words("collapsed", *words, *more))
    assert code == 0, err
    events = [row for row in rows_of(home, "collapsed", "event") if row["event"] == "collapsed_router"]
    assert {row["step"] for row in events} == {6} and len(events) == 2, "once per layer"
    assert "[collapsed_router]" in err
    assert "collapsed_router" in (home / "outputs" / "collapsed" / "report.html").read_text()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_and_is_named(home: Path, rank: int):
    """SIGSTOP: no message, no exit, no error in any collective before its long timeout."""
    name = f"stopped-rank-{rank}"
    words = fault("train.backward", "stop", 3, rank=rank)
    code, _, err = run(home, *train_words(name, *TWO, *words, "parallel.heartbeat_seconds=4"))
    assert code == 69, err
    assert f"stuck or gone, no sign of life for 4 s: rank {rank} on" in err and "step 3, phase train.backward" in err
    stacks = home / "outputs" / name / "stacks"
    for one in (0, 1):
        text = (stacks / f"rank_{one:05d}.txt").read_text()
        assert "engine.py" in text, "the stopped rank is woken to write its stacks too"
    code, _, err = run(home, "train", f"run.name={name}", "fault.point=null")
    assert code == 0, err


STUCK = "stuck, in one place of its loop for 8 s (parallel.timeout_seconds): rank "


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fast("0")
def test_a_rank_that_is_alive_but_stuck_is_named_and_not_those_that_wait_for_it(home: Path, rank: int):
    name = f"alive-{rank}"
    words = [*fault("train.backward", "hang", 3, rank=rank), "parallel.timeout_seconds=8"]
    code, _, err = run(home, *train_words(name, *TWO, *words))
    assert code == 69, err
    lines = [line for line in err.splitlines() if STUCK in line]
    assert len(lines) == 1 and f"{STUCK}{rank} on" in lines[0], err
    assert "step 3, phase train.backward, in reach (faults.py:" in lines[0]
    assert f"rank {1 - rank} on" not in lines[0]


@pytest.mark.slow
def test_a_run_of_one_process_that_is_stuck_ends(home: Path):
    words = [*fault("evaluate.batch", "hang", 6), "parallel.timeout_seconds=8"]
    code, _, err = run(home, *train_words("alone", *words))
    assert code == 69 and f"{STUCK}0 on" in err and "step 6, phase evaluate.batch, in reach (faults.py:" in err, err
    code, _, err = run(home, "train", "run.name=alone", "fault.point=null")
    assert code == 0, err


@pytest.mark.fast("1")
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_whose_code_keeps_the_interpreters_lock_are_named_and_end(home: Path, processes: int):
    """No thread of these ranks runs any more, so none of them can tell of itself or of another."""
    name = f"held-{processes}"
    words = [
        *fault("train.backward", "hold", 3, rank=-1),
        "parallel.timeout_seconds=6",
        f"parallel.processes={processes}",
    ]
    code, _, err = run(home, *train_words(name, *words))
    assert code == 69, err
    place = "last seen at step 3, phase train.backward, in reach (faults.py:"
    assert re.search(rf"for 6 s \(parallel.timeout_seconds\): rank \d on \S+, {re.escape(place)}", err), err
    assert "in reach" in (home / "outputs" / name / "stacks" / "rank_00000.txt").read_text()
    code, _, err = run(home, "train", f"run.name={name}", "fault.point=null", "parallel.timeout_seconds=60")
    assert code == 0, err


@pytest.mark.slow
def test_a_run_of_one_process_that_was_stopped_for_longer_than_its_limits_goes_on(home: Path):
    words = ["parallel.timeout_seconds=4", "parallel.heartbeat_seconds=4", "budget.tokens=61440"]
    process = start(home, *train_words("paused", *words))
    wait_for_step(home, "paused", 3, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(9)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "stuck" not in err, err
    assert [row["step"] for row in rows_of(home, "paused")] == list(range(1, 61))


def test_memory_at_its_limit_ends_the_run_or_lets_it_go_on(home: Path):
    """Nothing can be allocated, and no thread be started, on one rank.

    Most runs end of it. A step needs no more than what was freed before it, though, so some go on for ever, saves that
    fail said in events; none stands still.
    """
    name = "memory"
    long = ["budget.tokens=100000000", "evaluation.every_steps=100000", "parallel.heartbeat_seconds=5"]
    process = start(home, *train_words(name, *TWO, *long, "parallel.timeout_seconds=10"))
    wait_for_step(home, name, 5, process)
    worker = min(children_of(process.pid))  # rank 0
    size = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(worker, resource.RLIMIT_AS, (size, size))
    last, deadline = 5, time.monotonic() + 100
    while process.poll() is None and last < 200:
        assert time.monotonic() < deadline, f"stands still at step {last}"
        if (step := rows_of(home, name)[-1]["step"]) > last:
            last, deadline = step, time.monotonic() + 100
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
    else:
        assert process.returncode != 0


def children_of(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text().split()]


def test_a_killed_rank_is_named(home: Path):
    words = fault("train.update", "kill", 3, rank=1)
    code, _, err = run(home, *train_words("dead", *TWO, *words))
    assert code == 128 + signal.SIGKILL, err
    assert "rank 1 was killed by SIGKILL, last seen at step " in err


@pytest.mark.parametrize("damage", ["cut short", "changed"])
@pytest.mark.fast("cut short")
def test_shards_that_change_under_a_run_end_it_in_one_line(home: Path, damage: str):
    name = f"shards-{damage.split()[0]}"
    long = ["budget.tokens=100000000", "evaluation.every_steps=100000", f"run.cache_dir={home}/{name}"]
    process = start(home, *train_words(name, *long))
    wait_for_step(home, name, 3, process)
    (shard,) = (home / name).glob("*/train/shard-00000.bin")
    with open(shard, "r+b") as file:
        if damage == "changed":
            file.write(bytes(shard.stat().st_size // 2))
        else:
            file.truncate(shard.stat().st_size // 2)
    out, err = process.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 2 and "shard-00000.bin: damaged: " in last and "Traceback" not in err, err


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
@pytest.mark.fast("ENOSPC")
def test_a_failed_save_is_loud_and_training_goes_on(home: Path, error: str):
    name = f"failed-{error}"
    code, _, err = run(home, *train_words(name, *fault("save.file_half", error, 8)))
    assert code == 0, err
    (event,) = [row for row in rows_of(home, name, "event") if row["event"] == "checkpoint_failed"]
    assert "step 8 is NOT saved" in event["message"] and "last good checkpoint: step 4" in event["message"]
    assert event["message"] in err
    kept = sorted(path.name for path in (home / "outputs" / name / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000012"]


def test_a_failed_last_save_has_an_exit_code_of_its_own(home: Path):
    code, out, err = run(home, *train_words("unsaved", *fault("save.file_half", "ENOSPC", 12)))
    assert code == 74, err
    assert "could not be saved; the same command goes on from step 8" in out
    code, _, err = run(home, "train", "run.name=unsaved", "fault.point=null")
    assert code == 0, err
    assert [row["step"] for row in rows_of(home, "unsaved", "validation")] == [6, 12]


def test_damage_is_an_event_of_the_run_that_falls_back(home: Path):
    code, _, err = run(home, *train_words("damaged", "budget.tokens=8192"))
    assert code == 0, err
    file = home / "outputs" / "damaged" / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)
    code, _, err = run(home, "train", "run.name=damaged")
    assert code == 0, err
    events = {row["event"]: row for row in rows_of(home, "damaged", "event")}
    assert "rank_00000.safetensors is damaged" in events["checkpoint_damaged"]["message"]
    assert "from step_00000004" in events["resumed"]["message"]


def test_changes_that_may_be_are_said(home: Path):
    code, _, err = run(home, *train_words("changed", "budget.tokens=4096"))
    assert code == 0, err
    code, _, err = run(home, "train", "run.name=changed", "optimizer.learning_rate=0.001", "budget.tokens=8192")
    assert code == 0, err
    (event,) = [row for row in rows_of(home, "changed", "event") if row["event"] == "changed"]
    assert "optimizer.learning_rate=0.001 (was 0.004)" in event["message"]
    assert "budget.tokens=8192 (was 4096)" in event["message"]
    code, _, err = run(home, "train", "run.name=changed", "model.hidden_size=64", "budget.tokens=9216")
    assert code == 2 and "model.hidden_size=64 must stay 32" in err
    assert "these differ too, and may: budget.tokens=9216 (was 8192)" in err
