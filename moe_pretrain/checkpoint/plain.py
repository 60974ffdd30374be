"""A checkpoint written from tensors at hand, without an engine: what surgery on weights leaves behind."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_pretrain.checkpoint.host_copy import DTYPE_NAMES, Staged
from moe_pretrain.checkpoint.manifest import Interval
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.checkpoint.write import commit, make_work_folder, write_part

_PART_BYTES = 1 << 30


class KeptArray(NamedTuple):
    """One whole array of a checkpoint.

    Attributes:
        tensor: Name of the parameter or buffer.
        kind: ``weight``, ``buffer`` or the name of a moment.
        values: Its elements, in any shape.
    """

    tensor: str
    kind: str
    values: Tensor


@dataclass(frozen=True)
class PlainCheckpoint:
    """Contents of a checkpoint, to be written once.

    Attributes:
        arrays: Every array; they are asked for one by one.
        shapes: Shape of every parameter.
        moments: Names of the moments of every parameter; none where the optimizer is to begin anew.
        updates: Updates that the optimizer has made.
        state: State of the run.
    """

    arrays: Iterable[KeptArray]
    shapes: Mapping[str, list[int]]
    moments: Mapping[str, list[str]]
    updates: float
    state: TrainState


def write_plain(target: Path, checkpoint: PlainCheckpoint) -> None:
    """Write ``checkpoint``, whole or not at all, with about a gigabyte of it in memory at a time.

    Args:
        target: Its folder, named by the step of its state.
        checkpoint: Its contents.

    Raises:
        OSError: It cannot be written.
    """
    work = make_work_folder(target, _no_fault)
    parts: list[dict[str, Any]] = []
    waiting: list[KeptArray] = []
    size = 0
    staged = Staged("", b"", memoryview(b""), [], dict(checkpoint.shapes), dict(checkpoint.moments), checkpoint.updates)

    def flush() -> None:
        if waiting:
            parts.append(write_part(work, _stage(waiting, len(parts), staged), _no_fault))
            waiting.clear()

    for array in checkpoint.arrays:
        waiting.append(array)
        size += array.values.nbytes
        if size >= _PART_BYTES:
            flush()
            size = 0
    flush()
    commit(work, target, parts, staged, checkpoint.state.to_json(), _no_fault)


def _no_fault(point: str) -> None:
    """Nothing is injected here."""


def _stage(arrays: list[KeptArray], index: int, like: Staged) -> Staged:
    """One file of ``arrays``; the largest elements first, since safetensors allows no holes."""
    file = f"rank_{index:05d}.safetensors"
    ordered = sorted(arrays, key=lambda array: -array.values.element_size())
    header, offset, intervals, chunks = {}, 0, [], []
    for tensor, kind, values in ordered:
        interval = Interval(tensor, kind, 0, values.numel(), file)
        header[interval.key] = {
            "dtype": DTYPE_NAMES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [offset, offset + values.nbytes],
        }
        intervals.append(interval)
        chunks.append(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = torch.cat(chunks).numpy()
    return Staged(
        file,
        len(text).to_bytes(8, "little") + text,
        memoryview(content),  # type: ignore[arg-type]  # arrays are buffers from 3.12 on
        intervals,
        like.shapes,
        like.moments,
        like.updates,
    )
