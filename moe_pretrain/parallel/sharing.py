"""Ranks that share a list of work: each does a part of it, and all know every result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Own = TypeVar("Own")


@dataclass(frozen=True)
class Sharing:
    """This process's part among those that share work.

    Attributes:
        rank: Its number.
        size: Number of processes.
        in_step: Whether a forward pass of one waits for all others, as where experts are spread over them: then all
            must make equally many.
        device: Where a collective takes its tensors.
        between: Called by all of them at the same places, between two passes.
    """

    rank: int = 0
    size: int = 1
    in_step: bool = False
    device: torch.device = torch.device("cpu")
    between: Callable[[], None] = lambda: None

    def gather(self, own: Own) -> list[Own]:
        """Values of all of them, by rank; every one must call it."""
        if self.size == 1:
            return [own]
        found: list[Own] = [own] * self.size
        dist.all_gather_object(found, own)
        return found

    def any_works(self, is_working: bool) -> bool:
        """Whether to make another pass: while any of them works where they go in step, else while this one does."""
        if not self.in_step:
            return is_working
        works = torch.tensor(int(is_working), device=self.device)
        dist.all_reduce(works, op=dist.ReduceOp.MAX)
        return bool(works)


ALONE = Sharing()
"""One process that does everything."""
