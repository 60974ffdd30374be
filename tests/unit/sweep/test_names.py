"""Names of sweeps and their runs."""

import pytest

from moe_pretrain.sweep.planned_jobs import MAX_BYTES, job_name, sweep_name

LONG = [f"model.moe.expert_hidden_size={number}" for number in range(20)]


@pytest.mark.parametrize(
    "swept,name",
    [
        (["router=top_k", "seed=1"], "router=top_k,seed=1"),
        (["optimizer.learning_rate=0.001"], "optimizer.learning_rate=0.001"),
        (["+data.weights.web=0.5"], "data.weights.web=0.5"),
    ],
)
def test_plain_overrides_are_the_name(swept: list[str], name: str):
    assert job_name(swept) == name


@pytest.mark.parametrize(
    "swept,other",
    [
        (["data.paths=[a/b.txt]"], ["data.paths=[a-b.txt]"]),
        (["router_file=a/mine.py"], ["router_file=b/mine.py"]),
        (["run.note='two words'"], ["run.note='two  words'"]),
        (["data.name='ü'"], ["data.name='ä'"]),
        (LONG, [*LONG[:-1], "model.moe.expert_hidden_size=99"]),
    ],
)
def test_names_fit_a_folder_and_stay_apart(swept: list[str], other: list[str]):
    names = {job_name(swept), job_name(other)}
    assert len(names) == 2
    for name in names:
        assert len(name.encode()) <= MAX_BYTES and "/" not in name and " " not in name
    assert job_name(swept) == job_name(list(swept)), "the same overrides find their folder again"


def test_default_name_is_that_of_the_recipe():
    words = ["router=top_k,top_p", "seed=1,2", "optimizer.learning_rate=0.001"]
    name = sweep_name(["router", "seed"], words)
    assert name.startswith("sweep-router-seed-")
    how = [
        "sweep.parallel=2",
        "metrics.wandb=off",
        "hydra/launcher=submitit_slurm",
        "fault.point=null",
        "run.output_dir=x",
    ]
    assert sweep_name(["router", "seed"], [*how, *reversed(words)]) == name
    assert sweep_name(["router", "seed"], [*words[:-1], "optimizer.learning_rate=0.002"]) != name
