"""The package's door: one checkpoint out of an engine, the newest good one back into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_pretrain.checkpoint.background_save import Outcome, Saver
from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    complete_names,
    locate,
    newest,
    open_manifest,
    read_manifest,
    share,
    train_state,
    verify_files,
)
from moe_pretrain.checkpoint.restore import WarmStart, load_model, restore, warm_start
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.checkpoint.write import discard_after
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.parallel.mesh import Mesh

__all__ = [
    "FORMAT_VERSION",
    "CheckpointConfig",
    "CheckpointError",
    "Outcome",
    "RunIdentity",
    "Saver",
    "TrainState",
    "WarmStart",
    "agree_on",
    "agree_on_newest",
    "discard_after",
    "load_model",
    "locate",
    "newest",
    "read_manifest",
    "restore",
    "save",
    "train_state",
    "warm_start",
]

_SAVE_SECONDS = 1800.0


def save(engine: TrainEngine, folder: Path, state: TrainState, keep_last: int) -> Path:
    """Write one checkpoint and wait for it; every rank must call it.

    Args:
        engine: What to save.
        folder: The run's folder of checkpoints.
        state: Everything beside tensors that a run needs to go on.
        keep_last: Older checkpoints beyond this many are removed after the new one is complete.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It could not be written; on every rank.
    """
    config = CheckpointConfig(
        every_steps=1,
        keep_last=keep_last,
        keep_every_steps=None,
        keep_best=0,
        asynchronous=False,
        resume="auto",
        warm_start=None,
    )
    saver = Saver(engine, folder, config, _SAVE_SECONDS)
    saver.save(state)
    outcome = saver.take(wait=True)
    assert outcome is not None
    if outcome.path is None:
        raise CheckpointError(f"checkpoint of step {outcome.step} cannot be written: {outcome.problem}")
    return outcome.path


def agree_on_newest(
    folder: Path, mesh: Mesh, warn: Callable[[str], None], accept: Callable[[TrainState], bool] = lambda state: True
) -> tuple[Path, dict[str, Any]] | None:
    """``newest`` for all ranks together: each verifies its share of the files, and all take the same checkpoint.

    Args:
        folder: The run's folder of checkpoints, which every rank sees.
        mesh: This rank's place.
        warn: Hears, on every rank, of every newer checkpoint that does not verify.
        accept: Of a checkpoint's state, whether it may be taken; the same on all ranks.
    """
    names: list[Any] = [complete_names(folder)]
    dist.broadcast_object_list(names, src=0, device=mesh.device)
    for path in names[0]:
        try:
            manifest = agree_on(path, mesh)
            if accept(train_state(manifest)):
                return path, manifest
        except CheckpointError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    return None


def agree_on(path: Path, mesh: Mesh) -> dict[str, Any]:
    """The verified manifest of one checkpoint; each rank verifies its share of the files.

    Raises:
        CheckpointError: Something is damaged, missing, hostile, or of another format version; on every rank.
    """
    complaint, manifest = None, {}
    try:
        manifest = open_manifest(path)
        verify_files(path, manifest, share(manifest["files"], mesh.rank, mesh.world_size))
    except CheckpointError as error:
        complaint = str(error)
    complaints: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(complaints, complaint)
    if first := next((found for found in complaints if found), None):
        raise CheckpointError(first)
    return manifest
