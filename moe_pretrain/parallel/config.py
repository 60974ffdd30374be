"""Configuration of processes and expert parallelism."""

from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

Overlap = Literal["auto", "always", "never"]
_NAMING_SECONDS = 20


@dataclass(frozen=True)
class ParallelConfig:
    """Number of processes that train, and the spread of experts over them.

    Attributes:
        processes: Processes that ``train`` starts by itself. Under torchrun, ``deepspeed`` or SLURM the launcher's
            number of ranks counts instead.
        expert_parallel_size: Ranks over which one copy of the experts is spread; divides the number of ranks and
            the number of experts. Neighbouring ranks form a group, so the exchange stays inside a node while
            this is at most the node's number of GPUs.
        timeout_seconds: How long a rank's loop may stay in one place, where the others wait for it in a collective,
            before the run ends and names it; also how long ranks may take to meet.
        heartbeat_seconds: How long a rank's process may give no sign of life before the run ends and names it.
        overlap_exchange: Whether each half of a micro-batch's tokens is exchanged while experts run the other half:
            ``auto`` does it on a GPU under expert parallelism, where copies take no processor time; ``always`` and
            ``never`` whatever the device. Numbers stay the same but for the order of sums.
    """

    processes: PositiveInt
    expert_parallel_size: PositiveInt
    timeout_seconds: PositiveInt
    heartbeat_seconds: PositiveInt
    overlap_exchange: Overlap = "auto"

    def overlaps_exchange(self, device: str) -> bool:
        """``overlap_exchange`` with ``auto`` resolved for ``cuda`` or ``cpu``; False where nothing is exchanged."""
        is_wanted = device == "cuda" if self.overlap_exchange == "auto" else self.overlap_exchange == "always"
        return is_wanted and self.expert_parallel_size > 1

    @property
    def collective_seconds(self) -> int:
        """Limit of a collective: so much more that the rank that is waited for is named before it fails."""
        return self.timeout_seconds + max(_NAMING_SECONDS, self.timeout_seconds // 10)

    def check(self, world_size: int, field: str, spread: int) -> None:
        """Raise if the experts cannot be spread over ``world_size`` ranks.

        Args:
            world_size: Number of ranks.
            field: Name of what is spread: the experts, or the width of each.
            spread: Its number; 0 without routing.
        """
        size = self.expert_parallel_size
        if size > 1 and not spread:
            raise ValueError(f"parallel.expert_parallel_size={size} must be 1: router=dense has no experts to spread")
        if world_size % size:
            raise ValueError(
                f"parallel.expert_parallel_size={size} must divide the number of ranks={world_size}; valid: "
                f"{_divisors(world_size)}"
            )
        if spread % size:
            raise ValueError(
                f"parallel.expert_parallel_size={size} must divide {field}={spread}; valid: "
                f"{[d for d in _divisors(world_size) if spread % d == 0]}"
            )


def _divisors(value: int) -> list[int]:
    return [candidate for candidate in range(1, value + 1) if value % candidate == 0]
