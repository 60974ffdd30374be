"""A rank's part of a checkpoint in host memory, laid out as the file that it becomes."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pretrain.checkpoint.manifest import BUFFER, Interval
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import global_shape, kept_moments, pieces

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that a model's state may have."""


@dataclass(frozen=True)
class Staged:
    """One rank's part of a checkpoint, which training no longer touches.

    Attributes:
        file: Name of the file that it becomes.
        header: The safetensors header with its length in front.
        content: What follows the header.
        intervals: What lies in it.
        shapes: Global shape of every parameter.
        moments: Names of the moments that the optimizer keeps of each.
        updates: Updates that the optimizer has made.
    """

    file: str
    header: bytes
    content: memoryview
    intervals: list[Interval]
    shapes: dict[str, list[int]]
    moments: dict[str, list[str]]
    updates: float


class Staging:
    """Host memory that one save after another is copied to; it is allocated once, and pinned on a GPU."""

    def __init__(self, engine: TrainEngine):
        self._engine = engine
        self._memory = torch.empty(0, dtype=torch.uint8)

    def fill(self) -> Staged:
        """Copy the engine's state; what the call before returned is overwritten.

        Returns:
            This rank's part, with every array that it saves.
        """
        engine = self._engine
        file = f"rank_{engine.mesh.rank:05d}.safetensors"
        found, updates = self._arrays(file)
        # safetensors allows no holes, and every array must begin at a multiple of its element's size.
        found.sort(key=lambda pair: -pair[1].element_size())
        size = sum(values.nbytes for _, values in found)
        if len(self._memory) != size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=engine.mesh.device.type == "cuda")
        header, offset = {}, 0
        for interval, values in found:
            stop = offset + values.nbytes
            self._memory[offset:stop].view(values.dtype).copy_(values.detach().view(-1), non_blocking=True)
            header[interval.key] = {
                "dtype": DTYPE_NAMES[values.dtype],
                "shape": [values.numel()],
                "data_offsets": [offset, stop],
            }
            offset = stop
        if engine.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return Staged(
            file=file,
            header=len(text).to_bytes(8, "little") + text,
            content=memoryview(self._memory.numpy()),  # type: ignore[arg-type]  # arrays are buffers from 3.12 on
            intervals=[interval for interval, _ in found],
            shapes={name: global_shape(engine, parameter) for name, parameter in engine.model.named_parameters()},
            moments=kept_moments(engine),
            updates=updates,
        )

    def _arrays(self, file: str) -> tuple[list[tuple[Interval, Tensor]], float]:
        """Views of all that this rank saves, and the optimizer's number of updates."""
        engine = self._engine
        found: list[tuple[Interval, Tensor]] = []
        updates = 0.0
        for piece in pieces(engine):
            updates = float(piece.updates)
            if not piece.is_saved_here:
                continue
            for kind, values in piece.arrays().items():
                found.append((Interval(piece.name, kind, piece.start, values.numel(), file), values))
        if engine.mesh.is_main:  # the same on every rank
            for name, buffer in engine.model.named_buffers():
                found.append((Interval(name, BUFFER, 0, buffer.numel(), file), buffer))
        return found, updates
