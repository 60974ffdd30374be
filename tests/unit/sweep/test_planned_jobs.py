"""From a command to jobs: what is refused, what is recognised, what is written down."""

import json
from pathlib import Path

import pytest
from helpers.checkpoints import write_checkpoint
from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.sweep.job_record import JobState, read_jobs
from moe_pretrain.sweep.multirun import parse
from moe_pretrain.sweep.planned_jobs import Sweep, sweep_name


def sweep(folder: Path, *fixed: str) -> Sweep:
    return Sweep(folder, fixed, "cache", load().sweep)


def command(*words: str):
    return parse(words, OverridesParser.create())


def test_overrides_are_sorted():
    words = ["router=top_p,top_k", "model=tiny", "hydra/sweeper=optuna", "evaluation.sets.a.paths=[a,b]", "+x.y=1,2"]
    words += ["optimizer.learning_rate=tag(log,interval(1e-4,1e-2))", "run.note='a,b'", "seed=range(3,6)"]
    found = command(*words)
    assert found.hydra == ["hydra/sweeper=optuna"]
    assert found.fixed == ["model=tiny", "evaluation.sets.a.paths=[a,b]", "run.note='a,b'"]
    assert found.keys == ["router", "+x.y", "optimizer.learning_rate", "seed"]
    assert found.example == ["router=top_p", "+x.y=1", "optimizer.learning_rate=0.0001", "seed=3"]


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["seed=1"], "no override lists several values"),
        (["evaluation.sets.code.paths=[a,b]"], "no override lists several values"),
        (["run.output_dir=a,b"], "run.output_dir: what says where"),
        (["sweep.parallel=1,2"], "sweep.parallel: what says where"),
        (["seed=1,2", "run.name=x"], "run.name: a sweep names its runs itself"),
    ],
)
def test_what_a_sweep_cannot_be(words: list[str], fragment: str):
    with pytest.raises(ConfigError, match=fragment):
        command(*words)


def test_jobs_are_written_down_and_found_again(tmp_path: Path):
    jobs = sweep(tmp_path / "s", "model=small").plan([["router=top_k", "seed=1"], ["router=top_p", "seed=1"]])
    assert [job.name for job in jobs] == ["router=top_k,seed=1", "router=top_p,seed=1"]
    for job, router in zip(jobs, ("top_k", "top_p"), strict=True):
        config = load(job.words)
        assert (config.model.name, config.router.name, config.seed) == ("small", router, 1)
        assert config.run.folder == job.folder and config.run.cache_dir == "cache" and config.sweep.name == "s"
        assert config.num_steps == job.num_steps
    again = read_jobs(tmp_path / "s")
    assert [(job.name, job.number, job.words) for job in again] == [(job.name, job.number, job.words) for job in jobs]


def test_every_job_is_checked_before_any_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^job router.top_k=9,seed=1: router.top_k=9 must be at most"):
        sweep(tmp_path / "s").plan([["router.top_k=2", "seed=1"], ["router.top_k=9", "seed=1"]])
    with pytest.raises(ValueError, match=r"^job parallel.expert_parallel_size=3: .*must divide"):
        sweep(tmp_path / "s", "parallel.processes=2").plan([["parallel.expert_parallel_size=3"]])
    assert not (tmp_path / "s").exists()


def test_more_values_keep_the_jobs_there_are(tmp_path: Path):
    """Also when an override that had one value, and so no part in the name, now has two."""
    (first,) = sweep(tmp_path, "seed=1").plan([["router=top_k"]])
    JobState("finished").write(first.folder)
    jobs = sweep(tmp_path).plan([["router=top_k", "seed=1"], ["router=top_k", "seed=2"]])
    assert [job.name for job in jobs] == ["router=top_k", "router=top_k,seed=2"]
    assert [job.number for job in jobs] == [0, 1]
    assert load(jobs[0].words).run.folder == first.folder


def test_a_started_job_keeps_its_settings(tmp_path: Path):
    (job,) = sweep(tmp_path).plan([["seed=1"]])
    changed = sweep(tmp_path, "optimizer.learning_rate=0.5", "metrics.wandb=off", "checkpoint.keep_last=1")
    (replanned,) = changed.plan([["seed=1"]])
    assert load(replanned.words).optimizer.learning_rate == 0.5, "nothing was started with the old ones"
    JobState("stopped").write(job.folder)
    with pytest.raises(ValueError, match=r"its job seed=1 was started with .*learning_rate=0.1 \(was 0.5\);") as caught:
        sweep(tmp_path, "optimizer.learning_rate=0.1", "metrics.wandb=auto").plan([["seed=1"]])
    assert "wandb" not in str(caught.value) and "keep_last" not in str(caught.value)
    changed.plan([["seed=1"], ["seed=2"]])


def test_the_same_combination_twice_is_one_job(tmp_path: Path):
    jobs = sweep(tmp_path).plan([["seed=1"], ["seed=1"], ["seed=01"]])
    assert len({job.folder for job in jobs}) == 1 and len(read_jobs(tmp_path)) == 1


def test_a_broken_record_is_named(tmp_path: Path):
    (job,) = sweep(tmp_path).plan([["seed=1"]])
    (job.folder / "job.json").write_text(json.dumps({"number": 0})[:-3])
    with pytest.raises(ValueError, match=r"job.json is broken"):
        read_jobs(tmp_path)


def test_other_starting_weights_are_another_job(tmp_path: Path):
    """By name, by configuration and by the default name of the sweep."""
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name / "checkpoints", 1)
    starts = [f"checkpoint.warm_start={tmp_path / name}" for name in ("a", "b")]
    jobs = sweep(tmp_path / "one").plan([[start] for start in starts])
    assert len({job.folder for job in jobs}) == 2
    assert [job.values["checkpoint"]["warm_start"] for job in jobs] == [str(tmp_path / name) for name in ("a", "b")]
    (job,) = sweep(tmp_path / "two", starts[0]).plan([["seed=1"]])
    JobState("finished").write(job.folder)
    with pytest.raises(ValueError, match=r"was started with other settings: checkpoint.warm_start=.*b \(was .*a\)"):
        sweep(tmp_path / "two", starts[1]).plan([["seed=1"]])
    assert len({sweep_name(["seed"], ["seed=1,2", start]) for start in starts}) == 2
