"""Manifest: a checkpoint's words about itself, verified before anything of it is believed.

A checkpoint is a folder ``step_00000100`` with one safetensors file per rank that holds intervals (see ``layout``) and
``manifest.json``: which file holds which interval of which tensor, the size and hash of every file, the run's state,
and a hash of itself. Only JSON and safetensors are read, so loading runs no code; and since a hash is
no signature, a manifest may also be hostile: what it names must lie in its folder, be no link, and fit together.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydantic
import xxhash

from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.run_folder.paths import CHECKPOINTS

FORMAT_VERSION = 1
"""Version 1: intervals of float32 weights and moments, buffers of any type, one file per rank."""

BUFFER = "buffer"
"""Kind of state that has no gradient: router biases, thresholds."""

UPDATES = "adam_step"
"""Field of the optimizer's number of updates, by the name it has had since there was one optimizer."""

_FIRST_MOMENTS = ["exp_avg", "exp_avg_sq"]
"""Moments of every parameter in manifests that do not name them: those of AdamW, the only optimizer then."""

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")
_FOLDER_NAME = re.compile(r"step_(\d{8,})")
_BLOCK_BYTES = 1 << 24
_MOST_MANIFEST_BYTES = 1 << 30


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file. By itself: it is hostile, or of another release."""


class DamagedCheckpoint(CheckpointError):
    """A file is missing, or its size or hash is not what was written: only this is damage, and is passed over."""


class UnreadableCheckpoint(CheckpointError):
    """The system refuses to read: an error of the disk, the network or a permission says nothing of the checkpoint."""


SET_ASIDE = "set_aside"
"""Folder among the checkpoints for those that were in the way and that nobody has asked to remove."""


@dataclass(frozen=True)
class Interval:
    """Place of ``length`` elements from ``start`` of one array: ``key`` in ``file``."""

    tensor: str
    kind: str
    start: int
    length: int
    file: str

    @property
    def key(self) -> str:
        """Name of the interval in its file."""
        return f"{self.kind}/{self.tensor}/{self.start}"


@dataclass(frozen=True)
class _FileFacts:
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class _Fields:
    """The manifest's fields and their types; further ones are of a later release and are left alone."""

    format_version: int
    state: dict[str, Any]
    adam_step: float
    shapes: dict[str, list[int]]
    files: dict[str, _FileFacts]
    intervals: list[Interval]
    moments: dict[str, list[str]] | None = None


_FIELDS = pydantic.TypeAdapter(_Fields)


def folder_name(step: int) -> str:
    """Name of the checkpoint of ``step`` finished steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Finished steps of a checkpoint's folder, None for any other name."""
    match = _FOLDER_NAME.fullmatch(path.name)
    return int(match[1]) if match and path.name == folder_name(int(match[1])) else None


def complete_names(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; not yet verified.

    Raises:
        UnreadableCheckpoint: The folder cannot be listed, which is not the same as an empty one.
        CheckpointError: It is no folder.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(f"{folder} must be the folder of the run's checkpoints, and is none") from None
    except OSError as error:
        raise _unreadable(folder, error) from error
    found = [(step, path) for name in names if (step := step_of(path := folder / name)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def locate(path: Path) -> Path:
    """A checkpoint: ``path`` itself, or the newest in it if it is a run's folder; not yet verified.

    Raises:
        CheckpointError: There is none.
    """
    if os.path.lexists(path / MANIFEST):
        return path
    found = complete_names(path / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"{path} must be a checkpoint or the folder of a run that has one")
    return found[0]


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, and its manifest; ``warn`` hears of every newer one that is damaged.

    Raises:
        CheckpointError: A newer one cannot be read, is hostile or of another release.
    """
    for path in complete_names(folder):
        try:
            return path, read_manifest(path)
        except DamagedCheckpoint as error:
            warn(f"{error}; falling back to the checkpoint before it")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify a whole checkpoint.

    Raises:
        CheckpointError: Something is damaged, missing, not readable, hostile, or of another format version.
    """
    manifest = open_manifest(path)
    verify_files(path, manifest, manifest["files"])
    return manifest


def open_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and verify it against its own hash and itself, not yet its files.

    Raises:
        CheckpointError: It is damaged, missing, not readable, hostile, or of another format version.
    """
    file = path / MANIFEST
    manifest, expected = _parse(file, _content(path))
    version = manifest.get("format_version")
    if self_hash(manifest) != expected:
        # A later release may hash otherwise; but one flipped bit in the number of this format is damage.
        is_ours = self_hash({**manifest, "format_version": FORMAT_VERSION}) == expected
        if type(version) is not int or version <= FORMAT_VERSION or is_ours:
            raise DamagedCheckpoint(f"checkpoint {file} is damaged: its hash does not match")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format_version={version}, this program reads {FORMAT_VERSION}: go on with the "
            "release that wrote it"
        )
    try:
        _check(_FIELDS.validate_json(json.dumps(manifest), strict=True))
    except ValueError as error:
        detail = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
        reason = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail else str(error)
        raise CheckpointError(f"checkpoint {file} is refused: {reason}") from error
    step = manifest["state"]["step"]
    if step_of(path) not in (None, step):
        raise DamagedCheckpoint(
            f"checkpoint {path} holds step {step} and was renamed: its name must be {folder_name(step)}"
        )
    return manifest


def _content(path: Path) -> bytes:
    file = path / MANIFEST
    try:
        if path.is_symlink():
            raise CheckpointError(f"checkpoint {file} is refused: the folder is a link")
        with open_regular(file) as opened:
            if os.fstat(opened.fileno()).st_size > _MOST_MANIFEST_BYTES:
                raise CheckpointError(f"checkpoint {file} is refused: it is larger than {_MOST_MANIFEST_BYTES} bytes")
            return opened.read()
    except OSError as error:
        raise _unreadable(file, error) from error


def _parse(file: Path, content: bytes) -> tuple[dict[str, Any], Any]:
    """The manifest without its own hash, and that hash."""
    try:
        manifest = json.loads(content)
        json.dumps(manifest)  # as deep as Python can write, since it is hashed
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {file} is damaged: it is no JSON ({type(error).__name__})") from error
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"checkpoint {file} is damaged: its hash does not match")
    return manifest, manifest.pop("self", None)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """Error of a checkpoint's file, from that of the system."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DamagedCheckpoint(f"checkpoint file {path} is missing")
    if error.errno in (None, errno.ELOOP, errno.ENXIO):
        return CheckpointError(f"checkpoint file {path} is refused: a link or no regular file")
    return UnreadableCheckpoint(
        f"checkpoint file {path} cannot be read: {error.strerror}; nothing was changed: the same command goes on once "
        "it can be read"
    )


def train_state(manifest: dict[str, Any]) -> TrainState:
    """The state of the run in a manifest that was read by ``open_manifest``."""
    return TrainState.from_json(manifest["state"])


def _check(manifest: _Fields) -> None:
    """Raise ValueError unless the state fits its type, names stay in the folder and intervals tile every array once."""
    for file, facts in manifest.files.items():
        if not _FILE_NAME.fullmatch(file):
            raise ValueError(f"it names the file {file!r}, outside its folder or not of a rank")
        if facts.bytes < 0:
            raise ValueError(f"files.{file}.bytes={facts.bytes} must not be negative")
    state = TrainState.from_json(manifest.state)
    updates = manifest.adam_step
    if not (math.isfinite(updates) and updates == int(updates) and 0 <= updates <= state.step):
        raise ValueError(f"{UPDATES}={updates} must be a whole number from 0 to the {state.step} steps done")
    arrays: dict[tuple[str, str], list[Interval]] = {}
    for interval in manifest.intervals:
        if interval.file not in manifest.files:
            raise ValueError(f"interval {interval.key} lies in {interval.file!r}, which is not among its files")
        arrays.setdefault((interval.tensor, interval.kind), []).append(interval)
    moments = manifest.moments
    if moments is not None and moments.keys() != manifest.shapes.keys():
        raise ValueError("its moments and its shapes are of different tensors")
    for tensor, shape in manifest.shapes.items():
        if any(size < 0 for size in shape):
            raise ValueError(f"shapes.{tensor}={shape} has a negative size")
        for kind in (WEIGHT, *(_FIRST_MOMENTS if moments is None else moments[tensor])):
            _check_tiling(kind, tensor, arrays.pop((tensor, kind), []), math.prod(shape))
    for (tensor, kind), parts in arrays.items():
        if kind != BUFFER:
            raise ValueError(f"it has {kind} of {tensor!r}, which has no shape")
        _check_tiling(kind, tensor, parts, max(part.start + part.length for part in parts))


def _check_tiling(kind: str, tensor: str, parts: list[Interval], length: int) -> None:
    covered = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start != covered or part.length < 0:
            raise ValueError(f"{kind} of {tensor} has a gap or an overlap at element {covered}")
        covered += part.length
    if covered != length:
        raise ValueError(f"the intervals of {kind} of {tensor} cover {covered} of {length} elements")


def moments_of(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the moments of each tensor."""
    return manifest.get("moments") or dict.fromkeys(manifest["shapes"], _FIRST_MOMENTS)


def verify_files(path: Path, manifest: dict[str, Any], files: Iterable[str]) -> None:
    """Compare ``files`` of a checkpoint with the sizes and hashes in its manifest.

    Raises:
        CheckpointError: One is missing, damaged, not readable or no regular file.
    """
    for name in files:
        try:
            with open_regular(path / name) as file:
                size = os.fstat(file.fileno()).st_size
                actual = {"bytes": size, "xxh3_128": _hash(file) if size == manifest["files"][name]["bytes"] else ""}
        except OSError as error:
            raise _unreadable(path / name, error) from error
        if actual != manifest["files"][name]:
            raise DamagedCheckpoint(f"checkpoint file {path / name} is damaged: its size or hash does not match")


def _hash(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def share(files: Collection[str], rank: int, world_size: int) -> list[str]:
    """The files that ``rank`` verifies, so that all ranks together read each of them once."""
    return sorted(files)[rank::world_size]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, refusing links, and whatever else could block or lead elsewhere.

    Raises:
        OSError: It is missing, a link, or no regular file.
    """
    # Non-blocking: opening a pipe would wait for a writer that never comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def self_hash(manifest: dict[str, Any]) -> str:
    """Hash of a manifest without its ``self``."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
