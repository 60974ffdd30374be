"""Comparison of the runs of a folder, numbers and warnings: which is better, by how much, and can that be told.

Runs of one seed share data order and, by global expert id, initial weights, whatever their scheme; so variants are
compared seed by seed, which takes out what the seed does to the loss.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from moe_pretrain.analysis import measures
from moe_pretrain.analysis.compare.bootstrap import FEW_DOCUMENTS, last_probe, num_documents, resampled_losses
from moe_pretrain.analysis.compare.courses import warn_of_courses
from moe_pretrain.analysis.compare.scaling import Scaling, scaling_of
from moe_pretrain.analysis.compare.statistics import (
    Difference,
    Ranking,
    Sample,
    difference,
    rank,
)
from moe_pretrain.analysis.compare.task_comparison import TaskComparison, compare_tasks
from moe_pretrain.analysis.compare.tuning import Tuning, certainties, tunings, warn_of_tuning
from moe_pretrain.analysis.compare.variants import Variant, group, unnamed_differences
from moe_pretrain.run_folder.record import RunRecord, differences, find_runs, jobs_without_runs
from moe_pretrain.run_folder.tune_record import TuningFolder, split_trials, tuned_fields
from moe_pretrain.system.words import few

LOSS, BITS = "validation/loss", "validation/bits_per_byte"
UNITS = {LOSS: "nats per token", BITS: "bits per byte"}

_VALIDATION_KEYS = (
    "model.sequence_length",
    "evaluation.max_rows",
    "packing.isolate_documents",
    "packing.reset_positions",
    "data.validation_fraction",
)
"""What decides which tokens are validated on, and what they see."""

MEASURES: dict[str, tuple[str, Callable[[RunRecord], float | None], str]] = {
    "total_parameters": ("Parameters", lambda run: run.facts.get("total_parameters"), ",.0f"),
    "active_parameters": ("Active parameters", lambda run: run.facts.get("active_parameters"), ",.0f"),
    "unigram_cross_entropy": (
        "Unigram cross-entropy, nats",
        lambda run: run.facts.get("unigram_cross_entropy"),
        ".3f",
    ),
    "experts_per_token": ("Experts per token", lambda run: measures.at_end(run.train, "experts_per_token"), ".3g"),
    "validation_experts_per_token": (
        "Experts per token in evaluation",
        lambda run: measures.at_end(run.validation[-1:], "validation_experts_per_token"),
        ".3g",
    ),
    "zero_computation_share": (
        "Routes to zero-computation experts",
        lambda run: measures.at_end(run.train, "zero_computation_share"),
        ".1%",
    ),
    "mean_route_cost": (
        "Width of a route's expert / mean",
        lambda run: measures.at_end(run.train, "mean_route_cost"),
        ".3f",
    ),
    "active_experts": (
        "Experts in use per layer",
        lambda run: measures.at_end(run.train, "active_experts"),
        ".3g",
    ),
    "flops_per_token": ("FLOPs per token", lambda run: _last(measures.training_flops(run.train), run), ".3g"),
    "training_flops": ("Training FLOPs", lambda run: _last(measures.training_flops(run.train)), ".3g"),
    "training_seconds": ("Seconds in steps", lambda run: _last(measures.training_seconds(run.train)), ".4g"),
    "tokens_per_second": ("Tokens per second", lambda run: measures.median(run, "train/tokens_per_second"), ",.0f"),
    "model_flops_utilization": ("MFU", lambda run: measures.median(run, "train/model_flops_utilization"), ".1%"),
    "load_max_over_mean": (
        "Busiest expert / mean",
        lambda run: measures.at_end(run.train, "load_max_over_mean"),
        ".3f",
    ),
    "load_max_over_even_cost": (
        "Busiest expert / mean, routes times width",
        lambda run: measures.at_end(run.train, "load_max_over_even_cost"),
        ".3f",
    ),
    "router_entropy": ("Router entropy, nats", lambda run: measures.at_end(run.train, "router_entropy"), ".3f"),
    "dead_experts": ("Dead experts per layer", lambda run: measures.at_end(run.train, "dead_experts"), ".3g"),
    "dropped_share": ("Routes dropped", lambda run: measures.at_end(run.train, "dropped_share"), ".1%"),
}
"""Name -> label, measure of one run, format. Layer numbers are means over layers and the last fifth of the run."""


def _last(cumulated: np.ndarray, per_token_of: RunRecord | None = None) -> float | None:
    """The end of a cumulated sum, divided by a run's tokens if one is given; None if it was not recorded."""
    if not len(cumulated) or np.isnan(cumulated[-1]):
        return None
    return float(cumulated[-1]) / (per_token_of.last["tokens"] if per_token_of else 1)


@dataclass(frozen=True)
class Comparison:
    """Comparison of the runs of a folder.

    Attributes:
        runs: Every run, in any state, without the trials of a tuning.
        variants: Runs of equal configuration.
        reference: Name of the variant that the others are compared to.
        key: What is compared: ``LOSS``, or ``BITS`` when tokenizers or corpora differ.
        losses: Variant -> seed -> final ``key``.
        documents: Documents of the validation set that the intervals are over; 0 where all are over seeds alone.
        paired: Variant -> its difference to the reference.
        ranking: The places of variants with a loss.
        tuned: Variant -> its tuning, of those that were tuned.
        tasks: Each metric of each task that runs were asked at their end.
        scaling: Laws of loss over size and tokens, where the runs are ladders.
        warnings: Everything that makes the comparison less than it seems.
    """

    runs: list[RunRecord]
    variants: list[Variant]
    reference: str
    key: str
    losses: dict[str, dict[int, float]]
    documents: int
    paired: dict[str, Difference]
    ranking: Ranking
    tuned: dict[str, Tuning]
    tasks: list[TaskComparison]
    scaling: Scaling | None
    warnings: list[str]

    @property
    def unit(self) -> str:
        """Unit of ``key``."""
        return UNITS[self.key]

    def loss(self, run: RunRecord) -> float | None:
        """The number compared."""
        return run.final(self.key)

    def variant_of(self, run: RunRecord) -> Variant | None:
        """The variant that ``run`` belongs to; None if its configuration cannot be read."""
        return next((variant for variant in self.variants if run in variant.runs), None)


def compare(root: Path, reference: str | None = None) -> Comparison:
    """Read every run below ``root`` and compare its variants.

    Args:
        root: Folder with run folders, at any depth.
        reference: Name of a variant, or a part of one name only; None for the one that is named, or whose name begins
            with, ``top_k``, else the first.

    Raises:
        ValueError: There are no runs, or not one variant of that name.
    """
    runs, folders = split_trials(find_runs(root))
    if not runs:
        raise ValueError(f"FOLDER={root} has only trials of a tuning so far: the final runs come after them")
    fields = tuned_fields(folders)
    variants = group(runs, fields)
    if not variants:
        raise ValueError(
            f"FOLDER={root}: no run below it has a readable config.yaml; {runs[0].name}: {runs[0].problem}"
        )
    chosen = _choose_reference([variant.name for variant in variants], reference)
    corpora = {run.facts.get("corpus_fingerprint") for variant in variants for run in variant.counted}
    tokenizers_differ = any(key.startswith("tokenizer.") for key in differences([each.values for each in variants]))
    key = BITS if len(corpora) > 1 or tokenizers_differ else LOSS
    losses = {variant.name: variant.by_seed(lambda run: run.final(key)) for variant in variants}
    samples, documents, cautions = _samples(variants, losses, key)
    of_tuning, record_warnings = tunings(variants, folders, key)
    tuned = certainties(of_tuning, samples)
    for name, tuning in tuned.items():
        samples[name] = replace(samples[name], choice_variance=tuning.choice.mean_square if tuning.choice else 0.0)
    paired = {name: difference(sample, samples[chosen]) for name, sample in samples.items()}
    others = [found.over_texts for name, found in paired.items() if name != chosen]
    tasks, task_warnings = compare_tasks(variants, chosen)
    return Comparison(
        runs=runs,
        variants=variants,
        reference=chosen,
        key=key,
        losses=losses,
        documents=documents if any(others) or not others else 0,
        paired=paired,
        ranking=rank(samples),
        tuned=tuned,
        tasks=tasks,
        scaling=scaling_of(runs, root),
        warnings=[
            *_warn_of_later_tokens(samples),
            *_warn_of_random(variants, samples, UNITS[key]),
            *_warn_of_data(variants, key, fields),
            *record_warnings,
            *warn_of_tuning(tuned, variants, folders, {run.folder for run in runs}),
            *cautions,
            *warn_of_courses(variants),
            *_warn_of_jobs(root, folders),
            *_warn_of_runs(runs, variants, losses),
            *_warn_of_seeds(paired, losses, chosen),
            *task_warnings,
        ],
    )


def _choose_reference(names: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        found = [name for name in names if name == asked] or [name for name in names if asked in name]
        if len(found) != 1:
            wanted = "a part of one name only, of" if found else "one of the variants, or a part of one name:"
            listed = ", ".join(map(repr, found or names))
            raise ValueError(f"--reference={asked!r} must be {wanted} {listed}")
        return found[0]
    begins = [name for name in names if "top_k" in name.split(" ")]
    return "top_k" if "top_k" in names else (begins or list(names))[0]


def _samples(
    variants: Sequence[Variant], losses: Mapping[str, Mapping[int, float]], key: str
) -> tuple[dict[str, Sample], int, list[str]]:
    """Losses with what resampled documents make of them, the number of documents, and what is missing."""
    samples, documents, missing, found = {}, set(), [], []
    # Whatever the tokenizer, all of the held-out text is the same text: no draw that differs between variants.
    if key == BITS and all(_reads_all(run) for variant in variants for run in variant.counted):
        found.append("NO TEXTS ARE PAIRED: tokens of other corpora or tokenizers have no counterpart.")
        return {each.name: _sample(each, losses) for each in variants}, 0, found
    for variant in variants:
        resampled, rows = {}, {}
        for run in variant.counted:
            if run.seed not in losses[variant.name]:
                continue
            try:
                probe = last_probe(run)
            except ValueError as error:
                found.append(f"Not used: {error}")
                probe = None
            if probe is None:
                missing.append(run.name)
                continue
            resampled[run.seed] = resampled_losses(probe) * (run.end[key] / run.end[LOSS])
            rows[run.seed] = probe.fingerprint
            documents.add(num_documents(probe))
        samples[variant.name] = replace(_sample(variant, losses), resampled=resampled, rows=rows)
    if missing:
        everywhere = "" if documents else "all "
        found.append(
            f"{everywhere}{len(missing)} runs have no losses by document ({few(missing)}): intervals of their "
            "variants are over seeds alone, as if no other validation text could have been chosen."
        )
    rows_of = {name: set(sample.rows.values()) for name, sample in samples.items() if sample.rows}
    mixed = [name for name, rows in rows_of.items() if len(rows) > 1]
    if len(set().union(*rows_of.values())) > 1:
        between = f"seeds of {few(mixed)}" if mixed else "variants"
        found.append(
            f"VALIDATION ROWS DIFFER between {between}: their losses are of other tokens. Texts of the same rows alone "
            "are paired, and intervals hold what each would have made of others."
        )
    fewest = min(documents, default=0)
    if 0 < fewest < FEW_DOCUMENTS:
        found.append(f"Only {fewest} documents in the validation rows: raise evaluation.max_rows.")
    return samples, fewest, found


def _sample(variant: Variant, losses: Mapping[str, Mapping[int, float]]) -> Sample:
    """The losses of a variant without its documents."""
    is_causal = all(run.facts.get("causal_in_evaluation", True) for run in variant.counted)
    return Sample(losses[variant.name], knows_later_tokens=not is_causal)


def _reads_all(run: RunRecord) -> bool:
    """Whether a run validates on all that is held out, as far as it says."""
    return all(text.get("rows") == text.get("held_out_rows") for text in run.facts.get("validation_text", {}).values())


def _warn_of_seeds(
    paired: Mapping[str, Difference], losses: Mapping[str, Mapping[int, float]], reference: str
) -> list[str]:
    """Variants that could not be compared seed by seed."""
    others = [name for name, found in paired.items() if name != reference and not found.is_paired]
    if not others:
        return []
    return [f"NOT PAIRED: {', '.join(others)} and {reference} share fewer than two seeds: means over all seeds differ."]


def _warn_of_later_tokens(samples: Mapping[str, Sample]) -> list[str]:
    """Variants whose losses are no language model's."""
    names = [name for name, sample in samples.items() if sample.knows_later_tokens]
    if not names:
        return []
    return [
        f"NO LANGUAGE MODEL'S LOSS: in {', '.join(names)} the experts of a token depend on later tokens in evaluation "
        "too. Nothing is tested between them and the others, however large the difference."
    ]


def _warn_of_random(variants: Sequence[Variant], samples: Mapping[str, Sample], unit: str) -> list[str]:
    """Schemes that are not clearly better than random routing of the same model, where that is among the variants."""
    controls = [variant for variant in variants if variant.values.get("router.name") == "random"]
    found = []
    for variant in variants:
        if not controls or variant.values.get("router.name") in ("random", "dense"):
            continue
        control = min(controls, key=lambda each: len(_beside_the_router(variant, each)))
        apart = difference(samples[variant.name], samples[control.name])
        if apart.verdict == "better" or not samples[variant.name].losses:
            continue
        by = apart.difference
        figures = "not tested"
        if by is not None and apart.verdict != "not tested":
            figures = f"difference {by.mean:+.4f} [{by.low:+.4f}, {by.high:+.4f}] {unit}"
        found.append(f"{variant.name} DOES NOT BEAT RANDOM ROUTING ({control.name}): {figures}.")
    return found


def _beside_the_router(variant: Variant, other: Variant) -> list[str]:
    return [key for key in differences([variant.values, other.values]) if not key.startswith("router.")]


def _warn_of_data(variants: Sequence[Variant], key: str, tuned: Container[str]) -> list[str]:
    """Warn of data that was not the same though it should be."""
    found = []
    counted = [run for variant in variants for run in variant.counted]
    values = [variant.values for variant in variants]
    if key == BITS:
        found.append(
            "TOKENIZERS OR CORPORA DIFFER: losses per token do not compare, so everything here is in bits per byte. "
            "That compares only if the validation text is the same. " + _listed(variants, "corpus_fingerprint")
        )
    elif any(run.facts.get("corpus_fingerprint") is None for run in counted):
        found.append("Runs do not say which corpus they read (summary.json has no corpus_fingerprint).")
    validated = [name for name in _VALIDATION_KEYS if name in differences(values)]
    if validated:
        found.append(f"VALIDATION IS NOT THE SAME: {', '.join(validated)} differ, so losses are of other tokens.")
    ends = {variant.name: sorted({run.last["tokens"] for run in variant.counted}) for variant in variants}
    if len({tokens for each in ends.values() for tokens in each}) > 1:
        told = ", ".join(f"{name}: {' and '.join(f'{n:,}' for n in each)}" for name, each in ends.items() if each)
        found.append(f"UNEQUAL TOKENS: {told}. Final losses are of runs of different length.")
    found += _warn_of_order(variants)
    others = unnamed_differences(variants, tuned)
    if others:
        found.append(f"Variants also differ in {', '.join(others)}: see the table of differences.")
    for fact in ("versions", "commit", "dtype", "device"):
        if len({str(run.facts.get(fact)) for run in counted}) > 1:
            consequence = " Speeds do not compare." if fact == "device" else ""
            found.append(f"Runs differ in their {fact}.{consequence} " + _listed(variants, fact))
    for variant in variants:
        if len({run.facts.get("router_file_hash") for run in variant.counted}) > 1:
            found.append(
                f"ROUTER FILE CHANGED: seeds of {variant.name} ran with different contents of "
                f"{variant.values['router_file']}; they are counted as one scheme."
            )
        rows = {size for run in variant.counted if (size := run.facts.get("micro_batch_size"))}
        if len(rows) > 1 and not all(run.facts.get("causal_in_training", True) for run in variant.counted):
            found.append(
                f"MICRO-BATCHES DIFFER: in training of {variant.name} the tokens of a micro-batch compete, and its "
                f"seeds had {' and '.join(map(str, sorted(rows)))} rows in one; they are counted as one scheme."
            )
    return found


def _listed(variants: Sequence[Variant], fact: str) -> str:
    """A fact by variant: ``a: x; b: y or z``."""
    by_name = {
        variant.name: sorted({str(run.facts.get(fact, "not recorded")) for run in variant.counted})
        for variant in variants
    }
    return "; ".join(f"{name}: {' or '.join(found)}" for name, found in by_name.items() if found)


def _warn_of_order(variants: Sequence[Variant]) -> list[str]:
    """Runs of one seed and length that did not consume the same tokens: they are no pairs."""
    hashes = {
        variant.name: {(run.seed, run.last["tokens"]): run.last.get("data/token_hash") for run in variant.counted}
        for variant in variants
    }
    found = []
    for (name, own), (other, theirs) in combinations(hashes.items(), 2):
        seeds = [str(at[0]) for at in sorted(own.keys() & theirs.keys()) if own[at] != theirs[at]]
        if seeds:
            found.append(f"NOT PAIRED: {name} and {other} read different tokens with seed {', '.join(seeds)}.")
    return found


def _warn_of_jobs(root: Path, folders: Mapping[Path, TuningFolder]) -> list[str]:
    """Jobs of sweeps that have not started; those of a tuning are told of by ``warn_of_tuning``."""
    waiting = [
        str(folder.relative_to(root))
        for folder in jobs_without_runs(root)
        if folder.parent not in folders or folder.name not in folders[folder.parent].record.jobs
    ]
    return [f"{len(waiting)} jobs have not started, and are not compared: {few(waiting)}."] if waiting else []


def _warn_of_runs(
    runs: Sequence[RunRecord], variants: Sequence[Variant], losses: Mapping[str, Mapping[int, float]]
) -> list[str]:
    """Runs that are missing, not done, or there twice."""
    found = []
    for state in ("diverged", "failed", "unfinished", "unreadable"):
        names = [run.name for run in runs if run.state == state]
        if names:
            found.append(f"{len(names)} of {len(runs)} runs {state}: {', '.join(names)}.")
    for variant in variants:
        own = losses[variant.name]
        lost = sorted({run.seed for run in variant.runs if run.state == "diverged"} - own.keys())
        if own and lost:
            found.append(
                f"DIVERGED AND IN NO MEAN: seed {', '.join(map(str, lost))} of {variant.name}. Its place and its "
                "differences are those of the seeds that did not."
            )
        silent = [run.name for run in variant.counted if run.seed not in losses[variant.name]]
        if silent:
            found.append(f"{variant.name}: no number to compare at the end of {', '.join(silent)}.")
        repeated = [run.name for run in variant.runs if run.is_complete and run not in variant.counted]
        if repeated:
            found.append(f"{variant.name}: {', '.join(repeated)} repeat a seed and are not counted.")
    seeds = set().union(*losses.values())
    without: dict[str, list[str]] = {}
    for name, values in losses.items():
        if missing := sorted(seeds - values.keys()):
            without.setdefault(", ".join(map(str, missing)), []).append(name)
    for missing_seeds, names in without.items():
        found.append(
            f"No finished run of seed {missing_seeds}: {', '.join(names)}; pairs leave it out, and their own means are "
            "over other seeds than the others'."
        )
    if len(seeds) < 2:
        found.append("Fewer than two seeds: nothing can be tested.")
    return found
