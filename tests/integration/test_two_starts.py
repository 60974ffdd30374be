"""One run started twice on one folder: one trains, the other is refused and changes nothing."""

import time
from pathlib import Path

import pytest
from helpers.runs import rows_of, run, start, train_words, wait_for_step

LONG = ["budget.tokens=100000000", "checkpoint.every_steps=1000", "evaluation.every_steps=100000"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.fast("2")
def test_of_two_starts_at_once_one_trains_and_the_other_is_refused(home: Path, processes: int):
    name = f"twice-{processes}"
    folder = home / "outputs" / name
    words = train_words(name, *LONG, f"parallel.processes={processes}", f"parallel.expert_parallel_size={processes}")
    marks = [f"metrics.router_health_steps={number}" for number in (101, 102)]
    started = {mark: start(home, *words, mark) for mark in marks}
    deadline = time.monotonic() + 100
    while all(process.poll() is None for process in started.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if all(process.poll() is None for process in started.values()):
        for process in started.values():
            process.kill()
        pytest.fail("both starts train on one folder")
    ((loser, refused),) = [(mark, process) for mark, process in started.items() if process.poll() is not None]
    ((winner, owner),) = [(mark, process) for mark, process in started.items() if mark != loser]
    _, err = refused.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert refused.returncode == 2, err
    assert f"run.name={name} must be another one" in last and f"process {owner.pid} on" in last
    assert "Traceback" not in err
    wait_for_step(home, name, 3, owner)
    overrides = (folder / "overrides.txt").read_text().splitlines()
    assert winner in overrides and loser not in overrides, "the second start has written nothing"
    owner.kill()
    owner.communicate()
    rows = rows_of(home, name)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and {row["attempt"] for row in rows} == {0}
    code, _, err = run(home, "train", f"run.name={name}", "budget.tokens=2048")
    assert code == 0, err
    assert rows_of(home, name)[-1]["attempt"] == 1
