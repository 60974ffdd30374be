"""DynMoE: an expert takes every token that points its way far enough, and experts come and go in training."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first, router_logits, router_use
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertStart, Routing, RoutingContext, StepUse

_TINY = 1e-20
_SHORT = 1e-6
"""Length below which a token has no direction."""


@dataclass(frozen=True, kw_only=True)
class DynMoEConfig(RouterConfig):
    """Fields of ``router=dynmoe``; ``model.moe.num_experts`` is the number of slots, which all have memory throughout.

    Attributes:
        name: ``dynmoe``.
        initial_experts: Slots in use at the start, in [1, num_experts].
        initial_experts_per_token: Mean experts per token at the start, below ``initial_experts``: thresholds begin at
            the quantile of random directions that gives it. None begins at 0, as published: half of the experts.
        score_scale: Factor of cosines and thresholds before the sigmoid (the paper's tau). It moves no route, only the
            size of gradients. The DeepSpeed version has 1; None is ``3 sqrt(hidden_size)``, at which the sigmoids of
            random directions spread over (0, 1).
        unrouted: What a token that passes no threshold gets in training: ``none``: nothing, as published; ``top_1``:
            its best expert with weight 1. In evaluation it is always the latter.
        idle_steps: Steps without a record before each recorded window but the first, which begins after half of them.
        record_steps: Steps of a window; after its last one experts are removed and added.
        new_expert: Weights of an added expert: ``mean``: the mean of those in use plus noise; ``stale``: what its slot
            happens to hold, as in the code.
        noise: Standard deviation of that noise over the root mean square of the mean, > 0.
        diversity_weight: Coefficient of the diversity loss, >= 0.
        simplicity_weight: Coefficient of the simplicity loss, >= 0.
        load_balance_weight: Coefficient of the balance loss of the DeepSpeed version, >= 0; the paper has none.
        efficiency_weight: Coefficient of its efficiency loss, the mean number of experts in use as a share, >= 0.
    """

    name: Literal["dynmoe"]
    initial_experts: PositiveInt
    initial_experts_per_token: PositiveFloat | None
    score_scale: PositiveFloat | None
    unrouted: Literal["none", "top_1"]
    idle_steps: NonNegativeInt
    record_steps: PositiveInt
    new_expert: Literal["mean", "stale"]
    noise: PositiveFloat
    diversity_weight: NonNegativeFloat
    simplicity_weight: NonNegativeFloat
    load_balance_weight: NonNegativeFloat
    efficiency_weight: NonNegativeFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_experts_per_token is not None and self.initial_experts_per_token >= self.initial_experts:
            raise ValueError(
                f"router.initial_experts_per_token={self.initial_experts_per_token:g} must be below "
                f"router.initial_experts={self.initial_experts}"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        if self.initial_experts > num_experts:
            raise ValueError(
                f"router.initial_experts={self.initial_experts} must be at most model.moe.num_experts={num_experts}, "
                "the number of slots"
            )

    @property
    def mean_experts_per_token(self) -> float:
        """Of the start."""
        return self.initial_experts_per_token or self.initial_experts / 2

    @property
    def starts_experts(self) -> bool:
        """Yes, when it adds one."""
        return True

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "DynMoERouter":
        """The module of layer ``layer``."""
        return DynMoERouter(self, hidden_size, num_experts, layer)

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Cosines, scores, gates and their masks, beside two numbers for each expert."""
        return 3 * num_experts


class DynMoERouter(Router):
    """Top-any gating: expert ``e`` takes token ``t`` where ``sigmoid(tau cos(x_t, w_e)) > sigmoid(tau G_e)``.

    The experts of a token weigh the same, ``1 / k_t``, with the straight-through gradient of the published code: that
    of an open gate is 1 for its score and -1 for its threshold, closed gates and ``k_t`` have none. A slot that is not
    in use takes no token.

    Losses: ``diversity``, the Frobenius norm of the off-diagonal cosines of keys in use; ``simplicity``, the mean norm
    of the keys of all slots. By option ``load_balance``, ``slots sum_e mean_t(g_te / sum g_t) mean_t(A_te)`` over the
    micro-batch's tokens that have an expert, and ``efficiency``, the mean of all gates.

    In a window of steps every rank's text is recorded: routes to each expert, and the sum of the inputs of tokens that
    passed no threshold. At its end experts without a route go out of use, and if there was such a token the first free
    slot comes into use: its key is the direction of that sum, its threshold 0, its weights as ``new_expert`` says, and
    the optimizer forgets what it knew of the slot.

    Source:
        Guo et al. 2024 (arXiv:2405.14297), sec. 3; what the paper leaves open as in the DeepSpeed version of the code,
        with the balance loss over all slots, used or not. Deviations: records are pooled over all ranks (there over an
        expert group: with one rank to a group masks come apart); a window is of optimizer steps, not of forward passes;
        a token without an expert adds one, not a sum of components that is not 0; edits reach the master weights.
    """

    causal_in_training = True
    causal_in_evaluation = True
    gradients_by_design = MappingProxyType(
        {
            name: "a straight-through gradient: a gate is 0 or 1, and its derivative 0"
            for name in ("weight", "load_balance", "efficiency")
        }
    )
    other_scales = MappingProxyType({"load_balance": "its sums are over gates and not over probabilities"})

    def __init__(self, config: DynMoEConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        self.scale = config.score_scale or 3 * math.sqrt(hidden_size)
        self.losses_depend_on_cut = config.load_balance_weight > 0
        if config.unrouted == "none":
            self.evaluation_rule = "a token that passes no threshold takes its best expert; in training it takes none"
        self.num_sums = num_experts + hidden_size + 1
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.thresholds = nn.Parameter(torch.empty(num_experts))
        self.start_values = MappingProxyType({"thresholds": self._first_threshold(hidden_size)})
        self.start_stds = MappingProxyType({"weight": 1 / math.sqrt(hidden_size)})
        self.buffer_ranges = {"in_use": (0, 1)}
        self.in_use: Tensor
        self.steps: Tensor
        self.recorded_routes: Tensor
        self.unrouted_sum: Tensor
        self.unrouted_tokens: Tensor
        self.unrouted_share: Tensor
        self.register_buffer("in_use", (torch.arange(num_experts) < config.initial_experts).long())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("recorded_routes", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("unrouted_sum", torch.zeros(hidden_size))
        self.register_buffer("unrouted_tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unrouted_share", torch.zeros(()))

    def _first_threshold(self, hidden_size: int) -> float:
        """The cosine of random directions, normal with variance ``1 / hidden_size``, at the wanted quantile."""
        wanted = self.config.initial_experts_per_token
        if wanted is None:
            return 0.0
        return NormalDist(0, 1 / math.sqrt(hidden_size)).inv_cdf(1 - wanted / self.config.initial_experts)

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        config = self.config
        optional = {"load_balance": config.load_balance_weight, "efficiency": config.efficiency_weight}
        own = {"diversity": config.diversity_weight, "simplicity": config.simplicity_weight}
        return own | {name: weight for name, weight in optional.items() if weight > 0}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to the experts in use whose thresholds it passes."""
        used = self.in_use > 0
        length = _row_norm(hidden)[:, None].clamp(min=_SHORT)
        cosines = router_logits(hidden, functional.normalize(self.weight, dim=1)) / length
        scores = (self.scale * cosines).sigmoid()
        margins = scores - (self.scale * self.thresholds).sigmoid()
        passed = (margins.detach() > 0) & used
        routed = passed
        if not self.training or self.config.unrouted == "top_1":
            routed = passed | self._best(cosines.detach(), used) & ~passed.any(dim=1, keepdim=True)
        # The value is exact and the gradient that of the margin; one that was taken for want of another has none.
        gates = routed.float() + torch.where(passed, margins - margins.detach(), 0.0)
        count = routed.sum(dim=1, keepdim=True).clamp(min=1)
        routes = list_routes(routed, routed.numel())
        counts = self._count(routes.token, routes.slot, context)
        shares = scores.detach() * used
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=_TINY)
        sums = self._sums(hidden, passed, context) if self.training else None
        return Routing(
            routes.token,
            routes.slot,
            routes.take(gates / count),
            routes_per_token=None,
            use=router_use(counts, shares, context, sums),
            aux=self._losses(gates, routed, used, context.token_mask),
            num_routes=routes.num_routes,
        )

    def _best(self, cosines: Float[Tensor, "tokens experts"], used: Bool[Tensor, "experts"]) -> Tensor:
        """The best expert in use of each token, as a mask."""
        best = best_first(cosines.masked_fill(~used, -torch.inf), None)[:, :1]
        return torch.zeros_like(cosines, dtype=torch.bool).scatter(1, best, True)

    def _count(self, token_index: Tensor, expert_index: Tensor, context: RoutingContext) -> Float[Tensor, "experts"]:
        text = context.token_mask[token_index]
        return count_routes(expert_index, text, torch.zeros_like(expert_index), 1, self.num_experts)[0]

    def _sums(
        self, hidden: Float[Tensor, "tokens hidden"], passed: Bool[Tensor, "tokens experts"], context: RoutingContext
    ) -> Float[Tensor, "sums"]:
        """Text's routes to each expert, the sum of the inputs without a route, and their number; float64."""
        counts = (passed & context.token_mask[:, None]).sum(dim=0).double()
        unrouted = ~passed.any(dim=1) & context.token_mask
        total = (hidden.detach().double() * unrouted[:, None]).sum(dim=0)
        return torch.cat([counts, total, unrouted.sum()[None].double()])

    def _losses(
        self,
        gates: Float[Tensor, "tokens experts"],
        routed: Bool[Tensor, "tokens experts"],
        used: Bool[Tensor, "experts"],
        text: Bool[Tensor, "tokens"],
    ) -> dict[str, Tensor]:
        keys = functional.normalize(self.weight, dim=1)
        others = used[:, None] & used & ~torch.eye(self.num_experts, dtype=torch.bool, device=used.device)
        squares = (keys @ keys.T).square()
        # A GPU would be waited for to pick out those of others.
        squares = (squares * others if squares.is_cuda else squares[others]).sum()
        losses = {
            # The root has an infinite gradient at 0, which one expert alone has for a sum.
            "diversity": squares.clamp(min=_TINY).sqrt(),
            "simplicity": self.weight.norm(dim=1).mean(),
        }
        if self.config.load_balance_weight > 0:
            served = (routed.any(dim=1) & text)[:, None]
            tokens = served.sum().clamp(min=1)
            share = (gates / gates.sum(dim=1, keepdim=True).clamp(min=0.5) * served).sum(dim=0) / tokens
            load = (routed & served).sum(dim=0) / tokens
            losses["load_balance"] = self.num_experts * (share * load).sum()
        if self.config.efficiency_weight > 0:
            losses["efficiency"] = (gates * text[:, None]).sum() / (text.sum().clamp(min=1) * self.num_experts)
        return losses

    @torch.no_grad()
    def after_step(self, use: StepUse) -> ExpertStart | None:
        """Record the step if it is of a window; at the window's end remove and add experts."""
        config = self.config
        counts, total, unrouted = use.sums.split([self.num_experts, len(self.unrouted_sum), 1])
        self.unrouted_share.copy_(unrouted[0] / max(1, use.tokens))
        self.steps += 1
        period = config.idle_steps + config.record_steps
        place = (int(self.steps) - 1 + config.idle_steps - config.idle_steps // 2) % period
        if place < config.idle_steps:
            return None
        self.recorded_routes += counts.long()
        self.unrouted_sum += total.to(self.unrouted_sum)
        self.unrouted_tokens += unrouted[0].long()
        return self._update() if place == period - 1 else None

    def _update(self) -> ExpertStart | None:
        """Remove experts without a route, add one for tokens without an expert, and begin a new record."""
        if int(self.recorded_routes.sum() + self.unrouted_tokens) > 0:  # a window without text says nothing
            self.in_use *= (self.recorded_routes > 0).long()
        survivors = self.in_use > 0
        free = (~survivors).nonzero()[:, 0].tolist()
        direction = functional.normalize(self.unrouted_sum, dim=0)
        start = None
        if free and int(self.unrouted_tokens) > 0:
            slot = free[0]
            self.in_use[slot] = 1
            self.weight[slot] = direction
            self.thresholds[slot] = 0.0
            sources = survivors if self.config.new_expert == "mean" and bool(survivors.any()) else None
            start = ExpertStart(slot, ("weight", "thresholds"), sources, self.config.noise, int(self.steps))
        self.recorded_routes.zero_()
        self.unrouted_sum.zero_()
        self.unrouted_tokens.zero_()
        return start

    @property
    def free_slots(self) -> Bool[Tensor, "experts"]:
        """Slots without an expert."""
        return self.in_use == 0

    def metrics(self, use: StepUse) -> dict[str, float]:
        """Experts in use, and the share of text tokens that passed no threshold."""
        return {"active_experts": float(self.in_use.sum()), "unrouted_share": float(self.unrouted_share)}


def _row_norm(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"]:
    """Float32 length of every row; as in ``router_logits`` the input is kept as it came."""
    return _RowNorm.apply(hidden)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        length = hidden.float().norm(dim=1)
        ctx.save_for_backward(hidden, length)
        return length

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        hidden, length = ctx.saved_tensors
        return (hidden.float() * (grads[0] / length.clamp(min=_SHORT))[:, None]).to(hidden.dtype)
