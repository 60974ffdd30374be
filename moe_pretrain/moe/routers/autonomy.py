"""Autonomy-of-Experts: no router; experts rank themselves by the norm of their first activation."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.losses import entropy_loss
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.routers.base import BalancedRouter
from moe_pretrain.moe.routers.config import (
    BalancedRouterConfig,
    CapacityConfig,
    FactorisedGateConfig,
    FixedCountConfig,
    LimitedCountConfig,
    MeanExperts,
    ProbabilityMass,
    check_within_experts,
)
from moe_pretrain.moe.routers.expert_choice import (
    NUM_CUTOFF_SUMS,
    EvaluationThresholds,
    choose_tokens,
    cutoff_sums,
    most_taken,
)
from moe_pretrain.moe.routers.top_p import top_p_mask
from moe_pretrain.moe.types import ExpertRanking, Routing, RoutingContext, StepUse

Selection = tuple[Bool[Tensor, "tokens experts"], Float[Tensor, "sums"] | None]
"""Which experts each token takes, and ``RouterUse.sums``."""


@dataclass(frozen=True, kw_only=True)
class AutonomyFields(FactorisedGateConfig, BalancedRouterConfig):
    """Fields of all selection rules of Autonomy-of-Experts, beside ``gate_rank`` and those of ``BalancedRouterConfig``.

    Attributes:
        weights: ``selected``: softmax over the norms of the selected experts (the paper, and the first released
            code, which writes it as a renormalised softmax). ``full``: softmax over all norms, not renormalised (the
            released megablocks version); weights then sum to less than 1, and unselected experts get
            gradient from the LM loss.
        gate_activation: How an expert on another rank gets ``x W_down``, which the ranking has computed. ``travels``:
            it is sent with the token (layout A of the specification). ``recomputed``: the expert's rank, which holds
            ``W_down`` as every rank does, computes it again (layout B): less traffic, more FLOPs, the same numbers.
    """

    weights: Literal["selected", "full"]
    gate_activation: Literal["travels", "recomputed"]

    @property
    def payload_size(self) -> int:
        """The gate's low activations, unless the expert's rank computes them again."""
        return self.gate_rank if self.gate_activation == "travels" else 0

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """All experts' low activations, whose norms are taken."""
        return num_experts * self.gate_rank


@dataclass(frozen=True, kw_only=True)
class AutonomyConfig(FixedCountConfig, AutonomyFields):
    """Fields of ``router=autonomy``: those of ``AutonomyFields``, and ``top_k``."""

    name: Literal["autonomy"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "AutonomyRouter":
        """The module of layer ``layer``."""
        return AutonomyRouter(self, hidden_size, num_experts, layer)


@dataclass(frozen=True, kw_only=True)
class AutonomyTopPConfig(LimitedCountConfig, AutonomyFields):
    """Fields of ``router=autonomy_top_p``, beside ``max_experts`` and those of ``AutonomyFields``.

    Attributes:
        name: ``autonomy_top_p``.
        threshold: Probability mass that the chosen experts must exceed, in (0, 1]; the paper takes 0.6.
        dynamic_weight: Coefficient of the mean entropy of the softmax over all norms (the paper's equation 8), >= 0.
        expected_experts: Experts per token assumed where sizes are counted before a run.
    """

    name: Literal["autonomy_top_p"]
    threshold: ProbabilityMass
    dynamic_weight: NonNegativeFloat
    expected_experts: MeanExperts

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "max_experts", "expected_experts")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.expected_experts

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "AutonomyTopPRouter":
        """The module of layer ``layer``."""
        return AutonomyTopPRouter(self, hidden_size, num_experts, layer)


@dataclass(frozen=True, kw_only=True)
class AutonomyExpertChoiceConfig(CapacityConfig, AutonomyFields):
    """Fields of ``router=autonomy_expert_choice``: those of ``AutonomyFields``, and of ``CapacityConfig``.

    The paper has ``capacity_factor=2``.
    """

    name: Literal["autonomy_expert_choice"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "AutonomyExpertChoiceRouter":
        """The module of layer ``layer``."""
        return AutonomyExpertChoiceRouter(self, hidden_size, num_experts, layer)


class AutonomyBase(BalancedRouter):
    """Scores of an expert are ``||x W_down||``, the norm of its own low-rank gate activation.

    ``down_weight [experts, rank, hidden]`` is held by every rank, in the dense reduction group: all experts'
    activations are one product. Norms are float32: in bfloat16 their spacing is a sixth of what separates experts at
    initialisation.

    The probabilities of the balance loss are the softmax over all norms; only that loss reaches unselected experts'
    ``W_down`` with ``weights=selected``.

    Source:
        Lv et al. 2025 (arXiv:2501.13074), algorithm 2 and equations 3-6. Deviation: the balance loss is 1.0 when
        even (theirs is ``top_k``), so their weight 0.01 is ours times ``top_k``.
    """

    keep_float32 = False  # the down projections are expert weights, and large

    def __init__(self, fields: AutonomyFields, hidden_size: int, num_experts: int, layer: int):
        super().__init__(fields, num_experts, layer)
        self._fields = fields
        self.down_weight = nn.Parameter(torch.empty(num_experts, fields.gate_rank, hidden_size))

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Run every expert's first projection and let the scheme choose by the norms."""
        low, norms = self._first_activations(hidden)
        taken, sums = self.select(norms.detach(), context)
        per_token = self.routes_per_token
        most = self.most_routes(taken) if per_token is None else len(taken) * per_token
        routes = list_routes(taken, most, is_exact=per_token is not None)
        probs = norms.softmax(dim=-1)
        if self._fields.weights == "selected":
            # The lowest finite number, not -inf: a token without experts would have weights of NaN.
            lowest = torch.finfo(norms.dtype).min
            weight = routes.take(norms.masked_fill(~taken, lowest).softmax(dim=-1))
        else:
            weight = routes.take(probs)
        payload = routes.take(low) if self._fields.gate_activation == "travels" else None
        routing = self.route(
            *(norms, probs, routes.token, routes.slot, weight, per_token, context, payload, sums, routes.num_routes)
        )
        routing.aux.update(self.more_aux(probs, context))
        return routing

    def _first_activations(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``x W_down`` of every expert, and its norm."""
        low = functional.linear(hidden, self.down_weight.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        return low, torch.linalg.vector_norm(low.float(), dim=-1)

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their norms."""
        low, norms = self._first_activations(hidden)
        return ExpertRanking(norms, norms.softmax(dim=-1), payload=low)

    def more_aux(self, probs: Float[Tensor, "tokens experts"], context: RoutingContext) -> dict[str, Tensor]:
        """Aux losses beside those of ``BalancedRouter``."""
        return {}

    @property
    def routes_per_token(self) -> int | None:
        """See ``Routing``."""
        return None

    def most_routes(self, taken: Bool[Tensor, "tokens experts"]) -> int:
        """Most routes that there can be."""
        return taken.numel()

    def select(self, norms: Float[Tensor, "tokens experts"], context: RoutingContext) -> Selection:
        """Experts that each token takes, and the scheme's own sums."""
        raise NotImplementedError

    def expert_arguments(self, experts: range) -> dict[str, Tensor]:
        """The down projections of ``experts``, when they compute with them again."""
        if self._fields.gate_activation == "travels":
            return {}
        return {"down_weight": self.down_weight[experts.start : experts.stop]}


class AutonomyRouter(AutonomyBase):
    """The ``top_k`` experts with the largest norms; ties go to the lower expert id.

    With ``top_k`` 1 and ``weights=selected`` the weight is 1 and ranking itself gets no gradient from the LM loss,
    though ``W_down`` does, through the expert.

    Source:
        arXiv:2501.13074, algorithm 2.
    """

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, config: AutonomyConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config

    @property
    def routes_per_token(self) -> int:
        """``top_k``."""
        return self.config.top_k

    def select(self, norms: Float[Tensor, "tokens experts"], context: RoutingContext) -> Selection:
        """The largest norms."""
        chosen = norms.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.top_k]
        return torch.zeros_like(norms, dtype=torch.bool).scatter(1, chosen, True), None


class AutonomyTopPRouter(AutonomyBase):
    """As many experts as it takes to pass a mass of the softmax over all norms, with a loss on its entropy.

    Source:
        arXiv:2501.13074, sec. 4.4 (top-p selection, threshold 0.6) and equation 8.
    """

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, config: AutonomyTopPConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        return {**super().aux_weights, "dynamic": self.config.dynamic_weight}

    def most_routes(self, taken: Bool[Tensor, "tokens experts"]) -> int:
        """As many of each token as the limit allows."""
        return len(taken) * (self.config.max_experts or self.num_experts)

    def select(self, norms: Float[Tensor, "tokens experts"], context: RoutingContext) -> Selection:
        """The shortest prefix of the ordered probabilities that passes the threshold."""
        return top_p_mask(norms.softmax(dim=-1), self.config.threshold, self.config.max_experts, norms), None

    def more_aux(self, probs: Float[Tensor, "tokens experts"], context: RoutingContext) -> dict[str, Tensor]:
        """The dynamic loss."""
        return {"dynamic": entropy_loss(probs, context.token_mask)}


class AutonomyExpertChoiceRouter(AutonomyBase):
    """Every expert takes the tokens for which its norm is largest, each expert the same number.

    Training is not causal; evaluation goes by running thresholds on the norms, as in ``expert_choice``, and before the
    first step every token goes to every expert. The weights of a token are over the experts that took it.

    Source:
        arXiv:2501.13074, sec. 4.4 (expert choice, capacity factor 2, no auxiliary loss); evaluation is ours.
    """

    causal_in_training = False
    causal_in_evaluation = True
    evaluation_rule = "a token takes the experts whose running threshold it exceeds; in training experts choose tokens"

    def __init__(self, config: AutonomyExpertChoiceConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_sums = NUM_CUTOFF_SUMS * num_experts
        self.evaluation = EvaluationThresholds(num_experts, 0.0, config.threshold_decay)

    def most_routes(self, taken: Bool[Tensor, "tokens experts"]) -> int:
        """In training as many of each expert as it takes of nothing but text."""
        return most_taken(taken, self.config.capacity_factor if self.training else None)

    def select(self, norms: Float[Tensor, "tokens experts"], context: RoutingContext) -> Selection:
        """In training the experts choose; in evaluation thresholds decide."""
        text = context.token_mask
        if not self.training:
            return (norms > self.evaluation.thresholds) & text[:, None], None
        taken, cutoffs = choose_tokens(norms, text, self.config.capacity_factor)
        return taken, cutoff_sums(norms, cutoffs, text)

    def after_step(self, use: StepUse) -> None:
        """Move the thresholds by the cut-offs of the step."""
        self.evaluation.after_step(use)
