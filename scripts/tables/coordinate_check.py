"""Do activations keep their size when the model grows? Sizes and changes in the first steps, over width and more.

    python scripts/tables/coordinate_check.py                       # width 64 to 512; normal, width_aware, mup
    python scripts/tables/coordinate_check.py --axis top_k --values 1 2 4 8 --inits mup
    python scripts/tables/coordinate_check.py --schemes relu autonomy,router.weights=full --picture outputs/full.png

Prints, for each quantity, the exponent with which its root mean square grows along the axis: at the start, after the
last step, and of the change since the start after the first and the last step. Under a parameterisation that transfers
the exponents of the changes are near 0. The batch is one of random tokens, the same in every step
(`moe_pretrain/verify/coordinate_check.py`). A scheme may bring overrides of its own behind commas.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from moe_pretrain.config.load import load
from moe_pretrain.verify.coordinate_check import QUANTITIES, Coordinates, coordinates, growth

HEAD = 32
AXES: dict[str, tuple[list[int], Callable[[int], list[str]]]] = {
    "width": (
        [64, 128, 256, 512],
        lambda width: [
            f"model.hidden_size={width}",
            f"model.num_heads={max(1, width // HEAD)}",
            f"model.ffn_hidden_size={2 * width}",
            f"model.moe.expert_hidden_size={2 * width}",
        ],
    ),
    "depth": ([2, 4, 8, 16], lambda depth: [f"model.num_layers={depth}"]),
    "expert_width": ([64, 128, 256, 512], lambda width: [f"model.moe.expert_hidden_size={width}"]),
    "num_experts": ([4, 8, 16, 32], lambda number: [f"model.moe.num_experts={number}"]),
    # With one expert a renormalised weight is 1 and teaches the router nothing: there the probability itself.
    "top_k": ([1, 2, 4, 8], lambda k: [f"router.top_k={k}", *(["router.weights=raw"] if k == 1 else [])]),
}
"""What grows: its usual values, and the overrides of one. Widths differ in the number of heads, not in their size."""
SHAPE = ("model=tiny", "model.vocab_size=512", "tokenizer.vocab_size=512", "model.sequence_length=64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for moe-pretrain train")
    parser.add_argument("--axis", default="width", choices=AXES, help="what grows")
    parser.add_argument("--values", nargs="+", type=int, metavar="N", help="its values, for each axis some by default")
    parser.add_argument("--schemes", nargs="+", default=["top_k"], metavar="SCHEME[,KEY=VALUE]")
    parser.add_argument("--inits", nargs="+", default=["normal", "width_aware", "mup"], metavar="INIT")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 1, 3, 10], metavar="N", help="updates, from 0 on")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate (that of tiny)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--picture", type=Path, help="also draw the changes, to this file")
    options = parser.parse_args()
    if sorted(options.steps) != options.steps or options.steps[0] != 0 or len(options.steps) < 2:
        parser.error("--steps must ascend from 0 and be two at least")
    values, words = options.values or AXES[options.axis][0], AXES[options.axis][1]
    found: dict[str, list[dict[str, Coordinates]]] = {}
    for scheme in options.schemes:
        name, *own = scheme.split(",")
        for init in options.inits:
            given = [*SHAPE, f"router={name}", f"model.init={init}", *own]
            configs = [load([*given, *words(value), *options.overrides]) for value in values]
            label = f"{scheme}, {init}" if len(options.schemes) > 1 else init
            found[label] = [coordinates(config, options.steps, options.rate, options.rows) for config in configs]
    print(f"exponents over {options.axis} {', '.join(map(str, values))}; rate {options.rate:g}\n")
    print(table(found, values, options.steps))
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(found, values, options.axis, options.steps).savefig(options.picture, dpi=110)


def table(found: dict[str, list[dict[str, Coordinates]]], values: list[int], steps: list[int]) -> str:
    last = steps[-1]
    lines = [
        f"| init | quantity | size at the start, {values[0]} to {values[-1]} | exponent | size after {last} | exponent "
        f"| change after {steps[1]}, exponent | change after {last}, exponent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, runs in found.items():
        for name in QUANTITIES:
            if any(name not in run for run in runs):
                continue
            each = [run[name] for run in runs]

            def exponent(pick: Callable[[Coordinates], float], each: list[Coordinates] = each) -> str:
                return f"{growth(values, [pick(one) for one in each]):+.2f}"

            lines.append(
                f"| {label} | {name} | {each[0].size[0]:.3g} to {each[-1].size[0]:.3g} | "
                f"{exponent(lambda one: one.size[0])} | {each[0].size[-1]:.3g} to {each[-1].size[-1]:.3g} | "
                f"{exponent(lambda one: one.size[-1])} | {exponent(lambda one: one.change[1])} | "
                f"{exponent(lambda one: one.change[-1])} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Coordinates]]], values: list[int], axis: str, steps: list[int]) -> Figure:
    """A row for each label, a column for each quantity: its change over the axis, a line for each step."""
    shown = [name for name in QUANTITIES if all(name in run for runs in found.values() for run in runs)]
    shown = [name for name in shown if name != "sum of weights"]
    figure = Figure(figsize=(2.6 * len(shown), 2.2 * len(found) + 0.4), layout="constrained")
    axes = figure.subplots(len(found), len(shown), squeeze=False, sharex=True, sharey="col")
    for row, (label, runs) in zip(axes, found.items(), strict=True):
        for place, name in zip(row, shown, strict=True):
            for index, step in list(enumerate(steps))[1:]:
                place.plot(values, [run[name].change[index] for run in runs], marker="o", ms=3, label=f"step {step}")
            place.set_xscale("log", base=2)
            place.set_yscale("log")
            place.set_title(f"{label}: {name}", fontsize=8)
            place.tick_params(labelsize=7)
            place.grid(alpha=0.3)
    for place in axes[-1]:
        place.set_xlabel(axis, fontsize=8)
    for row in axes:
        row[0].set_ylabel("change since the start", fontsize=8)
    axes[0][0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
