"""The command as a whole, with a stand-in for training."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moe_pretrain.cli import main
from moe_pretrain.sweep import launcher

FAKE = Path(__file__).parents[2] / "helpers" / "fake_train.py"
PROGRAM = f"+hydra.launcher.program=['{sys.executable}','-S','{FAKE}']"

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="hydra-optuna-sweeper is not installed: the extra sweep"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(launcher, "_POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def multirun(*words: str) -> int:
    return main(["train", "-m", PROGRAM, *words])


def test_default_names_and_placement(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["router=top_k,hash", "seed=1,2", "run.output_dir='other place'"]
    assert multirun(*words) == 0
    (sweep,) = (home / "other place").iterdir()
    assert sweep.name.startswith("sweep-router-seed-")
    assert {path.parent.name for path in sweep.glob("*/metrics.jsonl")} == {
        f"router={router},seed={seed}" for router in ("top_k", "hash") for seed in (1, 2)
    }
    assert multirun(*words, "sweep.parallel=2") == 0
    assert [path.name for path in (home / "other place").iterdir()] == [sweep.name], "the same command, the same folder"
    assert "4 jobs: 4 finished" in capsys.readouterr().out


def test_fields_that_only_a_swept_choice_has():
    """``threshold`` is a field of top_p alone, ``paths`` of files."""
    assert multirun("data=choice(files)", "data.paths=[a b.txt]", "router=top_p", "router.threshold=0.3,0.4") == 0


MINE = """
from dataclasses import dataclass
from typing import Literal
from moe_pretrain.moe import Router

@dataclass(frozen=True)
class Mine:
    width: int = 1
    name: Literal['mine'] = 'mine'
    mean_experts_per_token = 1.0

    def check_num_experts(self, num_experts): ...

    def build(self, hidden_size, num_experts, layer):
        return Router(layer)
"""


def test_a_scheme_of_ones_own(home: Path):
    (home / "mine.py").write_text(MINE)
    assert multirun("router_file=mine.py", "router.width=1,2", "sweep.name=own") == 0
    assert len(list((home / "outputs" / "own").glob("*/metrics.jsonl"))) == 2


@pytest.mark.parametrize(
    "words,line",
    [
        (["seed=1,2", "router.top_k=2,9"], "job seed=1,router.top_k=9: router.top_k=9 must be at most"),
        (["seed=1,2", "modle=tiny"], "modle"),
        (["seed=1"], "--multirun: no override lists several values"),
        (["router=top_k,hash", "seed=1,2,1"], "--multirun: router=top_k seed=1 is listed twice: name each value once"),
        (["seed=1,2", "hydra/launcher=none"], "hydra/launcher/none"),
        (["seed=interval(1,2)"], "does not support sweep type"),
        (["seed=1,2", "run.name=x"], "run.name: a sweep names its runs itself"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_one_line_before_any_job_starts(
    home: Path, capfd: pytest.CaptureFixture[str], words: list[str], line: str
):
    assert multirun(*words) == 2
    out, err = capfd.readouterr()
    assert line in err and len(err.strip().splitlines()) == 1, err
    assert out == "" and not (home / "outputs").exists()


def test_ranks_of_a_launcher_start_no_sweep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert multirun("seed=1,2") == 2 and "start it without torchrun" in capfd.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert multirun("seed=1,2", "hydra/launcher=submitit_slurm") == 2
    assert "hydra/launcher=submitit_slurm needs hydra-submitit-launcher: pip install 'moe_pretrain[sweep]'" in (
        capfd.readouterr().err
    )


@needs_optuna
def test_a_search_goes_on_with_its_finished_trials(home: Path, capsys: pytest.CaptureFixture[str]):
    """The same trials are proposed again, and found; more of them follow from their losses."""
    words = ["hydra/sweeper=optuna", "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))", "sweep.name=search"]
    words += ["hydra.sweeper.sampler.n_startup_trials=2", "run.prepare_workers=null", "data.validation_fraction=0.1"]
    folder = home / "outputs" / "search"
    assert multirun(*words, "hydra.sweeper.n_trials=4") == 0
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    assert len(before) == 4
    assert multirun(*words, "hydra.sweeper.n_trials=6") == 0
    paths = set(folder.glob("*/metrics.jsonl"))
    assert len(paths) == 6 and all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert "6 jobs: 6 finished" in capsys.readouterr().out
    losses = {
        path.parent.name.partition("=")[2]: json.loads((path.parent / "job_state.json").read_text()) for path in paths
    }
    best = min(losses, key=lambda rate: losses[rate]["validation_loss"])
    assert all(1e-4 <= float(rate) <= 1e-2 for rate in losses)
    result = (folder / "optimization_results.yaml").read_text()
    assert f"optimizer.learning_rate: {best}" in result and str(losses[best]["validation_loss"]) in result


@needs_optuna
def test_bad_trials_do_not_end_a_search(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["hydra/sweeper=optuna", "seed=range(1,5)", "hydra/sweeper/sampler=grid", "sweep.name=search"]
    folder = home / "outputs" / "search"
    folder.mkdir(parents=True)
    (folder / "behaviour.json").write_text(json.dumps({"seed=1": "diverge", "seed=2": "fail"}))
    assert multirun(*words, "hydra.sweeper.n_trials=9") == 1
    assert "4 jobs: 2 finished, 1 failed, 1 diverged" in capsys.readouterr().out
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in folder.glob("*/job_state.json")}
    assert states == {"seed=1": "diverged", "seed=2": "failed", "seed=3": "finished", "seed=4": "finished"}
    assert "best_value: 3.5" in (folder / "optimization_results.yaml").read_text()


@needs_optuna
def test_a_wrong_trial_ends_a_search_after_saying_what_there_is(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "router.top_k=2,9", "sweep.name=search"]
    assert multirun(*words, "hydra.sweeper.n_trials=2") == 2
    out, err = capsys.readouterr()
    assert "job router.top_k=9: router.top_k=9 must be at most" in err
    assert out.count("outputs/search: ") == 2 and "router.top_k=9" not in out
