"""Findings of other commands in a run's folder, for the pages: certificate, specialisation, cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moe_pretrain.moe.part_timer import PARTS, LayerPart
from moe_pretrain.plan.layer_cost import per_token
from moe_pretrain.run_folder.paths import CERTIFICATE, SPECIALISATION_FILE
from moe_pretrain.run_folder.record import MISSING
from moe_pretrain.system.words import short_number

INFORMATION_NOTE = (
    "Normalised mutual information of a token's expert of the largest weight and its class, 0 to 1, mean over layers; "
    "in brackets with classes dealt out at random. Only what is above that is specialisation."
)
TIME_NOTE = (
    "Measured: microseconds of one rank for one token in one MoE layer, forward, in the last validation: the median "
    "over its batches, mean over layers and ranks; of several seeds the mean, with their standard deviation (sd). "
    "The router's time holds experts that it asks, the exchange's the waiting for other ranks, the experts' share the "
    "shared ones. What a scheme does in training alone (Sinkhorn's iterations, the experts' choice, jitter) is not in "
    "it. Only times of equal devices, as many of them, with nothing else running, can be compared."
)
COST_NOTE = (
    "Counted, not timed: forward, one token, one MoE layer, at the measured experts per token. Bytes are read and "
    "written in memory; those of the exchange leave a rank and come back."
)


def read_finding(path: Path) -> dict[str, Any] | None:
    """A JSON file that a command has written; None if it has not.

    Raises:
        ValueError: It is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged: not a JSON object")
    return found


@dataclass(frozen=True)
class Certificate:
    """The outcome of ``certify`` for a run.

    Attributes:
        passed: Properties that hold.
        others: Properties that fail, do not apply or are declared: ``property: verdict, detail``.
        failed: How many fail.
        code: What was tried.
    """

    passed: int
    others: list[str]
    failed: int
    code: str

    @property
    def outcome(self) -> str:
        """In one line."""
        verdict = f"NOT certified: {self.failed} fail" if self.failed else "certified"
        return f"{verdict}; {self.passed} pass, {len(self.others) - self.failed} do not apply or are declared"


def certificate(folder: Path) -> Certificate | None:
    """That of a run folder; None without one.

    Raises:
        ValueError: The file is damaged.
    """
    found = read_finding(folder / CERTIFICATE)
    if found is None:
        return None
    rows = found.get("rows", [])
    others = sorted((row for row in rows if row["verdict"] != "PASS"), key=lambda row: row["verdict"] != "FAIL")
    return Certificate(
        passed=sum(row["verdict"] == "PASS" for row in rows),
        others=[f"{row['property']}: {row['verdict']}, {row['detail']}" for row in others],
        failed=sum(row["verdict"] == "FAIL" for row in rows),
        code=str(found.get("code", "")),
    )


def normalised_information(folder: Path) -> dict[str, list[tuple[float, float]]] | None:
    """Kind of class -> of each MoE layer the normalised mutual information of a token's expert and class, and shuffled.

    ``2 I(E;Y) / (H(E) + H(Y))`` for the expert of the largest weight, from 0 to 1; the second is the same with classes
    dealt out anew, what a finite sample alone makes. None without ``specialise``.

    Raises:
        ValueError: The file is damaged.
    """
    found = read_finding(folder / SPECIALISATION_FILE)
    if found is None:
        return None

    def normalised(row: Mapping[str, Any]) -> tuple[float, float]:
        size = (row["hard"]["experts"] + row["hard"]["classes"]) / 2
        return (row["hard"]["mutual"] / size, row["hard_shuffled"] / size) if size > 0 else (0.0, 0.0)

    return {kind: [normalised(row) for row in rows] for kind, rows in found.get("classes", {}).items()}


def information_cell(pairs: list[tuple[float, float]]) -> str:
    """Mean over layers with its shuffled baseline."""
    mean, shuffled = np.mean(pairs, axis=0)
    return f"{mean:.3f} (shuffled {shuffled:.3f})"


def time_cells(runs: Sequence[Mapping[LayerPart, float]]) -> dict[str, str]:
    """Part of a MoE layer -> its microseconds in words, then their total and the experts' share of it.

    Args:
        runs: Microseconds of every part, one entry for each seed; all parts are MISSING without any.
    """
    titles = {name: name.replace("_", " ") for name in PARTS}
    totals = [sum(run.values()) for run in runs]
    shares = [(run["experts"] + run["shared_experts"]) / total for run, total in zip(runs, totals, strict=True)]
    cells = {title: _mean_and_deviation([run[name] for run in runs]) for name, title in titles.items()}
    return cells | {
        "total": _mean_and_deviation(totals),
        "experts' share": f"{fmean(shares):.0%}" if shares else MISSING,
    }


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    if not any(values):
        return "none"
    return f"{fmean(values):.3g}" + (f" (sd {stdev(values):.2g})" if len(values) > 1 else "")


def cost_cells(facts: Mapping[str, Any], experts_per_token: float | None) -> dict[str, str]:
    """Part of a MoE layer -> what it costs, in words; empty where that is not recorded."""
    cost = facts.get("moe_layer_cost") or {}
    if not cost or experts_per_token is None:
        return {}
    return {name: _cost(*each) for name, each in per_token(cost, experts_per_token).items()}


def _cost(flops: float, size: float) -> str:
    parts = [f"{short_number(flops)} FLOPs"] if flops else []
    parts += [f"{short_number(size)} bytes"] if size else []
    return ", ".join(parts) or "none"
