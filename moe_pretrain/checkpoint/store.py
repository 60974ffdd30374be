"""Checkpoints on disk: written whole or not at all, verified before they are believed.

A checkpoint is a folder ``step_00000100`` with one safetensors file per rank that holds intervals (see ``layout``), and
``manifest.json``: which file holds which interval of which tensor, the size and hash of every file, the
run's state, and a hash of itself. It is written under another name, flushed to disk and renamed, so a folder with
the right name is complete unless the disk damaged it. There is no ``latest`` pointer: the newest
folder that verifies wins. Only JSON and safetensors are read, so loading runs no code.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_pretrain.checkpoint.layout import MOMENTS, WEIGHT, Piece, global_shape, global_start, pieces
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.model.decoder import DecoderLM

FORMAT_VERSION = 1
BUFFER = "buffer"
"""Kind of state that has no gradient: router biases, thresholds."""

_MANIFEST = "manifest.json"
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        every_steps: Steps between checkpoints; one is always written at the end.
        keep_last: How many of the newest stay.
        resume: ``auto``: go on from the newest good checkpoint if there is one; ``must``: fail if there is none;
            ``never``: fail if there is one.
    """

    every_steps: int
    keep_last: int
    resume: str

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 1")
        if self.resume not in ("auto", "must", "never"):
            raise ValueError(f"checkpoint.resume={self.resume} must be auto, must or never")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file."""


@dataclass(frozen=True)
class _Interval:
    """Where ``length`` elements from ``start`` of one array are: ``key`` in ``file``."""

    tensor: str
    kind: str
    start: int
    length: int
    file: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.tensor}/{self.start}"


def save(engine: TrainEngine, folder: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint of ``engine`` and ``state``; every rank must call it.

    Args:
        engine: What to save.
        folder: The run's folder of checkpoints.
        state: JSON values that the run needs to go on; ``state["step"]`` is the number of finished steps.
        keep_last: Older checkpoints beyond this many are removed after the new one is complete.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"step_{state['step']:08d}"
    work = target.with_name(target.name + _TEMPORARY)
    if engine.mesh.is_main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    file = f"rank_{engine.mesh.rank:05d}.safetensors"
    intervals, adam_step = _write_own(engine, work / file)
    own = {"file": file, **_describe(work / file), "intervals": [asdict(part) for part in intervals]}
    gathered: list[Any] = [None] * engine.mesh.world_size
    dist.all_gather_object(gathered, own)
    if engine.mesh.is_main:
        shapes = {name: global_shape(engine, p) for name, p in engine.model.named_parameters()}
        _commit(work, target, gathered, shapes, state, adam_step)
        _retain(folder, keep_last)
    dist.barrier()
    return target


def _write_own(engine: TrainEngine, path: Path) -> tuple[list[_Interval], float]:
    tensors, intervals, adam_step = {}, [], 0.0
    for piece in pieces(engine):
        adam_step = float(piece.state["step"])
        if not piece.is_saved_here:
            continue
        for kind in (WEIGHT, *MOMENTS):
            values = piece.master if kind == WEIGHT else piece.moment(kind)
            interval = _Interval(piece.name, kind, piece.start, values.numel(), path.name)
            intervals.append(interval)
            tensors[interval.key] = values.detach().to("cpu", copy=True)
    if engine.mesh.is_main:  # the same on every rank
        for name, buffer in engine.model.named_buffers():
            interval = _Interval(name, BUFFER, 0, buffer.numel(), path.name)
            intervals.append(interval)
            tensors[interval.key] = buffer.detach().view(-1).to("cpu", copy=True)
    save_file(tensors, path)
    _flush(path)
    return intervals, adam_step


def _commit(
    work: Path,
    target: Path,
    files: list[dict[str, Any]],
    shapes: dict[str, list[int]],
    state: dict[str, Any],
    adam_step: float,
) -> None:
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "state": state,
        "adam_step": adam_step,
        "shapes": shapes,
        "files": {part["file"]: {"bytes": part["bytes"], "xxh3_128": part["xxh3_128"]} for part in files},
        "intervals": [interval for part in files for interval in part["intervals"]],
    }
    manifest["self"] = _self_hash(manifest)
    path = work / _MANIFEST
    path.write_text(json.dumps(manifest))
    _flush(path)
    _flush(work)
    if target.exists():  # a damaged one of the same step, which resume has passed over
        shutil.rmtree(target)
    work.rename(target)
    _flush(target.parent)


def _retain(folder: Path, keep_last: int) -> None:
    """Remove all but the newest; renamed first, so a kill leaves no half checkpoint under a good name."""
    for old in _complete_names(folder)[keep_last:]:
        doomed = old.with_name(old.name + _TEMPORARY)
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _complete_names(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; not yet verified."""
    found = [path for path in folder.glob("step_*") if path.name[len("step_") :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len("step_") :]), reverse=True)


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, and its manifest; ``warn`` hears of every newer one that does not."""
    for path in _complete_names(folder):
        try:
            return path, read_manifest(path)
        except CheckpointError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint: its manifest against its own hash, every file against size and hash.

    Raises:
        CheckpointError: Something is damaged, missing, or of another format version.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = manifest.pop("self")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path / _MANIFEST} cannot be read: {error}") from error
    if _self_hash(manifest) != expected:
        raise CheckpointError(f"checkpoint {path / _MANIFEST} is damaged: its hash does not match")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format_version={manifest['format_version']}, this program reads {FORMAT_VERSION}"
        )
    for file, facts in manifest["files"].items():
        if Path(file).name != file:
            raise CheckpointError(f"checkpoint {path} names the file {file!r} outside its folder")
        try:
            actual = _describe(path / file)
        except OSError as error:
            raise CheckpointError(f"checkpoint file {path / file} cannot be read: {error}") from error
        if actual != facts:
            raise CheckpointError(f"checkpoint file {path / file} is damaged: its size or hash does not match")
    return manifest


def restore(engine: TrainEngine, path: Path, manifest: dict[str, Any]) -> None:
    """Load weights and optimizer state into ``engine``, whatever topology it has; every rank must call it.

    Raises:
        CheckpointError: The checkpoint is not of this model.
    """
    reader = _Reader(path, manifest)
    parameters = dict(engine.model.named_parameters())
    _check_shapes({name: global_shape(engine, own) for name, own in parameters.items()}, path, manifest)
    with torch.no_grad():
        for name, parameter in parameters.items():
            start = global_start(engine, parameter)
            values = reader.read(name, WEIGHT, start, parameter.numel())
            # In a bfloat16 engine this rounds the master weight, which is what a training step does too.
            parameter.copy_(values.view_as(parameter))
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(reader.read(name, BUFFER, 0, buffer.numel()).view_as(buffer))
        for piece in pieces(engine):
            _restore_piece(piece, reader, manifest["adam_step"])


@torch.no_grad()
def load_model(model: DecoderLM, path: Path, manifest: dict[str, Any]) -> None:
    """Load weights and buffers into a whole model in one process, without an engine.

    Raises:
        CheckpointError: The checkpoint is not of this model.
    """
    reader = _Reader(path, manifest)
    parameters = dict(model.named_parameters())
    _check_shapes({name: list(parameter.shape) for name, parameter in parameters.items()}, path, manifest)
    for kind, tensors in ((WEIGHT, parameters), (BUFFER, dict(model.named_buffers()))):
        for name, tensor in tensors.items():
            tensor.copy_(reader.read(name, kind, 0, tensor.numel()).view_as(tensor))


def _check_shapes(shapes: dict[str, list[int]], path: Path, manifest: dict[str, Any]) -> None:
    """Raise ``CheckpointError`` unless the model's parameters are the checkpoint's."""
    for name in sorted(shapes.keys() | manifest["shapes"].keys()):
        if shapes.get(name) != manifest["shapes"].get(name):
            raise CheckpointError(
                f"checkpoint {path} has {name}={manifest['shapes'].get(name)}, this model has {shapes.get(name)}"
            )


def _restore_piece(piece: Piece, reader: "_Reader", adam_step: float) -> None:
    length = piece.master.numel()
    piece.master.copy_(reader.read(piece.name, WEIGHT, piece.start, length))
    for kind in MOMENTS:
        piece.moment(kind).copy_(reader.read(piece.name, kind, piece.start, length))
    piece.state["step"].fill_(adam_step)


class _Reader:
    """Reads any interval of any array from the intervals on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self._path = path
        self._intervals: dict[tuple[str, str], list[_Interval]] = {}
        for fields in manifest["intervals"]:
            interval = _Interval(**fields)
            self._intervals.setdefault((interval.tensor, interval.kind), []).append(interval)
        self._files = {file: safe_open(path / file, framework="pt") for file in manifest["files"]}

    def read(self, tensor: str, kind: str, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)``, float32.

        Raises:
            CheckpointError: The intervals on disk do not cover the range.
        """
        out = torch.empty(length)
        covered = 0
        for interval in self._intervals.get((tensor, kind), []):
            first = max(start, interval.start)
            stop = min(start + length, interval.start + interval.length)
            if first >= stop:
                continue
            part = self._files[interval.file].get_slice(interval.key)
            out[first - start : stop - start] = part[first - interval.start : stop - interval.start]
            covered += stop - first
        if covered != length:
            raise CheckpointError(
                f"checkpoint {self._path} covers {covered} of {length} elements of {kind} of {tensor}"
            )
        return out


def _describe(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _self_hash(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
