"""A tuning as a user runs it: processes, a kill, the comparison of what it chose."""

import json
import time
from pathlib import Path

import pytest
from helpers.runs import TINY, run, start

from moe_pretrain.run_folder.tune_record import TuneRecord, read_tune_record

WORDS = ["tune", *TINY, "data=files", "data.paths=[corpus.jsonl]", "budget.tokens=4096", "checkpoint.every_steps=2"]
WORDS += ["checkpoint.asynchronous=false", "router=top_k,random", "seed=1", "--trials=3", "sweep.name=contest"]
WORDS += ["--tuning-seed=5", "sweep.parallel=2", "optimizer.learning_rate=0.002"]


def metrics_of(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/metrics.jsonl")}


def record_of(folder: Path) -> TuneRecord:
    found = read_tune_record(folder)
    assert found is not None
    return found


def states_of(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["state"] for path in folder.glob("*/job_state.json")}


@pytest.mark.slow
def test_a_killed_tuning_goes_on(home: Path):
    """SIGKILL to the driver while a trial of the second scheme hangs: what is finished is not made again."""
    folder = home / "outputs" / "contest"
    driver = start(home, *WORDS, "fault.point=train.update", "fault.action=stop", "fault.step=3")
    deadline = time.monotonic() + 150
    while len(list(folder.glob("*/checkpoints/step_00000002"))) < 2:  # metrics are written before the checkpoint
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.communicate()
    record = record_of(folder)
    assert [len(scheme.trials) for scheme in record.schemes] == [3, 3], "written before its runs were started"
    assert all(trial.state == "waiting" for scheme in record.schemes for trial in scheme.trials)
    code, _, err = run(home, "compare", "outputs/contest")
    assert code == 2 and "has only trials of a tuning so far" in err

    code, out, err = run(home, *WORDS)
    assert code == 0 and "8 jobs: 8 finished" in out, out + err
    finished, record = metrics_of(folder), record_of(folder)
    assert sum(b'"resumed"' in rows for rows in finished.values()) == 2
    for scheme in record.schemes:
        losses = [trial.loss for trial in scheme.trials]
        rates = [trial.values["optimizer.learning_rate"] for trial in scheme.trials]
        assert rates == [0.001, 0.002, 0.004] and None not in losses
        assert scheme.chosen == {"optimizer.learning_rate": rates[losses.index(min(losses, key=float))]}
        (final,) = scheme.finals
        own = [json.loads(line) for line in finished[final].splitlines()]
        assert [row["step"] for row in own if row["kind"] == "train"] == [1, 2, 3, 4], "the budget of the trials"
    assert set(states_of(folder)) == {job for scheme in record.schemes for job in scheme.jobs}
    code, out, err = run(home, *WORDS)
    assert code == 0 and metrics_of(folder) == finished and record_of(folder) == record, out + err
    code, out, err = run(home, "compare", "outputs/contest")
    assert code == 0 and "best of 3 |" in out and "top_k DOES NOT BEAT RANDOM ROUTING" in out, out + err
