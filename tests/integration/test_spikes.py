"""A run that meets poisoned rows goes back and ends as if they had never been in its data."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import assert_same, contents
from helpers.runs import rows_of, run, train_words

SPIKES = ["spike.window_steps=4", "spike.deviations=2", "router=loss_free"]
POISON = ["fault.point=train.rows", "fault.action=poison", "fault.step=9", "fault.rank=-1"]
WITHOUT = [{"step": 0, "first": 9, "stop": 10}]


def record(home: Path, name: str, rewinds: list[dict[str, int]]) -> None:
    folder = home / "outputs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewinds.json").write_text(json.dumps(rewinds))


def checkpoints(home: Path, name: str) -> Path:
    return home / "outputs" / name / "checkpoints"


@pytest.fixture(scope="module")
def clean(home: Path) -> Path:
    """A run whose data never had the rows of step 9."""
    record(home, "clean", WITHOUT)
    code, _, err = run(home, *train_words("clean", *SPIKES))
    assert code == 0, err
    assert not [row for row in rows_of(home, "clean", "event") if row["event"] == "loss_spike"]
    return home


def final_state(home: Path, name: str) -> dict[str, Any]:
    return json.loads((checkpoints(home, name) / "step_00000012" / "manifest.json").read_text())["state"]


def assert_ends_as_clean(home: Path, name: str) -> None:
    assert final_state(home, name)["spikes"] == final_state(home, "clean")["spikes"]
    assert_same(contents(checkpoints(home, "clean")), contents(checkpoints(home, name)))
    ours, theirs = rows_of(home, name), rows_of(home, "clean")
    for key in ("step", "train/loss", "data/token_hash"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


def test_the_run_goes_back_and_leaves_the_rows_out(clean: Path) -> None:
    code, out, err = run(clean, *train_words("poisoned", *SPIKES, *POISON, "spike.rewind=true"))
    assert code == 0, err
    (event,) = [row for row in rows_of(clean, "poisoned", "event") if row["event"] == "rewound"]
    assert event["step"] == 8 and "went back to step_00000008" in event["message"]
    assert "the rows of steps 9 to 9 of the data are left out" in event["message"]
    facts = json.loads((clean / "outputs" / "poisoned" / "sick_steps" / "step_00000009.json").read_text())
    assert (facts["first_row"], facts["last_row"]) == (144, 159)
    assert_ends_as_clean(clean, "poisoned")


def test_a_kill_after_the_decision_cannot_bring_the_left_course_back(clean: Path) -> None:
    """The run has gone on with the spike, its record says that it went back; it resumes on two ranks."""
    words = train_words("stale", *SPIKES, *POISON)
    code, _, err = run(clean, *words)
    assert code == 0, err
    assert [row["event"] for row in rows_of(clean, "stale", "event")].count("loss_spike") == 1, (
        "said without rewind too"
    )
    record(clean, "stale", [{"step": 8, "first": 9, "stop": 10}])
    code, _, err = run(clean, "train", "run.name=stale", "parallel.processes=2", "parallel.expert_parallel_size=2")
    assert code == 0, err
    ours, theirs = rows_of(clean, "stale"), rows_of(clean, "clean")
    assert [row["data/token_hash"] for row in ours] == [row["data/token_hash"] for row in theirs]
    assert ours[-1]["train/loss"] == pytest.approx(theirs[-1]["train/loss"], rel=1e-4)
    assert final_state(clean, "stale")["rewinds"] == [{"step": 8, "first": 9, "stop": 10}]


def test_rows_stay_left_out_after_a_kill(clean: Path) -> None:
    """Killed between a checkpoint after the rows and the end; the record of the first attempt is lost."""
    record(clean, "killed", WITHOUT)
    fault = ["fault.point=train.step", "fault.action=kill", "fault.step=11"]
    code, _, _ = run(clean, *train_words("killed", *SPIKES, *fault, "checkpoint.every_steps=5"))
    assert code != 0
    (clean / "outputs" / "killed" / "rewinds.json").unlink()
    code, _, err = run(clean, "train", "run.name=killed", "fault.point=null")
    assert code == 0 and "step_00000010" in err, err
    assert_ends_as_clean(clean, "killed")


def test_without_a_checkpoint_before_the_rows_training_goes_on(clean: Path) -> None:
    words = train_words("nowhere", *SPIKES, *POISON, "spike.rewind=true", "checkpoint.every_steps=100")
    code, _, err = run(clean, *words)
    assert code == 0, err
    events = [row["event"] for row in rows_of(clean, "nowhere", "event")]
    assert "not_rewound" in events and "rewound" not in events


def test_a_damaged_record_ends_every_rank_in_one_line(clean: Path) -> None:
    """Only the main rank reads it: the other one must hear of it and not wait."""
    record(clean, "damaged", [{"step": 8, "first": 9}])
    words = train_words("damaged", *SPIKES, "parallel.processes=2", "parallel.expert_parallel_size=2")
    code, _, err = run(clean, *words)
    assert code == 2, err
    said = [line for line in err.splitlines() if "rewinds.json: damaged: entry 1" in line and "delete it" in line]
    assert len(said) == 2 and "Traceback" not in err, err
    assert not checkpoints(clean, "damaged").exists(), "nothing was trained"
