"""Configurations of routing schemes: their base, and the fields that several of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import BalanceLevel, LayerPlace

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1), such as a decay."""
MeanExperts = Annotated[float, Field(ge=1)]
"""Mean experts per token of a scheme that gives every token one at least."""
ProbabilityMass = Annotated[float, Field(gt=0, le=1)]
"""A number in (0, 1] that the probabilities of the chosen experts must exceed."""


class RouterConfig(ABC):
    """A routing scheme as configured: builds its module, and states its cost to planner, budget and layer builder.

    A scheme is a frozen dataclass of its fields on top of this class, with a field ``name: Literal["..."]`` that is its
    choice in the group ``router``. It must define ``build``, ``check_num_experts`` and ``mean_experts_per_token``; all
    other members have defaults that fit a plain router. No field may be called like one of them: a dataclass would take
    the member for the field's default.

    The range of a field stands in its type, as in ``top_k: PositiveInt``. Checks across fields stand in
    ``__post_init__``, which calls ``super().__post_init__()`` first.
    """

    name: str

    def __post_init__(self) -> None:  # noqa: B027  # most schemes have nothing to check
        """Check fields against each other; ``ValueError`` names the field, its value and the constraint."""

    def build(self, hidden_size: int, num_experts: int, layer: int) -> Router:
        """The module that routes in layer ``layer``; its parameters are empty until ``model.init`` fills them."""
        raise NotImplementedError(f"router={self.name} has no module of its own")

    def of_layer(self, layer: int) -> "RouterConfig":
        """The scheme of decoder layer ``layer``: this one, except where schemes go by layer (``moe.by_layer``)."""
        return self

    def parts(self) -> Mapping[str, "RouterConfig"]:
        """Schemes that layers may have, by the words in which messages speak of each; this one alone for most."""
        return {"router": self}

    def with_parts(self, change: Callable[["RouterConfig"], "RouterConfig"]) -> "RouterConfig":
        """The same with every one of its ``parts`` changed."""
        return change(self)

    def check_layers(self, moe_layers: Sequence[int], num_layers: int) -> None:  # noqa: B027  # most are for any
        """Raise ``ValueError`` unless every one of ``moe_layers`` has one scheme, and no other layer is named."""

    def twin_layers(self, moe_layers: Sequence[int]) -> list[int]:
        """Those of ``moe_layers`` that a small twin of the model keeps: two, of every part."""
        return list(moe_layers[:2])

    def renumbered(self, layers: Mapping[int, int]) -> "RouterConfig":
        """The same for a model whose layer ``new`` has the place of layer ``layers[new]``."""
        return self

    @property
    def description(self) -> str:
        """Its name; of several schemes those and their layers."""
        return self.name

    @property
    def carries(self) -> bool:
        """Whether its layers carry something up to the next one of the same scheme (``Routing.carried``)."""
        return False

    @property
    def whole_model_reason(self) -> str | None:
        """Reason against it in some layers only, in words that follow its name; None where there is none."""
        if self.dense_experts:
            return "has no experts: model.moe.num_leading_dense_layers and model.moe.every_k_layers make layers dense"
        if self.merges_experts:
            return "spreads experts over ranks by their width, the others by their number"
        if self.two_pass_weight is not None:
            return "runs the whole model twice"
        return None

    @abstractmethod
    def check_num_experts(self, num_experts: int) -> None:
        """Raise ``ValueError`` if the scheme cannot serve ``num_experts`` experts."""

    @property
    @abstractmethod
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts; a run's FLOPs use the number that it measures."""

    @property
    def fixed_experts_per_token(self) -> int | None:
        """Experts of every token; None where their number varies."""
        return None

    @property
    def experts_per_token_limit(self) -> int | None:
        """Experts that no token has more of; None where there may be all."""
        return self.fixed_experts_per_token

    def most_experts_per_token(self, num_experts: int) -> float:
        """Largest mean number of routes per token that a micro-batch can have.

        Lists of routes have this length on a GPU (``moe.route_list``).
        """
        return self.experts_per_token_limit or num_experts

    def build_for_experts(self, hidden_size: int, num_experts: int, layer: int, expert_width: int) -> Router:
        """``build`` for a module that also needs the inner width of an expert, as one that maps keys from it does."""
        return self.build(hidden_size, num_experts, layer)

    def build_in_place(self, hidden_size: int, place: LayerPlace) -> Router:
        """``build_for_experts`` for a module that also asks which experts are no networks, or what lies below."""
        return self.build_for_experts(hidden_size, place.kinds.total, place.layer, place.expert_width)

    @property
    def zero_computation_load(self) -> float:
        """Routes to a zero-computation expert, as a multiple of those to a feed-forward one, that balance aims at."""
        return 1.0

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """Means by which training evens what experts cost together, where ``Router.balanced_costs`` says what one does.

        A ``loss``, or ``quotas`` of each expert (``even_load``), at which a bias, a threshold or a table aims. None:
        nothing that knows of costs, so that ``model.moe.experts.balance=cost`` is refused.
        """
        return None

    @property
    def dense_experts(self) -> int:
        """Experts whose summed width one dense network has in their place; 0 for every scheme that routes."""
        return 0

    def check_sequence_length(self, sequence_length: int) -> None:  # noqa: B027  # most schemes fit any
        """Raise ``ValueError`` if the scheme cannot serve rows of ``sequence_length`` tokens."""

    def for_sequence_length(self, sequence_length: int) -> "RouterConfig":
        """The same scheme for rows that ``verify`` and ``certify`` have made short."""
        return self

    def mean_segment_tokens(self, sequence_length: int) -> float | None:
        """Tokens that share one merged network, as expected; None for schemes that send tokens to experts."""
        return None

    @property
    def starts_experts(self) -> bool:
        """Whether the scheme writes weights of experts between steps (``ExpertStart``)."""
        return False

    @property
    def merges_experts(self) -> bool:
        """Whether parameters are merged and no token is sent to an expert."""
        return False

    @property
    def two_pass_weight(self) -> float | None:
        """Coefficient of the consistency loss of a scheme that runs every micro-batch twice; None for all others."""
        return None

    @property
    def num_passes(self) -> int:
        """Passes over every micro-batch in training."""
        return 1 if self.two_pass_weight is None else 2

    @property
    def expert_gate_rank(self) -> int | None:
        """Rank of the factorised gate that the scheme gives its experts; None for full gates.

        The experts' width follows from it. Such an expert gets ``x W_down`` with each route, see ``payload_size``.
        """
        return None

    @property
    def balance_level(self) -> BalanceLevel | None:
        """Tokens over which shares of routes are taken; None without a loss of them."""
        return None

    def scored_experts(self, num_experts: int) -> int:
        """Experts whose first layer a token runs before it is routed, of ``num_experts``."""
        return 0

    @property
    def query_size(self) -> int:
        """Float32 numbers that travel with a token to each of the scored experts."""
        return 0

    @property
    def payload_size(self) -> int:
        """Numbers in the engine's dtype that travel with a route (``Routing.payload``)."""
        return self.expert_gate_rank or 0

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Float32 numbers per token that the module keeps for backward, beside two for each expert's score."""
        return 0


@dataclass(frozen=True, kw_only=True)
class FixedCountConfig(RouterConfig):
    """Field of schemes that give every token ``top_k`` experts.

    Attributes:
        top_k: Experts per token, in [1, num_experts].
    """

    top_k: PositiveInt

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "top_k")

    @property
    def mean_experts_per_token(self) -> float:
        """Routes per token."""
        return float(self.top_k)

    @property
    def fixed_experts_per_token(self) -> int:
        """The same of every token."""
        return self.top_k


@dataclass(frozen=True, kw_only=True)
class TargetCountConfig(RouterConfig):
    """Field of schemes whose number of experts varies around a mean that they steer to.

    Attributes:
        target_experts: That mean per token, in (0, num_experts]. A token may have any number, none too.
    """

    target_experts: PositiveFloat

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "target_experts")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.target_experts


@dataclass(frozen=True, kw_only=True)
class CapacityConfig(RouterConfig):
    """Fields of schemes whose experts take tokens.

    Attributes:
        capacity_factor: Mean experts per token, in (0, num_experts]; an expert takes ``capacity_factor * text tokens /
            num_experts`` tokens of a micro-batch.
        threshold_decay: Decay per step of the running mean of each expert's cut-off, by which evaluation routes, in
            [0, 1); 0 keeps the last step's alone.
    """

    capacity_factor: PositiveFloat
    threshold_decay: Fraction

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "capacity_factor")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.capacity_factor

    def most_experts_per_token(self, num_experts: int) -> float:
        """The same: experts take as many."""
        return self.capacity_factor


@dataclass(frozen=True, kw_only=True)
class LimitedCountConfig(RouterConfig):
    """Field of schemes whose number of experts varies, up to a limit.

    Attributes:
        max_experts: Most experts of one token, >= 1, or None for no limit.
    """

    max_experts: PositiveInt | None

    @property
    def experts_per_token_limit(self) -> int | None:
        """The limit."""
        return self.max_experts


@dataclass(frozen=True, kw_only=True)
class BalanceLevelConfig(RouterConfig):
    """Field of schemes with a loss of the shares of routes.

    Attributes:
        load_balance_level: Tokens over which the share of routes is taken: those of the ``micro_batch``, which depends
            on the number of ranks and on how the batch is cut; of the ``sequence``; of the ``global_batch``, for which
            accumulation needs a pass that counts ahead, a quarter to a third more compute; or of the global batch of
            the ``last_step``, which is known for nothing. Its first step counts ahead.
    """

    load_balance_level: BalanceLevel

    @property
    def balance_level(self) -> BalanceLevel:
        """The field."""
        return self.load_balance_level


@dataclass(frozen=True, kw_only=True)
class FactorisedGateConfig(RouterConfig):
    """Field of schemes whose experts' width follows from the rank of their gate.

    Attributes:
        gate_rank: Rank of the experts' factorised gate, in [1, hidden_size).
    """

    gate_rank: PositiveInt

    @property
    def expert_gate_rank(self) -> int:
        """The field."""
        return self.gate_rank


@dataclass(frozen=True, kw_only=True)
class MergingConfig(RouterConfig):
    """Base of schemes that merge the parameters of experts."""

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if there is nothing to merge."""
        if num_experts < 2:
            raise ValueError(f"model.moe.num_experts={num_experts} must be at least 2 for router={self.name}")

    @property
    def mean_experts_per_token(self) -> float:
        """One merged network."""
        return 1.0

    @property
    def merges_experts(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, kw_only=True)
class BalancedRouterConfig(BalanceLevelConfig):
    """Fields of every router with a distribution over experts, beside ``load_balance_level``.

    Attributes:
        load_balance_weight: Coefficient of the load balance loss, >= 0.
        router_z_weight: Coefficient of the router z-loss, >= 0.
    """

    load_balance_weight: NonNegativeFloat
    router_z_weight: NonNegativeFloat

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """A loss, if it weighs anything."""
        return "loss" if self.load_balance_weight else None


@dataclass(frozen=True, kw_only=True)
class LinearRouterConfig(BalancedRouterConfig):
    """Fields of every linear router, beside those of ``BalancedRouterConfig``.

    Attributes:
        jitter: Half width of the multiplicative noise on the router's input in training, in [0, 1).
        bias: Whether a learnt number per expert is added to the logits (gpt-oss). It starts at 0.
        logit_cap: Soft bound of the logits, > 0: ``cap * tanh(logits / cap)`` (Gemma 2, arXiv:2408.00118, sec. 2, there
            of other logits); None for none.
        expert_router_coupling_weight: Coefficient of the loss that ties each expert to its row of the router, >= 0; the
            paper's is 1.
        expert_router_coupling_alpha: Share of its response to its own row that an expert's response to others may
            reach, in (0, 1]: 1 for 64 experts, 0.5 for 256 in the paper.
    """

    jitter: Fraction
    bias: bool = False
    logit_cap: PositiveFloat | None = None
    expert_router_coupling_weight: NonNegativeFloat = 0.0
    expert_router_coupling_alpha: ProbabilityMass = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.expert_router_coupling_alpha
        if not self.expert_router_coupling_weight and alpha != 1:
            raise ValueError(
                f"router.expert_router_coupling_alpha={alpha} must be 1 with router.expert_router_coupling_weight=0"
            )

    @property
    def couples_experts(self) -> bool:
        """Whether training has the loss of that weight."""
        return self.expert_router_coupling_weight > 0

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """With noise: the noise, and the input with it; with a cap what is under it."""
        of_noise = 2 * hidden_size if self.jitter > 0 else 0
        return of_noise if self.logit_cap is None else of_noise + num_experts


def check_within_experts(config: object, num_experts: int, *fields: str) -> None:
    """Raise ``ValueError`` if a field of ``config`` asks for more experts than the layer has; None asks for nothing."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value > num_experts:
            raise ValueError(f"router.{field}={value} must be at most model.moe.num_experts={num_experts}")
