"""Kinds of experts as configured: ``model.moe.experts``, which the group ``experts`` fills in."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from moe_pretrain.moe.types import ExpertKinds


@dataclass(frozen=True)
class SwiGLUConfig:
    """Fields of ``experts=swiglu``: all experts are SwiGLU networks of one width.

    Attributes:
        name: ``swiglu``.
    """

    name: Literal["swiglu"] = "swiglu"

    def kinds(self, num_experts: int) -> ExpertKinds:
        """``num_experts`` networks."""
        return ExpertKinds(num_experts)


@dataclass(frozen=True)
class ZeroComputationConfig:
    """Fields of ``experts=zero_computation``: beside the networks, experts that cost next to nothing.

    They are computed where the token is, on parameters that every rank has; a route to one enters no exchange and no
    expert's product. Ids are those of the networks first, then constant, copy and zero ones.

    Attributes:
        name: ``zero_computation``.
        num_constant: Experts ``a x + b v``, with ``(a, b) = softmax(W x)`` and a learnt ``v``, >= 0.
        num_copy: Experts that return their input, >= 0.
        num_zero: Experts that return 0, >= 0.
        input_scale: Factor of the input of every routed expert, the networks too, > 0. The equations have none;
            the code of MoE++ doubles it for its two routes per token.

    Source:
        Jin et al. 2024 (arXiv:2410.07348), MoE++, sec. 3.1.
    """

    name: Literal["zero_computation"]
    num_constant: NonNegativeInt
    num_copy: NonNegativeInt
    num_zero: NonNegativeInt
    input_scale: PositiveFloat

    def __post_init__(self) -> None:
        if self.num_constant + self.num_copy + self.num_zero == 0:
            raise ValueError(
                "model.moe.experts.num_constant=0, num_copy=0 and num_zero=0: one must be above 0, or experts=swiglu"
            )

    def kinds(self, num_experts: int) -> ExpertKinds:
        """``num_experts`` networks and the others."""
        return ExpertKinds(num_experts, self.num_constant, self.num_copy, self.num_zero)


@dataclass(frozen=True)
class UnequalConfig:
    """Fields of ``experts=unequal``: SwiGLU networks of several widths.

    Attributes:
        name: ``unequal``.
        pattern: Proportions of the widths of the first experts, repeated until there are ``model.moe.num_experts``;
            each rank holds whole repetitions. ``model.moe.expert_hidden_size`` is the mean width. The paper finds four
            experts of 1, two of 2 and two of 4 best: ``[1, 1, 2, 4]`` twice.
        balance: ``cost``: what balances evens routes times width: the balance loss, which is then the paper's parameter
            penalty with widths over their mean, or the quotas at which a bias, a threshold, a table or experts that
            choose aim; refused where nothing in the router can. ``routes``: it evens routes, whatever these cost.

    Source:
        Wang et al. 2024 (arXiv:2408.10681), HMoE.
    """

    name: Literal["unequal"]
    pattern: tuple[PositiveInt, ...]
    balance: Literal["cost", "routes"]

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("model.moe.experts.pattern=[] must name a width at least")

    def kinds(self, num_experts: int) -> ExpertKinds:
        """``num_experts`` networks and what a route to each costs."""
        mean = sum(self.pattern) / len(self.pattern)
        costs = tuple(self.pattern[expert % len(self.pattern)] / mean for expert in range(num_experts))
        return ExpertKinds(num_experts, costs=costs, balances_cost=self.balance == "cost")


@dataclass(frozen=True)
class MatrixProductConfig:
    """Fields of ``experts=matrix_product``: matrices are chains of cores, and all experts share the central ones.

    Attributes:
        name: ``matrix_product``.
        num_cores: Cores of a matrix, odd, >= 3.
        truncation: Largest bond between two cores, >= 1; None for as wide as they must be to write any matrix.
        shared_gradient_dropout: Probability that a step leaves the shared cores without gradient, in [0, 1): they get
            that of all experts, the others of one. The paper tunes it per task; its code freezes cores instead.
    """

    name: Literal["matrix_product"]
    num_cores: PositiveInt
    truncation: PositiveInt | None
    shared_gradient_dropout: Annotated[float, Field(ge=0, lt=1)]

    def __post_init__(self) -> None:
        if self.num_cores < 3 or self.num_cores % 2 == 0:
            raise ValueError(
                f"model.moe.experts.num_cores={self.num_cores} must be odd and at least 3: the one in the middle is "
                "shared"
            )

    def kinds(self, num_experts: int) -> ExpertKinds:
        """``num_experts`` networks."""
        return ExpertKinds(num_experts)


ExpertsConfig = Annotated[
    SwiGLUConfig | ZeroComputationConfig | UnequalConfig | MatrixProductConfig, Field(discriminator="name")
]
"""Every kind of experts."""
