"""Tensors of a Hugging Face folder as parts of a checkpoint's tensors, written shard by shard."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_pretrain.checkpoint.host_copy import DTYPE_NAMES
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.system.files import WholeFile, write_json

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the folder: consecutive elements of one of the checkpoint's.

    Attributes:
        name: Its name in the folder.
        shape: Its shape.
        source: Name of the checkpoint's tensor; None for zeros.
        start: First element of it, in the tensor laid out flat.
        kind: What the checkpoint has of it, ``weight`` or ``buffer``.
        dtype: Type in the checkpoint.
        factor: Multiplies every element.
        is_rounded: Whether it is written in the dtype that the user asks for; what decides routes stays as it is.
    """

    name: str
    shape: list[int]
    source: str | None
    start: int = 0
    kind: str = WEIGHT
    dtype: torch.dtype = torch.float32
    factor: float = 1.0
    is_rounded: bool = True

    def written_dtype(self, asked: torch.dtype) -> torch.dtype:
        """Type in the folder."""
        return asked if self.is_rounded else self.dtype

    def read(self, reader: Reader, asked: torch.dtype) -> Tensor:
        """The tensor as it is written.

        Raises:
            CheckpointError: The checkpoint has no such elements.
        """
        dtype = self.written_dtype(asked)
        if self.source is None:
            return torch.zeros(self.shape, dtype=dtype)
        values = reader.read(self.source, self.kind, self.start, math.prod(self.shape), self.dtype).view(self.shape)
        return (values if self.factor == 1.0 else values * self.factor).to(dtype)


def split(tensors: Sequence[ExportedTensor], asked: torch.dtype, shard_bytes: int) -> list[list[ExportedTensor]]:
    """Shards of at most ``shard_bytes`` each, in order; a larger tensor is a shard of its own."""
    shards: list[list[ExportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        own = math.prod(tensor.shape) * tensor.written_dtype(asked).itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += own
    return shards


def write_tensors(
    folder: Path, tensors: Sequence[ExportedTensor], reader: Reader, asked: torch.dtype, shard_bytes: int
) -> int:
    """Write the safetensors files and their index, with one shard in memory at a time; the number of elements."""
    shards = split(tensors, asked, shard_bytes)
    files: dict[str, str] = {}
    size = elements = 0
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        values = {tensor.name: tensor.read(reader, asked) for tensor in shard}
        _write_safetensors(folder / name, values)
        files |= dict.fromkeys(values, name)
        size += sum(value.nbytes for value in values.values())
        elements += sum(value.numel() for value in values.values())
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": files})
    return elements


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors, each straight from its memory; the largest elements first, for there are no holes."""
    ordered = dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered.items():
        stop = offset + tensor.nbytes
        kind, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with WholeFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))
