"""Does the best learning rate stay where it is when the model grows? Short trainings over rates and one axis.

    python scripts/tables/rate_transfer.py --folder outputs/transfer                      # width; width_aware, mup
    python scripts/tables/rate_transfer.py --folder outputs/transfer --axis top_k --inits mup

Every training is a model of two layers and four experts on the bytes of the built-in text, in one process and float32
without DeepSpeed: the same rows in the same order for all, each row once, a warm-up and a linear decay to a tenth.
Its loss is the mean of its last fifth of steps. Finished trainings are kept in the folder, so the script may be stopped
and started, and another axis adds to it. The best rate is the vertex of a parabola through the lowest loss and its
neighbours over log rate.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
from coordinate_check import AXES
from matplotlib.figure import Figure

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config
from moe_pretrain.data.documents.builtin import builtin_pieces, builtin_row
from moe_pretrain.data.documents.document import LeftOut
from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batch
from moe_pretrain.verify.coordinate_check import PlainTraining

SHAPE = (
    *("model=tiny", "model.num_layers=2", "model.vocab_size=256", "tokenizer=pretrained", "tokenizer.path=bytes"),
    *("model.sequence_length=64", "model.moe.num_experts=4", "model.mup_base_width=64", "model.mup_base_layers=2"),
)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
VALUES = {"width": [64, 128, 256], "depth": [2, 4, 8], "num_experts": [4, 8, 16], "top_k": [1, 2, 4]}
VALUES["expert_width"] = [64, 128, 256]
WARMUP = 10
Losses = dict[tuple[str, int], dict[float, float]]
"""By init and value of the axis: loss over rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for moe-pretrain train")
    parser.add_argument("--folder", type=Path, required=True, help="where finished trainings are kept")
    parser.add_argument("--axis", default="width", choices=AXES, help="what grows")
    parser.add_argument("--values", nargs="+", type=int, metavar="N", help="its values, for each axis some by default")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), metavar="RATE")
    parser.add_argument("--inits", nargs="+", default=["width_aware", "mup"], metavar="INIT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="of the weights")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--picture", type=Path, help="also draw the losses, to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    values = options.values or VALUES[options.axis]
    batches: list[MicroBatch] = []
    found: Losses = {}
    for init in options.inits:
        for value in values:
            words = [*SHAPE, *AXES[options.axis][1](value), f"model.init={init}", *options.overrides]
            config = load(words)
            for rate in options.rates:
                losses = []
                for seed in options.seeds:
                    key = json.dumps([words, rate, seed, options.steps, options.rows])
                    if (loss := kept(options.folder).get(key)) is None:
                        batches = batches or read_batches(config, options.steps, options.rows)
                        loss = train(config, batches, rate, seed)
                        with (options.folder / "trainings.jsonl").open("a") as file:
                            file.write(json.dumps({"key": key, "loss": loss}) + "\n")
                        print(f"{init} {options.axis}={value} rate {rate:g} seed {seed}: {loss:.4f}", flush=True)
                    losses.append(loss)
                found.setdefault((init, value), {})[rate] = statistics.fmean(losses)
    print(f"\n{options.steps} steps of {options.rows * 64:,} bytes; loss by rate, lowest in bold\n")
    print(table(found, options.axis, options.rates))
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(found, options.axis).savefig(options.picture, dpi=110)


def kept(folder: Path) -> dict[str, float]:
    """Losses of the trainings that are finished."""
    file = folder / "trainings.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["key"]: row["loss"] for row in rows}


def read_batches(config: Config, steps: int, rows: int) -> list[MicroBatch]:
    """The text as bytes, cut into rows, in an order drawn once; each row is one document."""
    length = config.model.sequence_length + 1
    needed, text = steps * rows * length, bytearray()
    pieces = builtin_pieces()
    for index in np.random.default_rng(0).permutation(len(pieces)):
        row = builtin_row(pieces[index].name)
        if not isinstance(row, LeftOut):
            text += row.text.encode()
        if len(text) >= 4 * needed:  # so that rows of one file are spread over the steps
            break
    whole = np.frombuffer(bytes(text[: len(text) // length * length]), dtype=np.uint8).reshape(-1, length)
    chosen = whole[np.random.default_rng(1).permutation(len(whole))[: steps * rows]].astype(np.int64)
    return [
        build_micro_batch(part, np.zeros(part.shape, dtype=bool), np.arange(rows) + step * rows, True)
        for step, part in enumerate(np.split(chosen, steps))
    ]


def train(config: Config, batches: list[MicroBatch], rate: float, seed: int) -> float:
    """Mean loss of the last fifth of the steps; infinite if it is not finite."""
    run, losses = PlainTraining(config, seed), []
    warmup = min(WARMUP, len(batches) // 4)
    for step, batch in enumerate(batches):
        decayed = 1 - 0.9 * max(0, step + 1 - warmup) / max(1, len(batches) - warmup)
        losses.append(run.step(batch, rate * min((step + 1) / max(1, warmup), decayed)))
    loss = statistics.fmean(losses[-max(1, len(losses) // 5) :])
    return loss if math.isfinite(loss) else math.inf


def best_rate(losses: dict[float, float]) -> float:
    """Vertex of the parabola over log rate through the lowest loss and its neighbours; at an end the end itself."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if at in (0, len(rates) - 1) or math.inf in (losses[rates[at - 1]], losses[rates[at + 1]]):
        return rates[at]
    square, linear, _ = np.polyfit(np.log(rates[at - 1 : at + 2]), [losses[rate] for rate in rates[at - 1 : at + 2]], 2)
    return float(np.exp(-linear / (2 * square)))


def table(found: Losses, axis: str, rates: list[float]) -> str:
    lines = [
        f"| init | {axis} | " + " | ".join(f"{rate:g}" for rate in rates) + " | best rate |",
        "|---|---|" + "---|" * (len(rates) + 1),
    ]
    for (init, value), losses in found.items():
        low = min(losses.values())
        cells = [f"**{losses[rate]:.3f}**" if losses[rate] == low else f"{losses[rate]:.3f}" for rate in rates]
        lines.append(f"| {init} | {value} | {' | '.join(cells)} | {best_rate(losses):.2g} |")
    return "\n".join(lines)


def draw(found: Losses, axis: str) -> Figure:
    """A panel for each init: loss over rate, a line for each value of the axis."""
    inits = list(dict.fromkeys(init for init, _ in found))
    figure = Figure(figsize=(4 * len(inits), 3.2), layout="constrained")
    panels = figure.subplots(1, len(inits), squeeze=False, sharex=True, sharey=True)[0]
    for panel, init in zip(panels, inits, strict=True):
        for value in [value for name, value in found if name == init]:
            losses = found[init, value]
            points = [(rate, loss) for rate, loss in sorted(losses.items()) if math.isfinite(loss)]
            panel.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"{axis} {value}")
            panel.axvline(best_rate(losses), color=panel.lines[-1].get_color(), lw=0.6, ls=":")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("learning rate")
        panel.set_title(init, fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("training loss, last fifth (nats per byte)")
    return figure


if __name__ == "__main__":
    main()
