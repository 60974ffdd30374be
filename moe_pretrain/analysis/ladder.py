"""Ladders: runs of one scheme over sizes and tokens, the law that they follow, and what it says of larger scales."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_pretrain.analysis import measures
from moe_pretrain.analysis.compare.variants import names_apart
from moe_pretrain.analysis.scaling_law import (
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    NUM_CONSTANTS,
    RESAMPLES,
    Fit,
    PercentileInterval,
    fit,
)
from moe_pretrain.run_folder.identity import deciding
from moe_pretrain.run_folder.record import RunRecord
from moe_pretrain.run_folder.tune_record import split_trials
from moe_pretrain.system.words import few, short_number

Count = Literal["active", "total"]
Table = tuple[Sequence[str], list[list[str]]]
"""Header and lines."""
MIN_SIZES = 4
_NOTHING = 0.01
"""Share of the lowest loss below which E is none."""
_GROWS = (
    *("seed", "run", "sweep", "budget", "batch", "schedule", "engine", "spike", "evaluation", "checkpoint"),
    *("optimizer.learning_rate", "optimizer.weight_decay", "model.name", "model.num_layers", "model.hidden_size"),
    *("model.num_heads", "model.num_key_value_heads", "model.head_size", "model.ffn_hidden_size", "model.init_std"),
    *("model.moe.expert_hidden_size", "model.moe.shared_expert_hidden_size", "model.moe.num_experts"),
    *("model.moe.num_leading_dense_layers", "model.moe.gate_rank", "router.gate_rank"),
    "model.moe.latent_size",
)
"""Fields that may differ within a ladder: size, length, and what is set for them; but not what a run began with."""


@dataclass(frozen=True)
class Rung:
    """One run of a ladder.

    Attributes:
        run: The run.
        parameters: Its parameters, those that a token uses or all.
        tokens: Tokens that it has read.
        loss: Of its last validation, nats.
        flops: FLOPs that it has spent.
    """

    run: RunRecord
    parameters: float
    tokens: float
    loss: float
    flops: float


@dataclass(frozen=True)
class Ladder:
    """The runs of one scheme, and their law.

    Attributes:
        name: What sets the scheme apart from the others.
        rungs: By size, tokens and seed.
        fit: The law and its resamples.
    """

    name: str
    rungs: list[Rung]
    fit: Fit

    @property
    def cells(self) -> list[tuple[int, float, int]]:
        """Size, as its place among the sizes, tokens and seed of each run."""
        sizes = _sizes(self.rungs)
        return [(sizes.index(rung.parameters), rung.tokens, rung.run.seed) for rung in self.rungs]

    @property
    def knows_later_tokens(self) -> bool:
        """Whether its losses are no language model's: a token's experts depend on what comes after."""
        return not all(rung.run.facts.get("causal_in_evaluation", True) for rung in self.rungs)

    @property
    def flops_factor(self) -> float:
        """FLOPs of a run over its parameters times its tokens, geometric mean."""
        return math.exp(np.mean([math.log(rung.flops / rung.parameters / rung.tokens) for rung in self.rungs]))

    def interval(self, name: str) -> PercentileInterval:
        """One constant of the law."""
        return PercentileInterval.of(getattr(self.fit.law, name), [getattr(law, name) for law in self.fit.resampled])

    def is_decided(self, name: str) -> bool:
        """Whether the runs decide E or an exponent: its interval ends within what was searched, and E above zero."""
        interval = self.interval(name)
        if name == "irreducible":
            return interval.low > _NOTHING * min(rung.loss for rung in self.rungs)
        return 1.01 * LEAST_EXPONENT < interval.low and interval.high < 0.99 * LARGEST_EXPONENT  # it stays inside

    def best_parameters(self, flops: float) -> PercentileInterval:
        """Parameters of the lowest loss that ``flops`` can buy."""
        both = flops / self.flops_factor
        return PercentileInterval.of(
            self.fit.law.best_parameters(both), [law.best_parameters(both) for law in self.fit.resampled]
        )


def read_ladders(
    runs: Sequence[RunRecord], root: Path, count: Count = "active", leave_out: bool = False
) -> list[Ladder]:
    """Ladders of the runs below ``root``, one for each scheme.

    Args:
        runs: Runs in any state; trials of a tuning, copies, and runs without an end are no part of one.
        root: Folder, for the messages.
        count: Which parameters are N.
        leave_out: Go on without runs that diverged.

    Raises:
        ValueError: A run diverged, there are too few sizes or runs, sizes and tokens go together, or runs read, or
            were validated on, different text.
    """
    final, _ = split_trials(list(runs))
    diverged = [run.name for run in final if run.state == "diverged"]
    if diverged and not leave_out:
        raise ValueError(
            f"FOLDER={root}: {len(diverged)} runs diverged ({few(diverged)}): their losses are on no law; "
            "--without-diverged leaves them out"
        )
    once: dict[tuple[str, float, float], Rung] = {}
    for run in final:
        if run.state == "finished" and (rung := _rung(run, count)) is not None:
            once.setdefault((str(sorted(deciding(run.values).items())), rung.parameters, rung.tokens), rung)
    own = list(once.values())
    if len({str(rung.run.facts.get("corpus_fingerprint")) for rung in own}) > 1:
        raise ValueError(f"FOLDER={root}: runs read different corpora: losses of other text are on no common law")
    texts = {str(text) for rung in own if (text := rung.run.facts.get("validation_text"))}
    if len(texts) > 1:
        raise ValueError(f"FOLDER={root}: runs were validated on different rows: evaluation.max_rows must be the same")
    schemes: dict[str, tuple[dict[str, Any], list[Rung]]] = {}
    for rung in own:
        values = _scheme(rung.run.values)
        schemes.setdefault(str(sorted(values.items(), key=str)), (values, []))[1].append(rung)
    names = names_apart([values for values, _ in schemes.values()], ())
    if not schemes:
        raise ValueError(f"FOLDER={root} must have finished runs below it, with a validation and counted parameters")
    ladders: list[Ladder] = []
    for name, (_, rungs) in zip(names, schemes.values(), strict=True):
        rungs.sort(key=lambda rung: (rung.parameters, rung.tokens, rung.run.seed))
        _check(name, rungs, root)
        ladders.append(Ladder(name, rungs, _fit(rungs, 0)))
    # Of runs of the same sizes, tokens and seeds the draws are the same, and what a seed does to both cancels.
    first = ladders[0].cells
    return [
        ladder if ladder.cells == first else Ladder(ladder.name, ladder.rungs, _fit(ladder.rungs, seed=number))
        for number, ladder in enumerate(ladders)
    ]


def _fit(rungs: Sequence[Rung], seed: int) -> Fit:
    parameters, tokens, losses = (
        np.array([getattr(rung, name) for rung in rungs]) for name in ("parameters", "tokens", "loss")
    )
    return fit(parameters, tokens, losses, seed, RESAMPLES)


def _rung(run: RunRecord, count: Count) -> Rung | None:
    loss, parameters = run.final("validation/loss"), run.facts.get(f"{count}_parameters")
    flops = measures.training_flops(run.train)
    if loss is None or parameters is None or not len(flops) or not flops[-1] > 0:
        return None
    return Rung(run, float(parameters), float(run.validation[-1]["tokens"]), loss, float(flops[-1]))


def _scheme(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in deciding(values).items()
        if key == "checkpoint.warm_start" or not any(key == grows or key.startswith(f"{grows}.") for grows in _GROWS)
    }


def _sizes(rungs: Sequence[Rung]) -> list[float]:
    return sorted({rung.parameters for rung in rungs})


def _check(name: str, rungs: Sequence[Rung], root: Path) -> None:
    """Raise if these runs do not decide the five constants."""
    sizes, tokens = _sizes(rungs), {rung.tokens for rung in rungs}
    word = f"FOLDER={root}: {name or 'the scheme'} has"
    if len(sizes) < MIN_SIZES:
        listed = ", ".join(short_number(size) for size in sizes)
        raise ValueError(
            f"{word} {len(sizes)} size{'s' * (len(sizes) > 1)} ({listed} parameters) and must have at least "
            f"{MIN_SIZES}: fewer do not decide an exponent; train --multirun over more models"
        )
    if len(tokens) < 3:
        raise ValueError(f"{word} runs of {len(tokens)} lengths and must have at least 3: budget.tokens=A,B,C")
    if len(rungs) <= NUM_CONSTANTS + 1:
        raise ValueError(
            f"{word} {len(rungs)} runs and must have at least {NUM_CONSTANTS + 2}: the law has five constants"
        )
    points = np.log([[rung.parameters, rung.tokens] for rung in rungs])
    if abs(np.corrcoef(points.T)[0, 1]) > 0.99:
        raise ValueError(
            f"{word} tokens that follow sizes, and each size must have two lengths: their parts cannot be told"
        )


@dataclass(frozen=True)
class Gain:
    """Loss of the reference less that of another scheme, where both are measured and at a larger scale.

    Attributes:
        name: The other scheme.
        here: At the largest size and length of the reference's ladder.
        there: At ``scale`` times both.
        is_of_a_kind: Whether both or none of the two losses know later tokens.
    """

    name: str
    here: PercentileInterval
    there: PercentileInterval
    is_of_a_kind: bool = True

    @property
    def verdict(self) -> str:
        """Verdict on the gain at the larger scale, in words."""
        if not self.is_of_a_kind:
            return "not tested: one loss knows later tokens"
        if not self.there.sign:
            return "cannot be told" if self.here.sign else "no difference can be told"
        if self.here.sign and self.here.sign != self.there.sign:
            return "reverses"
        return ("survives" if self.here.sign else "appears") if self.there.sign > 0 else "is worse"


def gains(ladders: Sequence[Ladder], reference: Ladder, scale: float) -> list[Gain]:
    """Gains over the reference at its largest run and at ``scale`` times its parameters and its tokens."""
    parameters, tokens = (max(getattr(rung, name) for rung in reference.rungs) for name in ("parameters", "tokens"))

    def gain(other: Ladder, factor: float) -> PercentileInterval:
        place = factor * parameters, factor * tokens
        pairs = zip(reference.fit.resampled, other.fit.resampled, strict=True)
        value = reference.fit.law.loss(*place) - other.fit.law.loss(*place)
        return PercentileInterval.of(value, [one.loss(*place) - two.loss(*place) for one, two in pairs])

    return [
        Gain(
            other.name,
            gain(other, 1.0),
            gain(other, scale),
            other.knows_later_tokens == reference.knows_later_tokens,
        )
        for other in ladders
        if other is not reference
    ]


def choose_reference(ladders: Sequence[Ladder], asked: str | None) -> Ladder:
    """The ladder whose name is, or else contains, ``asked``; by default ``top_k``'s, else the first."""
    found = [ladder for ladder in ladders if asked is not None and asked in ladder.name.split(" ")]
    found = found or [ladder for ladder in ladders if (asked or "top_k") in ladder.name]
    if asked is not None and len(found) != 1:
        listed = ", ".join(repr(ladder.name) for ladder in ladders)
        raise ValueError(f"--reference={asked!r} must be one of the schemes {listed}")
    return (found or list(ladders))[0]


def law_table(ladders: Sequence[Ladder]) -> Table:
    """Header and lines: the constants of each scheme's law with 95% intervals."""
    header = ["Scheme", "Runs", "Sizes", "E", "alpha", "beta", "A", "B", "Residual"]
    lines = []
    for ladder in ladders:
        law = ladder.fit.law
        exact = [
            _words(ladder.interval(name), ".3f") + ("" if ladder.is_decided(name) else " NOT DECIDED")
            for name in ("irreducible", "alpha", "beta")
        ]
        scales = [f"{law.of_parameters:.3g}", f"{law.of_tokens:.3g}", f"{ladder.fit.residual:.2%}"]
        name = ladder.name or "all runs"
        lines.append([name, str(len(ladder.rungs)), str(len(_sizes(ladder.rungs))), *exact, *scales])
    return header, lines


def optimum_table(ladders: Sequence[Ladder], scale: float) -> Table:
    """Header and lines: the size of the lowest loss for the FLOPs of the dearest run, and for more."""
    header = ["Scheme", "FLOPs", "Parameters", "Tokens", "Loss"]
    lines = []
    for ladder in ladders:
        most = max(rung.flops for rung in ladder.rungs)
        for flops in (most, scale**2 * most):
            best = ladder.best_parameters(flops)
            tokens = flops / ladder.flops_factor / best.value
            size = f"{short_number(best.value)} [{short_number(best.low)}, {short_number(best.high)}]"
            loss = ladder.fit.law.loss(best.value, tokens)
            lines.append([ladder.name or "all runs", f"{flops:.3g}", size, short_number(tokens), f"{loss:.3f}"])
    return header, lines


def gain_table(found: Sequence[Gain], reference: str, scale: float) -> Table:
    """Header and lines: whether each scheme's gain over the reference survives."""
    header = ["Scheme", f"Gain over {reference}, nats, at its largest run", f"at {scale:g} times both", "The gain"]
    return header, [[gain.name, _words(gain.here, "+.4f"), _words(gain.there, "+.4f"), gain.verdict] for gain in found]


def _words(interval: PercentileInterval, form: str) -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def as_values(ladders: Sequence[Ladder], found: Sequence[Gain]) -> dict[str, Any]:
    """Plain values of laws, runs and gains, for a file."""
    return {
        "ladders": [
            {
                "scheme": ladder.name,
                "law": asdict(ladder.fit.law),
                "intervals": {name: asdict(ladder.interval(name)) for name in asdict(ladder.fit.law)},
                "runs": [
                    {"run": rung.run.name, **{name: getattr(rung, name) for name in ("parameters", "tokens", "loss")}}
                    for rung in ladder.rungs
                ],
            }
            for ladder in ladders
        ],
        "gains": [{**asdict(gain), "verdict": gain.verdict} for gain in found],
    }
