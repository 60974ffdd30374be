"""Norms of the gradient by part of the model, taken where the optimizer sees it, whatever ZeRO has made of it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_pretrain.engine.optimizers.base import Fragment
from moe_pretrain.model.parameter_groups import ParameterRole
from moe_pretrain.moe.host_values import on_device_of

GRADIENT_PARTS = ("router", "experts", "rest")


def gradient_part(role: ParameterRole) -> int:
    """Index of the part that a parameter belongs to."""
    return {"router": 0, "experts": 1}.get(role.group, 2)


def norms_of(squares: Sequence[float], present: set[int], norm: float) -> dict[str, float]:
    """Norm of each part that is ``present``, so that their squares sum to that of ``norm``.

    Args:
        squares: Sums of squares by part, of gradients that may have been scaled since.
        present: Parts that the model has.
        norm: Global norm before clipping.
    """
    total = math.fsum(squares)
    scale = norm / math.sqrt(total) if total > 0 else 0.0
    return {part: scale * math.sqrt(squares[index]) for index, part in enumerate(GRADIENT_PARTS) if index in present}


class GradientNorms:
    """Sums of squares of the gradients that an update reads, each element of the model once over all ranks."""

    def __init__(self, fragments: Sequence[Fragment]):
        """Look at the partitions of ``fragments``."""
        self.present = {gradient_part(fragment.role) for fragment in fragments}
        self._places: Mapping[Tensor, list[tuple[int, slice]]] = defaultdict(list)
        for fragment in fragments:
            if fragment.length and not fragment.is_replica:
                self._places[fragment.partition].append((gradient_part(fragment.role), fragment.place))
        self._squares: list[Tensor] = []
        self._part_of_square: list[int] = []

    @torch.no_grad()
    def note(self, partition: Tensor) -> None:
        """Add the gradient of ``partition``, which is about to be used."""
        places, gradient = self._places.get(partition, []), partition.grad
        if places and gradient is not None:
            self._squares += torch._foreach_norm([gradient.view(-1)[place] for _, place in places])
            self._part_of_square += [part for part, _ in places]

    def take(self, norm: float, device: torch.device) -> dict[str, float]:
        """Norms of the parts before clipping, ``norm`` being that of all; the sums begin anew. Collective."""
        squares = torch.zeros(len(GRADIENT_PARTS), dtype=torch.float64, device=device)
        if self._squares:
            index = on_device_of(squares, self._part_of_square, torch.int64)
            squares.index_add_(0, index, torch.stack(self._squares).double().square())
        self._squares, self._part_of_square = [], []
        dist.all_reduce(squares)
        return norms_of(squares.tolist(), self.present, norm)
