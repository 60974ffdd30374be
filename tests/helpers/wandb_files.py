"""What wandb's offline files hold: LevelDB's log of blocks, whose records are wandb's own messages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 2**15, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def offline_folders(run_folder: Path) -> list[Path]:
    return sorted(run_folder.glob("wandb/offline-run-*"))


def records(folder: Path) -> Iterator[Any]:
    """The records of an offline run, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, part = FILE_HEADER, b""
    while place + RECORD_HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < RECORD_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + RECORD_HEADER])
        data = content[place + RECORD_HEADER : place + RECORD_HEADER + length]
        place += RECORD_HEADER + length
        part = data if kind in (FULL, FIRST) else part + data
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(part)
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows, in order, with wandb's own step as ``_step``."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def run_record(folder: Path) -> Any:
    """Project, group, name, id and configuration."""
    return next(record.run for record in records(folder) if record.WhichOneof("record_type") == "run")


def configuration(folder: Path) -> dict[str, Any]:
    return {item.key: json.loads(item.value_json) for item in run_record(folder).config.update}
