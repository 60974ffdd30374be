"""Pieces of a validation: losses that pair with another run's, and the routes of every token.

A piece is the part of one document that lies in one row. The rows are drawn over the whole validation set, the same for
all runs of one corpus, tokenizer and row length (see ``validation_rows``): ``fingerprint`` says so.
``RUN/probe/step_XXXXXXXX.npz`` holds one validation each.

Axis names:
    pieces   of all rows, in order of set, row and document
    layers   MoE layers, bottom up
    sampled  text positions of which routes are kept, the same in every validation
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from moe_pretrain.data import IGNORE_INDEX, MicroBatch
from moe_pretrain.moe.types import Routing
from moe_pretrain.run_folder.probe import ValidationPart

MAX_SAMPLED = 8192
"""About the most positions of which routes are kept."""


class Collector:
    """Takes notes of one rank's validation batches of one set."""

    def __init__(self, document_ends: np.ndarray, sequence_length: int, num_rows: int, num_experts: int):
        """Nothing is seen yet.

        Args:
            document_ends: Stream offset after each document of the set, int64, rising.
            sequence_length: Positions of a row; row number r begins at the offset ``r * sequence_length``.
            num_rows: Rows of the set that are read, over all ranks.
            num_experts: Of a MoE layer; 0 without one.
        """
        self._document_ends, self._length = document_ends, sequence_length
        stride = max(1, min(sequence_length, -(-num_rows * sequence_length // MAX_SAMPLED)))
        self._sampled = slice(stride // 2, None, stride)
        generator = torch.Generator().manual_seed(0)
        # Zobrist hashing: the sum, modulo 2**64, of one random number for each member.
        self._number_of_expert = torch.randint(-(2**63), 2**63 - 1, (num_experts,), generator=generator)
        self._parts: list[ValidationPart] = []

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

    def gather(self) -> ValidationPart:
        """The notes of all ranks, in order of rows; every rank must call it."""
        everywhere: list[list[ValidationPart]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, self._parts)
        parts = [part for parts in everywhere for part in parts]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        by_piece, by_row = np.lexsort((whole["document"], whole["row"])), np.argsort(whole["hashed_row"])
        return {name: values[by_row if name in _OF_ROWS else by_piece] for name, values in whole.items()}


_OF_ROWS = ("hashed_row", "hash", "routes")
