"""Numbers and curves of one run, and what went wrong in it when.

Axis names:
    points    train rows, in order
    layers    MoE layers, bottom up
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_pretrain.analysis.figures import column
from moe_pretrain.analysis.run_charts import metric_layers
from moe_pretrain.metrics.step_rows import read_part_times
from moe_pretrain.moe.part_timer import LayerPart
from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.run_folder.record import RunRecord

END_SHARE = 0.2
"""Share of a run's tokens, at its end, over which balance is measured."""

IncidentKind = Literal["spike", "collapse", "non-finite"]
_INCIDENTS: dict[str, IncidentKind] = {
    "loss_spike": "spike",
    "rewound": "spike",  # going back removed the row of the spike itself; this one tells it
    "collapsed_router": "collapse",
    "non_finite": "non-finite",
    "step_skipped": "non-finite",
    "diverged": "non-finite",
}
"""Events of a run that are incidents."""
_JUDGES = {"spike.window_steps": "loss spikes", "metrics.router_health_steps": "collapsed routers"}
"""Settings of the run's own judges; a run of an earlier release that lacks one was not judged for it."""


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
    return read_part_times(run.end)


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


INCIDENT_HEADER = ("Kind", "Step", "Message of the run")


@dataclass(frozen=True)
class Incident:
    """An event of a run that says that something went wrong.

    Attributes:
        kind: ``spike``: of the training loss. ``collapse``: a layer sends nearly all tokens to as few experts as it
            can. ``non-finite``: a number was NaN or infinite.
        row: The event's row.
    """

    kind: IncidentKind
    row: MetricsRow


def incidents(events: Sequence[MetricsRow]) -> list[Incident]:
    """The incidents among a run's event rows, in their order. The run judged; nothing is judged here."""
    return [Incident(_INCIDENTS[row["event"]], row) for row in events if row["event"] in _INCIDENTS]


def not_judged(values: Mapping[str, Any]) -> list[str]:
    """Kinds of incidents that a run did not judge, in words: that nothing is recorded of them does not mean none.

    Args:
        values: Configuration with dotted keys.
    """
    return [kind for setting, kind in _JUDGES.items() if setting not in values]
