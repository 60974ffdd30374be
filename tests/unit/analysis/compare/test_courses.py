"""What happened to runs on their way to a number is said, and never more than happened."""

import json
from pathlib import Path

import pytest
from helpers.planted import BASE, STEPS, TOP_P, Planted, plant_sweep

from moe_pretrain.analysis.compare.comparison import compare
from moe_pretrain.analysis.compare.courses import changed_fields
from moe_pretrain.schedule.learning_rate import CosineScheduleConfig, describe_last_rate
from moe_pretrain.train.resume_rules import changes


def told(root: Path, beginning: str) -> list[str]:
    return [line for line in compare(root).warnings if line.startswith(beginning)]


def insert_event(folder: Path, step: int, name: str, message: str) -> None:
    """Put an event row behind the train row of a step."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    at = next(place for place, row in enumerate(rows) if row["kind"] == "train" and row["step"] == step)
    rows.insert(at + 1, {**rows[at], "kind": "event", "event": name, "message": message})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_fields_are_read_from_the_words_that_a_resume_writes():
    then = {"optimizer": {"learning_rate": 0.01}, "data": {"paths": ["a, b=1 (x)"]}, "parallel": {"processes": 1}}
    now = {"optimizer": {"learning_rate": 0.02}, "data": {"paths": ["c, d=2"]}, "parallel": {"processes": 2}}
    now["model"] = {"qk_norm": "none", "new": 3}  # one of another release
    found = changes(then, now, is_branch=False)
    words = [*found.allowed, *(word.replace(" must stay ", " (was ") + ")" for word in found.refused)]
    assert sorted(changed_fields(f"since step_00000050: {', '.join(words)}")) == [
        "data.paths",
        "optimizer.learning_rate",
        "parallel.processes",
    ]


def test_settings_that_changed_midway_are_said(tmp_path: Path):
    plant_sweep(tmp_path)
    assert not told(tmp_path, "CHANGED") and not told(tmp_path, "Speeds")
    message = "since step_00000050: budget.tokens=100000 (was 50000), parallel.processes=2 (was 1)"
    insert_event(tmp_path / "top_p-2", 50, "changed", message)
    insert_event(tmp_path / "top_p-3", 50, "changed", "since step_00000050: checkpoint.every_steps=2 (was 1)")
    assert told(tmp_path, "CHANGED") == [
        "CHANGED MIDWAY: top_p-2 (budget.tokens at step 50). They are counted as if they had their last settings from "
        "the start."
    ]
    assert told(tmp_path, "Speeds") == [
        "Speeds are over several settings and do not compare: top_p-2 (parallel.processes changed on the way)."
    ]


def test_a_learning_rate_that_had_not_come_down_is_said(tmp_path: Path):
    plant_sweep(tmp_path)
    assert not told(tmp_path, "THE LEARNING RATE")
    cut = describe_last_rate(CosineScheduleConfig("cosine", warmup_steps=2, floor=0.1), STEPS, 2 * STEPS)
    Planted("cut", 3.0, 4, TOP_P, end=("finished", f"after {STEPS} steps; {cut}")).write(tmp_path)
    (line,) = told(tmp_path, "THE LEARNING RATE")
    assert "at the end of 1 of 10 runs (cut)" in line


def test_steps_that_changed_nothing_are_counted(tmp_path: Path):
    plant_sweep(tmp_path)
    for step in (7, 9):
        insert_event(tmp_path / "top_p-2", step, "step_skipped", "loss=nan")
    assert told(tmp_path, "SKIPPED") == [
        f"SKIPPED STEPS, which changed nothing and count as read: top_p-2: 2 of {STEPS}."
    ]


@pytest.mark.parametrize(
    ("field", "beginning"),
    [
        ("checkpoint.warm_start", "BEGAN WITH TRAINED WEIGHTS: top_p "),
        ("checkpoint.branch_from", "BRANCHED OFF: top_p "),
    ],
)
def test_trained_beginnings_are_said_where_not_all_have_them(tmp_path: Path, field: str, beginning: str):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed, other={field: None}).write(tmp_path / "some")
        Planted(f"b-{seed}", loss, seed, TOP_P, {field: "x@50"}).write(tmp_path / "some")
        Planted(f"a-{seed}", loss, seed, other={field: "x@50"}).write(tmp_path / "all")
        Planted(f"b-{seed}", loss, seed, TOP_P, {field: "x@50"}).write(tmp_path / "all")
    (line,) = told(tmp_path / "some", beginning)
    assert f"({field}=x@50). " in line
    assert not told(tmp_path / "all", beginning[:5]) and not told(tmp_path / "some", "NOT PUT")


def test_seeds_that_only_their_beginnings_keep_apart_are_said(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P, {"checkpoint.branch_from": f"trunk-{seed}@50"}).write(tmp_path)
    (line,) = told(tmp_path, "NOT PUT TOGETHER")
    names = [f"top_p branch_from=trunk-{seed}@50" for seed in BASE]
    assert f"{', '.join(names)} differ in checkpoint.branch_from alone and share no seed" in line
    Planted("again", 3.0, 1, TOP_P, {"checkpoint.branch_from": "trunk-2@50"}).write(tmp_path)
    assert not told(tmp_path, "NOT PUT TOGETHER"), "two beginnings with one seed are what is compared"


@pytest.mark.parametrize(
    ("field", "place"), [("checkpoint.branch_from", "{}@50"), ("checkpoint.warm_start", "{}/checkpoints/step_00000050")]
)
def test_seeds_that_began_with_seeds_of_one_run_are_of_one_variant(tmp_path: Path, field: str, place: str):
    """Whose trunks are of another rate, or left at another step, is another variant."""
    trunks = tmp_path / "trunks"
    for seed, loss in BASE.items():
        for name, rate in (("slow", 0.001), ("fast", 0.002)):
            at = {"optimizer.learning_rate": rate, "parallel.processes": seed}
            Planted(f"{name}-{seed}", loss, seed, other=at).write(trunks)
            beginning = {field: place.format(trunks / f"{name}-{seed}")}
            Planted(f"of-{name}-{seed}", loss, seed, TOP_P, beginning).write(tmp_path / "branches")
    at = {field: place.format(trunks / "slow-1").replace("50", "60")}
    Planted("later", 3.0, 4, TOP_P, at).write(tmp_path / "branches")
    found = compare(tmp_path / "branches")
    assert sorted([run.name for run in variant.runs] for variant in found.variants) == [
        ["later"],
        ["of-fast-1", "of-fast-2", "of-fast-3"],
        ["of-slow-1", "of-slow-2", "of-slow-3"],
    ]
    for folder in trunks.iterdir():
        (folder / "config.yaml").unlink()
    assert len(compare(tmp_path / "branches").variants) == 7, "what they began with cannot be read"
