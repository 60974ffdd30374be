"""Bases of routing schemes' modules: balance and z losses, statistics, float32 logits with input noise."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.host_values import on_device_of
from moe_pretrain.moe.losses import count_text_routes, expert_router_coupling_loss, load_balance_loss, router_z_loss
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.config import BalancedRouterConfig, LinearRouterConfig
from moe_pretrain.moe.types import (
    POOLED_LEVELS,
    BalanceLevel,
    ExpertRanking,
    RouterUse,
    Routing,
    RoutingContext,
    as_count,
)

JITTER_STREAM, COUPLING_STREAM = 1, 10


def routes_by_group(
    token_index: Int[Tensor, "routes"],
    expert_index: Int[Tensor, "routes"],
    level: BalanceLevel,
    num_experts: int,
    context: RoutingContext,
) -> Float[Tensor, "groups experts"]:
    """Routes of this micro-batch's text to each expert: a row per sequence at that level, else one."""
    num_groups = context.num_sequences if level == "sequence" else 1
    return count_text_routes(token_index, expert_index, context.token_mask, num_groups, num_experts)


def over_groups(counts: Float[Tensor, "groups experts"]) -> Float[Tensor, "experts"]:
    """Sum over groups, which is the group itself where there is one."""
    return counts[0] if len(counts) == 1 else counts.sum(dim=0)


def balance_counts(
    own: Float[Tensor, "groups experts"], level: BalanceLevel, layer: int, context: RoutingContext
) -> Float[Tensor, "groups experts"]:
    """``own`` from ``routes_by_group``; at a pooled level in training the routes of a whole global batch."""
    if level in POOLED_LEVELS and context.sum_over_global_batch is not None:
        return context.sum_over_global_batch(layer, over_groups(own))[None]
    return own


def router_use(
    tokens_per_expert: Float[Tensor, "experts"],
    probs: Float[Tensor, "tokens experts"],
    context: RoutingContext,
    sums: Float[Tensor, "sums"] | None = None,
) -> RouterUse:
    """Statistics of a decision that drops no route; ``probs`` is the distribution whose entropy is reported."""
    return RouterUse(tokens_per_expert, *_count_text(probs.detach(), context.token_mask), sums)


def even_load(
    routes: Float[Tensor, "*experts"], num_experts: int, costs: Sequence[float] = ()
) -> Float[Tensor, "experts"]:
    """Share of each of ``num_experts`` experts in ``routes`` routes with which their load is even.

    Args:
        routes: Of all experts together, one number or one for each.
        num_experts: Experts.
        costs: What a route to each costs: shares are as the inverse, so that all cost the same together. Empty where
            all cost the same.

    Returns:
        float64; not whole numbers.
    """
    if not costs:
        return (routes.double() / num_experts).expand(num_experts)
    wanted = even_proportions(num_experts, costs)
    return routes.double() * on_device_of(routes, wanted, torch.float64) / sum(wanted)


def even_proportions(num_experts: int, costs: Sequence[float]) -> list[float]:
    """Proportions of ``even_load``, which do not add up to 1: 1, or the inverse of the cost."""
    return [1 / cost for cost in costs] or [1.0] * num_experts


@one_kernel_on_cuda
def _count_text(
    probs: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Number of text tokens, their summed entropy, and of dropped routes the number 0."""
    entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
    tokens = as_count(token_mask.sum())
    return tokens, as_count((entropy * token_mask).sum()), torch.zeros_like(tokens)


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
            use=router_use(over_groups(own), probs, context, sums),
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
