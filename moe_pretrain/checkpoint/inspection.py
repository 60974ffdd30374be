"""A checkpoint described and verified offline, without building a model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint.manifest import (
    BUFFER,
    MANIFEST,
    CheckpointError,
    complete_names,
    moments_of,
    open_manifest,
    train_state,
    verify_files,
)
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.run_folder.paths import CHECKPOINTS

_CHUNK_ELEMENTS = 1 << 24


def inspect(path: Path) -> Iterator[str]:
    """Lines that describe the checkpoint ``path``, each as soon as it is known.

    Raises:
        ValueError: ``path`` is no checkpoint.
        CheckpointError: It is damaged or hostile; the message names the file.
    """
    if not (path / MANIFEST).exists():
        raise ValueError(f"{path} is no checkpoint: {_reason(path)}")
    manifest = open_manifest(path)
    yield f"checkpoint:  {path}, format version {manifest['format_version']}"
    yield from _describe_state(train_state(manifest))
    yield from _describe_sizes(manifest)
    verify_files(path, manifest, manifest["files"])
    yield f"checksums:   verified, {len(manifest['files'])} files"
    yield from _describe_norms(Reader(path, manifest), manifest)


def _reason(path: Path) -> str:
    """Reason why ``path`` is no checkpoint, and which one near it may be meant."""
    if path.exists() and not path.is_dir():
        return "it is a file"
    near = (path, path / CHECKPOINTS) if path.is_dir() else (path.parent,)
    found = next(filter(None, map(complete_names, filter(Path.is_dir, near))), [])
    lack = f"it has no {MANIFEST}" if path.is_dir() else "there is no such folder"
    return f"{lack}; did you mean {found[0]}?" if found else lack


def _describe_state(state: TrainState) -> Iterator[str]:
    identity = state.identity
    yield f"step:        {state.step:,}"
    yield f"tokens:      {_word(state.tokens)}"
    yield f"validation:  {_word(state.validation_loss)}"
    yield (
        f"saved from:  {_word(identity.world_size)} ranks, expert parallel "
        f"{_look(identity.config, 'parallel', 'expert_parallel_size')}, ZeRO {_stage(identity)}, "
        f"{_engine(identity, 'device')}, {_engine(identity, 'dtype')}, kernels {_engine(identity, 'kernels')}"
    )
    parts = {part: _look(identity.config, part, "name") for part in ("model", "router", "optimizer")}
    yield f"model:       {parts['model']}, router {parts['router']}, optimizer {parts['optimizer']}"
    yield f"corpus:      {_word(identity.corpus_fingerprint)}"
    yield "versions:    " + ", ".join(f"{name} {version}" for name, version in sorted(identity.versions.items()))


def _engine(identity: RunIdentity, name: str) -> str:
    """A field of the engine, which the run may have worked out for itself."""
    return _look(identity.resolved, name) if name in identity.resolved else _look(identity.config, "engine", name)


def _stage(identity: RunIdentity) -> str:
    """ZeRO stage; where an earlier release has not recorded what ``auto`` became, what it must have been."""
    stage = _engine(identity, "zero_stage")
    if stage == "auto":
        return "1" if (identity.world_size or 0) > 1 else "auto, which is 0 in float32 and 1 in bfloat16"
    return stage


def _look(values: Any, *names: str) -> str:
    """A value of a configuration by its path, in words: another release may have had other fields."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return _word(values)


def _word(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if isinstance(value, str | float) else "not recorded"


def _describe_sizes(manifest: dict[str, Any]) -> Iterator[str]:
    shapes, moments = manifest["shapes"], moments_of(manifest)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    alone = sum(4 * math.prod(shape) * (1 + len(moments[name])) for name, shape in shapes.items()) / max(1, parameters)
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    yield (
        f"size:        {parameters:,} parameters in {len(shapes)} tensors, {size:,} bytes, "
        f"{size / max(1, parameters):.2f} bytes per parameter (weight and moments alone: {alone:.4g})"
    )


def _describe_norms(reader: Reader, manifest: dict[str, Any]) -> Iterator[str]:
    """L2 norms of weights and moments, layer by layer, and what is not finite."""
    layers: dict[str, list[str]] = {}
    for name in manifest["shapes"]:
        layers.setdefault(_layer_of(name), []).append(name)
    moments = moments_of(manifest)
    kinds = [WEIGHT, *dict.fromkeys(kind for kept in moments.values() for kind in kept)]
    width = max(map(len, layers))
    yield f"{'L2 norm':<{width}}" + "".join(f"{kind:>16}" for kind in kinds)
    broken = []
    for layer, names in layers.items():
        norms = []
        for kind in kinds:
            having = [name for name in names if kind == WEIGHT or kind in moments[name]]
            squares = {name: _sum_of_squares(reader, name, kind) for name in having}
            broken += [f"{kind} of {name}" for name, square in squares.items() if not math.isfinite(square)]
            norms.append(math.sqrt(sum(squares.values())))
        yield f"{layer:<{width}}" + "".join(f"{norm:>16.6g}" for norm in norms)
    for name, kind in reader.arrays():
        if kind == BUFFER:
            yield f"buffer {name}: L2 norm {math.sqrt(_sum_of_squares(reader, name, kind)):.6g}"
    if broken:
        raise CheckpointError(f"its checksums are right, but these are not finite: {', '.join(broken)}")


def _layer_of(name: str) -> str:
    """``layers.3`` of ``layers.3.attention.weight``; else the module's name."""
    words = name.split(".")
    numbered = next((index for index, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[: numbered + 1])


def _sum_of_squares(reader: Reader, name: str, kind: str) -> float:
    total = 0.0
    for interval in reader.arrays()[name, kind]:
        for first in range(0, interval.length, _CHUNK_ELEMENTS):
            part = reader.part(interval, first, min(first + _CHUNK_ELEMENTS, interval.length))
            total += float(part.double().square().sum())
    return total
