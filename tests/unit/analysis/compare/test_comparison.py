"""The comparison of runs: planted differences are found, planted equality is called that, and nothing is dropped."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.pages import assert_loads_nothing, needs_browser, photograph, read_page
from helpers.planted import AUTONOMY_DIFFERS_BY, BASE, STEPS, TOKENS, TOP_P, Planted, plant_sweep

from moe_pretrain.analysis.compare.charts import band
from moe_pretrain.analysis.compare.comparison import compare
from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.analysis.compare.tables import method
from moe_pretrain.analysis.compare.variants import names_apart
from moe_pretrain.analysis.measures import incidents, training_flops, training_seconds
from moe_pretrain.cli import main
from moe_pretrain.run_folder.record import find_runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = plant_sweep(tmp_path_factory.mktemp("sweeps") / "planted")
    write_comparison(root)
    return root


def test_a_planted_worse_variant_is_found_worse_and_an_equal_one_is_not_distinguishable(sweep: Path):
    found = compare(sweep)
    assert found.reference == "top_k"
    assert {name: each.verdict for name, each in found.paired.items()} == {
        "top_k": "not distinguishable",
        "top_p": "worse",
        "autonomy": "not distinguishable",
    }
    assert [(each.name, each.rank, each.equals) for each in found.ranking.places] == [
        ("top_k", 1, ["autonomy"]),
        ("autonomy", 1, ["top_k", "top_p"]),
        ("top_p", 2, ["autonomy"]),
    ]
    assert found.warnings == []
    assert compare(sweep, "top_p").paired["top_k"].verdict == "better"


def test_the_numbers_are_those_of_the_formulas(sweep: Path):
    """By hand from the planted losses: t at 2 degrees of freedom is 4.30265 (any table)."""
    found = compare(sweep)
    place = {each.name: each for each in found.ranking.places}["top_k"]
    losses = list(BASE.values())
    mean = sum(losses) / 3
    half = 4.302653 * math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2) / math.sqrt(3)
    assert place.estimate.mean == pytest.approx(mean, abs=1e-9)
    assert (place.estimate.low, place.estimate.high) == pytest.approx((mean - half, mean + half), abs=1e-6)
    worse = found.paired["top_p"]
    half = 4.302653 * 0.001 / math.sqrt(3)  # differences 0.049, 0.050, 0.051
    assert worse.difference is not None
    assert (worse.difference.low, worse.difference.high) == pytest.approx((0.05 - half, 0.05 + half), abs=1e-7)
    # With 2 degrees of freedom the two-sided p-value is 1 - t / sqrt(2 + t^2).
    t = 0.05 / (0.001 / math.sqrt(3))
    assert worse.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_flops_are_charged_by_the_measured_experts(tmp_path: Path):
    planted = Planted("a", 3.0)
    folder = planted.write(tmp_path)
    rows = planted.rows()
    for row in rows:
        if row["kind"] == "train" and row["step"] > 60:
            row["train/flops_per_token"] = 7e6
            row["train/step_seconds"] = 0.25
    kept = [row for row in rows if row["kind"] != "train" or row["step"] % 20 == 0]  # logged every 20 steps
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (run,) = find_runs(tmp_path)
    assert training_flops(run.train).tolist() == [6e10, 12e10, 18e10, 18e10 + 14e10, 18e10 + 28e10]
    assert training_seconds(run.train).tolist() == [10, 20, 30, 35, 40]


def test_a_missing_seed_is_said_and_left_out_of_pairs(tmp_path: Path):
    plant_sweep(tmp_path)
    (tmp_path / "top_p-2" / "metrics.jsonl").unlink()
    found = compare(tmp_path)
    assert found.paired["top_p"].seeds == [1, 3]
    assert found.paired["top_p"].difference.mean == pytest.approx(0.05)
    assert found.losses["top_p"].keys() == {1, 3}
    assert any("No finished run of seed 2: top_p;" in line for line in found.warnings)
    assert any("1 of 9 runs unfinished: top_p-2" in line for line in found.warnings)


def test_one_seed_is_not_tested(tmp_path: Path):
    Planted("a", 3.0).write(tmp_path)
    Planted("b", 9.0, router=TOP_P).write(tmp_path)
    found = compare(tmp_path)
    assert found.paired["top_p"].verdict == "not tested"
    assert [each.rank for each in found.ranking.places] == [1, 1]
    assert any("Fewer than two seeds" in line for line in found.warnings)


def break_runs(root: Path) -> dict[str, str]:
    """Add a broken run of every kind; name -> state."""
    new = {"seed": 4, "router": TOP_P}
    Planted("crashed", 3.0, **new, steps=30, end=("failed", "disk <full>")).write(root)
    Planted("going-on", 3.0, **new, steps=30, end=None).write(root)
    Planted("stopped", 3.0, **new, steps=30, end=("stopped", "by SIGTERM")).write(root)
    Planted("nan", 3.0, **new, steps=30, end=("diverged", "step 30: loss=nan")).write(root)
    rising = Planted("rising", 3.0, **new).write(root)
    rows = [json.loads(line) for line in (rising / "metrics.jsonl").read_text().splitlines()]
    rows[-2]["validation/loss"] += 2.0
    (rising / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torn = Planted("torn", 3.0, **new).write(root)
    (torn / "metrics.jsonl").write_text("{]\n")
    (root / "never-started").mkdir()
    (root / "never-started" / "overrides.txt").write_text("router=top_p\n")
    # A run that was finished and then made longer is not finished.
    longer = Planted("longer", 3.0, **new).write(root)
    with (longer / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**Planted("x", 3.0).rows()[0], "step": 101, "tokens": 101 * TOKENS}) + "\n")
    states = {name: "unfinished" for name in ("going-on", "stopped", "longer")}
    states |= {"crashed": "failed", "nan": "diverged", "rising": "diverged"}
    return states | {"torn": "unreadable", "never-started": "unreadable"}


def test_broken_runs_are_marked_and_never_dropped(tmp_path: Path):
    plant_sweep(tmp_path)
    states = break_runs(tmp_path)
    found = compare(tmp_path)
    assert {run.name: run.state for run in found.runs if run.name in states} == states
    assert sum(run.state == "finished" for run in found.runs) == 9
    # Only the run that reached its end is in the mean, diverged or not: leaving it out would flatter the scheme.
    assert found.losses["top_p"].keys() == {1, 2, 3, 4}
    page, text = write_comparison(tmp_path)
    words = read_page(page).text
    words = words[words.index("Runs") :]
    for name, state in states.items():
        assert name in words and words[words.index(name) : words.index(name) + 6].count(state) == 1, name
    assert "disk <full>" in words
    assert "4 of 10 (2 diverged, 1 failed, 3 unfinished, 1 unreadable)" in text
    assert all(name in text for name in states)
    rows = list(csv.DictReader((tmp_path / "compare_runs.csv").open()))
    assert {row["run"]: row["state"] for row in rows if row["run"] in states} == states
    assert [row["run"] for row in rows if row["state"] == "diverged" and row["counted"] == "True"] == ["rising"]


def test_a_repeated_seed_counts_once(tmp_path: Path):
    plant_sweep(tmp_path)
    Planted("top_k-1-again", 9.0, 1).write(tmp_path)
    found = compare(tmp_path)
    assert found.losses["top_k"][1] == pytest.approx(BASE[1])
    assert any("top_k-1-again repeat a seed" in line for line in found.warnings)


def rewrite(folder: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Change the rows of a run."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_only_a_validation_after_the_last_step_is_the_end_of_a_run(tmp_path: Path):
    """A run whose last validation is lost has none, and not that of an earlier step."""
    plant_sweep(tmp_path)
    last = [("validation", STEPS)]
    rewrite(tmp_path / "top_p-2", lambda rows: [row for row in rows if (row["kind"], row["step"]) not in last])
    found = compare(tmp_path)
    assert found.losses["top_p"] == pytest.approx({1: BASE[1] + 0.049, 3: BASE[3] + 0.051})
    assert "top_p: no number to compare at the end of top_p-2." in found.warnings


@pytest.mark.parametrize("written", [None, math.nan, math.inf])
def test_a_seed_that_diverged_is_in_no_mean_and_that_is_said(tmp_path: Path, written: float | None):
    """Whatever stands for a number that is not finite: JSON has none, other programs write NaN."""
    plant_sweep(tmp_path)

    def spoil(rows: list[dict]) -> list[dict]:
        return [row | {"validation/loss": written} if (row["kind"], row["step"]) in late else row for row in rows]

    late = [("validation", STEPS - 20)]
    rewrite(tmp_path / "top_p-1", spoil)  # a validation on the way, which decides nothing
    late = [("validation", STEPS)]
    rewrite(tmp_path / "top_p-2", spoil)
    Planted("top_p-4", 9.0, 4, TOP_P, steps=30, end=("diverged", "loss=nan")).write(tmp_path)
    Planted("hash-1", 9.0, 1, {"name": "hash"}, steps=30, end=("diverged", "loss=nan")).write(tmp_path)
    found = compare(tmp_path)
    assert found.losses["top_p"].keys() == {1, 3}
    assert [line for line in found.warnings if line.startswith("DIVERGED")] == [
        "DIVERGED AND IN NO MEAN: seed 2, 4 of top_p. Its place and its differences are those of the seeds that did "
        "not."
    ]


def test_jobs_that_have_not_started_are_said(tmp_path: Path):
    plant_sweep(tmp_path)
    assert not any("not started" in line for line in compare(tmp_path).warnings)
    for name in ("deep/waiting", "top_p-1"):  # the latter has run
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "job.json").write_text("{}")
    assert "1 jobs have not started, and are not compared: deep/waiting." in compare(tmp_path).warnings


def test_linked_runs_are_compared_and_each_once(tmp_path: Path):
    """Runs of several sweeps in one folder: one that is passed over would be missing in silence."""
    sweep, chosen = plant_sweep(tmp_path / "sweep"), tmp_path / "chosen"
    chosen.mkdir()
    for seed in BASE:
        (chosen / f"own-{seed}").symlink_to(sweep / f"top_k-{seed}")
    (chosen / "more").symlink_to(sweep / "deep")
    (chosen / "again").symlink_to(sweep / "top_k-1")
    (chosen / "inside").symlink_to(chosen / "own-2")
    (sweep / "deep" / "round").symlink_to(tmp_path)
    found = compare(chosen)
    there = [sweep / f"{name}-{seed}" for name in ("deep/autonomy", "top_k") for seed in BASE]
    assert sorted(run.folder.resolve() for run in found.runs) == [place.resolve() for place in there]
    assert found.warnings == []


def give_rows(folder: Path, fingerprint: str) -> None:
    """Say that a run was validated on other rows."""
    path = folder / "probe" / f"step_{STEPS:08d}.npz"
    np.savez(path, **{**np.load(path), "fingerprint": fingerprint})


def test_validation_rows_that_differ_are_said_and_pair_no_texts(tmp_path: Path):
    """Within the variants, where seeds are still pairs, and between them, where the texts make the interval."""
    plant_sweep(tmp_path)
    paired = compare(tmp_path).paired["top_p"]
    for name in ("top_k", "top_p", "deep/autonomy"):
        give_rows(tmp_path / f"{name}-2", "other")
    found = compare(tmp_path)
    (line,) = [line for line in found.warnings if line.startswith("VALIDATION ROWS DIFFER")]
    assert "between seeds of autonomy, top_k, top_p" in line
    assert found.paired["top_p"].difference == paired.difference and paired.verdict == "worse"
    for seed in (1, 3):
        for name in ("top_p", "deep/autonomy"):
            give_rows(tmp_path / f"{name}-{seed}", "other")
    give_rows(tmp_path / "top_k-2", "corpus")
    found = compare(tmp_path)
    (line,) = [line for line in found.warnings if line.startswith("VALIDATION ROWS DIFFER")]
    assert "between variants" in line
    apart = found.paired["top_p"]
    assert apart.verdict == "not distinguishable" and apart.over_texts
    # Of 20 documents evenly from -0.5 to 0.5, and twice.
    error = math.sqrt(2 * np.var(np.linspace(-0.5, 0.5, 20), ddof=1) / 20)
    assert (apart.difference.high - apart.difference.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert "20 documents of the validation rows, paired too where runs have the same rows" in method(found)


def test_a_seed_on_another_topology_is_a_seed_of_its_variant(tmp_path: Path):
    """Unless a seed ran on both: then speeds are compared."""
    for seed, loss in BASE.items():
        processes = {"parallel.processes": 2 if seed == 2 else 1}
        Planted(f"a-{seed}", loss, seed, other={"parallel.processes": 1}).write(tmp_path)
        Planted(f"b-{seed}", loss + 0.1, seed, TOP_P, processes).write(tmp_path)
    found = compare(tmp_path)
    assert found.losses["top_p"] == pytest.approx({seed: loss + 0.1 for seed, loss in BASE.items()})
    assert "Speeds are over several settings and do not compare: top_p (parallel.processes=1 and 2)." in found.warnings
    Planted("c", 3.0, 2, TOP_P, {"parallel.processes": 1}).write(tmp_path)
    names = [variant.name for variant in compare(tmp_path).variants]
    assert names == ["top_k", "top_p processes=1", "top_p processes=2"]


def test_other_tokenizers_are_compared_by_bits_per_byte_and_loudly(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed, bytes_per_token=4.0).write(tmp_path)
        # A higher loss of longer tokens: fewer bits per byte.
        more = {"fingerprint": "other", "bytes_per_token": 5.0}
        Planted(f"b-{seed}", loss + 0.3 + seed / 1000, seed, TOP_P, {"tokenizer.vocab_size": 99}, **more).write(
            tmp_path
        )
    found = compare(tmp_path)
    assert found.unit == "bits per byte"
    assert found.paired["top_p"].verdict == "better"
    assert found.losses["top_p"][1] == pytest.approx(3.301 / math.log(2) / 5)
    assert found.warnings[0].startswith("TOKENIZERS OR CORPORA DIFFER")
    assert "| Validation, bits per byte |" in write_comparison(tmp_path)[1]


def test_tokenizers_that_each_read_a_part_of_the_text_are_judged_over_texts(tmp_path: Path):
    """Another part each, so that what the parts make of it is left to chance; all of the text is the same text."""
    for root, rows in (("part", 30), ("all", 90)):
        read = {"validation_text": {"corpus": {"rows": rows, "held_out_rows": 90}}}
        for seed, loss in BASE.items():
            Planted(f"a-{seed}", loss, seed, facts=read).write(tmp_path / root)
            more = {"fingerprint": "other", "bytes_per_token": 5.0}
            Planted(f"b-{seed}", loss, seed, TOP_P, {"tokenizer.vocab_size": 99}, facts=read, **more).write(
                tmp_path / root
            )
    whole, part = (compare(tmp_path / root).paired["top_p"] for root in ("all", "part"))
    assert whole.difference.mean == part.difference.mean and not whole.over_texts and part.over_texts
    # Each side's mean of 20 documents evenly from -0.5 to 0.5 nats per token, in bits per byte.
    errors = [np.std(np.linspace(-0.5, 0.5, 20), ddof=1) / math.sqrt(20) / math.log(2) / size for size in (4, 5)]
    assert part.difference.high - part.difference.low == pytest.approx(2 * 1.96 * math.hypot(*errors), rel=0.15)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"steps": 80}, "UNEQUAL TOKENS: top_k: 100,000, top_p: 80,000"),
        ({"token_hash": "other"}, "NOT PAIRED: top_k and top_p read different tokens with seed 1, 2, 3"),
        ({"other": {"optimizer.learning_rate": 0.01}}, "Variants also differ in optimizer.learning_rate"),
        ({"other": {"evaluation.max_rows": 5}}, "VALIDATION IS NOT THE SAME: evaluation.max_rows"),
    ],
)
def test_unfair_comparisons_are_said(tmp_path: Path, change: dict, warning: str):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P, **change).write(tmp_path)
    assert any(line.startswith(warning) for line in compare(tmp_path).warnings), compare(tmp_path).warnings


@pytest.mark.parametrize(
    ("facts", "warning"),
    [
        ({"commit": "2"}, "Runs differ in their commit. top_k: 1; top_p: 1 or 2"),
        ({"dtype": "float32"}, "Runs differ in their dtype. top_k: bfloat16; top_p: bfloat16 or float32"),
        (
            {"router_file_hash": "2"},
            "ROUTER FILE CHANGED: seeds of top_p ran with different contents of my.py; they are counted as one scheme.",
        ),
    ],
)
def test_code_that_changed_between_runs_is_said(tmp_path: Path, facts: dict, warning: str):
    for seed, loss in BASE.items():
        same = {"commit": "1", "dtype": "bfloat16", "router_file_hash": "1"}
        own = {"router_file": "my.py"}
        for name, router, others in (("a", None, same), ("b", TOP_P, same | (facts if seed == 3 else {}))):
            planted = Planted(f"{name}-{seed}", loss, seed, facts=others)
            planted.router = router or planted.router
            folder = planted.write(tmp_path)
            config = yaml.safe_load((folder / "config.yaml").read_text()) | own
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert warning in compare(tmp_path).warnings


def test_seeds_whose_tokens_competed_in_other_micro_batches_are_said(tmp_path: Path):
    """As on another number of ranks, with ``batch.micro_batch_size=null``; where none compete it is speed alone."""
    for seed, loss in BASE.items():
        at = {"micro_batch_size": 4 if seed == 2 else 8}
        for name, is_causal in (("top_k", True), ("sinkhorn", False)):
            facts = {**at, "causal_in_training": is_causal}
            Planted(f"{name}-{seed}", loss, seed, {"name": name}, facts=facts).write(tmp_path)
    (line,) = [line for line in compare(tmp_path).warnings if line.startswith("MICRO-BATCHES DIFFER")]
    assert "training of sinkhorn" in line and "4 and 8 rows" in line


def test_a_loss_that_knows_later_tokens_has_no_verdict_and_takes_no_place(tmp_path: Path):
    plant_sweep(tmp_path)
    for seed in BASE:
        Planted(f"leaks-{seed}", 1.0, seed, {"name": "leaks"}, facts={"causal_in_evaluation": False}).write(tmp_path)
    found = compare(tmp_path)
    assert found.paired["leaks"].verdict == "not tested"
    assert {each.name: each.rank for each in found.ranking.places} == {
        "leaks": 1,
        "top_k": 1,
        "autonomy": 1,
        "top_p": 2,
    }
    assert found.warnings[0].startswith("NO LANGUAGE MODEL'S LOSS: in leaks the experts")


def test_what_most_variants_of_a_scheme_have_is_not_in_their_names():
    """Where no value has a majority all are shown. A group of fields is named as in its override."""
    plain = {"router.name": "top_k", "router.load_balance_weight": 0.01, "model.moe.experts.name": "swiglu"}
    others = [{"model.moe.experts.name": "unequal"}, {"router.load_balance_weight": 0.0}]
    top_p = [{"router.name": "top_p", "router.weights": weights} for weights in ("raw", "renormalised")]
    names = names_apart([plain, *(plain | other for other in others), *top_p], ())
    assert names == [
        *("top_k", "top_k experts=unequal", "top_k load_balance_weight=0.0"),
        *("top_p weights=raw", "top_p weights=renormalised"),
    ]


def test_variants_are_named_by_what_differs(tmp_path: Path):
    Planted("a", 3.0, router={"name": "top_k", "top_k": 1}).write(tmp_path)
    Planted("b", 3.0, router={"name": "top_k", "top_k": 2}).write(tmp_path)
    Planted("c", 3.0, router=TOP_P, other={"metrics.log_every_steps": 7}).write(tmp_path)
    Planted("d", 3.0, 2, router=TOP_P, other={"checkpoint.every_steps": 7}).write(tmp_path)
    names = [variant.name for variant in compare(tmp_path).variants]
    assert names == ["top_k top_k=1", "top_k top_k=2", "top_p"]
    assert compare(tmp_path).reference == "top_k top_k=1"
    assert compare(tmp_path, "_k=2").reference == "top_k top_k=2"
    with pytest.raises(ValueError, match="--reference='top' must be a part of one name only, of 'top_k top_k=1', "):
        compare(tmp_path, "top")
    with pytest.raises(ValueError, match="--reference='x' must be one of the variants, or a part of one name: 'top_k "):
        compare(tmp_path, "x")


def test_a_band_is_the_mean_and_interval_at_common_steps():
    found = band([{1: (10.0, 1.0), 2: (20.0, 3.0)}, {2: (22.0, 4.0), 3: (30.0, 9.0)}, {2: (24.0, 8.0)}])
    assert found is not None and (found.x.tolist(), found.mean.tolist()) == ([22.0], [5.0])
    half = 4.302653 * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)
    assert (found.low[0], found.high[0]) == pytest.approx((5 - half, 5 + half), abs=1e-5)
    assert band([{1: (0.0, 0.0)}, {2: (0.0, 0.0)}]) is None and band([]) is None


def found_incidents(root: Path) -> list:
    (run,) = find_runs(root)
    return incidents(run.events)


def test_incidents_are_the_events_that_were_planted(tmp_path: Path):
    """The run judges, not the page: a leap of the loss and a load on one expert are none without an event."""
    planted = Planted("a", 3.0, steps=200)
    folder = planted.write(tmp_path)
    assert found_incidents(tmp_path) == []
    rows = planted.rows()
    for row in rows:
        if row["kind"] == "train" and row["step"] == 120:
            row["train/loss"] += 1.5
            row["moe/layer_01/expert_share"] = [1, 0, 0, 0, 0, 0, 0, 0]
    planned = [
        *(("collapsed_router", 60), ("dead_experts", 61), ("loss_spike", 130), ("rewound", 140), ("resumed", 145)),
        *(("non_finite", 150), ("step_skipped", 151), ("diverged", 160)),
    ]
    for name, step in planned:
        base = {"step": step, "tokens": step * TOKENS, "seconds": 0, "attempt": 0}
        rows.append({"kind": "event", **base, "event": name, "message": f"of {name}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(each.kind, each.row["step"], each.row["message"]) for each in found_incidents(tmp_path)] == [
        ("collapse", 60, "of collapsed_router"),
        ("spike", 130, "of loss_spike"),
        ("spike", 140, "of rewound"),
        ("non-finite", 150, "of non_finite"),
        ("non-finite", 151, "of step_skipped"),
        ("non-finite", 160, "of diverged"),
    ]


def test_the_page_names_the_runs_that_did_not_judge(tmp_path: Path):
    for seed, lacking in enumerate(((), ("metrics",), ("metrics", "spike"))):
        path = Planted(f"run-{seed}", 3.0, seed).write(tmp_path) / "config.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in lacking}))
    text = " ".join(read_page(write_comparison(tmp_path)[0]).text)
    assert "Did not judge collapsed routers, having no settings for that: run-1." in text
    assert "Did not judge loss spikes and collapsed routers, having no settings for that: run-2." in text
    assert "settings for that: run-0" not in text


def test_the_tables_hold_the_raw_numbers(sweep: Path):
    rows = {row["variant"]: row for row in csv.DictReader((sweep / "compare.csv").open())}
    assert rows.keys() == {"top_k", "top_p", "autonomy"}
    row = rows["top_p"]
    assert float(row["loss_mean"]) == pytest.approx(sum(BASE.values()) / 3 + 0.05)
    assert (row["rank"], row["last_rank"], row["verdict"], row["counted"]) == ("2", "3", "worse", "3")
    # Layers have 3 and 4 experts per token, loads of 1.2 and 2.2; a dead expert until step 85 of the last 20 rows.
    assert float(row["experts_per_token"]) == pytest.approx(3.5)
    assert float(row["load_max_over_mean"]) == pytest.approx(1.2 + 0.5)
    assert float(row["dead_experts"]) == pytest.approx(5 / 20)
    assert float(row["flops_per_token"]) == pytest.approx(4e6)
    assert (row["total_parameters"], row["active_parameters"]) == ("900.0", "500.0")
    assert float(row["training_flops"]) == pytest.approx(4e6 * STEPS * TOKENS)
    assert float(row["tokens_per_second"]) == 2050.5
    runs = {row["run"]: row for row in csv.DictReader((sweep / "compare_runs.csv").open())}
    assert len(runs) == 9
    assert float(runs["deep/autonomy-2"]["validation_loss"]) == pytest.approx(BASE[2] + AUTONOMY_DIFFERS_BY[2])
    table = (sweep / "compare.md").read_text()
    assert "| 2 to 3 | top_p | worse | 3.0667 [" in table and "| 3 of 3 | 3.5 | - | 4e+06 |" in table


def test_page_has_every_chart_and_loads_nothing(sweep: Path):
    reader = read_page(sweep / "compare.html")
    assert [chart["aria-label"] for chart in reader.charts] == [
        "Paired differences",
        "Validation against tokens",
        "Validation against flops",
        "Validation against seconds",
        "Experts per token by layer, end of the run",
        "Experts per token",
        "Busiest expert over the mean (1 = even)",
        "Entropy of a token's routing (nats)",
        "Experts without a token",
        "Balance against quality, one point per run",
        "Routing drift between validations",
    ]
    assert_loads_nothing(sweep / "compare.html")
    first = (sweep / "compare.html").read_bytes()
    assert write_comparison(sweep)[0].read_bytes() == first


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_draws_in_a_browser(tmp_path: Path, width: int):
    plant_sweep(tmp_path / "runs")
    break_runs(tmp_path / "runs")
    pixels = photograph(write_comparison(tmp_path / "runs")[0], tmp_path, width, height=4000)
    orange = (pixels[..., 0] > 0.75) & (pixels[..., 1] < 0.6) & (pixels[..., 2] < 0.4)
    assert orange.sum() > 100, "the worse variant's interval was not drawn"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "FOLDER=nowhere must be a folder with runs below it"),
        (["."], "must have runs below it"),
        ([], "required: FOLDER; see moe-pretrain compare --help"),
        ([".", "--reference"], "--reference: expected one argument"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch, capsys, words: list[str], complaint: str):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_the_command_prints_the_table(tmp_path: Path, capsys):
    plant_sweep(tmp_path)
    assert main(["compare", str(tmp_path), "--reference", "autonomy"]) == 0
    out = capsys.readouterr().out
    assert "Difference: to autonomy" in out and out.endswith(f"{tmp_path / 'compare.html'}\n")
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "compare.html",
        "compare.md",
        "compare.png",
        "compare.csv",
        "compare_runs.csv",
    }


def test_other_starting_weights_are_another_variant(tmp_path: Path):
    for name, seed, start in (("a", 1, "x"), ("b", 2, "x"), ("c", 1, "y"), ("d", 1, None)):
        Planted(name, 3.0, seed, router=TOP_P, other={"checkpoint.warm_start": start}).write(tmp_path)
    found = compare(tmp_path).variants
    assert [[run.name for run in variant.runs] for variant in found] == [["a", "b"], ["c"], ["d"]]


HOSTILE = "a|b`<script>alert(1)</script>\n[x](http://y) $\\frac{ &"


def test_names_are_shown_and_nothing_more(tmp_path: Path):
    for seed in (1, 2):
        Planted(f"good{seed}", 3.0, seed, router=TOP_P).write(tmp_path)
        Planted(f"bad{seed}{HOSTILE.replace('/', '')}", 3.1, seed, router={"name": HOSTILE, "top_k": 1}).write(tmp_path)
    page, text = write_comparison(tmp_path)
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 4, "a header, its rule, two variants"
    (line,) = [line for line in lines if "alert" in line and line.startswith("|")]
    assert "a\\|b\\`&lt;script&gt;alert(1)&lt;/script&gt; [x]\\(http://y) $\\\\frac{ &amp;" in line
    assert line.replace("\\|", "").count("|") == lines[0].count("|")
    assert "<script" not in text and "<script" not in page.read_text()
