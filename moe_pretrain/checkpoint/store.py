"""The package's door: checkpoints out of an engine, the newest good one back into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_pretrain.checkpoint.background_save import Outcome, Saver
from moe_pretrain.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpoint,
    UnreadableCheckpoint,
    complete_names,
    locate,
    newest,
    open_manifest,
    read_manifest,
    share,
    train_state,
    verify_files,
)
from moe_pretrain.checkpoint.restore import WarmStart, load_model, restore, take_weights, warm_start
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.checkpoint.write import keep_copy, set_aside
from moe_pretrain.engine.intervals import updates_made
from moe_pretrain.parallel.mesh import Mesh

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "Outcome",
    "RunIdentity",
    "Saver",
    "TrainState",
    "UnreadableCheckpoint",
    "WarmStart",
    "agree_on",
    "agree_on_newest",
    "complete_names",
    "keep_copy",
    "load_model",
    "locate",
    "newest",
    "read_manifest",
    "restore",
    "set_aside",
    "take_weights",
    "train_state",
    "updates_made",
    "warm_start",
]


def agree_on_newest(
    folder: Path,
    mesh: Mesh,
    warn: Callable[[str], None],
    accept: Callable[[TrainState], bool] = lambda state: True,
    is_lenient: bool = False,
) -> tuple[Path, dict[str, Any]] | None:
    """``newest`` for all ranks together: each verifies its share of the files, and all take the same checkpoint.

    Args:
        folder: The run's folder of checkpoints, which every rank sees.
        mesh: This rank's place.
        warn: Hears, on every rank, of every newer checkpoint that does not verify.
        accept: Of a checkpoint's state, whether it may be taken; the same on all ranks.
        is_lenient: Pass over hostile ones and those of another release too, as over damaged ones.

    Raises:
        CheckpointError: A newer one cannot be read, or, unless ``is_lenient``, is hostile or of another release; on
            every rank.
    """
    for path in mesh.on_main(lambda: complete_names(folder)):
        try:
            manifest = agree_on(path, mesh)
            if accept(train_state(manifest)):
                return path, manifest
        except CheckpointError as error:
            if isinstance(error, UnreadableCheckpoint) or not (is_lenient or isinstance(error, DamagedCheckpoint)):
                raise
            warn(f"{error}; falling back to the checkpoint before it")
    return None


def agree_on(path: Path, mesh: Mesh) -> dict[str, Any]:
    """The verified manifest of one checkpoint; each rank verifies its share of the files.

    Raises:
        CheckpointError: Something is damaged, missing, not readable, hostile, or of another format version; the same on
            every rank, and of several what says least of the checkpoint itself.
    """
    complaint: CheckpointError | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = open_manifest(path)
        verify_files(path, manifest, share(manifest["files"], mesh.rank, mesh.world_size))
    except CheckpointError as error:
        complaint = error
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, complaint)
    complaints = [found for found in gathered if found is not None]
    for kind in (UnreadableCheckpoint, CheckpointError):
        for found in complaints:
            if type(found) is kind:
                raise found
    if complaints:
        raise complaints[0]
    return manifest
