"""A checkpoint into an engine, whatever topology either has."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_pretrain.checkpoint.manifest import BUFFER, UPDATES, CheckpointError, Interval, moments_of
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import WEIGHT, global_shape, global_start, kept_moments, pieces
from moe_pretrain.model.decoder import DecoderLM

SQUARES = ("exp_avg_sq",)
"""Moments whose root an optimizer takes."""
ROUTER = ".router."
"""What the names of routers' weights have in common, and no other."""


@torch.no_grad()
def restore(engine: TrainEngine, path: Path, manifest: dict[str, Any]) -> list[str]:
    """Load weights and optimizer state into ``engine``; every rank must call it.

    Args:
        engine: Whose state is replaced.
        path: The checkpoint's folder.
        manifest: Its manifest, verified.

    Returns:
        Names of buffers that an earlier release did not have and the checkpoint therefore lacks: they begin anew.

    Raises:
        CheckpointError: The checkpoint is not of this model.
    """
    reader = Reader(path, manifest)
    shapes = _global_shapes(engine)
    _check_shapes(shapes, path, manifest)
    stored = moments_of(manifest)
    for name, moments in kept_moments(engine).items():
        if moments != stored[name]:
            raise CheckpointError(
                f"checkpoint {path} has the moments {', '.join(stored[name])} of {name}, "
                f"optimizer.name={engine.optimizer_config.name} keeps {', '.join(moments)}"
            )
    _restore_weights(engine, reader, shapes.keys())
    missing = missing_buffers(engine.model, reader)
    for name, buffer in engine.model.named_buffers():
        if name in missing:
            buffer.zero_()
        else:
            buffer.copy_(reader.read_buffer(engine.model, name, buffer))
    for piece in pieces(engine):
        for kind, values in piece.arrays().items():
            if kind != WEIGHT:
                values.copy_(reader.read(piece.name, kind, piece.start, values.numel()))
        piece.updates.fill_(manifest[UPDATES])
    return missing


def missing_buffers(model: nn.Module, reader: "Reader") -> list[str]:
    """Buffers that a checkpoint lacks and may lack: those that their module calls ``later_buffers``.

    They are zero when the module is built, and a run goes on with zeros. Any other buffer that is not there
    is an error of whoever reads it.
    """
    found = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in getattr(module, "later_buffers", ())
    ]
    return [name for name in found if (name, BUFFER) not in reader.arrays()]


@dataclass(frozen=True)
class WarmStart:
    """Result of taking the weights of another run, by name.

    Attributes:
        loaded: Taken over.
        fresh: Of this run's routers, which the other does not have, or has in another shape: as initialised.
        left: Of the other's routers, which this run does not have, or has in another shape.
    """

    loaded: list[str]
    fresh: list[str]
    left: list[str]


@torch.no_grad()
def warm_start(engine: TrainEngine, path: Path, manifest: dict[str, Any]) -> WarmStart:
    """Load the weights alone, of a run that may have another router; every rank must call it.

    Everything outside the routers must be there in the same shape. Optimizer state and the routers' buffers stay as
    they are.

    Args:
        engine: Whose weights are replaced; it must not have made a step.
        path: The checkpoint's folder.
        manifest: Its manifest, verified.

    Raises:
        CheckpointError: A weight outside the routers has no counterpart.
    """
    return take_weights(engine, path, manifest["shapes"], Reader(path, manifest))


@torch.no_grad()
def take_weights(engine: TrainEngine, path: Path, stored: Mapping[str, list[int]], reader: "WeightReader") -> WarmStart:
    """``warm_start`` from anything that can be read by our names; every rank must call it.

    Args:
        engine: Whose weights are replaced; it must not have made a step.
        path: Where they are, for messages.
        stored: Shape of each tensor that is there.
        reader: Reader of them.

    Raises:
        CheckpointError: A weight outside the routers has no counterpart.
    """
    shapes = _global_shapes(engine)
    found = WarmStart([], [], [])
    for name in sorted(shapes.keys() | stored.keys()):
        if shapes.get(name) == stored.get(name):
            found.loaded.append(name)
        elif ROUTER in name:
            if name in shapes:
                found.fresh.append(name)
            if name in stored:
                found.left.append(name)
        else:
            raise CheckpointError(
                f"checkpoint.warm_start={path} has {name}={stored.get(name)}, this model has {shapes.get(name)}: only "
                "the weights of routers may differ"
            )
    _restore_weights(engine, reader, found.loaded)
    return found


def _restore_weights(engine: TrainEngine, reader: "WeightReader", names: Collection[str]) -> None:
    for name, parameter in engine.model.named_parameters():
        if name in names:
            values = reader.read(name, WEIGHT, global_start(engine, parameter), parameter.numel())
            # In a bfloat16 engine this rounds the master weight, which is what a training step does too.
            parameter.copy_(values.view_as(parameter))
    for piece in pieces(engine):
        if piece.name in names:
            piece.master.copy_(reader.read(piece.name, WEIGHT, piece.start, piece.master.numel()))


def _global_shapes(engine: TrainEngine) -> dict[str, list[int]]:
    return {name: global_shape(engine, parameter) for name, parameter in engine.model.named_parameters()}


@torch.no_grad()
def load_model(model: DecoderLM, path: Path, manifest: dict[str, Any]) -> None:
    """Load weights and buffers into a whole model in one process, without an engine.

    Raises:
        CheckpointError: The checkpoint is not of this model.
    """
    reader = Reader(path, manifest)
    parameters = dict(model.named_parameters())
    _check_shapes({name: list(parameter.shape) for name, parameter in parameters.items()}, path, manifest)
    missing = missing_buffers(model, reader)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in missing}
    for name, tensor in parameters.items():
        tensor.copy_(reader.read(name, WEIGHT, 0, tensor.numel()).view_as(tensor))
    for name, buffer in buffers.items():
        buffer.copy_(reader.read_buffer(model, name, buffer))


def _check_shapes(shapes: dict[str, list[int]], path: Path, manifest: dict[str, Any]) -> None:
    """Raise ``CheckpointError`` unless the model's parameters are the checkpoint's."""
    for name in sorted(shapes.keys() | manifest["shapes"].keys()):
        if shapes.get(name) != manifest["shapes"].get(name):
            raise CheckpointError(
                f"checkpoint {path} has {name}={manifest['shapes'].get(name)}, this model has {shapes.get(name)}"
            )


@runtime_checkable
class WeightReader(Protocol):
    """Reads any interval of any array by its name here."""

    def read(self, tensor: str, kind: str, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)``, float32."""


class Reader:
    """Reads any interval of any array from the intervals on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        """Open the files of a checkpoint whose manifest is verified.

        Raises:
            CheckpointError: A file is not what safetensors can read.
        """
        self._path = path
        self._intervals: dict[tuple[str, str], list[Interval]] = {}
        for fields in manifest["intervals"]:
            interval = Interval(**fields)
            self._intervals.setdefault((interval.tensor, interval.kind), []).append(interval)
        self._files = {}
        for file in manifest["files"]:
            try:
                self._files[file] = safe_open(path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"checkpoint file {path / file} cannot be read: {error}") from error

    def arrays(self) -> dict[tuple[str, str], list[Interval]]:
        """The intervals of each (tensor, kind)."""
        return self._intervals

    def part(self, interval: Interval, first: int, stop: int) -> Tensor:
        """Elements ``[first, stop)`` of one interval, counted from its own start.

        Raises:
            CheckpointError: Its file has no such interval, or another length of it.
        """
        try:
            part = self._files[interval.file].get_slice(interval.key)
            if part.get_shape() != [interval.length]:
                raise SafetensorError(f"its shape is {part.get_shape()} and not [{interval.length}]")
            return part[first:stop]
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint file {self._path / interval.file}: {interval.key}: {error}") from error

    def read(self, tensor: str, kind: str, start: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Elements ``[start, start + length)`` of an array.

        Raises:
            CheckpointError: The intervals on disk do not cover the range, are of another type, or hold what no run
                writes: a number that is not finite, a mean of squares below 0.
        """
        out = torch.empty(length, dtype=dtype)
        covered = 0
        for interval in self._intervals.get((tensor, kind), []):
            first = max(start, interval.start)
            stop = min(start + length, interval.start + interval.length)
            if first < stop:
                part = self.part(interval, first - interval.start, stop - interval.start)
                if part.dtype != dtype:
                    raise CheckpointError(f"checkpoint {self._path}: {kind} of {tensor} is {part.dtype}, not {dtype}")
                out[first - start : stop - start] = part
                covered += stop - first
        if covered != length:
            raise CheckpointError(
                f"checkpoint {self._path} covers {covered} of {length} elements of {kind} of {tensor}"
            )
        if dtype.is_floating_point and not bool(out.isfinite().all()):
            raise CheckpointError(f"checkpoint {self._path}: {kind} of {tensor} is not finite")
        if kind in SQUARES and bool((out < 0).any()):
            raise CheckpointError(f"checkpoint {self._path}: {kind} of {tensor}, a mean of squares, is negative")
        return out

    def read_buffer(self, model: nn.Module, name: str, buffer: Tensor) -> Tensor:
        """The whole of a buffer of ``model``, in its shape and within the range that its module gives.

        Raises:
            CheckpointError: As ``read``; or it is longer, or leaves its range.
        """
        stored = sum(interval.length for interval in self._intervals.get((name, BUFFER), []))
        if stored > buffer.numel():
            raise CheckpointError(f"checkpoint {self._path}: {name} has {stored} elements, not {buffer.numel()}")
        values = self.read(name, BUFFER, 0, buffer.numel(), buffer.dtype).view_as(buffer)
        owner, _, own_name = name.rpartition(".")
        low, high = getattr(model.get_submodule(owner), "buffer_ranges", {}).get(own_name, (-math.inf, math.inf))
        if values.numel() and not (low <= values.min().item() and values.max().item() <= high):
            raise CheckpointError(
                f"checkpoint {self._path}: {name} must be from {low} to {high}, has {values.min().item()} to "
                f"{values.max().item()}"
            )
        return values
