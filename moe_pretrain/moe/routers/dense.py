"""The dense twin: no routing, one feed-forward network of the width that a token of the MoE model uses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Fields of ``router=dense``, the baseline of equal active size for any sweep.

    Attributes:
        name: ``dense``.
        active_experts: Experts of the model whose summed width the network has, >= 1.
    """

    name: Literal["dense"]
    active_experts: int

    def __post_init__(self) -> None:
        if self.active_experts < 1:
            raise ValueError(f"router.active_experts={self.active_experts} must be at least 1")
