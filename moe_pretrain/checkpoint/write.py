"""The file operations of a save, in the order that makes a kill at any moment harmless.

A checkpoint is written under another name, flushed to the disk and renamed, so a folder with the right name is complete
unless the disk damaged it. What goes is renamed first and then deleted, so a half-deleted one never has the right name.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.host_copy import Staged
from moe_pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TEMPORARY,
    UPDATES,
    CheckpointError,
    complete_names,
    open_manifest,
    read_manifest,
    self_hash,
    step_of,
    train_state,
)
from moe_pretrain.system.files import WholeFile, sync_folder

Reach = Callable[[str], None]
"""Called with the name of every place that is passed; see ``faults``."""

_CHUNK_BYTES = 1 << 24


def work_folder(target: Path) -> Path:
    """Folder in which the checkpoint ``target`` is written before it gets its name."""
    return target.with_name(target.name + TEMPORARY)


def make_work_folder(target: Path, reach: Reach) -> Path:
    """An empty folder to write ``target`` into; what an earlier attempt left there goes."""
    work = work_folder(target)
    if work.exists():
        shutil.rmtree(work)
    reach("save.cleared")
    work.mkdir(parents=True)
    reach("save.folder_made")
    return work


def write_part(work: Path, staged: Staged, reach: Reach) -> dict[str, Any]:
    """Write one rank's file to the disk; what the manifest must say of it."""
    with WholeFile(work / staged.file) as file:
        reach("save.file_opened")
        middle = len(staged.content) // 2
        parts = (memoryview(staged.header), staged.content[:middle], staged.content[middle:])
        for part, point in zip(parts, ("save.file_header", "save.file_half", "save.file_written"), strict=True):
            for start in range(0, len(part), _CHUNK_BYTES):
                file.write(part[start : start + _CHUNK_BYTES])
            reach(point)
    reach("save.file_flushed")
    return {
        "file": staged.file,
        "bytes": len(staged.header) + len(staged.content),
        "xxh3_128": file.checksum.hexdigest(),
        "intervals": [asdict(interval) for interval in staged.intervals],
    }


def commit(
    work: Path, target: Path, parts: list[dict[str, Any]], staged: Staged, state: dict[str, Any], reach: Reach
) -> None:
    """Write the manifest of the ranks' ``parts`` and give the folder its name."""
    if target.exists() and _verifies(target):
        shutil.rmtree(work)  # the same step of the same run: replacing it would only risk it
        return
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "state": state,
        UPDATES: staged.updates,
        "shapes": staged.shapes,
        "moments": staged.moments,
        "files": {part["file"]: {"bytes": part["bytes"], "xxh3_128": part["xxh3_128"]} for part in parts},
        "intervals": [interval for part in parts for interval in part["intervals"]],
    }
    manifest["self"] = self_hash(manifest)
    text = json.dumps(manifest).encode()
    with WholeFile(work / MANIFEST) as file:
        reach("save.manifest_opened")
        file.write(text[: len(text) // 2])
        reach("save.manifest_half")
        file.write(text[len(text) // 2 :])
        reach("save.manifest_written")
    reach("save.manifest_flushed")
    sync_folder(work)  # the files of ranks on other hosts too
    reach("save.folder_flushed")
    if target.exists():  # a damaged one of the same step, which resume has passed over
        target.rename(_free_name(target))
        reach("save.replaced_moved")
    work.rename(target)
    reach("save.renamed")
    sync_folder(target.parent)
    reach("save.committed")


def _verifies(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def _free_name(path: Path) -> Path:
    """A temporary name beside ``path`` that nothing has, so that ``retain`` sweeps it up."""
    taken = 0
    while (free := path.with_name(f"{path.name}.{taken}{TEMPORARY}")).exists():
        taken += 1
    return free


def discard_after(folder: Path, step: int) -> None:
    """Take checkpoints of later steps out of the way, for the run goes on from ``step`` on another course."""
    for path in complete_names(folder):
        if step_of(path) > step:  # type: ignore[operator]  # complete names have a step
            path.rename(_free_name(path))


class Retention:
    """Decides which checkpoints stay, and removes the others."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder, self._config = folder, config
        self._losses: dict[int, float | None] = {}

    def apply(self, step: int, reach: Reach) -> None:
        """Remove what need not stay, now that the checkpoint of ``step`` is complete.

        Checkpoints of later steps are removed too: the run has come to ``step`` anew, so they did not verify.
        """
        self._losses.pop(step, None)  # it may have replaced a damaged one
        staying = self._staying(step)
        doomed = [path for path in complete_names(self._folder) if step_of(path) not in staying]
        reach("retain.chosen")
        for path in doomed:
            path.rename(_free_name(path))
            reach("retain.renamed")
        for path in self._folder.glob(f"step_*{TEMPORARY}"):
            if path.is_symlink():
                path.unlink()
                continue
            first = next(path.iterdir(), None)
            if first is not None and first.is_file():
                first.unlink()
                reach("retain.half_deleted")
            shutil.rmtree(path)
            reach("retain.deleted")
        reach("retain.done")

    def _staying(self, step: int) -> set[int]:
        config = self._config
        steps = [found for path in complete_names(self._folder) if (found := step_of(path)) is not None]
        steps = [found for found in steps if found <= step]
        staying = set(steps[: config.keep_last])
        if config.keep_every_steps is not None:
            staying |= {found for found in steps if found and found % config.keep_every_steps == 0}
        if config.keep_best:
            losses = [(loss, -found) for found in steps if (loss := self._validation_loss(found)) is not None]
            staying |= {-found for _, found in sorted(losses)[: config.keep_best]}
        return staying

    def _validation_loss(self, step: int) -> float | None:
        """Validation loss at a checkpoint's step; None if there was no validation or it cannot be read."""
        if step not in self._losses:
            path = next(path for path in complete_names(self._folder) if step_of(path) == step)
            try:
                loss = train_state(open_manifest(path)).validation_loss
            except CheckpointError:
                loss = None
            self._losses[step] = loss
        return self._losses[step]
