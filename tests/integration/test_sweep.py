"""A sweep as a user runs it: processes, kills, files."""

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import TINY, Program, run, start

from moe_pretrain.cli import main
from moe_pretrain.moe.part_timer import PARTS

WORDS = ["train", "--multirun", *TINY, "data=files", "data.paths=[corpus.jsonl]"]
WORDS += ["checkpoint.every_steps=2", "checkpoint.asynchronous=false"]
GRID = ["router=top_k,top_p", "seed=1,2", "sweep.name=grid", "sweep.parallel=2"]
NAMES = [f"router={router},seed={seed}" for router in ("top_k", "top_p") for seed in (1, 2)]
FIRST, SECOND = NAMES[::2], NAMES[1::2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The program without a process of its own."""
    monkeypatch.chdir(home)

    def called(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return (main(words), *capfd.readouterr())

    return called


def file_of(home: Path, name: str, file: str, sweep: str = "grid") -> Path:
    return home / "outputs" / sweep / name / file


def rows_of(home: Path, name: str, sweep: str = "grid") -> list[dict]:
    path = file_of(home, name, "metrics.jsonl", sweep)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(home: Path, name: str, sweep: str = "grid") -> int:
    return max((row["step"] for row in rows_of(home, name, sweep)), default=0)


def wait_until(is_so: Callable[[], bool], process: Program) -> None:
    deadline = time.monotonic() + 150
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(process: Program) -> list[int]:
    return [
        int(word)
        for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_sweep_goes_on(home: Path, call: Call):
    """SIGKILL to the driver while two jobs are finished and two hang; a second driver is refused meanwhile."""
    code, out, err = run(home, *WORDS, "router=top_k,top_p", "seed=choice(1)", *GRID[2:])
    assert code == 0 and "2 jobs: 2 finished" in out, out + err
    before = {name: file_of(home, name, "metrics.jsonl").read_bytes() for name in FIRST}
    driver = start(home, *WORDS, *GRID, "fault.point=train.update", "fault.action=stop", "fault.step=5")
    wait_until(lambda: all(steps_of(home, name) == 5 for name in SECOND), driver)
    code, _, err = call(*WORDS, *GRID)
    assert code == 2 and "sweep.name=grid: another process runs this sweep" in err
    assert "4 jobs: 2 running, 2 finished" in call("sweep-status", "outputs/grid")[1]
    jobs = children_of(driver)
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 30
    while "2 stopped" not in (status := call("sweep-status", "outputs/grid")[1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "4 jobs: 2 finished, 2 stopped" in status
    assert len(jobs) == 2 and not any(is_alive(pid) for pid in jobs), "jobs die with their driver"

    code, out, err = run(home, *WORDS, *GRID)
    assert code == 0 and "4 jobs: 4 finished" in out, out + err
    for name in FIRST:
        assert file_of(home, name, "metrics.jsonl").read_bytes() == before[name], "a finished run is not made again"
    for name in SECOND:
        (resumed,) = [row for row in rows_of(home, name) if row.get("event") == "resumed"]
        assert resumed["step"] == 4
    hashes = {
        name: [row.get("data/token_hash") for row in rows_of(home, name) if row["kind"] == "train"] for name in NAMES
    }
    assert all(len(set(each)) == 12 for each in hashes.values())
    assert hashes[NAMES[0]] == hashes[NAMES[2]] and hashes[NAMES[1]] == hashes[NAMES[3]], "paired by construction"
    assert hashes[NAMES[0]] != hashes[NAMES[1]]
    assert len(list((home / "outputs" / "cache").glob("files-*"))) == 1, "tokenised once"
    code, out, err = call("compare", "outputs/grid")
    assert code == 0 and "| top_k |" in out and "| top_p |" in out and out.count("2 of 2") == 2, out + err
    for row in csv.DictReader((home / "outputs" / "grid" / "compare.csv").open()):
        parts = [float(row[f"{name}_microseconds_per_token"]) for name in PARTS]
        assert float(row["moe_layer_microseconds_per_token"]) == pytest.approx(sum(parts)) and parts[0] > 0


@pytest.mark.slow  # goes on with what the test before has left
def test_a_sweep_grows_and_marks_what_fails(home: Path, call: Call):
    """More values, of which one cannot work, which only the run finds out: what there is is kept under its name."""
    (home / "short.jsonl").write_text('{"text": "a few words"}\n' * 2)
    before = file_of(home, NAMES[0], "metrics.jsonl").read_bytes()
    code, out, err = call(*WORDS, "seed=1", "data.paths=[corpus.jsonl],[short.jsonl]", "sweep.name=grid")
    assert code == 1 and "5 jobs: 4 finished, 1 failed" in out, out + err
    (line,) = [line for line in out.splitlines() if " failed  " in line]
    assert line.split()[0].startswith("data.paths=-short.jsonl-") and "leaves no validation document" in line
    assert file_of(home, NAMES[0], "metrics.jsonl").read_bytes() == before
    code, _, err = call(*WORDS, *GRID, "optimizer.learning_rate=0.1")
    assert code == 2 and f"its job {NAMES[0]} was started with other settings: optimizer.learning_rate=0.1" in err


def test_a_signal_stops_a_sweep_and_its_jobs_save(home: Path):
    driver = start(home, *WORDS, "seed=1,2", "sweep.name=stopped", "budget.tokens=10000000")
    wait_until(lambda: steps_of(home, "seed=1", "stopped") > 0, driver)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=100)
    assert driver.returncode == 75, out + err
    assert "2 jobs: 1 waiting, 1 stopped" in out and "the same command goes on" in out
    state = json.loads(file_of(home, "seed=1", "job_state.json", "stopped").read_text())
    assert (state["state"], state["exit_code"]) == ("stopped", 75)
    steps = steps_of(home, "seed=1", "stopped")
    assert file_of(home, "seed=1", f"checkpoints/step_{steps:08d}", "stopped").is_dir()
    assert not file_of(home, "seed=2", "job_state.json", "stopped").exists()
