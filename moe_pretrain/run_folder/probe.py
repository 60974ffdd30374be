"""Probes: the validation losses and routes of one step, kept in a run's folder."""

import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe_pretrain.run_folder.paths import PROBES, probe_file, probe_step
from moe_pretrain.system.files import write_whole

ValidationPart = dict[str, np.ndarray]
"""``row``, ``document``, ``tokens``, ``loss`` of pieces; ``hashed_row``, ``hash``, ``routes [rows, ...]`` of rows."""


@dataclass(frozen=True)
class Probe:
    """One validation.

    Attributes:
        step: Finished steps.
        fingerprint: Hash of the rows and of what counts in them; equal for runs that can be paired text by text.
        share: Share of each set in the loss [sets], float64; one of 1 unless the corpus is a mixture.
        set_index: Set of each piece [pieces], int64.
        document: Document of each piece within its set [pieces], int64.
        tokens: Counted tokens of each piece [pieces], int64.
        loss: Their summed cross-entropy [pieces], nats, float64.
        layer: Number of each MoE layer [layers], int64.
        routes: A hash of the set of experts that each position was sent to [layers, sampled], int64; equal sets have
            equal hashes, and unequal ones have them with probability 2**-64.
    """

    step: int
    fingerprint: str
    share: np.ndarray
    set_index: np.ndarray
    document: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    layer: np.ndarray
    routes: np.ndarray

    @property
    def mean_loss(self) -> float:
        """``validation/loss``: the mean over tokens of each set, by shares; nats per token."""
        sets = [self.set_index == index for index in range(len(self.share))]
        means = [self.loss[own].sum() / self.tokens[own].sum() for own in sets]
        return float(self.share @ np.array(means))


def put_together(
    step: int, parts: Mapping[str, ValidationPart], shares: Mapping[str, float], layers: Iterable[int]
) -> Probe:
    """One ``Probe`` of what ``Collector.gather`` gave for each set."""
    names = list(shares)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([parts[each][name] for each in names])

    share = np.array([shares[name] for name in names], dtype=np.float64)
    digest = xxhash.xxh3_128(share.tobytes())
    for name in names:
        digest.update(parts[name]["hash"].tobytes())
    routes = [parts[name]["routes"].swapaxes(0, 1) for name in names]  # [layers, rows, sampled of a row]
    layer = np.array(list(layers), dtype=np.int64)
    return Probe(
        step=step,
        fingerprint=digest.hexdigest(),
        share=share,
        set_index=np.concatenate([np.full(len(parts[name]["row"]), index) for index, name in enumerate(names)]),
        document=joined("document"),
        tokens=joined("tokens"),
        loss=joined("loss"),
        layer=layer,
        routes=np.concatenate([each.reshape(len(layer), each.shape[1] * each.shape[2]) for each in routes], axis=1),
    )


def routing_drift(before: Probe, now: Probe) -> dict[int, float]:
    """Share of the sampled positions whose set of experts changed from one validation to the next, by MoE layer.

    Empty if they are not of the same rows.
    """
    if before.fingerprint != now.fingerprint or before.routes.shape != now.routes.shape:
        return {}
    return dict(zip(now.layer.tolist(), (before.routes != now.routes).mean(axis=1).tolist(), strict=True))


class ProbeFiles:
    """The probes of a run folder."""

    def __init__(self, run_folder: Path):
        self._run_folder, self.folder = run_folder, run_folder / PROBES

    def steps(self) -> list[int]:
        """Steps of the probes that are there, rising."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(step for path in paths if (step := probe_step(path)) is not None)

    def path(self, step: int) -> Path:
        """Path of the probe of ``step``."""
        return probe_file(self._run_folder, step)

    def write(self, probe: Probe) -> None:
        """Write one whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(probe.step)
        values: dict[str, Any] = {field.name: getattr(probe, field.name) for field in fields(Probe)}
        content = io.BytesIO()
        np.savez_compressed(content, **values)
        write_whole(path, content.getvalue())

    def read(self, step: int) -> Probe | None:
        """The probe of ``step``; None if there is none.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.path(step)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as values:
                found = {name: values[name] for name in values.files}
            return Probe(**{**found, "step": int(found["step"]), "fingerprint": str(found["fingerprint"])})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from error

    def newest(self, step: int) -> Probe | None:
        """The newest probe of at most ``step`` steps."""
        before = [each for each in self.steps() if each <= step]
        return self.read(before[-1]) if before else None

    def remove_after(self, step: int) -> None:
        """Remove the probes of steps that a resumed run will do again."""
        for each in self.steps():
            if each > step:
                self.path(each).unlink()

    def remove_before(self, oldest_checkpoint: int) -> None:
        """Remove what no resume from a checkpoint that is kept needs: probes older than the newest of those before."""
        for each in [each for each in self.steps() if each <= oldest_checkpoint][:-1]:
            self.path(each).unlink()
