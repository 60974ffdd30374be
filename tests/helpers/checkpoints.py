"""Small checkpoints written without an engine, and what any checkpoint holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.host_copy import Staged
from moe_pretrain.checkpoint.manifest import MANIFEST, Interval, folder_name, moments_of, self_hash
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.checkpoint.write import commit, make_work_folder, write_part
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import WEIGHT

_SAVE_SECONDS = 1800.0
MOMENTS = ["exp_avg", "exp_avg_sq"]
KINDS = (WEIGHT, *MOMENTS)


def no_fault(point: str) -> None:
    pass


def write_checkpoint(folder: Path, step: int, **state: Any) -> Path:
    """One rank's checkpoint of two arrays, [2, 3] and [5]; its numbers are the bytes of ``step``."""
    shapes = {"layers.0.weight": [2, 3], "norm.weight": [5]}
    header, intervals, offset = {}, [], 0
    file = "rank_00000.safetensors"
    for name, size in (("layers.0.weight", 6), ("norm.weight", 5)):
        for kind in KINDS:
            interval = Interval(name, kind, 0, size, file)
            header[interval.key] = {"dtype": "F32", "shape": [size], "data_offsets": [offset, offset + 4 * size]}
            intervals.append(interval)
            offset += 4 * size
    text = json.dumps(header).encode()
    content = memoryview(bytes([step]) * offset)
    moments = dict.fromkeys(shapes, MOMENTS)
    staged = Staged(
        file, len(text).to_bytes(8, "little") + text, content, intervals, shapes, moments, float(min(step, 1))
    )
    target = folder / folder_name(step)
    work = make_work_folder(target, no_fault)
    part = write_part(work, staged, no_fault)
    commit(work, target, [part], staged, {"step": step, "tokens": step * 8, **state}, no_fault)
    return target


def policy(
    keep_last: int, keep_every_steps: int | None = None, keep_best: int = 0, asynchronous: bool = False
) -> CheckpointConfig:
    """Settings of a run that saves every step."""
    return CheckpointConfig(
        every_steps=1,
        keep_last=keep_last,
        keep_every_steps=keep_every_steps,
        keep_best=keep_best,
        asynchronous=asynchronous,
        resume="auto",
        warm_start=None,
        branch_from=None,
    )


def save(engine: TrainEngine, folder: Path, state: TrainState, keep_last: int) -> Path:
    """Write one checkpoint of an engine and wait for it; every rank must call it."""
    saver = store.Saver(engine, folder, policy(keep_last), _SAVE_SECONDS)
    saver.save(state)
    outcome = saver.take(wait=True)
    assert outcome is not None
    if outcome.path is None:
        raise store.CheckpointError(f"checkpoint of step {outcome.step} cannot be written: {outcome.problem}")
    return outcome.path


def rewrite_manifest(path: Path, change: Any) -> None:
    """Change a manifest and give it the right hash again, as one who means harm would."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["self"]
    change(manifest)
    manifest["self"] = self_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical array of the newest checkpoint, put together."""
    path, manifest = store.newest(folder, pytest.fail)
    reader = Reader(path, manifest)
    return {
        f"{kind}/{name}": reader.read(name, kind, 0, torch.Size(shape).numel())
        for name, shape in manifest["shapes"].items()
        for kind in (WEIGHT, *moments_of(manifest)[name])
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
