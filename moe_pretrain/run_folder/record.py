"""The run folders below a folder: what each was to do, how far it came, and which are the same but for the seed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows
from moe_pretrain.run_folder.paths import CONFIG_FILE, JOB_FILE, METRICS_FILE, RUN_FILES, no_run
from moe_pretrain.run_folder.provenance import read_config, read_summary
from moe_pretrain.system.words import one_line

State = Literal["finished", "diverged", "failed", "unfinished", "unreadable"]

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
        folder: Where it is; of a link, where that leads: to the run's sweep and its tuning.
    """

    name: str
    values: dict[str, Any]
    facts: dict[str, Any]
    train: list[MetricsRow]
    validation: list[MetricsRow]
    events: list[MetricsRow]
    state: State
    problem: str
    is_complete: bool
    folder: Path

    @property
    def seed(self) -> int:
        """Seed of the run; its configuration was readable."""
        return self.values["seed"]

    @property
    def last(self) -> MetricsRow:
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

    @property
    def end(self) -> MetricsRow:
        """The validation row after the last step; empty if the run did not come to its end, or has no such row."""
        last = self.validation[-1] if self.is_complete and self.validation else {}
        return last if last.get("step", -1) >= self.last.get("step", 0) else {}

    def final(self, key: str) -> float | None:
        """A number of the validation at the end; None if that is not there or it is not finite."""
        return self.end.get(key)


def find_runs(root: Path) -> list[RunRecord]:
    """Read every run folder below ``root``, itself included, in order of their names.

    Raises:
        ValueError: There is none.
    """
    if not root.is_dir():
        raise ValueError(f"FOLDER={root} must be a folder with runs below it")
    found = [_read_run(folder, root) for folder, files in _run_and_job_folders(root) if RUN_FILES & files]
    if not found:
        raise ValueError(f"FOLDER={root} must have runs below it: folders with {CONFIG_FILE} and {METRICS_FILE}")
    return sorted(found, key=lambda run: run.name)


def jobs_without_runs(root: Path) -> list[Path]:
    """Folders of the jobs of sweeps below ``root`` that have not started, so that there is no run to read."""
    return sorted(folder for folder, files in _run_and_job_folders(root) if not RUN_FILES & files)


def _run_and_job_folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Every folder of a run or of a sweep's job below ``root``, itself included, with the names of its files.

    Links are followed, each target once, but not those to what lies below ``root`` anyway, or around it.
    """
    below, seen = root.resolve(), set[Path]()
    for folder, children, files in os.walk(root, followlinks=True):
        if (RUN_FILES | {JOB_FILE}) & set(files):
            yield Path(folder), set(files)
            children.clear()  # what lies in a run folder (wandb's files, checkpoints) is no run
        children[:] = sorted(child for child in children if not child.startswith("."))
        for link in [child for child in children if (Path(folder) / child).is_symlink()]:
            target = (Path(folder) / link).resolve()
            if target in seen or target.is_relative_to(below) or below.is_relative_to(target):
                children.remove(link)
            seen.add(target)


def _read_run(folder: Path, root: Path) -> RunRecord:
    values, facts, rows, problems = {}, {}, [], []
    try:
        values = flatten(read_config(folder))
        if "seed" not in values:
            problems.append(f"{CONFIG_FILE}: {'it has no seed' if values else 'missing'}")
            values = {}
    except ValueError as error:
        problems.append(one_line(error))
    try:
        rows = read_rows(folder / METRICS_FILE)
    except (OSError, ValueError) as error:
        problems.append(one_line(error))
    try:
        facts = read_summary(folder)
    except ValueError as error:
        problems.append(one_line(error))
    state, problem = _judge(rows)
    kinds = _by_kind(rows)
    return RunRecord(
        name=str(folder.relative_to(root)),
        values=values,
        facts=facts,
        train=kinds["train"],
        validation=kinds["validation"],
        events=kinds["event"],
        state="unreadable" if problems else state,
        problem="; ".join(problems) or problem,
        is_complete=_last_word(rows)[0] == "finished" and not problems,
        folder=folder.resolve() if folder.is_symlink() else folder,
    )


def _by_kind(rows: Sequence[MetricsRow]) -> dict[str, list[MetricsRow]]:
    return {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "validation", "tasks", "event")}


def _last_word(rows: Sequence[MetricsRow]) -> tuple[State, str]:
    """The state that the event rows tell, and the message of the one that decides."""
    state: tuple[State, str] = ("unfinished", "")
    for row in rows:
        if row["kind"] == "train":
            state = ("unfinished", "")
        elif row["kind"] == "event" and row["event"] in _LAST_STATE:
            state = (_LAST_STATE[row["event"]], row["message"])
    return state


def _judge(rows: Sequence[MetricsRow]) -> tuple[State, str]:
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


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def differences(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that are not the same everywhere, in the order of the configuration."""
    keys = list(dict.fromkeys(key for each in values for key in each))
    return [key for key in keys if any(show(each, key) != show(values[0], key) for each in values)]


def show(values: Mapping[str, Any], key: str) -> str:
    """One value as text; ``MISSING`` where the configuration has no such key."""
    value = values.get(key, MISSING)
    if key == "router.name":
        value = f"{value}{_of_layers(values)}"
    return "null" if value is None else str(value)


def _of_layers(values: Mapping[str, Any]) -> str:
    """Schemes by layer, of a router that has several; else empty."""
    names = [(key.split("."), value) for key, value in values.items() if key.startswith("router.layers.")]
    schemes = [f"{path[2]}:{value}" for path, value in names if path[3:] == ["name"]]
    return f"{{{','.join(schemes)}}}" if schemes else ""


def load_rows(run_dir: Path) -> dict[str, list[MetricsRow]]:
    """Read the metrics of a run, by kind.

    Raises:
        ValueError: The folder has no ``metrics.jsonl``, or it has no train rows yet.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        raise ValueError(no_run(run_dir, METRICS_FILE))
    kinds = _by_kind(read_rows(path))
    if not kinds["train"]:
        raise ValueError(f"{path} has no train rows yet: nothing to report")
    return kinds
