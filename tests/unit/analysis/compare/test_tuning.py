"""Tuned variants: what is compared, how sure the choice of a rate is, and what that does to differences."""

import csv
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import yaml
from helpers.planted import AUTONOMY, TOP_P, Planted
from scipy.stats import norm

from moe_pretrain.analysis.compare.comparison import compare
from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.analysis.compare.statistics import Sample, difference, student_t_quantile
from moe_pretrain.analysis.compare.tables import answer
from moe_pretrain.analysis.compare.tuning import choice, seed_noise
from moe_pretrain.analysis.compare.variants import one_of_each_variant
from moe_pretrain.run_folder.tune_record import TunedScheme, TuneRecord, TuningTrial, read_tune_record
from moe_pretrain.sweep.rate_search import Search, Setting

RATE = "optimizer.learning_rate"
TOP_K = {"name": "top_k", "top_k": 2}
RANDOM = {"name": "random", "top_k": 2}
CURVE = {0.001: 3.4, 0.002: 3.0, 0.004: 3.01, 0.008: math.inf}
"""Rate -> loss of a trial; its best has one near neighbour."""


def plant(
    root: Path,
    router: Mapping,
    finals: Mapping[int, float],
    curve: Mapping[float, float] = CURVE,
    name: str = "",
    other: Mapping | None = None,
    by_document: tuple[float, ...] | None = None,
) -> TunedScheme:
    """The trials and final runs of one scheme, and its part of the folder's record."""
    name, chosen = name or router["name"], min(curve, key=lambda rate: (curve[rate], rate))
    folder = root / "tuned"

    def run(rate: float, seed: int, loss: float) -> str:
        job = f"{name}-{rate}-{seed}"
        lost = {"end": ("diverged", "loss=nan")} if math.isinf(loss) else {}
        at = {RATE: rate, **(other or {})}
        planted = Planted(job, 9.0 if lost else loss, seed, dict(router), at, by_document=by_document, **lost)
        planted.write(folder)
        return job

    trials = tuple(
        TuningTrial(run(rate, 0, loss), {RATE: rate}, None if lost else loss, "diverged" if lost else "finished")
        for rate, loss in curve.items()
        if (lost := math.isinf(loss)) in (True, False)
    )
    ends = tuple(run(chosen, seed, loss) for seed, loss in finals.items())
    at_edge = chosen in (min(curve), max(curve))
    scheme = TunedScheme(f"router={name}", (f"router={name}",), trials, {RATE: chosen}, at_edge, ends)
    record = read_tune_record(folder) or TuneRecord("rule", RATE, 2.0, len(curve), 0)
    record.with_schemes([scheme]).write(folder)
    return scheme


BASE = {1: 3.00, 2: 3.10, 3: 2.95}
APART = {1: 0.049, 2: 0.070, 3: 0.031}
WORSE = {seed: loss + APART[seed] for seed, loss in BASE.items()}


def test_a_trial_of_the_chosen_rate_is_no_seed_of_its_variant(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE, {0.001: 9.0, 0.002: 1.0, 0.004: 8.0})
    plant(tmp_path, TOP_P, WORSE)
    found = compare(tmp_path)
    assert found.losses == {"top_k": pytest.approx(BASE), "top_p": pytest.approx(WORSE)}
    assert len(found.runs) == 6 and set(found.tuned) == {"top_k", "top_p"}
    assert not any("learning_rate" in line for line in found.warnings), "both are at the rate chosen for them"
    assert [folder.name for folder in one_of_each_variant(tmp_path)] == ["top_k-0.002-1", "top_p-0.002-1"]


def test_linked_trials_are_trials(tmp_path: Path):
    plant(tmp_path / "sweeps", TOP_K, BASE)
    plant(tmp_path / "sweeps", TOP_P, WORSE)
    (tmp_path / "links").mkdir()
    for job in (tmp_path / "sweeps" / "tuned").iterdir():
        if job.is_dir():
            (tmp_path / "links" / f"my-{job.name}").symlink_to(job)
    there, linked = compare(tmp_path / "sweeps"), compare(tmp_path / "links")
    assert len(linked.runs) == 6 and linked.losses == there.losses
    assert linked.paired == there.paired and set(linked.tuned) == {"top_k", "top_p"}


def test_a_run_of_the_tuning_seed_among_the_seeds_is_said(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    assert not any("TUNING SEED" in line for line in compare(tmp_path).warnings)
    shutil.copytree(tmp_path / "tuned" / "top_k-0.002-0", tmp_path / "picked")
    (line,) = [line for line in compare(tmp_path).warnings if "TUNING SEED" in line]
    assert line.startswith("THE TUNING SEED IS AMONG THE SEEDS of top_k: ") and "luck of seed 0" in line


def test_only_trials_are_nothing_to_compare(tmp_path: Path):
    plant(tmp_path, TOP_K, {})
    with pytest.raises(ValueError, match="has only trials of a tuning so far"):
        compare(tmp_path)


@pytest.mark.parametrize("gap,noise", [(0.05, 0.001), (0.01, 0.01), (0.2, 0.0001), (0.0, 0.01)])
def test_the_choice_between_two_trials_is_the_normal_distributions(gap: float, noise: float):
    found = choice([3.0, 3.0 + gap, math.inf], noise)
    wrong = norm.cdf(-gap / math.sqrt(2 * noise))
    assert found.shares == pytest.approx([1 - wrong, wrong, 0], abs=0.02)
    assert found.cost == pytest.approx(gap * found.shares[1])
    assert found.mean_square == pytest.approx(gap**2 * found.shares[1])


def test_without_noise_the_choice_is_sure():
    found = choice([3.1, 3.0, math.inf], 0.0)
    assert found.shares.tolist() == [0, 1, 0] and found.cost == found.mean_square == 0


def test_the_noise_is_half_of_the_variance_of_differences():
    """What a seed does to all alike moves no choice."""
    apart = [0.01, -0.02, 0.03]
    samples = {
        "a": Sample({seed: 100.0 * seed for seed in range(3)}),
        "b": Sample({seed: 100.0 * seed + apart[seed] for seed in range(3)}),
    }
    assert seed_noise(samples) == pytest.approx(dict.fromkeys("ab", stdev(apart) ** 2 / 2))
    alone = {"a": Sample({1: 3.0, 2: 3.2}), "b": Sample({3: 3.0})}
    assert seed_noise(alone) == pytest.approx({"a": 0.02}), "without pairs, what a variant's own seeds tell"


def test_a_difference_holds_what_both_choices_may_cost(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE)
    found = compare(tmp_path)
    of = found.paired["top_p"].difference
    noise = stdev(APART.values()) ** 2 / 2
    assert of is not None and noise > 0
    cost = 0.01**2 * norm.cdf(-0.01 / math.sqrt(2 * noise))  # of the one near neighbour
    half = student_t_quantile(0.95, 2) * math.sqrt(stdev(APART.values()) ** 2 / 3 + 2 * cost)
    assert of.mean == pytest.approx(fmean(APART.values()))
    assert of.high - of.mean == pytest.approx(half, rel=0.01)
    alone = student_t_quantile(0.95, 2) * stdev(APART.values()) / math.sqrt(3)
    assert half > 1.1 * alone, "the widening shows"


def test_the_choice_widens_intervals_over_documents_and_what_wins_a_place_too(tmp_path: Path):
    def halves(curve: Mapping[float, float], at: str) -> tuple[float, float]:
        for router, losses in ((TOP_K, BASE), (TOP_P, WORSE), (AUTONOMY, {s: v + 0.5 for s, v in BASE.items()})):
            plant(tmp_path / at, router, losses, curve, by_document=tuple(np.linspace(-0.5, 0.5, 20)))
        found = compare(tmp_path / at)
        of = found.paired["top_p"]
        assert of.difference is not None and of.over_texts and found.ranking.needed is not None
        return of.difference.high - of.difference.mean, found.ranking.needed

    sure, unsure = halves({0.001: 9.0, 0.002: 3.0, 0.004: 9.0}, "sure"), halves(CURVE, "unsure")
    assert unsure[0] > 1.1 * sure[0] and unsure[1] > 1.02 * sure[1]


def test_the_text_says_what_was_tuned_and_how(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE, {0.001: 3.0, 0.002: 3.5, 0.004: 4.0, 0.008: 5.0, 0.016: 6.0})
    for seed, loss in BASE.items():
        Planted(f"untuned-{seed}", loss, seed, AUTONOMY, {RATE: 0.004}, by_document=None).write(tmp_path)
    page, text = write_comparison(tmp_path, "top_k")
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| 1")}
    assert "| 0.002, best of 4 |" in rows["top_k"] and "| no |" in rows["autonomy"]
    assert "0.001: 3.4000, 0.002: 3.0000, 0.004: 3.0100, 0.008: diverged" in text
    assert "| top_p | 0.001 (at the edge) | 100% | 0.0000 |" in text
    for line in (
        "NOT ALL TUNED: autonomy ran at the learning rate of the configuration, top_k, top_p at the best of several.",
        "UNEQUAL TUNING: top_k: 4, top_p: 5 trials.",
        "top_p: the best rate lies at the edge of what was tried (0.001 to 0.016): a better one may lie beyond.",
        "top_k: 1 of its 4 trials diverged, at 0.008.",
    ):
        assert f"- {line}" in text.splitlines()
    html = page.read_text()
    assert "Loss over learning rate, tuning seed" in html and "Chosen in" in html
    row = next(row for row in csv.DictReader((tmp_path / "compare.csv").open()) if row["variant"] == "top_k")
    assert (row["trials"], row["chosen"]) == ("4", "0.002") and 0.5 < float(row["chosen_share"]) < 1
    assert float(row["choice_cost"]) == pytest.approx(0.01 * (1 - float(row["chosen_share"])))


def test_the_table_of_runs_has_the_trials_from_which_the_choice_can_be_replayed(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE)
    write_comparison(tmp_path)
    rows = list(csv.DictReader((tmp_path / "compare_runs.csv").open()))
    trials = [row for row in rows if row["trial"] == "True"]
    assert len(rows) == 6 + 8 and len(trials) == 8
    assert {(row["seed"], row["counted"]) for row in trials} == {("0", "False")}
    of_top_k = {float(row[RATE]): row for row in trials if row["variant"] == "top_k"}
    losses = {rate: float(row["validation_loss"]) for rate, row in of_top_k.items() if row["state"] == "finished"}
    assert losses == pytest.approx({rate: loss for rate, loss in CURVE.items() if math.isfinite(loss)})
    assert of_top_k[0.008]["state"] == "diverged"
    finals = {row["seed"]: float(row[RATE]) for row in rows if row["variant"] == "top_k" and row["trial"] == "False"}
    assert finals == dict.fromkeys("123", 0.002)


def test_untuned_runs_are_told_nothing_of_tuning(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
    _, text = write_comparison(tmp_path)
    assert "Tuned" not in text and "rate" not in text.partition("To be aware of")[2]


def test_one_final_seed_leaves_the_choice_without_an_error_and_says_so(tmp_path: Path):
    plant(tmp_path, TOP_K, {1: 3.0})
    found = compare(tmp_path)
    assert found.tuned["top_k"].choice is None
    assert any(line.startswith("The chosen rates of top_k are taken as the best") for line in found.warnings)


def test_a_record_that_is_not_of_these_runs_is_said(tmp_path: Path):
    """Numbers are the runs' own, whatever the record says of them."""
    scheme = plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE)
    assert not any("RECORD" in line for line in compare(tmp_path).warnings)
    record = read_tune_record(tmp_path / "tuned")
    assert record is not None
    trials = (replace(scheme.trials[0], loss=2.0), *scheme.trials[1:])
    lied = replace(scheme, trials=trials, chosen=trials[2].values)
    record.with_schemes([lied]).write(tmp_path / "tuned")
    found = compare(tmp_path)
    assert found.tuned["top_k"].losses == pytest.approx([3.4, 3.0, 3.01, math.inf])
    told = "\n".join(found.warnings)
    assert "THE TUNE RECORD IS NOT OF THESE RUNS: top_k-0.001-0 has loss 3.4000, the record says 2.0000" in told
    ran, said = "ran with optimizer.learning_rate=0.002", "and not with optimizer.learning_rate=0.004, which it chose."
    assert f"top_k-0.002-1, tuned/top_k-0.002-2, tuned/top_k-0.002-3 {ran} {said}" in told
    assert "not at the best" not in told and found.tuned["top_k"].scheme.trials[found.tuned["top_k"].chosen].values == {
        RATE: 0.002
    }


def reconfigure(folder: Path, field: str, value: object) -> None:
    """Another value in the configuration that a run recorded."""
    part, _, name = field.rpartition(".")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    (values.setdefault(part, {}) if part else values)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def test_final_runs_at_other_values_than_the_best_are_said(tmp_path: Path):
    """The record's word is not enough: the final runs' own rate is what they were tuned to, if it was tried."""
    scheme = plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE)
    for name in scheme.finals:
        reconfigure(tmp_path / "tuned" / name, RATE, 0.004)
    found = compare(tmp_path)
    told = "\n".join(found.warnings)
    assert f"{RATE}=0.004 and not with {RATE}=0.002, which it chose." in told
    assert "top_k: its final runs are not at the best of its trials (3.0100 against 3.0000)" in told
    assert ["0.004, NOT the best of 4" in line for line in answer(found)[1]] == [True, False]
    for name in scheme.finals:
        reconfigure(tmp_path / "tuned" / name, RATE, 0.1)
    found = compare(tmp_path)
    assert set(found.tuned) == {"top_p"} and any(line.startswith("NOT ALL TUNED: top_k ") for line in found.warnings)


def test_runs_that_began_with_nothing_are_no_other_scheme(tmp_path: Path):
    """As every real one they say that they were no warm start and no branch."""
    scheme = plant(tmp_path, TOP_K, BASE)
    for job in scheme.jobs:
        for field in ("checkpoint.warm_start", "checkpoint.branch_from"):
            reconfigure(tmp_path / "tuned" / job, field, None)
    assert not [line for line in compare(tmp_path).warnings if "SOMETHING ELSE" in line]


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        (
            "batch.total_tokens",
            7,
            "top_k WAS TUNED AS SOMETHING ELSE: tuned/top_k-0.001-0 differ from its final runs in ",
        ),
        ("seed", 1, "THE TUNE RECORD IS NOT OF THESE RUNS: tuned/top_k-0.001-0 ran with seed=1 and not with seed=0"),
        (RATE, 0.1, f"THE TUNE RECORD IS NOT OF THESE RUNS: tuned/top_k-0.001-0 ran with {RATE}=0.1 and not with "),
        ("metrics.log_every_steps", 9, None),
    ],
)
def test_trials_that_were_no_trials_of_the_scheme_are_said(tmp_path: Path, field: str, value: object, line: str | None):
    scheme = plant(tmp_path, TOP_K, BASE)
    before = compare(tmp_path).warnings
    reconfigure(tmp_path / "tuned" / scheme.trials[0].job, field, value)
    new = [each for each in compare(tmp_path).warnings if each not in before]
    assert len(new) == (line is not None) and all(each.startswith(str(line)) for each in new)


def test_the_edge_is_that_of_the_rates_that_were_tried(tmp_path: Path):
    """Whatever the record says."""
    scheme = plant(tmp_path, TOP_K, BASE, {0.001: 3.0, 0.002: 3.5, 0.004: 4.0})
    inner = plant(tmp_path, TOP_P, WORSE)
    record = read_tune_record(tmp_path / "tuned")
    assert record is not None
    lies = [replace(scheme, at_edge=False), replace(inner, at_edge=True)]
    record.with_schemes(lies).write(tmp_path / "tuned")
    found = compare(tmp_path)
    assert {name: tuning.at_edge for name, tuning in found.tuned.items()} == {"top_k": True, "top_p": False}
    assert [line.partition(":")[0] for line in found.warnings if "at the edge" in line] == ["top_k"]


def test_a_trial_that_is_not_at_its_end_has_not_diverged(tmp_path: Path):
    """Its loss is the record's; in bits per byte, which the record does not have, it is not known and never wins."""
    scheme = plant(tmp_path, TOP_K, BASE)
    plant(tmp_path, TOP_P, WORSE)
    rows = (tmp_path / "tuned" / scheme.trials[2].job / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tuned" / scheme.trials[2].job / "metrics.jsonl").write_text("".join(rows[:-1]))
    found = compare(tmp_path)
    assert found.tuned["top_k"].losses == pytest.approx([3.4, 3.0, 3.01, math.inf])
    told = f"THE TUNE RECORD IS NOT OF THESE RUNS: {scheme.trials[2].job} is unfinished, the record has its loss 3.0100"
    assert any(line.startswith(told) for line in found.warnings)
    Planted("beside", 3.0, 1, AUTONOMY, fingerprint="other").write(tmp_path)
    found = compare(tmp_path)
    assert found.unit == "bits per byte" and math.isnan(found.tuned["top_k"].losses[2])
    assert found.tuned["top_k"].choice.shares[2] == 0  # type: ignore[union-attr]
    assert "0.004: not known, 0.008: diverged" in write_comparison(tmp_path)[1]
    assert any("the loss of 1 of its 4 trials is not known" in line for line in found.warnings)


def test_final_runs_that_are_not_there_are_said(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    scheme = plant(tmp_path, TOP_P, WORSE)
    (tmp_path / "tuned" / scheme.finals[0]).rename(tmp_path / "elsewhere")
    for name in scheme.finals[1:]:
        shutil.rmtree(tmp_path / "tuned" / name)
    (tmp_path / "tuned" / scheme.finals[1]).mkdir()
    (tmp_path / "tuned" / scheme.finals[1] / "job.json").write_text("{}")
    told = f"router=top_p: 3 of its 3 final runs have not started, or are gone: {', '.join(scheme.finals)}."
    found = compare(tmp_path).warnings
    assert told in found and not any("jobs have not started" in line for line in found), "said once"


def test_two_schemes_that_were_tuned_to_one_are_said(tmp_path: Path):
    scheme = plant(tmp_path, TOP_K, BASE)
    record = read_tune_record(tmp_path / "tuned")
    assert record is not None
    record.with_schemes([replace(scheme, name="router=other")]).write(tmp_path / "tuned")
    line = "top_k stands for router=top_k, router=other: what was chosen made them the same scheme."
    assert line in compare(tmp_path).warnings


def test_a_scheme_without_a_choice_is_said(tmp_path: Path):
    plant(tmp_path, TOP_K, BASE)
    record = read_tune_record(tmp_path / "tuned")
    assert record is not None
    ended = Planted("ended", 3.2, 9)  # after a command without this scheme, the record still calls it waiting
    ended.write(tmp_path / "tuned")
    trials = tuple(TuningTrial(job, {RATE: 0.1}, None, "waiting") for job in ("gone", "ended"))
    record.with_schemes([TunedScheme("router=hash", ("router=hash",), trials)]).write(tmp_path / "tuned")
    told = "router=hash: no rate chosen, with 1 of 4 trials made; moe-pretrain tune with this scheme goes on with them."
    assert told in compare(tmp_path).warnings


def test_variants_are_not_named_by_the_rate_that_was_chosen_for_them(tmp_path: Path):
    """Though it tells three of them apart, and the balance loss only two."""
    weights = {"heavy": 0.1, "light": 0.01, "none": 0.0}
    for at, (name, weight) in enumerate(weights.items()):
        curve = {0.001 * 2**at: 3.0, 0.001 * 2 ** (at + 1): 4.0, 0.001 * 2 ** (at + 2): 5.0}
        plant(tmp_path, {**TOP_K, "load_balance_weight": weight}, BASE, curve, name)
    assert [variant.name for variant in compare(tmp_path).variants] == [
        f"load_balance_weight={weight}" for weight in weights.values()
    ]
    plant(tmp_path, {**TOP_K, "load_balance_weight": 0.1}, BASE, {0.064: 2.0, 0.1: 3.0, 0.2: 4.0}, "again")
    names = [variant.name for variant in compare(tmp_path).variants]
    assert len(set(names)) == 4 and sum("learning_rate=" in name for name in names) == 4, "where nothing else does"


def tuned_sweep(random: np.random.Generator, curve: float, noise: float) -> dict[str, Sample]:
    """Two identical schemes, each tuned by the rule and run with three seeds at its best rate."""
    seeds, search = random.normal(0, 0.05, 3), Search("rate", 1.0, 2.0, 5)
    samples, tried = {}, {}
    for name in "ab":
        losses: dict[Setting, float] = {}

        def loss(setting: Setting) -> float:
            return 3 + curve * (math.log2(float(setting[0][1])) - 0.37) ** 2 + random.normal(0, noise)

        while settings := search.next(losses):
            losses |= {setting: loss(setting) for setting in settings}
        chosen = search.choose(losses)
        assert chosen is not None
        samples[name] = Sample({seed: loss(chosen) + of_all for seed, of_all in enumerate(seeds)})
        tried[name] = list(losses.values())
    noises = seed_noise(samples)
    return {
        name: replace(sample, choice_variance=choice(tried[name], noises[name]).mean_square)
        for name, sample in samples.items()
    }


def test_identical_schemes_that_were_tuned_are_told_apart_rarely():
    """Their rates differ by chance, and so do their losses; without what that may cost they differ too often."""
    random, sweeps = np.random.default_rng(1), 300
    told = {"with": 0, "without": 0}
    for _ in range(sweeps):
        samples = tuned_sweep(random, curve=0.01, noise=0.01)
        told["with"] += difference(samples["a"], samples["b"]).verdict in ("better", "worse")
        bare = {name: Sample(sample.losses) for name, sample in samples.items()}
        told["without"] += difference(bare["a"], bare["b"]).verdict in ("better", "worse")
    assert told["with"] <= 0.06 * sweeps < told["without"]


def random_and(tmp_path: Path, **by: Mapping[int, float]) -> list[str]:
    """What is said of schemes that differ so from random routing."""
    for seed, loss in BASE.items():
        Planted(f"random-{seed}", loss, seed, RANDOM, by_document=None).write(tmp_path)
    for name, apart in by.items():
        for seed, value in apart.items():
            router = {"name": name, "top_k": 2}
            Planted(f"{name}-{seed}", BASE[seed] + value, seed, router, by_document=None).write(tmp_path)
    return [line for line in compare(tmp_path).warnings if "RANDOM" in line]


def test_a_scheme_that_does_not_beat_random_says_so(tmp_path: Path):
    better, unclear = {1: -0.049, 2: -0.050, 3: -0.051}, {1: -0.01, 2: 0.02, 3: -0.015}
    worse = {seed: -value for seed, value in better.items()}
    lines = random_and(tmp_path, top_k=better, hash=unclear, sinkhorn=worse, top_p={1: -0.5}, dense=worse)
    assert [line.partition(":")[0] for line in sorted(lines)] == [
        f"{name} DOES NOT BEAT RANDOM ROUTING (random)" for name in ("hash", "sinkhorn", "top_p")
    ]
    told = dict(line.split(" DOES NOT BEAT RANDOM ROUTING (random): ") for line in lines)
    assert told["sinkhorn"].startswith("difference +0.0500 [+0.0475, +0.0525] nats per token")
    assert told["top_p"] == "not tested."


def test_without_random_routing_nothing_is_said_of_it(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P).write(tmp_path)
    assert not any("RANDOM" in line for line in compare(tmp_path).warnings)
