"""Does every scheme learn, and do the papers' signatures show? All schemes, three seeds, on the built-in text.

    python scripts/tables/learning_table.py --jobs 2 --folder outputs/learning

A run is `moe-pretrain train` with one scheme and one seed; same rows in the same order, same initial weights by
global expert id, equal parameters (Autonomy-of-Experts by its equation 5; `dense` has equal active parameters
instead). Finished runs are kept, so the script may be stopped and started. At the end it prints the comparison
(`moe-pretrain compare`) and the signatures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows

SHAPE = (
    *("model=tiny", "model.num_layers=4", "model.hidden_size=96", "model.moe.expert_hidden_size=192"),
    *("model.sequence_length=128", "model.vocab_size=2048", "tokenizer.vocab_size=2048"),
    *("batch.global_batch_tokens=4096", "schedule.warmup_steps=20", "evaluation.max_rows=256", "metrics.wandb=off"),
    *(
        "metrics.progress=false",
        "metrics.log_every_steps=5",
        "evaluation.every_steps=50",
        "checkpoint.every_steps=1000",
    ),
)
VARIANTS = {
    "dense": ["router=dense"],
    "top_k": ["router=top_k"],
    "top_k_no_balance": ["router=top_k", "router.load_balance_weight=0", "router.router_z_weight=0"],
    "loss_free": ["router=loss_free"],
    "quantile": ["router=quantile"],
    "hash": ["router=hash"],
    "sinkhorn": ["router=sinkhorn"],
    "expert_choice": ["router=expert_choice"],
    "expert_threshold": ["router=expert_threshold"],
    "relu": ["router=relu"],
    "top_p": ["router=top_p"],
    "attention_importance": ["router=attention_importance"],
    "attentive": ["router=attentive"],
    "attentive_dense": ["router=attentive_dense"],
    "attentive_low_rank": ["router=attentive_low_rank"],
    "autonomy": ["router=autonomy"],
    "autonomy_no_balance": ["router=autonomy", "router.load_balance_weight=0"],
    "autonomy_top_p": ["router=autonomy_top_p"],
    "autonomy_expert_choice": ["router=autonomy_expert_choice"],
}
REFERENCE = "top_k load_balance_weight=0.01"
"""What `compare` calls the variant `top_k` beside the one without a balance loss."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path("outputs/learning"))
    options.add_argument("--tokens", type=int, default=614_400)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    options.add_argument("--overrides", nargs="+", default=[], help="key=value for every run, after the script's own")
    chosen = options.parse_args()
    jobs = [(variant, seed) for seed in chosen.seeds for variant in chosen.variants]
    train(jobs[0], chosen)  # alone, so that only one process prepares the corpus
    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(lambda job: train(job, chosen), jobs[1:]))
    subprocess.run(
        [sys.executable, "-m", "moe_pretrain", "compare", str(chosen.folder), "--reference", REFERENCE], check=True
    )
    draw(print_table(chosen), chosen.folder / "learning.png")
    print_signatures(chosen)


def print_table(chosen: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """A Markdown table of all variants, best first; of each the final losses and loads of its finished seeds."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    lines = {}
    for variant in chosen.variants:
        runs = Runs(variant, chosen)
        if not runs.losses:
            continue
        mean = statistics.fmean(runs.losses)
        spread = f"{min(runs.losses):.3f} to {max(runs.losses):.3f}"
        columns = [f"`{variant}`", f"{mean:.3f} ({spread}, {len(runs.losses)} seeds)"]
        loads = [] if variant == "dense" else runs.mean("load_max_over_mean", END)
        for name in ("experts_per_token", "load_max_over_mean", "router_entropy"):
            columns.append("" if variant == "dense" else f"{statistics.fmean(runs.mean(name, END)):.2f}")
        lines[variant] = "| " + " | ".join(columns) + " |"
        found[variant] = runs.losses, loads
    print("| scheme | final validation loss | experts per token | load max / mean | router entropy |")
    print("|---|---|---|---|---|")
    order = sorted(found, key=lambda variant: statistics.fmean(found[variant][0]))
    for variant in order:
        print(lines[variant])
    return {variant: found[variant] for variant in order}


def draw(found: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Final loss and load of every scheme, a dot per seed."""
    figure = Figure(figsize=(9, 0.28 * len(found) + 1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, index, title in zip(
        panels, (0, 1), ("final validation loss, nats per token", "largest load / mean load, last fifth"), strict=True
    ):
        for row, values in enumerate(found.values()):
            axes.plot(values[index], [row] * len(values[index]), "o", ms=5, alpha=0.7, color="#2563a8")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="x", color="#e6e6e6")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def train(job: tuple[str, int], chosen: argparse.Namespace) -> None:
    """One run, unless it is finished."""
    variant, seed = job
    folder = run_folder(variant, seed, chosen)
    rows = read_rows(folder / "metrics.jsonl")
    steps = chosen.tokens // 4096
    if any(row.get("event") == "finished" for row in rows):
        return
    words = [*VARIANTS[variant], *SHAPE, f"seed={seed}", f"run.name={folder.name}", f"run.output_dir={chosen.folder}"]
    words += [f"budget.tokens={steps * 4096}", *chosen.overrides]
    log = chosen.folder / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        command = [sys.executable, "-m", "moe_pretrain", "train", *words]
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    print(f"{folder.name}: {'done' if code == 0 else f'FAILED with {code}, see {log}'}", flush=True)


def run_folder(variant: str, seed: int, chosen: argparse.Namespace) -> Path:
    return chosen.folder / f"{variant}-seed{seed}"


class Runs:
    """The train rows and final losses of one variant, all finished seeds."""

    def __init__(self, variant: str, chosen: argparse.Namespace):
        folders = [run_folder(variant, seed, chosen) for seed in chosen.seeds]
        read = {seed: read_rows(folder / "metrics.jsonl") for seed, folder in zip(chosen.seeds, folders, strict=True)}
        kept = {seed: rows for seed, rows in read.items() if any(row.get("event") == "finished" for row in rows)}
        self.seeds, every = list(kept), list(kept.values())
        self.rows = [[row for row in rows if row["kind"] == "train"] for rows in every]
        self.losses = [[row["validation/loss"] for row in rows if row["kind"] == "validation"][-1] for rows in every]
        self.layers = yaml.safe_load((folders[0] / "config.yaml").read_text())["model"]["num_layers"]

    def mean(self, name: str, part: slice, layers: range | None = None) -> list[float]:
        """Of each seed: mean over layers and over the rows of ``part`` (by share of the run, in percent)."""
        return [
            statistics.fmean(
                row[f"moe/layer_{layer:02d}/{name}"]
                for row in cut(rows, part)
                for layer in layers or range(self.layers)
            )
            for rows in self.rows
        ]


def cut(rows: list[MetricsRow], part: slice) -> list[MetricsRow]:
    start, stop = (round(len(rows) * (bound or 0) / 100) for bound in (part.start, part.stop))
    start = min(start, len(rows) - 1)  # of a run of a few rows, the last
    return rows[start : max(stop, start + 1)]


END = slice(80, 100)


def print_signatures(chosen: argparse.Namespace) -> None:
    """Print the papers' signatures, found or not, on these runs."""
    has = set(chosen.variants)
    found = []

    def report(claim: str, holds: list[bool], figures: str) -> None:
        verdict = "found" if all(holds) else "not found" if not any(holds) else f"in {sum(holds)} of {len(holds)} seeds"
        found.append({"claim": claim, "verdict": verdict, "figures": figures})

    def numbers(values: list[float]) -> str:
        return ", ".join(f"{value:.3g}" for value in values)

    if {"autonomy_no_balance", "top_k_no_balance"} <= has:
        ours, plain = Runs("autonomy_no_balance", chosen), Runs("top_k_no_balance", chosen)
        for name, claim in (
            ("load_max_over_mean", "autonomy balances better than top_k, both without a balance loss"),
            ("router_entropy", "autonomy's routing entropy is lower than top_k's, both without a balance loss"),
        ):
            both = [seed for seed in ours.seeds if seed in plain.seeds]
            left, right = (
                [value for seed, value in zip(runs.seeds, runs.mean(name, END), strict=True) if seed in both]
                for runs in (ours, plain)
            )
            report(
                claim, [a < b for a, b in zip(left, right, strict=True)], f"{numbers(left)} against {numbers(right)}"
            )
    if "top_p" in has:
        runs = Runs("top_p", chosen)
        early, late = (runs.mean("experts_per_token", part) for part in (slice(5, 15), END))
        report(
            "top_p's mean number of experts falls during training",
            [b < a for a, b in zip(early, late, strict=True)],
            f"{numbers(early)} at a tenth, {numbers(late)} at the end",
        )
        low, high = (
            runs.mean("experts_per_token", END, layers) for layers in (range(1), range(runs.layers - 1, runs.layers))
        )
        report(
            "top_p uses more experts in low layers",
            [a > b for a, b in zip(low, high, strict=True)],
            f"{numbers(low)} in the lowest, {numbers(high)} in the highest layer",
        )
    if "quantile" in has:
        runs = Runs("quantile", chosen)
        first = [rows[0]["step"] for rows in runs.rows]
        values = runs.mean("load_max_over_mean", slice(0, 5))
        late = runs.mean("load_max_over_mean", END)
        report(
            "quantile balances within a few steps (largest load under 1.5 times the mean)",
            [value < 1.5 for value in values],
            f"{numbers(values)} over the first twentieth, from step {first[0]} on; {numbers(late)} at the end",
        )
    for row in found:
        print(f"{row['verdict']:>18}: {row['claim']} ({row['figures']})")
    (chosen.folder / "signatures.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
