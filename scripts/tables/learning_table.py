"""Does every scheme learn, and do the papers' signatures show? All schemes, tuned, several seeds, built-in text.

    python scripts/tables/learning_table.py --jobs 2 --folder outputs/learning
    python scripts/tables/learning_table.py --size wide --folder outputs/learning-wide

It is one `moe-pretrain tune` of all schemes (each has the same number of trials of its learning rate, by one run each
of the tuning seed, then a run for each final seed at the best), on the same rows in the same order with the same
initial weights by global expert id, at equal parameters (Autonomy-of-Experts by its equation 5; `dense` has equal
active parameters instead). The same command again goes on where it was stopped. At the end it writes
`moe-pretrain compare`'s page, the table, `learning.md`, with the signatures, and `learning.csv`, every run's loss.
"""

import argparse
import csv
import functools
import io
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from moe_pretrain.analysis.compare.comparison import MEASURES, Comparison, compare
from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.analysis.compare.statistics import Estimate
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.config.load import load
from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.system.exit_codes import STOPPED, USAGE_CODE
from moe_pretrain.system.files import write_whole
from moe_pretrain.verify.start_loudness import StartLoudness, start_loudness

STEP_TOKENS = 4096
SIZES = {
    "small": ["model.hidden_size=96", "model.moe.expert_hidden_size=192"],
    "wide": ["model.hidden_size=192", "model.moe.expert_hidden_size=384"],
}
SHAPE = [
    *("model=tiny", "model.num_layers=4"),
    *("model.sequence_length=128", "model.vocab_size=2048", "tokenizer.vocab_size=2048"),
    *(f"batch.global_batch_tokens={STEP_TOKENS}", "schedule.warmup_steps=20", "metrics.wandb=off"),
    *("metrics.progress=false", "metrics.log_every_steps=5", "checkpoint.every_steps=1000"),
    # 294,866 held-out tokens of 304 documents, once: at the end. Fewer rows are of fewer than 300 documents.
    *("evaluation.max_rows=2304", "evaluation.every_steps=1000"),
]
SCHEMES = {
    "dense": ["router=dense"],
    "random": ["router=random"],
    "uniform": ["router=uniform"],
    "top_k": ["router=top_k"],
    "top_k_no_balance": ["router=top_k", "router.load_balance_weight=0", "router.router_z_weight=0"],
    "top_k_factorised": ["router=top_k_factorised"],
    "loss_free": ["router=loss_free"],
    "quantile": ["router=quantile"],
    "hash": ["router=hash"],
    "sinkhorn": ["router=sinkhorn"],
    "k_means": ["router=k_means"],
    "unequal": ["router=top_k", "experts=unequal"],
    "moce_ir": ["router=moce_ir"],
    "dynmoe": ["router=dynmoe"],
    "moe_plus_plus": ["router=moe_plus_plus"],
    "orthogonal": ["combine=orthogonal"],
    "matrix_product": ["experts=matrix_product"],
    "thor": ["router=thor"],
    "lory": ["router=lory"],
    "smear": ["router=smear"],
    "expert_choice": ["router=expert_choice"],
    "expert_threshold": ["router=expert_threshold"],
    "relu": ["router=relu"],
    "top_p": ["router=top_p"],
    "top_p_renormalised": ["router=top_p_renormalised"],
    "attention_importance": ["router=attention_importance"],
    "attention_importance_renormalised": ["router=attention_importance_renormalised"],
    "attentive": ["router=attentive"],
    "attentive_dense": ["router=attentive_dense"],
    "attentive_low_rank": ["router=attentive_low_rank"],
    "autonomy": ["router=autonomy"],
    "autonomy_no_balance": ["router=autonomy", "router.load_balance_weight=0"],
    "autonomy_top_p": ["router=autonomy_top_p"],
    "autonomy_expert_choice": ["router=autonomy_expert_choice"],
}
REFERENCE = "top_k"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path("outputs/learning"))
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--steps", type=int, default=150, help=f"of {STEP_TOKENS} tokens")
    options.add_argument("--trials", type=int, default=5, help="of each scheme's learning rate")
    options.add_argument("--also", nargs="+", default=[], help="FIELD=VALUE,VALUE to be tried too, within the trials")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--tuning-seed", type=int, default=100)
    options.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    options.add_argument("--table-only", action="store_true", help="of what is there; starts nothing")
    options.add_argument("--overrides", nargs="+", default=[], help="key=value for every run, after the script's own")
    chosen = options.parse_args()
    code = 0 if chosen.table_only else tune(chosen)
    if code not in (0, 1):  # 1: some have no result; the table is of those that have
        return code
    table = LearningTable(chosen)
    text = table.text()
    write_whole(chosen.folder / "learning.md", text)
    write_whole(chosen.folder / "learning.csv", table.runs())
    table.draw(chosen.folder / "learning.png")
    print(text)
    return code


def shared_words(chosen: argparse.Namespace) -> list[str]:
    """Overrides of every run."""
    return [*SHAPE, *SIZES[chosen.size], *chosen.overrides]


def tune(chosen: argparse.Namespace) -> int:
    """Run what is left of the tuning; its exit code."""
    command = [sys.executable, "-m", "moe_pretrain", "tune", f"--trials={chosen.trials}"]
    command += [f"--tuning-seed={chosen.tuning_seed}"]
    command += [f"--also={field}" for field in chosen.also]
    command += [f"--scheme={shlex.join(SCHEMES[name])}" for name in chosen.schemes]
    command += [*shared_words(chosen), f"budget.tokens={chosen.steps * STEP_TOKENS}", f"sweep.parallel={chosen.jobs}"]
    command += [f"seed={','.join(map(str, chosen.seeds))}", f"sweep.name={chosen.folder.name}"]
    command += [f"run.output_dir='{chosen.folder.parent}'"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode if done.returncode >= 0 else STOPPED


@dataclass(frozen=True)
class Row:
    """One scheme of the table.

    Attributes:
        name: The scheme's.
        variant: Its final runs.
        losses: Of its final seeds.
    """

    name: str
    variant: Variant
    losses: list[float]


class LearningTable:
    """The table that the runs of the folder come to."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen = chosen
        self.found = compare_with(REFERENCE, chosen.folder)
        by_scheme = {each.scheme.words: name for name, each in self.found.tuned.items()}
        variants = {variant.name: variant for variant in self.found.variants}
        rows = []
        for name in chosen.schemes:
            variant = variants.get(by_scheme.get(tuple(SCHEMES[name]), ""))
            if variant is not None and self.found.losses[variant.name]:
                rows.append(Row(name, variant, list(self.found.losses[variant.name].values())))
        self.rows = sorted(rows, key=lambda row: statistics.fmean(row.losses))

    def text(self) -> str:
        """The table as Markdown, best first, and the signatures."""
        header = ["scheme", "validation loss", f"difference to `{REFERENCE}`", "place", "experts per token, training"]
        header += [
            "in evaluation",
            "load max / mean",
            "router entropy",
            "output at start",
            "experts' gradient at start",
        ]
        header += ["learning rate", "chosen in"]
        lines = [header, ["---"] * len(header), *map(self.line, self.rows)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        cautions = "\n".join(f"- {line}" for line in self.found.warnings)
        signatures = "\n".join(f"- **{verdict}:** {claim} ({figures})" for verdict, claim, figures in self.signatures())
        parts = [table, self.note(), "Signatures:" if signatures else "", signatures, "To be aware of:", cautions]
        return "\n\n".join(filter(None, parts)) + "\n"

    def runs(self) -> str:
        """All runs of the table as CSV: a line for each trial and each final run, losses in nats per token."""
        written = io.StringIO()
        lines = csv.writer(written, lineterminator="\n")
        lines.writerow(["scheme", "setting", "run", "seed", "validation loss"])
        for row in self.rows:
            tuned = self.found.tuned[row.variant.name]
            for trial in tuned.scheme.trials:
                setting = tuned.setting(trial)
                lines.writerow([row.name, setting, "trial", tuned.record.tuning_seed, trial.loss])
            for seed, loss in self.found.losses[row.variant.name].items():
                setting = tuned.setting(tuned.scheme.trials[tuned.chosen])
                lines.writerow([row.name, setting, "final", seed, loss])
        return written.getvalue()

    def note(self) -> str:
        """A line that says what the table is of."""
        tuned = next(iter(self.found.tuned.values()))
        tokens = self.chosen.steps * STEP_TOKENS
        searched = " and ".join(["learning rate", *self.chosen.also])
        return (
            f"{tokens:,} training tokens, `--size {self.chosen.size}`; {len(self.chosen.seeds)} final seeds with their "
            f"95% intervals, {tuned.record.trials} trials of each scheme's {searched} with seed "
            f"{tuned.record.tuning_seed}. Loads and entropies: means over layers, seeds and the last fifth of the run. "
            f"At start: relative to `{REFERENCE}`. Chosen in: the share of resamples in which this trial wins."
        )

    def line(self, row: Row) -> list[str]:
        """One scheme's cells."""
        name = row.variant.name
        ranked = next(each for each in self.found.ranking.places if each.name == name)
        paired, tuned = self.found.paired[name].difference, self.found.tuned[name]
        is_dense = row.name == "dense"
        shown = ("experts_per_token", "validation_experts_per_token", "load_max_over_mean", "router_entropy")
        loudness = [""] * 2 if is_dense else [f"{value:.2f}" for value in self.loudness(row.name)]
        return [
            f"`{row.name}`",
            interval(ranked.estimate),
            "" if name == self.found.reference or paired is None else interval(paired, "+"),
            f"{ranked.rank} to {ranked.last_rank}" if ranked.equals else str(ranked.rank),
            *("" if is_dense else self.measured(row.variant, measure) for measure in shown),
            *loudness,
            tuned.setting(tuned.scheme.trials[tuned.chosen]) + (" (edge)" if tuned.at_edge else ""),
            "" if tuned.choice is None else f"{tuned.choice.shares[tuned.chosen]:.0%}",
        ]

    def measured(self, variant: Variant, measure: str) -> str:
        """Mean over seeds of one of ``compare``'s numbers."""
        values = variant.by_seed(MEASURES[measure][1])
        return f"{statistics.fmean(values.values()):.2f}" if values else ""

    def loudness(self, name: str) -> tuple[float, float]:
        """Output and experts' gradient of a scheme at step 0, relative to the reference's."""
        own, to = self.at_start(name), self.reference_at_start
        return own.output / to.output, own.expert_gradient / to.expert_gradient

    @functools.cached_property
    def reference_at_start(self) -> StartLoudness:
        return self.at_start(REFERENCE)

    def at_start(self, name: str) -> StartLoudness:
        config = load([*SCHEMES[name], *shared_words(self.chosen)])
        return start_loudness(config.model, config.router, seed=0)

    def draw(self, path: Path) -> None:
        """Final loss and load of every scheme, a dot per seed."""
        figure = Figure(figsize=(9, 0.28 * len(self.rows) + 1), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        loads = [list(row.variant.by_seed(MEASURES["load_max_over_mean"][1]).values()) for row in self.rows]
        titles = ("final validation loss, nats per token", "largest load / mean load, last fifth")
        for axes, values, title in zip(panels, ([row.losses for row in self.rows], loads), titles, strict=True):
            for place, dots in enumerate(values):
                axes.plot(dots, [place] * len(dots), "o", ms=5, alpha=0.7, color="#2563a8")
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(axis="x", color="#e6e6e6")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        panels[0].set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        panels[0].invert_yaxis()
        figure.savefig(path, dpi=110)

    def signatures(self) -> list[tuple[str, str, str]]:
        """The papers' reports, found or not, on these runs: verdict, claim, figures."""
        rows = {row.name: row for row in self.rows}
        found: list[tuple[str, str, str]] = []

        def by_seed(claim: str, holds: Sequence[bool], figures: str) -> None:
            some = f"in {sum(holds)} of {len(holds)} seeds"
            found.append(("found" if all(holds) else some if any(holds) else "not found", claim, figures))

        def no_worse(name: str, claim: str, also: bool = True, more: str = "") -> None:
            """A claim that a scheme's loss is at most the reference's, with its interval."""
            paired = self.found.paired[rows[name].variant.name]
            if paired.difference is None or paired.verdict == "not tested":
                found.append(("not tested", claim, "fewer than two seeds"))
                return
            holds = {"better": "found", "worse": "not found"}.get(paired.verdict, "not distinguishable")
            found.append((holds if also else "not found", claim, interval(paired.difference, "+") + more))

        if {"autonomy", REFERENCE} <= rows.keys():
            no_worse("autonomy", f"autonomy's loss is at or below {REFERENCE}'s at equal parameters")
        if {"top_p", REFERENCE} <= rows.keys():
            measure = MEASURES["validation_experts_per_token"][1]
            experts = {
                name: statistics.fmean(rows[name].variant.by_seed(measure).values()) for name in ("top_p", REFERENCE)
            }
            fewer = experts["top_p"] < experts[REFERENCE]
            figures = f"; {experts['top_p']:.2f} experts per token in evaluation against {experts[REFERENCE]:.2f}"
            no_worse("top_p", f"top_p's loss is at or below {REFERENCE}'s with fewer experts", fewer, figures)
        if {"autonomy_no_balance", "top_k_no_balance"} <= rows.keys():
            for name, claim in (
                ("load_max_over_mean", "autonomy balances better than top_k, both without a balance loss"),
                ("router_entropy", "autonomy's routing entropy is lower than top_k's, both without a balance loss"),
            ):
                ours, plain = (
                    rows[scheme].variant.by_seed(MEASURES[name][1])
                    for scheme in ("autonomy_no_balance", "top_k_no_balance")
                )
                both = sorted(ours.keys() & plain.keys())
                left, right = [ours[seed] for seed in both], [plain[seed] for seed in both]
                holds = [a < b for a, b in zip(left, right, strict=True)]
                by_seed(claim, holds, f"{numbers(left)} against {numbers(right)}")
        if "top_p" in rows:
            variant = rows["top_p"].variant
            early, late = (means(variant, "experts_per_token", part) for part in (slice(5, 15), END))
            by_seed(
                "top_p's mean number of experts falls during training",
                [b < a for a, b in zip(early, late, strict=True)],
                f"{numbers(early)} at a tenth, {numbers(late)} at the end",
            )
            last = variant.counted[0].values["model.num_layers"] - 1
            low, high = (means(variant, "experts_per_token", END, [layer]) for layer in (0, last))
            by_seed(
                "top_p uses more experts in low layers",
                [a > b for a, b in zip(low, high, strict=True)],
                f"{numbers(low)} in the lowest, {numbers(high)} in the highest layer",
            )
        if "quantile" in rows:
            variant = rows["quantile"].variant
            early, late = (means(variant, "load_max_over_mean", part) for part in (slice(0, 5), END))
            first = variant.counted[0].train[0]["step"]
            by_seed(
                "quantile balances within a few steps (largest load under 1.5 times the mean)",
                [value < 1.5 for value in early],
                f"{numbers(early)} over the first twentieth, from step {first} on; {numbers(late)} at the end",
            )
        return found


def compare_with(scheme: str, folder: Path) -> Comparison:
    """The comparison of a folder to the variant of a scheme, if that is there; its page is written."""
    found = compare(folder)
    words = tuple(SCHEMES[scheme])
    reference = next((name for name, each in found.tuned.items() if each.scheme.words == words), found.reference)
    write_comparison(folder, reference)
    return found if found.reference == reference else compare(folder, reference)


def interval(value: Estimate, sign: str = "") -> str:
    text = f"{value.mean:{sign}.3f}"
    return text if math.isnan(value.low) else f"{text} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


END = slice(80, 100)


def means(variant: Variant, name: str, part: slice, layers: Sequence[int] | None = None) -> list[float]:
    """Of each seed: mean over layers and over the rows of ``part`` (by share of the run, in percent)."""
    number = variant.values["model.num_layers"]
    return [
        statistics.fmean(
            row[f"moe/layer_{layer:02d}/{name}"] for row in cut(run.train, part) for layer in layers or range(number)
        )
        for run in variant.counted
    ]


def cut(rows: Sequence[MetricsRow], part: slice) -> Sequence[MetricsRow]:
    start, stop = (round(len(rows) * (bound or 0) / 100) for bound in (part.start, part.stop))
    start = min(start, len(rows) - 1)  # of a run of a few rows, the last
    return rows[start : max(stop, start + 1)]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"learning_table: {error}", file=sys.stderr)
        sys.exit(USAGE_CODE)
