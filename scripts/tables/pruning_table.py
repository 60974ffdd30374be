"""Losses of one run pruned by every method: what it costs, and how much of it tuning brings back.

    python scripts/tables/pruning_table.py outputs/tiny-top_k --experts 4 --steps 50 --folder outputs/pruned

`moe-pretrain prune` writes a run for each method; each is then trained for the same number of steps on rows that it has
not seen in that order (another seed), with fresh moments, and so is the run as it was. SEER-MoE's own tuning, with
a loss on the router's entropy, is a row of its own for each `--entropy-weights`. Words behind `--overrides` are of the
tuning: `optimizer.learning_rate=`, `optimizer.trainable=routers`. Prints a Markdown table of validation losses.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from moe_pretrain.run_folder.provenance import read_config, read_overrides
from moe_pretrain.run_folder.record import load_rows
from moe_pretrain.surgery.pruning_methods import METHODS

SEED = 1_000_003
"""Of the rows of tuning, which are the same for all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--experts", type=int, required=True, help="experts of a layer that stay")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of tuning")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "router_norm"])
    parser.add_argument("--before", type=Path, help="earlier checkpoint of the run, for the method router_norm")
    parser.add_argument("--rows", type=int, default=64, help="training rows that are looked at")
    parser.add_argument(
        "--entropy-weights", nargs="*", default=["0.01"], help="of SEER-MoE's tuning, where it is pruned so"
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="key=value, of the tuning")
    options = parser.parse_args()
    losses = prune(options)
    before = next(iter(losses.values()))[0]
    header = f"{options.steps} steps of tuning"
    print(f"| pruned by | loss before | after | {header} |\n|---|---|---|---|", flush=True)
    print(f"| (not pruned) | {before:.4f} | {before:.4f} | {tuned(options, 'whole', options.run):.4f} |", flush=True)
    for method, (_, after) in losses.items():
        place = options.folder / f"{options.run.resolve().name}-{method}-{options.experts}"
        variants = {method: []}
        if method == "seer":
            variants |= {
                f"seer, entropy {weight}": [f"router.entropy_weight={weight}"] for weight in options.entropy_weights
            }
        for label, words in variants.items():
            name = label.replace(", entropy ", "-entropy-")
            found = tuned(options, name, place, *words)
            print(f"| `{label}` | {before:.4f} | {after:.4f} | {found:.4f} |", flush=True)


def prune(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Validation losses before and after, by method."""
    plain = [method for method in options.methods if method != "router_norm"]
    asked = [[f"--method={','.join(plain)}"]] if plain else []
    if "router_norm" in options.methods:
        asked.append(["--method=router_norm", f"--before={options.before}"])
    found = {}
    for words in asked:
        own = [str(options.run), f"--experts={options.experts}", f"--rows={options.rows}", f"--to={options.folder}"]
        for line in started("prune", *own, *words).splitlines():
            name, *columns = line.split() or [""]
            if name in options.methods:  # NAME 8 -> 4 BEFORE AFTER FOLDER
                found[name] = (float(columns[3]), float(columns[4]))
    return {method: found[method] for method in options.methods}


def tuned(options: argparse.Namespace, name: str, start: Path, *words: str) -> float:
    """Validation loss of the run in ``start`` after the steps of tuning, which are a run of their own."""
    recorded = read_overrides(start)
    tokens = read_config(options.run)["batch"]["global_batch_tokens"]
    own = [
        *(f"checkpoint.warm_start={start}", f"run.name={name}-tuned", f"run.output_dir={options.folder}"),
        *(f"seed={SEED}", f"budget.tokens={options.steps * tokens}", f"schedule.warmup_steps={options.steps // 5}"),
        *("run.report=false", "metrics.wandb=off"),
    ]
    taken = {word.partition("=")[0] for word in own}
    kept = [word for word in recorded if word.partition("=")[0] not in taken]
    started("train", *kept, *own, *options.overrides, *words)
    return float(load_rows(options.folder / f"{name}-tuned")["validation"][-1]["validation/loss"])


def started(*words: str) -> str:
    """Standard output of a command of the program; ends this one where it fails."""
    command = [sys.executable, "-m", "moe_pretrain", *words]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
