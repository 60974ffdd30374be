"""Numbers and curves of one run, and what went wrong in it when.

Axis names:
    points    train rows, in order
    layers    MoE layers, bottom up
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from moe_pretrain.analysis.figures import column
from moe_pretrain.analysis.run_charts import metric_layers
from moe_pretrain.metrics.step_rows import read_part_times
from moe_pretrain.moe.part_timer import LayerPart
from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.run_folder.record import RunRecord

END_SHARE = 0.2
"""Share of a run's tokens, at its end, over which balance is measured."""
SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_NATS = 50, 8.0, 0.2
"""A spike is a training loss this many robust standard deviations, and nats, above the median of the rows before it."""
COLLAPSED_RATIO = 1.5
"""A layer has collapsed when its load is worth at most this many times the experts that one token uses."""


def of_layers(rows: Sequence[MetricsRow], name: str) -> np.ndarray:
    """One of the ``moe/layer_XX`` numbers: [points, layers], NaN where it is missing; the last row tells the layers."""
    layers = metric_layers(rows[-1:], name)
    return np.array([column(rows, f"moe/layer_{layer}/{name}") for layer in layers]).reshape(len(layers), len(rows)).T


def end_of(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows of the last ``END_SHARE`` of the tokens."""
    return [row for row in rows if row["tokens"] > (1 - END_SHARE) * rows[-1]["tokens"]]


def at_end(train: Sequence[MetricsRow], name: str) -> float | None:
    """Mean of a layer number over layers and the end of a run; None if it was not recorded."""
    return mean_or_none(of_layers(end_of(train), name)) if train else None


def layers_at_end(run: RunRecord, name: str) -> dict[int, float]:
    """Mean of a layer number over the end of the run, by layer."""
    rows = end_of(run.train)
    layers = metric_layers(rows[-1:], name)
    return {int(k): value for k in layers if (value := mean_or_none(column(rows, f"moe/layer_{k}/{name}"))) is not None}


def mean_or_none(values: np.ndarray) -> float | None:
    """Mean of the numbers that are there."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def median(run: RunRecord, key: str) -> float | None:
    """Median of a number over all train rows; None if it was not recorded."""
    values = column(run.train, key)
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def part_times(run: RunRecord) -> dict[LayerPart, float]:
    """Microseconds of each part of a MoE layer for one token, at the end of a run; empty where not measured."""
    return read_part_times(run.validation[-1]) if run.is_complete and run.validation else {}


def training_flops(rows: Sequence[MetricsRow]) -> np.ndarray:
    """FLOPs spent up to each row [points], as the run summed them over its steps.

    A run of an earlier release has no sums: each row's measured FLOPs per token hold for the tokens since the last.
    """
    if rows and all("train/flops_spent" in row for row in rows):
        return column(rows, "train/flops_spent")
    tokens = column(rows, "tokens")
    return np.cumsum(np.diff(tokens, prepend=0.0) * column(rows, "train/flops_per_token"))


def training_seconds(rows: Sequence[MetricsRow]) -> np.ndarray:
    """Seconds in training steps up to each row [points]: no validation, no checkpoints, no lost work."""
    if rows and all("train/seconds_spent" in row for row in rows):
        return column(rows, "train/seconds_spent")
    steps = column(rows, "step")
    return np.cumsum(np.diff(steps, prepend=0.0) * column(rows, "train/step_seconds"))


def tokens(rows: Sequence[MetricsRow]) -> np.ndarray:
    """Tokens up to each row [points]."""
    return column(rows, "tokens")


@dataclass(frozen=True)
class Incident:
    """Something that went wrong over some steps.

    Attributes:
        kind: ``spike``: of the training loss. ``collapse``: a layer sends nearly all tokens to as few experts as it
            can. ``non-finite``: a number was NaN or infinite.
        first: First row of it.
        last: Last row of it.
        detail: Size, or layer.
    """

    kind: Literal["spike", "collapse", "non-finite"]
    first: MetricsRow
    last: MetricsRow
    detail: str


def incidents(train: Sequence[MetricsRow], events: Sequence[MetricsRow]) -> list[Incident]:
    """Spikes, collapses and numbers that were not finite in a run's rows, in order of their steps."""
    non_finite = [
        Incident("non-finite", row, row, row["message"]) for row in events if row["event"] in ("non_finite", "diverged")
    ]
    found = [*_spikes(train), *_collapses(train), *non_finite]
    return sorted(found, key=lambda each: each.first["step"])


def _spikes(rows: Sequence[MetricsRow]) -> Iterator[Incident]:
    losses = column(rows, "train/loss")
    excess = np.full(len(losses), math.nan)
    for index in range(SPIKE_WINDOW, len(losses)):
        before = losses[index - SPIKE_WINDOW : index]
        if np.isfinite(before).any():
            middle = np.nanmedian(before)
            deviation = 1.4826 * np.nanmedian(np.abs(before - middle))
            over = losses[index] - middle
            if over > max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation):
                excess[index] = over
    for stretch in _stretches(np.isfinite(excess)):
        yield Incident(
            "spike", rows[stretch[0]], rows[stretch[-1]], f"{excess[stretch].max():.2f} nats above the median"
        )


def _collapses(rows: Sequence[MetricsRow]) -> Iterator[Incident]:
    for layer in metric_layers(rows[-1:], "expert_share"):
        bad = np.array([_has_collapsed(row, layer) for row in rows])
        for stretch in _stretches(bad):
            yield Incident("collapse", rows[stretch[0]], rows[stretch[-1]], f"layer {int(layer)}")


def _has_collapsed(row: MetricsRow, layer: str) -> bool:
    """Whether the load of a layer is worth few experts: by the exponential of its entropy, for at most half of them."""
    share = np.array(row.get(f"moe/layer_{layer}/expert_share") or [], dtype=np.float64)
    each = row.get(f"moe/layer_{layer}/experts_per_token")
    if not share.sum() > 0 or each is None:
        return False
    used = share[share > 0]
    worth = math.exp(-float((used * np.log(used)).sum()))
    return worth <= min(COLLAPSED_RATIO * max(each, 1.0), len(share) / 2) + 1e-9


def _stretches(flags: np.ndarray) -> Iterator[list[int]]:
    """Indices of each run of True."""
    for flag, members in groupby(range(len(flags)), key=lambda index: bool(flags[index])):
        if flag:
            yield list(members)
