"""Charts that compare variants: runs in, SVG elements or drawings out.

Axis names:
    points    steps that all runs of a variant have
    seeds     runs of a variant
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator

from moe_pretrain.analysis import measures
from moe_pretrain.analysis.compare.statistics import CONFIDENCE, Difference, Estimate, student_t_quantile
from moe_pretrain.analysis.compare.tuning import Tuning
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.analysis.figures import (
    BLUE,
    GREY,
    ORANGE,
    chart,
    column,
    finish,
    plain,
)
from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.run_folder.record import RunRecord
from moe_pretrain.system.words import short_duration

MAX_POINTS = 300

Draw = Callable[[Axes], None]
Axis = Callable[[Sequence[MetricsRow]], np.ndarray]
"""Positions of train rows on an x axis, [points]."""

_DURATION = FuncFormatter(lambda value, _: short_duration(value))
X_AXES: dict[str, tuple[str, Axis, Formatter | None]] = {
    "tokens": ("tokens", measures.tokens, None),
    "flops": ("training FLOPs, experts as measured", measures.training_flops, EngFormatter()),
    "seconds": ("time in training steps", measures.training_seconds, _DURATION),
}
"""What a loss can be drawn against."""


MAX_COLORED = 8
OTHERS = "#c4c8ce"
MAX_BANDS = 4
"""With more bands than this one sees none."""


def variant_colors(variants: Sequence[Variant], best_first: Sequence[str], reference: str) -> dict[str, str]:
    """A colour for every variant, by name, in the order of ``best_first``.

    With more than ``MAX_COLORED`` the reference and the best have one each and all others are ``OTHERS``: more colours
    than that cannot be told apart.
    """
    names = [*best_first, *(variant.name for variant in variants if variant.name not in best_first)]
    colored = names
    if len(names) > MAX_COLORED:
        colored = [reference, *(name for name in names if name != reference)][:MAX_COLORED]
        colored = [name for name in names if name in colored]
    palette = [to_hex(color) for color in matplotlib.colormaps["Dark2"].colors]  # type: ignore[attr-defined]
    shades = dict(zip(colored, palette, strict=False))
    return {name: shades.get(name, OTHERS) for name in names}


def has_bands(colors: Mapping[str, str]) -> bool:
    """Whether intervals over seeds are drawn."""
    return len(colors) <= MAX_BANDS


def legend_colors(colors: Mapping[str, str]) -> dict[str, str]:
    """Colours of a legend: those of ``variant_colors``, the others as one."""
    rest = [name for name, color in colors.items() if color == OTHERS]
    shown = {name: color for name, color in colors.items() if color != OTHERS}
    return shown | ({f"{len(rest)} others": OTHERS} if rest else {})


@dataclass(frozen=True)
class Band:
    """Mean and 95% t-interval over seeds, each [points]; NaN ends where there is one seed."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


Curve = dict[int, tuple[float, float]]
"""Step -> position and value."""


def validation_curve(run: RunRecord, key: str, axis: Axis) -> Curve:
    """A validation number of one run against an axis that its train rows define."""
    steps = column(run.validation, "step")
    x = np.interp(steps, [0.0, *column(run.train, "step")], [0.0, *axis(run.train)])
    points = zip(steps, x, column(run.validation, key), strict=True)
    return {int(step): (float(at), float(value)) for step, at, value in points}


def layers_curve(rows: Sequence[MetricsRow], name: str) -> Curve:
    """Mean over layers of a layer number against tokens, at most ``MAX_POINTS`` points, each the mean of its rows."""
    by_layer = measures.of_layers(rows, name)
    if not by_layer.size:
        return {}
    values = by_layer.mean(axis=1)
    parts = np.array_split(np.arange(len(rows)), min(MAX_POINTS, len(rows)))
    return {rows[part[-1]]["step"]: (float(rows[part[-1]]["tokens"]), float(values[part].mean())) for part in parts}


def band(curves: Sequence[Curve]) -> Band | None:
    """Mean and interval of curves, at the steps that all of them have; None where there are none."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return None
    points = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, points, 2]
    x, mean = points.mean(axis=0).T
    half = np.full(len(steps), math.nan)
    if len(curves) > 1:
        factor = student_t_quantile(CONFIDENCE, len(curves) - 1) / math.sqrt(len(curves))
        half = factor * points[:, :, 1].std(axis=0, ddof=1)
    return Band(x, mean, mean - half, mean + half)


def loss_drawings(variants: Sequence[Variant], colors: Mapping[str, str], key: str, y_label: str) -> list[Draw]:
    """Validation loss against tokens, FLOPs and seconds.

    Complete runs make a line and a band for each variant; others are drawn one by one, dashed, as far as they came.
    """

    def against(title: str, axis: Axis, x_format: Formatter | None) -> Draw:
        def draw(axes: Axes) -> None:
            bands = []
            for variant in variants:
                counted = variant.counted
                found = band([validation_curve(run, key, axis) for run in counted])
                if found is not None:
                    bands.append(found)
                    _draw_band(axes, found, colors[variant.name], has_bands(colors))
                for run in variant.runs:
                    if run not in counted and run.validation and run.train:
                        x, y = zip(*validation_curve(run, key, axis).values(), strict=True)
                        axes.plot(x, y, color=colors[variant.name], ls="--", lw=0.8)
            _look_at_the_end(axes, bands)
            axes.set_ylabel(y_label)
            finish(axes, f"Validation against {title.partition(',')[0]}", title, *([x_format] if x_format else []))

        return draw

    return [against(*of) for of in X_AXES.values()]


def _draw_band(axes: Axes, found: Band, color: str, with_band: bool) -> None:
    marker = "o" if len(found.x) <= 30 else ""
    is_other = color == OTHERS
    axes.plot(found.x, found.mean, color=color, marker="" if is_other else marker, ms=3, zorder=1 if is_other else 2)
    if with_band:
        axes.fill_between(found.x, found.low, found.high, color=color, alpha=0.13, lw=0)


def _look_at_the_end(axes: Axes, bands: Sequence[Band]) -> None:
    """Choose the y range by the means after a tenth of the run: the first losses and wide bands hide differences."""
    late = [value for found in bands for value in found.mean[found.x >= 0.1 * found.x[-1]] if math.isfinite(value)]
    if late and max(late) > min(late):
        margin = 0.12 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


def difference_drawing(paired: Mapping[str, Difference], reference: str, unit: str) -> Draw:
    """Each variant's paired difference to the reference as a point with its interval; left of 0 is better."""

    def draw(axes: Axes) -> None:
        there = {name: found.difference for name, found in paired.items() if found.difference is not None}
        names = sorted((name for name in there if name != reference), key=lambda name: there[name].mean)
        axes.axvline(0, color=GREY, lw=0.8)
        for place, name in enumerate(names):
            found = there[name]
            color = {"better": BLUE, "worse": ORANGE}.get(paired[name].verdict, GREY)
            if math.isfinite(found.low):
                axes.plot([found.low, found.high], [place, place], color=color, lw=2)
            axes.plot(found.mean, place, "o", color=color, ms=5)
        _look_at_most([there[name] for name in names], axes)
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        finish(axes, "Difference to the reference, 95%", unit, FuncFormatter(lambda value, _: f"{value:g}"))

    return draw


def _look_at_most(found: Sequence[Estimate], axes: Axes) -> None:
    """Show every mean, 0, and intervals of up to twice the median width."""
    widths = [each.high - each.low for each in found if math.isfinite(each.low)]
    if widths:
        half = float(np.median(widths))
        ends = [0.0] + [max(each.low, each.mean - half) for each in found if math.isfinite(each.low)]
        ends += [min(each.high, each.mean + half) for each in found if math.isfinite(each.low)]
        ends += [each.mean for each in found]
        margin = 0.04 * (max(ends) - min(ends)) or 1e-3
        axes.set_xlim(min(ends) - margin, max(ends) + margin)


def rate_chart(tuned: Mapping[str, Tuning], colors: Mapping[str, str], unit: str) -> list[str]:
    """Loss of each trial over its rate, a line for each tuned variant; nothing where nothing was tuned.

    A ring marks what was chosen, a cross at the top a trial that diverged, a dot beside the line one with further
    fields changed.
    """
    title = "Loss over learning rate, tuning seed"

    def draw(axes: Axes) -> None:
        finite: list[float] = []
        rates: set[float] = set()
        for name, tuning in tuned.items():
            trials = list(zip(tuning.scheme.trials, tuning.losses, strict=True))
            points = sorted((tuning.rate(trial), loss) for trial, loss in trials if len(trial.values) == 1)
            line = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
            finite += [loss for _, loss in line]
            rates |= {rate for rate, _ in points}
            color, zorder = colors[name], 1 if colors[name] == OTHERS else 2
            axes.plot([rate for rate, _ in line], [loss for _, loss in line], "o-", color=color, ms=3, zorder=zorder)
            for trial, loss in trials:
                if len(trial.values) > 1 and math.isfinite(loss):
                    axes.plot(tuning.rate(trial), loss, ".", color=color, ms=4, zorder=zorder)
                if math.isinf(loss):
                    top = axes.get_xaxis_transform()
                    axes.plot(tuning.rate(trial), 0.98, "x", color=color, ms=5, transform=top, zorder=zorder)
            chosen, loss = trials[tuning.chosen]
            axes.plot(tuning.rate(chosen), loss, "o", mfc="none", mec=color, ms=8, zorder=zorder)
        lowest = min(finite, default=0.0)
        highest = min(max(finite, default=0.0), lowest + 3 * (float(np.median(finite or [0.0])) - lowest))
        if highest > lowest:
            margin = 0.08 * (highest - lowest)
            axes.set_ylim(lowest - margin, highest + margin)
        axes.set_ylabel(unit)
        as_written = FuncFormatter(lambda value, _: f"{value:.2g}")
        finish(axes, title, "learning rate", as_written)
        axes.set_xscale("log")
        axes.set_xticks(_apart(sorted(rates)))
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(as_written)

    return [chart("rates", title, draw, (6.5, 3.6))] if tuned else []


def _apart(rates: Sequence[float]) -> list[float]:
    """Of rates in order those whose labels have room, each at least 1.8 times the one before."""
    kept: list[float] = []
    for rate in rates:
        if not kept or rate >= 1.8 * kept[-1]:
            kept.append(rate)
    return kept


def layer_charts(
    variants: Sequence[Variant],
    colors: Mapping[str, str],
    name: str,
    title: str,
    rows_of: Callable[[RunRecord], Sequence[MetricsRow]] = lambda run: run.train,
) -> list[str]:
    """A layer number of train, or other, rows, mean over layers, against tokens; nothing where no variant has it."""
    bands = {variant.name: band([layers_curve(rows_of(run), name) for run in variant.counted]) for variant in variants}

    def draw(axes: Axes) -> None:
        for variant, found in bands.items():
            if found is not None:
                _draw_band(axes, found, colors[variant], has_bands(colors))
        finish(axes, title, "tokens")

    return [chart(f"layers-{name}", title, draw)] if any(found is not None for found in bands.values()) else []


def experts_by_layer_chart(variants: Sequence[Variant], colors: Mapping[str, str]) -> list[str]:
    """Experts per token of each layer at the end of the run, mean over seeds; nothing without MoE layers."""
    title = "Experts per token by layer, end of the run"
    found: dict[str, dict[int, float]] = {}
    for variant in variants:
        by_seed = [measures.layers_at_end(run, "experts_per_token") for run in variant.counted]
        layers = sorted(set().union(*by_seed))
        found[variant.name] = {k: float(np.mean([seed[k] for seed in by_seed if k in seed])) for k in layers}

    def draw(axes: Axes) -> None:
        for name, values in found.items():
            zorder = 1 if colors[name] == OTHERS else 2
            axes.plot(list(values), list(values.values()), "o-", color=colors[name], ms=4, zorder=zorder)
        finish(axes, title, "layer", FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    return [chart("experts-by-layer", title, draw)] if any(found.values()) else []


def balance_chart(
    variants: Sequence[Variant], colors: Mapping[str, str], loss: Callable[[RunRecord], float | None], unit: str
) -> list[str]:
    """Load of the busiest expert against the loss, a point for each run; nothing without MoE layers."""
    points = [
        (balance, value, colors[variant.name])
        for variant in variants
        for run in variant.counted
        if (balance := measures.at_end(run.train, "load_max_over_mean")) is not None
        and (value := loss(run)) is not None
    ]
    title = "Balance against quality, one point per run"

    def draw(axes: Axes) -> None:
        for x, y, color in points:
            axes.plot(x, y, "o", color=color, ms=5)
        axes.set_ylabel(unit)
        finish(axes, title, "busiest expert over the mean", FuncFormatter(lambda value, _: f"{value:g}"))

    return [chart("balance", title, draw)] if points else []


_MARKS = {"spike": ("^", ORANGE), "collapse": ("s", BLUE), "non-finite": ("X", "#b00020")}


def incident_chart(found: Mapping[str, Sequence[measures.Incident]]) -> list[str]:
    """Spikes, collapses and numbers that were not finite over a run's tokens: a line for each run, by name."""
    title = "Spikes, collapses and numbers that were not finite"

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        for place, events in enumerate(found.values()):
            for each in events:
                marker, color = _MARKS[each.kind]
                label = "" if each.kind in labelled else each.kind
                labelled.add(each.kind)
                axes.plot([each.row["tokens"]], [place], marker=marker, color=color, ms=5, label=label, ls="")
        axes.set_yticks(range(len(found)), [plain(name) for name in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.legend()
        finish(axes, title, "tokens")

    return [chart("incidents", title, draw, (6.5, 1.2 + 0.25 * len(found)))] if found else []
