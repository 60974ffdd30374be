"""The dense twin: no routing, one feed-forward network of the width that a token of the MoE model uses."""

from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from moe_pretrain.moe.routers.config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class DenseConfig(RouterConfig):
    """Fields of ``router=dense``, the baseline of equal active size for any sweep.

    Attributes:
        name: ``dense``.
        active_experts: Experts of the model whose summed width the network has, >= 1.
    """

    name: Literal["dense"]
    active_experts: PositiveInt

    def check_num_experts(self, num_experts: int) -> None:
        """Any number fits: none is built."""

    @property
    def mean_experts_per_token(self) -> float:
        """No routes."""
        return 0.0

    @property
    def dense_experts(self) -> int:
        """``active_experts``."""
        return self.active_experts
