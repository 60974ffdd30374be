"""Record of a run's rewinds: which rows it leaves out, whatever checkpoint it goes on from."""

import json
import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_pretrain.run_folder.paths import REWINDS_FILE
from moe_pretrain.schedule.loss_spikes import MOST_SKIPPED_STEPS, Rewind, Rewinds
from moe_pretrain.system.files import write_json

_MOST_STEPS = 2**62


def read_rewinds(folder: Path) -> Rewinds:
    """Those recorded in a run's folder; none if it has no record.

    Raises:
        ValueError: The record is damaged; one line that says what to do.
        OSError: It cannot be read.
    """
    path = folder / REWINDS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Rewinds()
    try:
        return Rewinds(parse_rewinds(json.loads(content)))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged: {error}; restore what it held from the events 'rewound' in metrics.jsonl, or delete "
            "it: then only what the newest checkpoint leaves out is left out"
        ) from error


def write_rewinds(folder: Path, rewinds: Rewinds) -> None:
    """Record them, so that a kill right after cannot bring the left course back."""
    write_json(folder / REWINDS_FILE, rewinds.state())


def parse_rewinds(values: Any) -> list[Rewind]:
    """The rewinds in plain values; raises ValueError if they are anything else."""
    if not isinstance(values, list):
        raise ValueError(f"{reprlib.repr(values)} must be a list")
    names = [field.name for field in fields(Rewind)]
    for number, entry in enumerate(values, start=1):
        if not isinstance(entry, dict) or entry.keys() != set(names):
            raise ValueError(f"entry {number}, {reprlib.repr(entry)}, must have the fields {', '.join(names)}")
        for name, value in entry.items():
            if type(value) is not int or not 0 <= value < _MOST_STEPS:
                raise ValueError(f"entry {number}: {name}={reprlib.repr(value)} must be a whole number of at least 0")
        if entry["stop"] <= entry["first"]:
            raise ValueError(f"entry {number}: stop={entry['stop']} must be more than first={entry['first']}")
        if entry["stop"] - entry["first"] > MOST_SKIPPED_STEPS:
            raise ValueError(f"entry {number}: it leaves out more than {MOST_SKIPPED_STEPS} steps")
        if entry["step"] > entry["first"]:
            raise ValueError(f"entry {number}: step={entry['step']} must be at most first={entry['first']}")
    return [Rewind(**entry) for entry in values]
