"""Bases of routing schemes: their configuration, balance and z losses, statistics, float32 logits with input noise."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.losses import count_routes, expert_router_coupling_loss, load_balance_loss, router_z_loss
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import (
    POOLED_LEVELS,
    BalanceLevel,
    ExpertRanking,
    LayerPlace,
    RouterUse,
    Routing,
    RoutingContext,
    as_count,
)

JITTER_STREAM, COUPLING_STREAM = 1, 10
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
        """Experts of every token: the field ``top_k``, where there is one. None: their number varies."""
        return vars(self).get("top_k")

    def most_experts_per_token(self, num_experts: int) -> float:
        """Largest mean number of routes per token that a micro-batch can have.

        Lists of routes have this length on a GPU (``moe.route_list``). It is the fixed number, or the field
        ``max_experts``, where there is one and it is set, else all of ``num_experts``.
        """
        return self.fixed_experts_per_token or vars(self).get("max_experts") or num_experts

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
    def has_one_expert(self) -> bool:
        """Whether no token ever has two experts: its field ``top_k`` or ``max_experts`` is 1."""
        return 1 in (vars(self).get("top_k"), vars(self).get("max_experts"))

    @property
    def expert_gate_rank(self) -> int | None:
        """Rank of the factorised gate that the scheme gives its experts: its field ``gate_rank``; None for full gates.

        The experts' width follows from it. Such an expert gets ``x W_down`` with each route, see ``payload_size``.
        """
        return vars(self).get("gate_rank")

    @property
    def balance_level(self) -> BalanceLevel | None:
        """Tokens over which shares of routes are taken: its field ``load_balance_level``; None without such a loss."""
        return vars(self).get("load_balance_level")

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
class BalancedRouterConfig(RouterConfig):
    """Fields of every router with a distribution over experts.

    Attributes:
        load_balance_weight: Coefficient of the load balance loss, >= 0.
        load_balance_level: Tokens over which the share of routes is taken: those of the ``micro_batch``, which depends
            on the number of ranks and on how the batch is cut; of the ``sequence``; of the ``global_batch``, for which
            accumulation needs a pass that counts ahead, a quarter to a third more compute; or of the global batch of
            the ``last_step``, which is known for nothing. Its first step counts ahead.
        router_z_weight: Coefficient of the router z-loss, >= 0.
    """

    load_balance_weight: NonNegativeFloat
    load_balance_level: BalanceLevel
    router_z_weight: NonNegativeFloat


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


def routes_by_group(
    token_index: Int[Tensor, "routes"],
    expert_index: Int[Tensor, "routes"],
    level: BalanceLevel,
    num_experts: int,
    context: RoutingContext,
) -> Float[Tensor, "groups experts"]:
    """Routes of this micro-batch's text to each expert: a row per sequence at that level, else one."""
    num_groups = context.num_sequences if level == "sequence" else 1
    group_of_route = token_index // (len(context.token_mask) // num_groups)
    return count_routes(expert_index, context.token_mask[token_index], group_of_route, num_groups, num_experts)


def balance_counts(
    own: Float[Tensor, "groups experts"], level: BalanceLevel, layer: int, context: RoutingContext
) -> Float[Tensor, "groups experts"]:
    """``own`` from ``routes_by_group``; at a pooled level in training the routes of a whole global batch."""
    if level in POOLED_LEVELS and context.sum_over_global_batch is not None:
        return context.sum_over_global_batch(layer, own.sum(dim=0))[None]
    return own


def router_use(
    tokens_per_expert: Float[Tensor, "experts"],
    probs: Float[Tensor, "tokens experts"],
    context: RoutingContext,
    sums: Float[Tensor, "sums"] | None = None,
) -> RouterUse:
    """Statistics of a decision that drops no route; ``probs`` is the distribution whose entropy is reported."""
    tokens, entropy = _count_text(probs.detach(), context.token_mask)
    return RouterUse(tokens_per_expert, tokens, entropy, tokens_per_expert.new_zeros(()), sums)


@one_kernel_on_cuda
def _count_text(
    probs: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Number of text tokens, and their summed entropy."""
    entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
    return as_count(token_mask.sum()), as_count((entropy * token_mask).sum())


class BalancedRouter(Router):
    """Base of routers with a distribution over experts: makes losses and statistics of a decision."""

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, settings: BalancedRouterConfig, num_experts: int, layer: int):
        super().__init__(layer)
        self._settings = settings
        self.num_experts = num_experts

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        settings = self._settings
        return {"load_balance": settings.load_balance_weight, "router_z": settings.router_z_weight}

    @property
    def needs_global_routes(self) -> bool:
        """Whether training needs ``RoutingContext.sum_over_global_batch``."""
        return self._settings.load_balance_level in POOLED_LEVELS and self._settings.load_balance_weight > 0

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        probs: Float[Tensor, "tokens experts"],
        token_index: Int[Tensor, "routes"],
        expert_index: Int[Tensor, "routes"],
        weight: Float[Tensor, "routes"],
        routes_per_token: int | None,
        context: RoutingContext,
        payload: Float[Tensor, "routes low"] | None = None,
        sums: Float[Tensor, "sums"] | None = None,
        num_routes: Int[Tensor, ""] | None = None,
    ) -> Routing:
        """Put a decision, its losses and its statistics together.

        Args:
            logits: For the z-loss.
            probs: Distribution over experts for the balance loss and the entropy statistic; rows sum to 1.
            token_index: Token of each route, ascending.
            expert_index: Expert of each route.
            weight: Weight of each route.
            routes_per_token: See ``Routing``.
            context: Of the micro-batch.
            payload: See ``Routing``.
            sums: See ``RouterUse``.
            num_routes: See ``Routing``.
        """
        level = self._settings.load_balance_level
        own = routes_by_group(token_index, expert_index, level, self.num_experts, context)
        counts = balance_counts(own, level, self.layer, context)
        return Routing(
            token_index,
            expert_index,
            weight,
            routes_per_token,
            use=router_use(own.sum(dim=0), probs, context, sums),
            aux={
                "load_balance": load_balance_loss(probs, counts, context.token_mask, self.balanced_costs),
                "router_z": router_z_loss(logits, context.token_mask),
                **self.own_losses(probs, context),
            },
            payload=payload,
            num_routes=num_routes,
        )

    def own_losses(self, probs: Float[Tensor, "tokens experts"], context: RoutingContext) -> dict[str, Tensor]:
        """Aux losses that a scheme has beside these two."""
        return {}


class LinearRouter(BalancedRouter):
    """Base of routers whose logits are a linear map of the token, or two such maps; a scheme decides what follows."""

    def __init__(
        self,
        settings: LinearRouterConfig,
        hidden_size: int,
        num_experts: int,
        layer: int,
        projection_size: int | None = None,
    ):
        super().__init__(settings, num_experts, layer)
        self._jitter = settings.jitter
        self.projection = None if projection_size is None else nn.Parameter(torch.empty(projection_size, hidden_size))
        self.weight = nn.Parameter(torch.empty(num_experts, projection_size or hidden_size))
        self._logit_cap = settings.logit_cap
        # Not ``bias``, which a scheme of a user's own may well call a buffer of its own.
        self.logit_bias = nn.Parameter(torch.empty(num_experts)) if settings.bias else None
        if settings.bias:
            self.start_values = {**self.start_values, "logit_bias": 0.0}
        self._coupling = (settings.expert_router_coupling_weight, settings.expert_router_coupling_alpha)
        self.needs_proxy_norms = settings.couples_experts
        if self.needs_proxy_norms:
            reason = "the bound of the noise on a row is held constant, though it depends on the rows"
            self.gradients_by_design = {**self.gradients_by_design, "expert_router_coupling": reason}

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        own = {"expert_router_coupling": self._coupling[0]} if self.needs_proxy_norms else {}
        return super().aux_weights | own

    def own_losses(self, probs: Float[Tensor, "tokens experts"], context: RoutingContext) -> dict[str, Tensor]:
        """Coupling of experts and router where it is asked for; in training."""
        if context.proxy_norms is None:
            return {}
        norms = context.proxy_norms(perturbed_rows(self.weight.float(), context, self.layer))
        return {"expert_router_coupling": expert_router_coupling_loss(norms, self._coupling[1])}

    def logits(
        self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext
    ) -> Float[Tensor, "tokens experts"]:
        """Float32 logits; in training with the configured noise on the input."""
        inputs = hidden
        if self.training and self._jitter > 0:
            keys = (context.seed, JITTER_STREAM, context.step, self.layer)
            noise = counter_uniform(context.token_position, hidden.shape[1], *keys)
            inputs = hidden.float() * (1 + self._jitter * (2 * noise - 1))
        if self.projection is not None:
            inputs = router_logits(inputs, self.projection)
        logits = router_logits(inputs, self.weight)
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits if self._logit_cap is None else self._logit_cap * (logits / self._logit_cap).tanh()

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their logits, with probabilities as gates."""
        logits = self.logits(hidden, context)
        return ExpertRanking(logits, logits.softmax(dim=-1))


def perturbed_rows(
    rows: Float[Tensor, "experts hidden"], context: RoutingContext, layer: int
) -> Float[Tensor, "experts hidden"]:
    """Rows of a router as proxies of the tokens that it sends to each expert: each number times ``1 + e_i u``.

    ``u`` is uniform in [-1, 1), new in every step and alike in all of its micro-batches and on all ranks; ``e_i = min_j
    |R_i - R_j| / (2 |R_i|)`` keeps a row nearer to itself than to another. The noise has no gradient.

    Source:
        Lv et al. 2025 (arXiv:2512.23447), eq. 4 and figure 8.
    """
    with torch.no_grad():
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.fill_diagonal_(torch.inf).amin(dim=1)
        bound = nearest / (2 * rows.norm(dim=1)).clamp(min=1e-20)
        place = torch.arange(len(rows), device=rows.device)
        uniform = counter_uniform(place, rows.shape[1], context.seed, COUPLING_STREAM, context.step, layer)
        factor = 1 + bound[:, None] * (2 * uniform - 1)
    return factor * rows


def check_within_experts(config: object, num_experts: int, *fields: str) -> None:
    """Raise ``ValueError`` if a field of ``config`` asks for more experts than the layer has; None asks for nothing."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value > num_experts:
            raise ValueError(f"router.{field}={value} must be at most model.moe.num_experts={num_experts}")


def best_first(
    scores: Float[Tensor, "tokens experts"], ties: Float[Tensor, "tokens experts"] | None, dim: int = -1
) -> Int[Tensor, "tokens experts"]:
    """Indices along ``dim`` by score, best first; of equal scores the larger of ``ties``, then the lower index.

    Scores saturate where logits do not: in float32 a softmax is exactly 1 or 0 beyond gaps of 17 and 104, a sigmoid
    exactly 1 above 16.7. By scores alone all of these go to the lowest index, whatever the router has learnt. Both
    sorts are stable, and neither is ``topk``, which does not say which of two equals it takes.
    """
    if ties is None:
        return scores.sort(dim=dim, descending=True, stable=True).indices
    by_tie = ties.sort(dim=dim, descending=True, stable=True).indices
    by_score = scores.gather(dim, by_tie).sort(dim=dim, descending=True, stable=True).indices
    return by_tie.gather(dim, by_score)


def router_logits(
    hidden: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "tokens experts"]:
    """``hidden @ weight.T`` in float32 for any input dtype.

    Autograd would keep ``hidden.float()``, a tenth of what the whole layer saves in bfloat16. Here the input is
    kept as it came, which costs nothing because the experts keep it too, and is cast again in backward.
    """
    return _RouterLogits.apply(hidden, weight)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return functional.linear(hidden.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = grads[0].mm(weight.float()).to(hidden.dtype)
        return grad_hidden, grads[0].t().mm(hidden.float()).to(weight.dtype)
