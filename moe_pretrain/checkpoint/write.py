"""The file operations of a save, in the order that makes a kill at any moment harmless.

A checkpoint is written under another name, flushed to the disk and renamed, so a folder with the right name is complete
unless the disk damaged it. What goes is renamed first and then deleted, so a half-deleted one never has the right name.
Only what this process has written or verified goes; what else is in the way is set aside.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.host_copy import Staged
from moe_pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SET_ASIDE,
    TEMPORARY,
    UPDATES,
    CheckpointError,
    UnreadableCheckpoint,
    complete_names,
    open_manifest,
    read_manifest,
    self_hash,
    step_of,
    train_state,
)
from moe_pretrain.system.files import WholeFile, sync_folder, write_whole

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
    if os.path.lexists(target) and _verifies(target):
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
    if os.path.lexists(target):  # one of the same step that resume has passed over
        set_aside(target)
        reach("save.replaced_moved")
    work.rename(target)
    reach("save.renamed")
    sync_folder(target.parent)
    reach("save.committed")


def _verifies(path: Path) -> bool:
    try:
        read_manifest(path)
    except UnreadableCheckpoint:
        raise
    except CheckpointError:
        return False
    return True


def _free_name(path: Path) -> Path:
    """A temporary name beside ``path`` that nothing has, so that ``Retention`` sweeps it up."""
    taken = 0
    while os.path.lexists(free := path.with_name(f"{path.name}.{taken}{TEMPORARY}")):
        taken += 1
    return free


def set_aside(path: Path) -> Path:
    """Move a checkpoint out of the way; its new place, which nothing of ours removes."""
    place = _place_aside(path.parent, path.name)
    path.rename(place)
    sync_folder(place.parent)
    sync_folder(path.parent)
    return place


def keep_copy(file: Path, checkpoints: Path) -> Path:
    """Put a copy of a file of the run beside the checkpoints that were set aside; its place."""
    place = _place_aside(checkpoints, file.name)
    if file.exists():
        write_whole(place, file.read_bytes())
    return place


def _place_aside(checkpoints: Path, name: str) -> Path:
    folder = checkpoints / SET_ASIDE
    folder.mkdir(parents=True, exist_ok=True)
    taken, place = 0, folder / name
    while os.path.lexists(place):
        taken += 1
        place = folder / f"{name}.{taken}"
    return place


class Retention:
    """Decides which checkpoints stay, and removes the others.

    Only what this process has written or verified is removed. What lay there at the start counts as neither until it
    has been read, and whatever is newer than the checkpoint that the run went on from stays for ever.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        """Nothing is decided yet."""
        self._folder, self._config = folder, config
        self._losses: dict[int, float | None] = {}
        self._said: set[Path] = set()
        self._went_on_from = math.inf
        self._strange: set[int | None] | None = None  # steps of what lay there at the start, not yet looked at

    def went_on_from(self, step: int) -> None:
        """Learn which checkpoint the run went on from, which it has verified."""
        self._went_on_from = step
        self._strange = {step_of(path) for path in complete_names(self._folder)} - {step}

    def leave(self, step: int) -> None:
        """Take checkpoints of later steps out of the way, for the run goes on from ``step`` on another course."""
        for path in complete_names(self._folder):
            found = step_of(path)
            if found is not None and found > step:
                if found in (self._strange or ()):
                    set_aside(path)
                else:
                    path.rename(_free_name(path))

    def apply(self, step: int, reach: Reach) -> str | None:
        """Remove what need not stay, now that the checkpoint of ``step`` is complete.

        Returns:
            What could not be removed and why, in one line, each path once; the next call tries it again. None if there
            is nothing to say.
        """
        self._losses.pop(step, None)  # it may have replaced a damaged one
        if self._strange is None:
            self._strange = {step_of(path) for path in complete_names(self._folder)}
        self._strange.discard(step)
        problems: list[str] = []
        doomed = self._doomed(step)
        reach("retain.chosen")
        for path in doomed:
            with self._each(path, problems):
                if step_of(path) in self._strange:
                    read_manifest(path)
                path.rename(_free_name(path))
                reach("retain.renamed")
        for path in self._folder.glob(f"step_*{TEMPORARY}"):
            with self._each(path, problems):
                _remove(path, reach)
        reach("retain.done")
        return "; ".join(problems) or None

    @contextlib.contextmanager
    def _each(self, path: Path, problems: list[str]) -> Iterator[None]:
        """Keep what happens to one path from the others."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            if path not in self._said:
                self._said.add(path)
                problems.append(" ".join(str(error).split()))

    def _doomed(self, step: int) -> list[Path]:
        config = self._config
        found = {number: path for path in complete_names(self._folder) if (number := step_of(path)) is not None}
        steps = [number for number in found if number <= step and not self._is_newer_than_the_start(number)]
        staying = set(steps[: config.keep_last])
        if config.keep_every_steps is not None:
            staying |= {number for number in steps if number and number % config.keep_every_steps == 0}
        if config.keep_best:
            losses = [(loss, -number) for number in steps if (loss := self._validation_loss(found[number])) is not None]
            staying |= {-number for _, number in sorted(losses)[: config.keep_best]}
        return [found[number] for number in steps if number not in staying]

    def _is_newer_than_the_start(self, step: int) -> bool:
        return step > self._went_on_from and step in (self._strange or ())

    def _validation_loss(self, path: Path) -> float | None:
        """Validation loss at a checkpoint's step; None if there was no validation, or it is damaged.

        One that cannot be read now is the best there may be, and stays until it can.
        """
        step = step_of(path)
        assert step is not None
        if step not in self._losses:
            try:
                loss = train_state(open_manifest(path)).validation_loss
            except UnreadableCheckpoint:
                return -math.inf
            except CheckpointError:
                loss = None
            self._losses[step] = loss
        return self._losses[step]


def _remove(path: Path, reach: Reach) -> None:
    """Delete what has a temporary name; a link itself, and not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    first = next(path.iterdir(), None)
    if first is not None and first.is_file():
        first.unlink()
        reach("retain.half_deleted")
    shutil.rmtree(path)
    reach("retain.deleted")
