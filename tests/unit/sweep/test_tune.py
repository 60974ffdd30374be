"""The command as a whole, with a stand-in for training whose loss is least at a rate of 1."""

import json
import sys
from pathlib import Path

import pytest

from moe_pretrain.cli import main
from moe_pretrain.run_folder.tune_record import TuneRecord, read_tune_record
from moe_pretrain.sweep import launcher

FAKE = Path(__file__).parents[2] / "helpers" / "fake_train.py"
PROGRAM = f"+hydra.launcher.program=['{sys.executable}','-S','{FAKE}']"
TOP_K = "router=top_k,optimizer.learning_rate={},seed={}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(launcher, "_POLL_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(*words: str) -> int:
    return main(["tune", PROGRAM, "sweep.name=contest", *words])


def record(home: Path) -> TuneRecord:
    found = read_tune_record(home / "outputs" / "contest")
    assert found is not None
    return found


def behave(home: Path, **chosen: str) -> None:
    folder = home / "outputs" / "contest"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behaviour.json").write_text(json.dumps(chosen))


def started(home: Path) -> dict[str, int]:
    """Starts of each job."""
    files = (home / "outputs" / "contest").glob("*/job_state.json")
    return {path.parent.name: json.loads(path.read_text())["attempts"] for path in files}


def test_every_scheme_has_its_trials_and_its_final_runs(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["router=top_k,hash", "seed=1,2", "optimizer.learning_rate=0.6", "--trials", "4"]
    assert tune(*words) == 0
    found = record(home)
    assert (found.trials, found.tuning_seed, found.factor, found.former) == (4, 0, 2.0, ())
    assert [scheme.name for scheme in found.schemes] == ["router=top_k", "router=hash"]
    for scheme in found.schemes:
        assert [trial.values["optimizer.learning_rate"] for trial in scheme.trials] == [0.3, 0.6, 1.2, 2.4]
        assert [trial.loss for trial in scheme.trials] == pytest.approx([4.0229, 3.7218, 3.5792, 3.8802], abs=1e-4)
        assert scheme.chosen == {"optimizer.learning_rate": 1.2} and not scheme.at_edge
        assert scheme.finals == tuple(f"{scheme.name},optimizer.learning_rate=1.2,seed={seed}" for seed in (1, 2))
    assert set(started(home)) == {job for scheme in found.schemes for job in scheme.jobs} and len(started(home)) == 12
    assert "router=top_k: optimizer.learning_rate=1.2, the best of 4 trials (0.3: 4.0229" in capsys.readouterr().out

    assert tune(*words) == 0
    assert set(started(home).values()) == {1} and record(home) == found, "what is finished stands"
    assert tune("router=top_k", "seed=1,2,3", "optimizer.learning_rate=0.6", "--trials=4") == 0
    assert len(started(home)) == 13, "one more final seed"
    assert record(home).schemes[1] == found.schemes[1], "what other commands tuned is kept"


def test_a_diverged_trial_is_named_and_the_search_goes_on(home: Path, capsys: pytest.CaptureFixture[str]):
    behave(home, **{TOP_K.format("1.2", 0): "diverge"})
    assert tune("router=top_k", "seed=1", "optimizer.learning_rate=0.6", "--trials=4") == 0
    (scheme,) = record(home).schemes
    assert [(trial.state, trial.loss is None) for trial in scheme.trials] == [
        *(("finished", False), ("finished", False), ("diverged", True), ("finished", False))
    ]
    rates = [trial.values["optimizer.learning_rate"] for trial in scheme.trials]
    assert rates == [0.3, 0.6, 1.2, 0.424264] and scheme.chosen == {"optimizer.learning_rate": 0.6}
    assert "1.2: diverged" in capsys.readouterr().out


def test_schemes_whose_trials_all_diverge_are_said(home: Path, capsys: pytest.CaptureFixture[str]):
    behave(home, **{TOP_K.format(rate, 0): "diverge" for rate in ("0.3", "0.6", "1.2")})
    assert tune("router=top_k,hash", "seed=1", "optimizer.learning_rate=0.6", "--trials=3") == 1
    top_k, other = record(home).schemes
    assert top_k.chosen is None and top_k.finals == () and other.chosen is not None
    assert "router=top_k: no value chosen, all its trials diverged" in capsys.readouterr().out


def test_a_failed_trial_decides_nothing_and_is_made_again(home: Path, capsys: pytest.CaptureFixture[str]):
    """A full disk is no property of a rate."""
    words = ["router=top_k,hash", "seed=1", "optimizer.learning_rate=0.6", "--trials=3"]
    behave(home, **{TOP_K.format("1.2", 0): "fail"})
    assert tune(*words) == 1
    top_k, other = record(home).schemes
    assert top_k.chosen is None and other.chosen == {"optimizer.learning_rate": 1.2}, "the others go on"
    assert top_k.trials[2].state == "failed"
    assert "router=top_k: no value chosen, a trial failed" in capsys.readouterr().out
    behave(home)
    assert tune(*words) == 0
    assert record(home).schemes[0].chosen == {"optimizer.learning_rate": 1.2}
    assert sorted(started(home).values()) == [1] * 7 + [2]


def test_further_fields_of_the_schemes_that_have_them(home: Path):
    words = ["router=top_k,hash", "seed=1", "optimizer.learning_rate=1", "--trials=4"]
    also = ["--also", "router.load_balance_weight=0.01,0.03"]  # 0.01 is top_k's own
    control = ["--scheme", "router=top_k router.load_balance_weight=0"]
    assert tune(*words, *also, *control) == 0
    top_k, other, without = record(home).schemes
    assert [trial.values.get("router.load_balance_weight") for trial in top_k.trials] == [None, None, None, 0.03]
    assert all(len(trial.values) == 1 for trial in [*other.trials, *without.trials]), "a control stays what it is"
    assert {len(scheme.trials) for scheme in record(home).schemes} == {4}
    assert without.words == ("router=top_k", "router.load_balance_weight=0")


def test_the_rate_of_a_group_is_tried_where_the_scheme_has_weights_in_it(home: Path):
    """A fixed table and a frozen router learn nothing by it: refused for a run, no reason to refuse the others."""
    words = ["router=top_k,hash,random", "seed=1", "optimizer.learning_rate=1", "--trials=4"]
    assert tune(*words, "--also", "optimizer.groups.router.lr_scale=0.5,1") == 0
    tried = {
        scheme.words: [trial.values.get("optimizer.groups.router.lr_scale") for trial in scheme.trials]
        for scheme in record(home).schemes
    }
    assert tried == {
        ("router=top_k",): [None, None, None, 0.5],
        ("router=hash",): [None] * 4,
        ("router=random",): [None] * 4,
    }


def test_a_choice_is_never_forgotten_while_another_scheme_is_tuned(home: Path, monkeypatch: pytest.MonkeyPatch):
    """A comparison made meanwhile has the final runs of what was tuned before."""
    words = ["seed=1", "optimizer.learning_rate=0.6", "--trials=3"]
    assert tune("router=top_k", *words) == 0
    before, written = record(home), []
    monkeypatch.setattr(TuneRecord, "write", lambda self, folder: written.append(self))
    assert tune("router=top_k,hash", *words) == 0
    assert len(written) > 2 and written[0].schemes[1].chosen is None
    for each in written:
        assert each.schemes[0] == before.schemes[0] and each.former == ()


def test_values_of_a_further_field_may_be_words(home: Path, capsys: pytest.CaptureFixture[str]):
    also = ["--also", "router.load_balance_level=sequence", "--trials=4", "seed=1", "optimizer.learning_rate=0.6"]
    assert tune("router=top_k", *also) == 0
    assert " 1.2 with sequence: 3.5792" in capsys.readouterr().out


def test_more_trials_for_all_leave_no_stray_runs(home: Path):
    words = ["router=top_k", "seed=1", "optimizer.learning_rate=0.1"]
    behave(home, **{TOP_K.format("0.2", 1): "diverge"})
    assert tune(*words, "--trials=3") == 1, "the scheme has no final run"
    assert tune(*words, "--trials=5") == 0, "at the better rate it has"
    (scheme,) = record(home).schemes
    assert len(scheme.trials) == 5 and scheme.finals == (TOP_K.format("0.8", 1),)
    assert record(home).former == (TOP_K.format("0.2", 1),), "the final run of the earlier choice is no run to compare"


@pytest.mark.parametrize(
    "words,line",
    [
        (["router=top_k", "seed=1", "--trials=2"], "--trials=2 must be from 3 to 30"),
        (["router=top_k", "seed=1", "--trials=many"], "'many' must be a whole number"),
        (["router=top_k", "seed=1", "--factor=1"], "--factor=1 must be from 1.05 to 100"),
        (["router=top_k"], "seed must list the final seeds"),
        (["router=top_k", "seed=0,1"], "seed=0 is the tuning seed"),
        (["router=top_k", "seed=1,1"], "seed=1 is listed twice"),
        (["router=top_k", "seed=one"], "seed=one must be a whole number"),
        (["router=top_k", "seed=1", "optimizer.learning_rate=fast"], "optimizer.learning_rate"),
        (["router=top_k", "seed=1", "optimizer.learning_rate=1,2"], "optimizer.learning_rate: its values are searched"),
        (["router=top_k,top_k", "seed=1"], "router=top_k and router=top_k are the same scheme"),
        (["router=top_k", "seed=1", "--scheme", "router=top_k"], "are the same scheme"),
        (["router=top_k", "seed=1", "--scheme", "router=top_k optimizer.learning_rate=9"], "are the same scheme"),
        (["router=top_k", "seed=1", "--scheme", "router=hash seed=2"], "--scheme: seed=2 must give one value"),
        (["router=top_k,topk", "seed=1"], "router=topk is not a choice; did you mean top_k?"),
        (
            ["router=hash", "seed=1", "--also", "router.weight=1,2"],
            "--also router.weight=1,2: no scheme has such a field",
        ),
        (
            ["router=hash", "seed=1", "--also", "optimizer.groups.router.lr_scale=0.5"],
            "--also optimizer.groups.router.lr_scale=0.5: no scheme has such a field",
        ),
        (["router=top_k", "seed=1", "--also", "router.top_k=3,99", "--trials=5"], "router.top_k=99 must be at most"),
        (["router=top_k", "seed=1", "--also", "router.top_k=1,3,4"], "leaves 2 for the rate of router=top_k"),
        (["router=top_k", "seed=1", "run.name=x"], "run.name: a sweep names its runs itself"),
        (["router=top_k", "seed=1", "--cfg", "job"], "show one configuration"),
        (["router=top_k", "seed=1", "hydra/sweeper=optuna"], "hydra/sweeper=optuna has no effect"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_before_any_job_starts(
    home: Path, capfd: pytest.CaptureFixture[str], words: list[str], line: str
):
    assert tune(*words) == 2
    out, err = capfd.readouterr()
    assert line in err and len(err.strip().splitlines()) == 1, err
    assert out == "" and not (home / "outputs").exists()


def test_a_folder_of_another_kind_is_refused(home: Path, capfd: pytest.CaptureFixture[str]):
    def complaint(*words: str) -> str:
        capfd.readouterr()
        assert tune("seed=1", "optimizer.learning_rate=0.6", *words) == 2
        return capfd.readouterr().err

    assert main(["train", "-m", PROGRAM, "sweep.name=contest", "router=top_k,hash"]) == 0
    assert "is a sweep that was not tuned; give another sweep.name" in complaint("router=top_k")
    folder = home / "outputs" / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert "is the folder of a run" in complaint("router=top_k", "sweep.name=run")
    name = "sweep.name=tuned"
    assert tune("seed=1", "optimizer.learning_rate=0.6", "router=top_k", name, "--trials=3") == 0
    assert "router=top_k had 3; give as many" in complaint("router=hash", name, "--trials=4")
    assert "was tuned with --tuning-seed=0" in complaint("router=hash", name, "--trials=3", "--tuning-seed=7")
    assert "was tuned with --factor=2" in complaint("router=hash", name, "--trials=3", "--factor=4")
    (home / "outputs" / "tuned" / "tune.json").write_text("{}")
    assert "tune.json is broken" in complaint("router=top_k", name, "--trials=3")
