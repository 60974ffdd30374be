"""The run folders below a folder: what each was to do, how far it came, and which are the same but for the seed."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_pretrain.run_folder.metrics_file import Row, read_rows

State = Literal["finished", "diverged", "failed", "unfinished", "unreadable"]

RUN_FILES = {"config.yaml", "metrics.jsonl", "overrides.txt"}
"""A folder with any of these is a run: one that broke before its first step must not vanish from the comparison."""
NOT_THE_EXPERIMENT = ("seed", "run.", "sweep.", "metrics.", "checkpoint.", "fault.")
"""Keys (or their beginnings) that do not make another variant: where a run lives, what it logs and saves."""
DIVERGED_NATS = 0.5
"""A run whose last validation loss is this much above its best one is called diverged."""
_LAST_STATE: dict[str, State] = {
    "finished": "finished",
    "diverged": "diverged",
    "failed": "failed",
    "stopped": "unfinished",
    "resumed": "unfinished",
}
MISSING = "-"


@dataclass(frozen=True)
class RunRecord:
    """One run folder.

    Attributes:
        name: Path below the compared folder.
        values: Configuration with dotted keys; empty when it cannot be read.
        facts: ``summary.json``.
        train: Train rows.
        validation: Validation rows.
        events: Event rows.
        state: ``finished``: reached its last step. ``diverged``: a loss that is not finite, or a last validation loss
            ``DIVERGED_NATS`` above the run's best. ``failed``: ended by an error. ``unfinished``: running, stopped or
            killed. ``unreadable``: a file of it is missing or broken.
        problem: Why it is unreadable, failed or diverged; else empty.
        is_complete: Whether it made all its steps, diverged or not.
        folder: Where it is.
    """

    name: str
    values: dict[str, Any]
    facts: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    events: list[Row]
    state: State
    problem: str
    is_complete: bool
    folder: Path

    @property
    def seed(self) -> int:
        """Seed of the run; its configuration was readable."""
        return self.values["seed"]

    @property
    def last(self) -> Row:
        """The last train row; empty before there is one."""
        return self.train[-1] if self.train else {}

    @property
    def planned_steps(self) -> int | None:
        """Steps that the budget was expected to come to; None where that was not recorded."""
        if (planned := self.facts.get("planned_steps")) is not None:
            return planned
        # Earlier releases: only tokens, and only in the configuration.
        total, step = (self.values.get(f"batch.{name}_tokens") for name in ("total", "global_batch"))
        return -(-total // step) if total and step else None

    def final(self, key: str) -> float | None:
        """A number of the validation at the end; None if the run did not come to its end or it is not finite."""
        return self.validation[-1].get(key) if self.is_complete and self.validation else None


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: What sets it apart from the other variants.
        values: Configuration, without ``NOT_THE_EXPERIMENT``.
        runs: All its runs, in any state.
    """

    name: str
    values: dict[str, Any]
    runs: list[RunRecord]

    @property
    def counted(self) -> list[RunRecord]:
        """Complete runs, the first of each seed: the same seed again is no further evidence."""
        first: dict[int, RunRecord] = {}
        for run in self.runs:
            if run.is_complete:
                first.setdefault(run.seed, run)
        return [first[seed] for seed in sorted(first)]

    def by_seed(self, measure: Callable[[RunRecord], float | None]) -> dict[int, float]:
        """``measure`` of the counted runs, those without left out."""
        return {run.seed: value for run in self.counted if (value := measure(run)) is not None}


def find_runs(root: Path) -> list[RunRecord]:
    """Read every run folder below ``root``, itself included, in order of their names.

    Raises:
        ValueError: There is none.
    """
    if not root.is_dir():
        raise ValueError(f"FOLDER={root} must be a folder with runs below it")
    found = []
    for folder, children, files in os.walk(root):
        if RUN_FILES & set(files):
            found.append(_read_run(Path(folder), root))
            children.clear()  # what lies in a run folder (wandb's files, checkpoints) is no run
        children[:] = sorted(child for child in children if not child.startswith("."))
    if not found:
        raise ValueError(f"FOLDER={root} must have runs below it: folders with config.yaml and metrics.jsonl")
    return sorted(found, key=lambda run: run.name)


def one_of_each_variant(root: Path) -> list[Path]:
    """Folder of the first complete run of each variant below ``root`` that routes; of ``root`` if that is a run.

    Raises:
        ValueError: There is none.
    """
    if root.is_dir() and RUN_FILES & {path.name for path in root.iterdir()}:
        return [root]
    variants = [each for each in group(find_runs(root)) if each.values.get("router.name") != "dense" and each.counted]
    if not variants:
        raise ValueError(f"FOLDER={root} must be a run, or have complete runs of models with routing below it")
    return [variant.counted[0].folder for variant in variants]


def _read_run(folder: Path, root: Path) -> RunRecord:
    problems, values, facts, rows = [], {}, {}, []
    try:
        values = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        if "seed" not in values:
            raise ValueError("it has no seed")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        values = {}
        problems.append(f"config.yaml: {_one_line(error)}")
    try:
        rows = read_rows(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        problems.append(_one_line(error))
    try:
        if (folder / "summary.json").exists():
            facts = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        problems.append(f"summary.json: {_one_line(error)}")
    state, problem = _judge(rows)
    train, validation, events = ([row for row in rows if row["kind"] == kind] for kind in _KINDS)
    return RunRecord(
        name=str(folder.relative_to(root)),
        values=values,
        facts=facts,
        train=train,
        validation=validation,
        events=events,
        state="unreadable" if problems else state,
        problem="; ".join(problems) or problem,
        is_complete=_last_word(rows)[0] == "finished" and not problems,
        folder=folder,
    )


_KINDS = ("train", "validation", "event")


def _last_word(rows: Sequence[Row]) -> tuple[State, str]:
    """The state that the event rows tell, and the message of the one that decides."""
    state: tuple[State, str] = ("unfinished", "")
    for row in rows:
        if row["kind"] == "train":
            state = ("unfinished", "")
        elif row["kind"] == "event" and row["event"] in _LAST_STATE:
            state = (_LAST_STATE[row["event"]], row["message"])
    return state


def _judge(rows: Sequence[Row]) -> tuple[State, str]:
    """State and problem of a run whose files could be read."""
    state, message = _last_word(rows)
    losses = [row["validation/loss"] for row in rows if row["kind"] == "validation"]
    train = [row["train/loss"] for row in rows if row["kind"] == "train"]
    if state != "failed" and (None in losses[-1:] or None in train[-1:]):
        return "diverged", "its last loss is not finite"
    best = min((loss for loss in losses if loss is not None), default=None)
    if state == "finished" and best is not None and losses[-1] - best > DIVERGED_NATS:
        return "diverged", f"its last validation loss is {losses[-1] - best:.2f} above its best"
    return state, message if state in ("diverged", "failed") else ""


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return " ".join(str(error).split())[:200]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _experiment(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not f"{key}.".startswith(_DROPPED)}


_DROPPED = tuple(key if key.endswith(".") else f"{key}." for key in NOT_THE_EXPERIMENT)


def group(runs: Iterable[RunRecord]) -> list[Variant]:
    """Put runs of equal configuration together and name them by what differs, in order of their first run.

    Runs without a readable configuration belong to no variant.
    """
    grouped: dict[str, tuple[dict[str, Any], list[RunRecord]]] = {}
    for run in runs:
        if run.values:
            values = _experiment(run.values)
            grouped.setdefault(json.dumps(values, sort_keys=True, default=str), (values, []))[1].append(run)
    names = _names([values for values, _ in grouped.values()])
    return [Variant(name, values, own) for name, (values, own) in zip(names, grouped.values(), strict=True)]


def differences(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that are not the same everywhere, in the order of the configuration."""
    keys = list(dict.fromkeys(key for each in values for key in each))
    return [key for key in keys if any(show(each, key) != show(values[0], key) for each in values)]


def show(values: Mapping[str, Any], key: str) -> str:
    """One value as text; ``MISSING`` where the configuration has no such key."""
    value = values.get(key, MISSING)
    return "null" if value is None else str(value)


_HEADS = ("model.name", "router.name")


def _names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Size and scheme where they differ, then what tells variants of the same size and scheme apart."""
    differing = differences(values)
    leaves = [_leaf(key) for key in differing]
    heads = [key for key in _HEADS if key in differing]
    kin: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for each in values:
        kin.setdefault(tuple(show(each, key) for key in heads), []).append(each)
    names = []
    for each in values:
        head = tuple(show(each, key) for key in heads)
        rest = [
            f"{_leaf(key) if leaves.count(_leaf(key)) == 1 else key}={show(each, key)}"
            for key in _telling(kin[head])
            if key in each
        ]
        names.append(" ".join([*head, *rest]) or show(each, "router.name"))
    return names


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _telling(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fewest of the differing keys, taken one by one where they tell most, that tell all ``values`` apart."""
    differing = differences(values)
    chosen: list[str] = []

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(show(each, key) for key in keys) for each in values})

    while kinds(chosen) < len(values) and len(chosen) < len(differing):
        chosen.append(max((key for key in differing if key not in chosen), key=lambda key: kinds([*chosen, key])))
    return [key for key in differing if key in chosen]


def unnamed_differences(variants: Sequence[Variant]) -> list[str]:
    """Keys that differ between variants though neither their names nor the change of scheme or size tells so.

    Where schemes differ, so do their own fields; where sizes differ, so does the model. Anything else, such as a
    learning rate that changes together with the scheme, leaves open what made the difference.
    """
    differing = differences([variant.values for variant in variants])
    told = tuple(key.partition(".")[0] + "." for key in _HEADS if key in differing)
    shown = {word.partition("=")[0] for variant in variants for word in variant.name.split(" ")}
    return [key for key in differing if not {key, _leaf(key)} & shown and not key.startswith(told)]
