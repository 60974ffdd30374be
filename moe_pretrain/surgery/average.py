"""Mean of the weights of a run's last checkpoints."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.manifest import BUFFER, UPDATES, moments_of
from moe_pretrain.checkpoint.plain import KeptArray, PlainCheckpoint
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.run_folder.paths import CHECKPOINTS
from moe_pretrain.surgery.run_folder import write_run


def average(run: Path, folder: Path, last: int, model: DecoderLM) -> tuple[Path, list[int]]:
    """Write a run folder whose checkpoint has the mean of the weights of the ``last`` checkpoints of ``run``.

    Weights and the routers' floating-point buffers (biases, thresholds) are means, formed in float64. Optimizer state,
    buffers of whole numbers (tables, counters) and the run's state are those of the newest checkpoint, so that the
    result trains on. One tensor is in memory at a time.

    Args:
        run: Folder of the run.
        folder: Folder to write; empty, or not there yet.
        last: Number of checkpoints, >= 2.
        model: The run's model, without storage: which buffers it has, and of what type.

    Returns:
        Place of the checkpoint, and the steps of those that it was made of, newest first.

    Raises:
        ConfigError: There are not so many, or they are not of one model.
        CheckpointError: One of them is damaged.
        ValueError: Something is in ``folder``.
    """
    if last < 2:
        raise ConfigError(f"--last={last} must be at least 2: the mean of one is itself")
    paths = store.complete_names(run / CHECKPOINTS)
    if len(paths) < last:
        raise ConfigError(
            f"--last={last} must be at most {len(paths)}, the checkpoints in {run / CHECKPOINTS}: checkpoint.keep_last "
            "and checkpoint.keep_every_steps say how many a run keeps"
        )
    manifests = [store.read_manifest(path) for path in paths[:last]]
    newest = manifests[0]
    for path, manifest in zip(paths, manifests, strict=False):
        if manifest["shapes"] != newest["shapes"]:
            raise ConfigError(f"{path} is of another model than {paths[0]}: their tensors have other shapes")
    readers = [Reader(path, manifest) for path, manifest in zip(paths, manifests, strict=False)]
    # What was measured was the newest alone.
    state = replace(store.train_state(newest), validation_loss=None)
    averaged = PlainCheckpoint(
        _arrays(readers, newest, model), newest["shapes"], moments_of(newest), newest[UPDATES], state
    )
    return write_run(folder, run, averaged), [manifest["state"]["step"] for manifest in manifests]


def _arrays(readers: list[Reader], newest: dict[str, Any], model: DecoderLM) -> Iterator[KeptArray]:
    for name, shape in newest["shapes"].items():
        size = torch.Size(shape).numel()
        yield KeptArray(name, WEIGHT, _mean([reader.read(name, WEIGHT, 0, size) for reader in readers]))
        for moment in moments_of(newest)[name]:
            yield KeptArray(name, moment, readers[0].read(name, moment, 0, size))
    types = {name: buffer.dtype for name, buffer in model.named_buffers()}
    for (name, kind), parts in readers[0].arrays().items():
        if kind == BUFFER:
            size, dtype = sum(part.length for part in parts), types[name]
            own = readers if dtype.is_floating_point else readers[:1]
            yield KeptArray(name, BUFFER, _mean([reader.read(name, BUFFER, 0, size, dtype) for reader in own]))


def _mean(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    total = values[0].double()
    for value in values[1:]:
        total += value
    return (total / len(values)).to(values[0].dtype)
