"""What a validation finds piece by piece: losses that pair with another run's, and where every token was sent.

A piece is the part of one document that lies in one row. The rows are the first of the validation set, the same for
all runs of one corpus, tokenizer and row length: ``fingerprint`` says so. ``RUN/probe/step_XXXXXXXX.npz`` holds one
validation each.

Axis names:
    pieces   of all rows, in order of set, row and document
    layers   MoE layers, bottom up
    sampled  text positions of which routes are kept, the same in every validation
"""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from moe_pretrain.data import IGNORE_INDEX, MicroBatch
from moe_pretrain.moe.types import Routing

FOLDER = "probe"
MAX_SAMPLED = 8192
"""About the most positions of which routes are kept."""
_FILE = re.compile(r"step_(\d{8})\.npz")


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


Part = dict[str, np.ndarray]
"""``row``, ``document``, ``tokens``, ``loss`` of pieces; ``hashed_row``, ``hash``, ``routes [rows, ...]`` of rows."""


class Collector:
    """Takes notes of one rank's validation batches of one set."""

    def __init__(self, document_ends: np.ndarray, sequence_length: int, num_rows: int, num_experts: int):
        """Nothing is seen yet.

        Args:
            document_ends: Stream offset after each document of the set, int64, rising.
            sequence_length: Positions of a row; row r begins at the offset ``r * sequence_length``.
            num_rows: Rows of the set that are read, over all ranks.
            num_experts: Of a MoE layer; 0 without one.
        """
        self._document_ends, self._length = document_ends, sequence_length
        stride = max(1, min(sequence_length, -(-num_rows * sequence_length // MAX_SAMPLED)))
        self._sampled = slice(stride // 2, None, stride)
        generator = torch.Generator().manual_seed(0)
        # Zobrist hashing: the sum, modulo 2**64, of one random number for each member.
        self._number_of_expert = torch.randint(-(2**63), 2**63 - 1, (num_experts,), generator=generator)
        self._parts: list[Part] = []

    def add(self, batch: MicroBatch, losses: Tensor, routings: Sequence[Routing]) -> None:
        """Note one batch: ``losses [batch, sequence]`` and the routers' decisions, bottom up."""
        rows = batch.row_positions.cpu().numpy()
        there = rows >= 0
        labels = batch.labels.cpu().numpy()
        counted = (labels != IGNORE_INDEX) & there[:, None]
        target = rows[:, None] * self._length + np.arange(1, self._length + 1)  # offset of each label
        document = np.searchsorted(self._document_ends, target[counted], side="right")
        row = np.broadcast_to(rows[:, None], counted.shape)[counted]
        pieces, piece = np.unique(np.stack([row, document]), axis=1, return_inverse=True)
        seen = [
            labels,
            batch.input_ids.cpu().numpy(),
            batch.document_ids.cpu().numpy(),
            batch.position_ids.cpu().numpy(),
        ]
        hashes = [
            xxhash.xxh3_64_intdigest(np.stack([each[k] for each in seen]).tobytes()) for k in np.flatnonzero(there)
        ]
        number = self._number_of_expert.to(losses.device)
        routes = [self._hash_routes(routing, number, batch) for routing in routings]
        self._parts.append(
            {
                "row": pieces[0],
                "document": pieces[1],
                "tokens": np.bincount(piece, minlength=pieces.shape[1]),
                "loss": np.bincount(piece, losses.cpu().numpy()[counted].astype(np.float64), pieces.shape[1]),
                "hashed_row": rows[there],
                "hash": np.array(hashes, dtype=np.uint64),
                "routes": np.stack(routes, axis=1)[there] if routes else np.zeros((there.sum(), 0, 0), np.int64),
            }
        )

    def _hash_routes(self, routing: Routing, number: Tensor, batch: MicroBatch) -> np.ndarray:
        """``[batch, sampled]``; 0 where a position has no expert."""
        hashes = number.new_zeros(batch.labels.numel())
        hashes.index_add_(0, routing.token_index, number[routing.expert_index])
        return hashes.view(batch.labels.shape)[:, self._sampled].cpu().numpy()

    def gather(self) -> Part:
        """The notes of all ranks, in order of rows; every rank must call it."""
        everywhere: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, self._parts)
        parts = [part for parts in everywhere for part in parts]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        by_piece, by_row = np.lexsort((whole["document"], whole["row"])), np.argsort(whole["hashed_row"])
        return {name: values[by_row if name in _OF_ROWS else by_piece] for name, values in whole.items()}


_OF_ROWS = ("hashed_row", "hash", "routes")


def put_together(step: int, parts: Mapping[str, Part], shares: Mapping[str, float], layers: Iterable[int]) -> Probe:
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
        self.folder = run_folder / FOLDER

    def steps(self) -> list[int]:
        """Steps of the probes that are there, rising."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match.group(1)) for name in names if (match := _FILE.fullmatch(name)))

    def path(self, step: int) -> Path:
        """Where the probe of ``step`` is."""
        return self.folder / f"step_{step:08d}.npz"

    def write(self, probe: Probe) -> None:
        """Write one whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(probe.step)
        partial = path.with_name(f"{path.name}.partial")
        values: dict[str, Any] = {field.name: getattr(probe, field.name) for field in fields(Probe)}
        with partial.open("wb") as file:
            np.savez_compressed(file, **values)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

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
