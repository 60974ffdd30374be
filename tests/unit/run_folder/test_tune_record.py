"""The record of a tuned sweep: read as written, merged by scheme, and what it takes out of a comparison."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.planted import Planted

from moe_pretrain.run_folder.record import find_runs
from moe_pretrain.run_folder.tune_record import (
    TunedScheme,
    TuneRecord,
    TuningTrial,
    read_tune_record,
    split_trials,
)

RATE = "optimizer.learning_rate"
TRIALS = tuple(TuningTrial(f"trial-{n}", {RATE: 0.001 * n}, 3.0 + n, "finished") for n in (1, 2, 3))
SCHEME = TunedScheme("router=top_k", ("router=top_k",), TRIALS, {RATE: 0.001}, True, ("final-1", "final-2"))
RECORD = TuneRecord("rule", RATE, 2.0, 3, 0, (SCHEME,), ("old",))


def test_it_is_read_as_it_was_written(tmp_path: Path):
    assert read_tune_record(tmp_path) is None
    RECORD.write(tmp_path)
    assert read_tune_record(tmp_path) == RECORD


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schemes": [{"name": "x"}], "former": []}'])
def test_a_broken_one_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(ValueError, match="tune.json is broken") as caught:
        read_tune_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_schemes_are_merged_and_what_is_no_longer_used_is_former():
    other = TunedScheme("router=hash", ("router=hash",), finals=("other-1",))
    again = replace(SCHEME, trials=TRIALS[:2], finals=("final-1", "new"))
    merged = RECORD.with_schemes([other]).with_schemes([again])
    assert merged.schemes == (again, other)
    assert merged.former == ("final-2", "old", "trial-3")
    assert merged.with_schemes([SCHEME]).former == ("new", "old"), "used again"


def test_trials_and_former_runs_are_not_compared(tmp_path: Path):
    for name in ("final-1", "final-2", "trial-1", "trial-2", "old", "beside"):
        Planted(name, 3.0).write(tmp_path / "tuned")
    Planted("trial-1", 3.0).write(tmp_path / "elsewhere")
    RECORD.write(tmp_path / "tuned")
    compared, folders = split_trials(find_runs(tmp_path))
    names = ["elsewhere/trial-1", "tuned/beside", "tuned/final-1", "tuned/final-2"]
    assert [run.name for run in compared] == names, "a name says nothing in another folder"
    assert list(folders) == [tmp_path / "tuned"]
    assert sorted(folders[tmp_path / "tuned"].trials) == ["trial-1", "trial-2"]
