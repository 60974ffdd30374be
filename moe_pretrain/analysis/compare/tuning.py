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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance

import numpy as np

from moe_pretrain.analysis.compare.statistics import Sample, shared_prior
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.run_folder.record import RunRecord
from moe_pretrain.run_folder.tune_record import TunedScheme, TuneRecord, TuningFolder, TuningTrial

RESAMPLES = 10_000
_SAME_LOSS = 1e-6
"""Largest relative difference between a trial's loss in the record and in its run's own rows."""
_RECORDED = "validation/loss"
"""The number that the record holds of a trial."""


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
        losses: Loss of each trial, in the unit of the comparison; infinite where it diverged.
        choice: How sure the choice is; None where the noise between seeds is not known.
    """

    scheme: TunedScheme
    record: TuneRecord
    losses: list[float]
    choice: Choice | None = None

    @property
    def chosen(self) -> int:
        """Place of the chosen trial."""
        return next(at for at, trial in enumerate(self.scheme.trials) if trial.values == self.scheme.chosen)

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


def tunings(variants: Sequence[Variant], folders: Mapping[Path, TuningFolder], key: str) -> dict[str, Tuning]:
    """Variant -> its tuning, of those whose runs are final runs of a tuned scheme.

    Args:
        variants: Of the compared runs.
        folders: From ``split_trials``.
        key: The number that is compared.
    """
    found: dict[str, Tuning] = {}
    for variant in variants:
        for run in variant.runs:
            folder = folders.get(run.folder.parent)
            if folder is None or variant.name in found:
                continue
            for scheme in folder.record.schemes:
                if run.folder.name in scheme.finals and scheme.chosen is not None:
                    losses = [_loss(folder.trials.get(trial.job), trial, key) for trial in scheme.trials]
                    found[variant.name] = Tuning(scheme, folder.record, losses)
    return found


def _is_made(run: RunRecord | None, trial: TuningTrial) -> bool:
    """Whether a trial has ended, by its run: a later command without its scheme leaves it ``waiting`` in the record."""
    return trial.state != "waiting" if run is None else run.state in ("finished", "diverged", "failed")


def _loss(run: RunRecord | None, trial: TuningTrial, key: str) -> float:
    """A trial's number by its run's own rows, else by the record; infinite where it diverged."""
    if run is None:
        loss = trial.loss if key == _RECORDED else None
    else:
        loss = None if run.state == "diverged" else run.final(key)
    return math.inf if loss is None else loss


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
        losses: Of the trials, at least one of them finite.
        noise: Variance of one trial's loss.
    """
    curve = np.array(losses)
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
    found: Mapping[str, Tuning], variants: Sequence[Variant], folders: Mapping[Path, TuningFolder]
) -> list[str]:
    """Warn of what makes tuned variants less comparable than they seem."""
    lines = _disagreements(found, folders)
    for folder in folders.values():
        for scheme in folder.record.schemes:
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
        if tuning.scheme.at_edge:
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
                if then != now and not abs(then - now) <= _SAME_LOSS * abs(then):
                    lines.append(
                        f"THE TUNE RECORD IS NOT OF THESE RUNS: {trial.job} has loss {now:.4f}, the record says "
                        f"{then:.4f}; run moe-pretrain tune again."
                    )
    for name, tuning in found.items():
        best = min(tuning.losses)
        if tuning.losses[tuning.chosen] > best:
            lines.append(
                f"{name}: its final runs are not at the best of its trials ({tuning.losses[tuning.chosen]:.4f} against "
                f"{best:.4f}); run moe-pretrain tune again."
            )
    return lines
