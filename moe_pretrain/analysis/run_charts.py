"""Charts that describe one run: rows of ``metrics.jsonl`` in, SVG elements out."""

import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from moe_pretrain.analysis.figures import (
    GREEN,
    ORANGE,
    Curve,
    HeatMap,
    column,
    heat_maps,
    line_chart,
)
from moe_pretrain.run_folder.metrics_file import MetricsRow

MAX_COLUMNS = 200


def loss_charts(
    train: Sequence[MetricsRow],
    validation: Sequence[MetricsRow],
    events: Sequence[MetricsRow],
    unigram_cross_entropy: float | None,
) -> list[str]:
    """LM loss, with that of guessing the validation text by the training text's token frequencies as a reference."""
    curves = [Curve(train, "train/loss", label="train")]
    if validation:
        curves.append(Curve(validation, "validation/loss", ORANGE, "validation", "o"))
    resumed = [row["tokens"] for row in events if row["event"] == "resumed"]
    return [
        line_chart(
            "loss",
            "LM loss in nats per token, auxiliary losses not included",
            curves,
            size=(5.6, 3.1),
            reference=None if unigram_cross_entropy is None else (unigram_cross_entropy, "unigram cross-entropy"),
            marks=(resumed, "resumed"),
        )
    ]


def optimizer_charts(train: Sequence[MetricsRow]) -> list[str]:
    """Learning rate and gradient norm."""
    rate = [Curve(train, "train/learning_rate")]
    norm = [Curve(train, "train/gradient_norm")]
    return [
        line_chart("learning-rate", "Learning rate", rate, from_zero=True),
        line_chart("gradient-norm", "Gradient norm", norm),
    ]


def task_charts(tasks: Sequence[MetricsRow]) -> list[str]:
    """Each metric of each task over training."""
    keys = sorted({key for row in tasks for key in row if key.startswith("tasks/")})
    names = {key: key.removeprefix("tasks/").replace("/", ", ") for key in keys}
    return [
        line_chart(f"task-{index}", names[key], [Curve(tasks, key, ORANGE, marker="o")])
        for index, key in enumerate(keys)
    ]


def throughput_charts(train: Sequence[MetricsRow]) -> list[str]:
    """Tokens per second and, where it was measured, model FLOPs utilisation."""
    speed = [Curve(train, "train/tokens_per_second", GREEN)]
    charts = [line_chart("throughput", "Tokens per second", speed, from_zero=True, y_format="count")]
    key = "train/model_flops_utilization"
    if any(row.get(key) is not None for row in train):
        share = [Curve(train, key, GREEN)]
        title = "Model FLOPs utilisation, active parameters"
        charts.append(line_chart("utilization", title, share, from_zero=True, y_format="percent"))
    return charts


def aux_loss_charts(train: Sequence[MetricsRow]) -> list[str]:
    """Each auxiliary loss, unweighted, and their weighted sum; nothing when there is none."""
    key = re.compile(r"aux/(\w+)_loss")
    names = sorted({match.group(1) for row in train for k in row if (match := key.fullmatch(k))})
    charts = []
    for name in names:
        weights = column(train, f"aux/{name}_weight")
        weights = weights[~np.isnan(weights)]
        title = name.replace("_", " ") + (f", weight {weights[-1]:g}" if len(weights) else "")
        charts.append(line_chart(f"aux-{name}", title, [Curve(train, f"aux/{name}_loss")]))
    if names:
        total = [Curve(train, "train/aux_loss", ORANGE)]
        charts.append(line_chart("aux-sum", "weighted sum, as added to the loss", total))
    return charts


def metric_layers(train: Sequence[MetricsRow], name: str) -> list[str]:
    """List the two-digit layer numbers that have a metric of this name."""
    key = re.compile(rf"moe/layer_(\d+)/{name}")
    found = {match.group(1) for row in train for k in row if (match := key.fullmatch(k))}
    return sorted(found, key=int)


def load_over_time(train: Sequence[MetricsRow], layer: str) -> HeatMap:
    """Average one layer's expert load into at most ``MAX_COLUMNS`` columns.

    Args:
        train: Train rows, some with this layer's ``expert_share``.
        layer: Two-digit layer number.

    Returns:
        Load [experts, columns]: share of the routes times the number of experts, so 1 is even.
    """
    key = f"moe/layer_{layer}/expert_share"
    rows = [row for row in train if key in row]
    rows = [row for row in rows if len(row[key]) == len(rows[-1][key])]
    shares = np.array([row[key] for row in rows], dtype=np.float64)  # [points, experts]
    blocks = np.array_split(shares, min(MAX_COLUMNS, len(shares)))
    load = np.stack([block.mean(axis=0) for block in blocks], axis=1) * shares.shape[1]
    first_step, last_step = rows[0]["step"], rows[-1]["step"]
    return HeatMap(f"Layer {int(layer)}", load, first_step, max(last_step, first_step + 1))


def expert_load_charts(train: Sequence[MetricsRow]) -> list[str]:
    """One figure, a panel per MoE layer: which experts were used when. Nothing without shares."""
    maps = [load_over_time(train, layer) for layer in metric_layers(train, "expert_share")]
    if not maps:
        return []
    title = "Load of every expert over time, by layer"
    return [heat_maps("expert-load", title, maps, "load (1 = even)")]


def layer_colors(layers: Sequence[str]) -> dict[str, str]:
    """Give every layer a colour, dark to light with depth."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    return {layer: to_hex(shade) for layer, shade in zip(layers, shades, strict=True)}


def router_charts(train: Sequence[MetricsRow], validation: Sequence[MetricsRow]) -> tuple[list[str], dict[str, str]]:
    """Charts of even, decided and steady routing, a line per layer; and the colour of each layer."""
    titles = {
        "load_max_over_mean": "Busiest expert over the mean (1 = even)",
        "load_max_over_even_cost": "Busiest expert by routes times width over the mean (1 = even)",
        "router_entropy": "Mean entropy of a token's routing (nats)",
        "dead_experts": "Experts without a token",
        "dropped_share": "Share of routes dropped",
        "experts_per_token": "Experts per token",
        "validation_experts_per_token": "Experts per token in evaluation",
        "zero_computation_share": "Share of routes to zero-computation experts",
        "active_experts": "Experts in use",
        "mean_route_cost": "Width of the expert of a route over the mean",
        "routing_drift": "Routing drift between validations",
    }
    validated = ("validation_experts_per_token", "routing_drift")
    rows_of = {name: validation if name in validated else train for name in titles}
    layers = {name: metric_layers(rows_of[name], name) for name in titles}
    colors = layer_colors(sorted({layer for found in layers.values() for layer in found}, key=int))
    charts = []
    for name, title in titles.items():
        marker = "o" if name in validated else ""
        curves = [
            Curve(rows_of[name], f"moe/layer_{layer}/{name}", colors[layer], marker=marker) for layer in layers[name]
        ]
        if curves:
            percent = dict.fromkeys(("dropped_share", "routing_drift", "zero_computation_share"), "percent")
            y_format = ({"dead_experts": "integer", "active_experts": "integer"} | percent).get(name, "")
            from_zero = bool(y_format)
            chart = line_chart(f"router-{name}", title, curves, from_zero=from_zero, y_format=y_format)
            charts.append(chart)
    return charts, colors
