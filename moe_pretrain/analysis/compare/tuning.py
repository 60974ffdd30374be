"""Tuned variants: curves of loss over rate, and what is uncertain about having chosen the best of them.

A rate is chosen by one run of each trial, whose loss is the rate's true loss and noise. How large the noise is, the
final seeds tell: half of the variance of seed-by-seed differences between variants, which is what is left of a run's
variance when the part that a seed does to all runs alike is taken out; the trials share a seed, so that part moves no
choice between them. Where no two variants share two seeds it is the whole variance between a variant's seeds, which is
larger. In each of ``RESAMPLES`` resamples the losses of a scheme's trials get independent normal noise of that
variance, and the lowest wins: the share of resamples in which each trial wins is how sure its choice is. By the
measured curve a trial that wins wrongly costs its loss less the lowest one. The mean square of that cost over resamples
(its variance and its mean's square, since the best of noisy losses is never better than the best) is added to the
squared standard error of every difference of the variant to another.

What lies beyond the edges of what was tried, or between trials, is not in it. In simulations of identical schemes,
tuned with 5 trials and run with 3 seeds (loss quadratic in the logarithm of the rate, noise from a twentieth to three
times of what a factor of two costs), a difference is called one in up to 8% of the sweeps without it, in up to 6% with
it.

Axis names:
    trials     of one scheme
    resamples  of the noise
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np

from moe_pretrain.analysis.compare.statistics import Sample, shared_prior
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.run_folder.identity import deciding
from moe_pretrain.run_folder.record import RunRecord, differences, show
from moe_pretrain.run_folder.tune_record import TunedScheme, TuneRecord, TuningFolder, TuningTrial
from moe_pretrain.system.words import few

RESAMPLES = 10_000
_SAME_LOSS = 1e-6
"""Largest relative difference between a trial's loss in the record and in its run's own rows."""
_RECORDED = "validation/loss"
"""The number that the record holds of a trial."""
_BELIED = "THE TUNE RECORD IS NOT OF THESE RUNS"


@dataclass(frozen=True)
class Choice:
    """Certainty of the choice among a scheme's trials.

    Attributes:
        shares: Share of resamples in which each trial wins, [trials].
        cost: Mean of what the winner costs by the measured curve, in the losses' unit.
        mean_square: Mean square of the same.
    """

    shares: np.ndarray
    cost: float
    mean_square: float


@dataclass(frozen=True)
class Tuning:
    """Trials of a variant before its final runs.

    Attributes:
        scheme: Its trials and what they decided.
        record: The record that it is of.
        runs: Runs of the trials, of those that are still there.
        losses: Loss of each trial, in the unit of the comparison; infinite where it diverged, NaN where unknown.
        chosen: Place of the trial whose values the final runs have.
        choice: How sure the choice is; None where the noise between seeds is not known.
    """

    scheme: TunedScheme
    record: TuneRecord
    runs: list[RunRecord]
    losses: list[float]
    chosen: int
    choice: Choice | None = None

    @property
    def is_best(self) -> bool:
        """Whether the chosen trial is the best of those whose loss is known."""
        return not any(loss < self.losses[self.chosen] for loss in self.losses)

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the lowest or the highest of all that were tried."""
        rates = [self.rate(trial) for trial in self.scheme.trials]
        return rates[self.chosen] in (min(rates), max(rates))

    def rate(self, trial: TuningTrial) -> float:
        """The searched field's value in a trial."""
        return float(trial.values[self.record.field])

    def setting(self, trial: TuningTrial) -> str:
        """A trial's values in words: the rate, and the further fields that it changed."""
        rate, *others = (
            f"{value:g}" if name == self.record.field else f"{name.rpartition('.')[2]}={value}"
            for name, value in trial.values.items()
        )
        return " with ".join([rate, *others])


def tunings(
    variants: Sequence[Variant], folders: Mapping[Path, TuningFolder], key: str
) -> tuple[dict[str, Tuning], list[str]]:
    """Variant -> its tuning, of those whose runs are final runs of a tuned scheme; and what belies a record.

    The final runs say what was chosen; a record that says something else is belied. A final run that is at the values
    of no trial is not tuned.

    Args:
        variants: Of the compared runs.
        folders: From ``split_trials``.
        key: The number that is compared.
    """
    found: dict[str, Tuning] = {}
    lines: list[str] = []
    strays: dict[str, list[str]] = {}
    for variant in variants:
        schemes: dict[str, tuple[TunedScheme, TuningFolder, int]] = {}
        for run in variant.runs:
            if (folder := folders.get(run.folder.parent)) is None:
                continue
            for scheme in folder.record.schemes:
                if scheme.chosen is None or run.folder.name not in scheme.finals:
                    continue
                chosen = _trial_of(run, scheme)
                if chosen is None or scheme.trials[chosen].values != scheme.chosen:
                    strays.setdefault(
                        _at(run.values, scheme) + " and not with " + _at(scheme.chosen, scheme), []
                    ).append(run.name)
                if chosen is not None:
                    schemes.setdefault(scheme.name, (scheme, folder, chosen))
        for scheme, folder, chosen in list(schemes.values())[:1]:
            runs = [folder.trials.get(trial.job) for trial in scheme.trials]
            losses = [_loss(run, trial, key) for run, trial in zip(runs, scheme.trials, strict=True)]
            found[variant.name] = Tuning(scheme, folder.record, [run for run in runs if run], losses, chosen)
            lines += _other_trials(variant, scheme, folder)
            if (seed := folder.record.tuning_seed) in {run.seed for run in variant.counted}:
                lines.append(
                    f"THE TUNING SEED IS AMONG THE SEEDS of {variant.name}: its values were chosen by the luck of seed "
                    f"{seed}, so its mean is too good."
                )
        if len(schemes) > 1:
            lines.append(f"{variant.name} stands for {', '.join(schemes)}: what was chosen made them the same scheme.")
    belied = [f"{_BELIED}: {few(names)} ran with {words}, which it chose." for words, names in strays.items()]
    return found, belied + lines


def _trial_of(run: RunRecord, scheme: TunedScheme) -> int | None:
    """Place of the trial at whose values a run is, the one that says most of them; None if there is none."""
    at = [
        place
        for place, trial in enumerate(scheme.trials)
        if all(show(run.values, key) == show(trial.values, key) for key in trial.values)
    ]
    return max(at, key=lambda place: len(scheme.trials[place].values), default=None)


def _at(values: Mapping[str, Any], scheme: TunedScheme) -> str:
    """Values of the tuned fields in words."""
    tuned = dict.fromkeys(key for trial in scheme.trials for key in trial.values)
    return ", ".join(f"{key}={show(values, key)}" for key in tuned if key in values)


def _other_trials(variant: Variant, scheme: TunedScheme, folder: TuningFolder) -> list[str]:
    """Trials that were not a trial of this variant: of other settings, at other values, or of another seed."""
    tuned = {key for trial in scheme.trials for key in trial.values}
    strays: dict[str, list[str]] = {}
    apart: dict[str, list[str]] = {}
    for trial in scheme.trials:
        run = folder.trials.get(trial.job)
        if run is None or not run.values:
            continue
        if _trial_of(run, replace(scheme, trials=(trial,))) is None:
            strays.setdefault(_at(run.values, scheme) + " and not with " + _at(trial.values, scheme), []).append(
                run.name
            )
        if run.seed != folder.record.tuning_seed:
            seed = f"seed={run.seed} and not with seed={folder.record.tuning_seed}"
            strays.setdefault(seed, []).append(run.name)
        both = [deciding(run.values), deciding(variant.values)]
        if fields := [key for key in differences(both) if key not in tuned and key != "seed"]:
            apart.setdefault(", ".join(fields), []).append(run.name)
    lines = [f"{_BELIED}: {few(names)} ran with {words}, its trials." for words, names in strays.items()]
    for words, names in apart.items():
        lines.append(f"{variant.name} WAS TUNED AS SOMETHING ELSE: {few(names)} differ from its final runs in {words}.")
    return lines


def _is_made(run: RunRecord | None, trial: TuningTrial) -> bool:
    """Whether a trial has ended, by its run: a later command without its scheme leaves it ``waiting`` in the record."""
    return trial.state != "waiting" if run is None else run.state in ("finished", "diverged", "failed")


def _loss(run: RunRecord | None, trial: TuningTrial, key: str) -> float:
    """A trial's number by its run's own rows, else by the record; infinite where it diverged, NaN where unknown."""
    if run is not None and (run.is_complete or run.state == "diverged"):
        loss = None if run.state == "diverged" else run.final(key)
        return math.inf if loss is None else loss
    if trial.state == "diverged":
        return math.inf
    return trial.loss if key == _RECORDED and trial.loss is not None else math.nan


def seed_noise(samples: Mapping[str, Sample]) -> dict[str, float]:
    """Variance of one run's loss about what its scheme and its seed make of it, for each variant that tells.

    Half of the moderated variance of the seed-by-seed differences to each other variant, mean over these; the whole
    variance between its seeds where there is no other with two common seeds.
    """
    prior = shared_prior(samples)
    halves: dict[str, list[float]] = {name: [] for name in samples}
    for (a, of), (b, to) in combinations(samples.items(), 2):
        common = of.losses.keys() & to.losses.keys()
        if len(common) >= 2:
            own = np.array([variance([of.losses[seed] - to.losses[seed] for seed in common])])
            half = float(prior.moderate(own, len(common) - 1)[0]) / 2
            halves[a].append(half)
            halves[b].append(half)
    found = {name: fmean(values) for name, values in halves.items() if values}
    for name, sample in samples.items():
        if name not in found and len(sample.losses) >= 2:
            found[name] = variance(sample.losses.values())
    return found


def choice(losses: Sequence[float], noise: float) -> Choice:
    """Find how sure it is which of a scheme's trials is the best.

    Args:
        losses: Of the trials, at least one of them finite; one that is not known, NaN, never wins.
        noise: Variance of one trial's loss.
    """
    curve = np.nan_to_num(np.array(losses), nan=math.inf, posinf=math.inf)
    drawn = curve + math.sqrt(noise) * np.random.default_rng(0).standard_normal((RESAMPLES, len(curve)))
    winners = drawn.argmin(axis=1)  # [resamples]
    cost = curve[winners] - curve.min()
    shares = np.bincount(winners, minlength=len(curve)) / RESAMPLES
    return Choice(shares, float(cost.mean()), float((cost**2).mean()))


def certainties(found: Mapping[str, Tuning], samples: Mapping[str, Sample]) -> dict[str, Tuning]:
    """The tunings with how sure their choices are, by the noise that the final runs tell."""
    noise = seed_noise(samples)
    return {
        name: replace(tuning, choice=choice(tuning.losses, noise[name]))
        if name in noise and any(map(math.isfinite, tuning.losses))
        else tuning
        for name, tuning in found.items()
    }


def warn_of_tuning(
    found: Mapping[str, Tuning],
    variants: Sequence[Variant],
    folders: Mapping[Path, TuningFolder],
    compared: Container[Path],
) -> list[str]:
    """Warn of what makes tuned variants less comparable than they seem.

    Args:
        found: From ``certainties``.
        variants: Of the compared runs.
        folders: From ``split_trials``.
        compared: Folders of all compared runs.
    """
    lines = _disagreements(found, folders)
    for place, folder in folders.items():
        for scheme in folder.record.schemes:
            missing = [name for name in scheme.finals if place / name not in compared]
            if missing:
                lines.append(
                    f"{scheme.name}: {len(missing)} of its {len(scheme.finals)} final runs have not started, or are "
                    f"gone: {few(missing)}."
                )
            if scheme.chosen is None:
                made = sum(_is_made(folder.trials.get(trial.job), trial) for trial in scheme.trials)
                lines.append(
                    f"{scheme.name}: no rate chosen, with {made} of {folder.record.trials} trials made; "
                    "moe-pretrain tune with this scheme goes on with them."
                )
    if not found:
        return lines
    untuned = [each.name for each in variants if each.name not in found]
    if untuned:
        lines.append(
            f"NOT ALL TUNED: {', '.join(untuned)} ran at the learning rate of the configuration, {', '.join(found)} at "
            "the best of several."
        )
    counts = {name: len(tuning.scheme.trials) for name, tuning in found.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        lines.append(f"UNEQUAL TUNING: {told} trials.")
    for name, tuning in found.items():
        rates = [tuning.rate(trial) for trial in tuning.scheme.trials]
        if tuning.at_edge:
            lines.append(
                f"{name}: the best rate lies at the edge of what was tried ({min(rates):g} to {max(rates):g}): a "
                "better one may lie beyond."
            )
        lost = [
            tuning.setting(trial)
            for trial, loss in zip(tuning.scheme.trials, tuning.losses, strict=True)
            if math.isinf(loss)
        ]
        if lost:
            lines.append(f"{name}: {len(lost)} of its {len(rates)} trials diverged, at {', '.join(lost)}.")
        if unknown := sum(map(math.isnan, tuning.losses)):
            lines.append(f"{name}: the loss of {unknown} of its {len(rates)} trials is not known, their runs are gone.")
    certain = [name for name, tuning in found.items() if tuning.choice is None]
    if certain:
        lines.append(
            f"The chosen rates of {', '.join(certain)} are taken as the best: without two final seeds nobody knows how "
            "large the noise is by which they were chosen."
        )
    return lines


def _disagreements(found: Mapping[str, Tuning], folders: Mapping[Path, TuningFolder]) -> list[str]:
    """Trials whose runs do not say what the record says, and choices that the runs' own losses would not make."""
    lines = []
    for folder in folders.values():
        for scheme in folder.record.schemes:
            for trial in scheme.trials:
                run = folder.trials.get(trial.job)
                if run is None or trial.state not in ("finished", "diverged"):
                    continue
                then = math.inf if trial.loss is None else trial.loss
                now = _loss(run, trial, _RECORDED)
                if not run.is_complete and run.state != "diverged":
                    lines.append(
                        f"{_BELIED}: {trial.job} is {run.state}, the record has its loss {then:.4f}; run "
                        "moe-pretrain tune again."
                    )
                if then != now and not abs(then - now) <= _SAME_LOSS * abs(then):
                    lines.append(
                        f"{_BELIED}: {trial.job} has loss {now:.4f}, the record says "
                        f"{then:.4f}; run moe-pretrain tune again."
                    )
    for name, tuning in found.items():
        if not tuning.is_best:
            best = min(loss for loss in tuning.losses if not math.isnan(loss))
            lines.append(
                f"{name}: its final runs are not at the best of its trials ({tuning.losses[tuning.chosen]:.4f} against "
                f"{best:.4f}); run moe-pretrain tune again."
            )
    return lines
