"""Attentive gating: a token asks the experts' own hidden states which of them suit it."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.losses import distillation_loss, importance_loss, sample_similarity_loss
from moe_pretrain.moe.routers.base import BalancedRouter, router_logits
from moe_pretrain.moe.routers.config import (
    BalancedRouterConfig,
    FactorisedGateConfig,
    FixedCountConfig,
    check_within_experts,
)
from moe_pretrain.moe.types import Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class AttentiveFields(FixedCountConfig, BalancedRouterConfig):
    """Fields of every form of attentive gating, beside ``top_k`` and those of ``BalancedRouterConfig``.

    Attributes:
        key_size: Width of queries and keys, >= 1.
        weights: ``selected``: softmax over the scores of the selected experts (the released code for ``top_k`` above
            1); with ``top_k`` 1 it is always 1 and the gate gets no gradient from the LM loss, so it is refused there.
            ``full``: the gate's probability, softmax over all candidates, not renormalised (the released code for
            ``top_k`` 1).
        similarity_weight: Coefficient of the sample-similarity loss, >= 0; the paper's pair comes to
            ``T ** 2 * beta_s + beta_d / (num_experts - 1)`` for ``T`` tokens. Level ``micro_batch``.
        importance_weight: Coefficient of the importance loss, >= 0; the paper tries 0.2 to 1.0. Level
            ``micro_batch``. The paper compares the two losses and does not combine them.
    """

    key_size: PositiveInt
    weights: Literal["selected", "full"]
    similarity_weight: NonNegativeFloat
    importance_weight: NonNegativeFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.weights == "selected":
            raise ValueError(
                "router.weights=selected must be full when router.top_k=1: the weight would always be 1 and the gate "
                "would not learn from the LM loss"
            )

    @property
    def query_size(self) -> int:
        """A query goes with a token to the experts that are asked."""
        return self.key_size

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """The query, and with the similarity loss the centred input."""
        return self.key_size + (hidden_size if self.similarity_weight > 0 else 0)


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig(AttentiveFields):
    """Fields of ``router=attentive``, the two-stage form, beside those of ``AttentiveFields``.

    Attributes:
        name: ``attentive``.
        num_candidates: Experts whose keys a token sees, in (top_k, num_experts]; a linear router chooses them.
        distillation_weight: Coefficient of the loss that teaches the linear router the gate's choice, > 0: nothing
            else teaches it.
    """

    name: Literal["attentive"]
    num_candidates: PositiveInt
    distillation_weight: PositiveFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates <= self.top_k:
            raise ValueError(
                f"router.num_candidates={self.num_candidates} must be more than router.top_k={self.top_k}: "
                "the gate chooses among candidates"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        super().check_num_experts(num_experts)
        check_within_experts(self, num_experts, "num_candidates")

    def scored_experts(self, num_experts: int) -> int:
        """Experts whose first layer a token runs for its key."""
        return self.num_candidates

    def build_for_experts(self, hidden_size: int, num_experts: int, layer: int, expert_width: int) -> "AttentiveRouter":
        """The module of layer ``layer``, whose keys are mapped from experts ``expert_width`` wide."""
        return AttentiveRouter(self, hidden_size, num_experts, layer, expert_width=expert_width)


@dataclass(frozen=True, kw_only=True)
class AttentiveDenseConfig(AttentiveFields):
    """Fields of ``router=attentive_dense``, beside those of ``AttentiveFields``.

    Attributes:
        name: ``attentive_dense``.
    """

    name: Literal["attentive_dense"]

    def scored_experts(self, num_experts: int) -> int:
        """Experts whose first layer a token runs for its key."""
        return num_experts

    def build_for_experts(
        self, hidden_size: int, num_experts: int, layer: int, expert_width: int
    ) -> "AttentiveDenseRouter":
        """The module of layer ``layer``, whose keys are mapped from experts ``expert_width`` wide."""
        return AttentiveDenseRouter(self, hidden_size, num_experts, layer, expert_width=expert_width)


@dataclass(frozen=True, kw_only=True)
class AttentiveLowRankConfig(FactorisedGateConfig, AttentiveFields):
    """Fields of ``router=attentive_low_rank``: those of ``AttentiveFields``, and ``gate_rank`` as in ``autonomy``."""

    name: Literal["attentive_low_rank"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "AttentiveLowRankRouter":
        """The module of layer ``layer``."""
        return AttentiveLowRankRouter(self, hidden_size, num_experts, layer)

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Beside that of every form: all experts' low activations, and the query mapped to their space."""
        return super().kept_per_token(hidden_size, num_experts) + (num_experts + 1) * self.gate_rank


class QueryKey(nn.Module):
    """The two bias-free maps of the gate, float32: ``query_weight [key, hidden]``, ``key_weight [key, inner]``.

    ``reads`` says what ``key_weight`` is a map of, for its initialisation: an expert's ``activation``, or the
    ``low_rank`` half of its gate.
    """

    keep_float32 = True

    def __init__(
        self, key_size: int, hidden_size: int, inner_size: int, reads: Literal["activation", "low_rank"] = "activation"
    ):
        super().__init__()
        self.reads = reads
        self.query_weight = nn.Parameter(torch.empty(key_size, hidden_size))
        self.key_weight = nn.Parameter(torch.empty(key_size, inner_size))


class AttentiveBase(BalancedRouter):
    """``p = softmax_e(q . k_e / sqrt(key_size))`` with ``q = W_q x`` and ``k_e = W_k h_e(x)``; the best ``top_k`` act.

    ``W_k`` is shared by all experts, ``h_e`` is an expert's hidden state for this very token, so experts themselves
    say what they are good at, and learn to through the gate. The forms differ in what ``h_e`` is and which experts
    are asked. The output is ``sum of weight * expert(x)``: experts are vectors here, so the probability mixture of the
    paper becomes a mixture of outputs. The query is one linear map of the layer's input, where the paper has a
    gate network; the trunk below the layer is that.

    ``similarity`` and ``importance`` are losses on ``p`` over the text tokens of the micro-batch. The first costs as
    much as a linear router, so it is made only where it has a weight; FLOP counts leave it out, as they do all losses.
    Both see only ``p``. Where ``p`` is nearly uniform, as at the start, ``top_k`` may still pick the same experts for
    every token: what sees routes is the load balance loss.

    Source:
        Krishnamurthy et al. 2023 (arXiv:2302.14703) and its released code.
    """

    causal_in_training = True
    causal_in_evaluation = True
    losses_depend_on_cut = True
    keys_read: Literal["activation", "low_rank"] = "activation"

    def __init__(self, fields: AttentiveFields, hidden_size: int, num_experts: int, layer: int, inner_size: int):
        super().__init__(fields, num_experts, layer)
        fields.check_num_experts(num_experts)
        self._fields = fields
        self.gate = QueryKey(fields.key_size, hidden_size, inner_size, self.keys_read)

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        fields = self._fields
        similarity = {"similarity": fields.similarity_weight} if fields.similarity_weight else {}
        return {**super().aux_weights, **similarity, "importance": fields.importance_weight}

    def ask(
        self, hidden: Float[Tensor, "tokens hidden"], candidates: Int[Tensor, "tokens slots"], context: RoutingContext
    ) -> Float[Tensor, "tokens slots"]:
        """Scaled scores of ``candidates`` by their full hidden states, wherever they are."""
        assert context.score_routes is not None, "this router is called by a MoELayer"
        query = router_logits(hidden, self.gate.query_weight)
        scores = context.score_routes(hidden, candidates, query, self.gate.key_weight)
        return scores / self._fields.key_size**0.5

    def decide(
        self,
        scores: Float[Tensor, "tokens slots"],
        candidates: Int[Tensor, "tokens slots"],
        hidden: Float[Tensor, "tokens hidden"],
        context: RoutingContext,
        linear_logits: Float[Tensor, "tokens experts"] | None = None,
        low: Float[Tensor, "tokens experts rank"] | None = None,
    ) -> Routing:
        """Select, weigh, and add the losses.

        Args:
            scores: Scaled scores of the candidates.
            candidates: Their experts, ascending in each row.
            hidden: The router's input.
            context: Of the micro-batch.
            linear_logits: What the balance loss, the z-loss and the entropy statistic are of; None for the scores of
                all experts.
            low: Activations that travel with the routes.
        """
        fields = self._fields
        probs = scores.softmax(dim=-1)
        chosen = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, : fields.top_k]
        weight = scores.gather(1, chosen).softmax(dim=-1) if fields.weights == "selected" else probs.gather(1, chosen)
        token = torch.arange(len(scores), device=scores.device).repeat_interleave(fields.top_k)
        expert = candidates.gather(1, chosen).flatten()
        payload = None if low is None else low[token, expert]
        gate = torch.zeros(len(scores), self.num_experts, device=scores.device).scatter(1, candidates, probs)
        logits = scores if linear_logits is None else linear_logits
        routing = self.route(
            logits, logits.softmax(dim=-1), token, expert, weight.flatten(), fields.top_k, context, payload
        )
        text = context.token_mask
        if fields.similarity_weight:
            routing.aux["similarity"] = sample_similarity_loss(gate, hidden, text)
        routing.aux["importance"] = importance_loss(gate, text)
        return routing

    def all_experts(self, hidden: Float[Tensor, "tokens hidden"]) -> Int[Tensor, "tokens experts"]:
        """Every expert is a candidate."""
        return torch.arange(self.num_experts, device=hidden.device).expand(len(hidden), -1)


class AttentiveDenseRouter(AttentiveBase):
    """The exact form: the first layer of every expert runs for every token, and ``top_k`` of them go on.

    With ``top_k`` the number of experts it is the paper's mixture. In a layer of ``n`` experts a token's keys cost as
    much as ``2 n / 3`` experts, beside its ``top_k``, and under expert parallelism it goes to every rank: a reference
    for small models. The first layers of the selected experts run twice, once for the key and once for the output.

    Source:
        arXiv:2302.14703, expectation model; keys are of the activation that enters an expert's last matrix.
    """

    needs_expert_scores = True

    def __init__(
        self, config: AttentiveDenseConfig, hidden_size: int, num_experts: int, layer: int, *, expert_width: int
    ):
        super().__init__(config, hidden_size, num_experts, layer, expert_width)
        self.config = config

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Ask all experts."""
        candidates = self.all_experts(hidden)
        return self.decide(self.ask(hidden, candidates, context), candidates, hidden, context)


class AttentiveRouter(AttentiveBase):
    """The two-stage form: a linear router names ``num_candidates`` experts, and the gate chooses among those.

    Experts that are no candidates have probability 0. A token costs the first layer of its candidates (two thirds of
    an expert each) beside its ``top_k`` experts, whose first layers so run twice, and under expert parallelism one more
    exchange: token and query to the candidates, one number back from each. With every expert a candidate it is the
    dense form.

    The linear router only selects, so the LM loss does not reach it. It learns from ``distillation``: the cross-entropy
    of the gate's probabilities, without gradient, against the router's own softmax over the same candidates, which
    makes its order that of the gate. It moves candidates against each other; what brings in other experts is the
    balance loss, which like the z-loss and the entropy statistic is of this router's softmax over all experts. The
    paper trains a plain gate on frozen experts afterwards; learning it along the way, and this loss, are our choice.

    Source:
        arXiv:2302.14703 for the gate.
    """

    needs_expert_scores = True
    without_lm_gradient = MappingProxyType({"weight": "it only names candidates, and the distillation loss teaches it"})
    gradients_by_design = MappingProxyType({"distillation": "its teacher, the gate, is held constant"})

    def __init__(self, config: AttentiveConfig, hidden_size: int, num_experts: int, layer: int, *, expert_width: int):
        super().__init__(config, hidden_size, num_experts, layer, expert_width)
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        return {**super().aux_weights, "distillation": self.config.distillation_weight}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Name candidates, ask them, and teach the router that named them."""
        logits = router_logits(hidden, self.weight)
        best = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.config.num_candidates]
        candidates = best.sort(dim=-1).values  # so that equal scores go to the lower expert id
        scores = self.ask(hidden, candidates, context)
        routing = self.decide(scores, candidates, hidden, context, logits)
        routing.aux["distillation"] = distillation_loss(
            logits.gather(1, candidates), scores.detach().softmax(dim=-1), context.token_mask
        )
        return routing


class AttentiveLowRankRouter(AttentiveBase):
    """The cheap form: ``h_e = x W_down^e``, the low-rank half of the experts' own factorised gate.

    ``down_weight [num_experts, gate_rank, hidden]`` is held by every rank, as in Autonomy-of-Experts: all keys are one
    product, and what it made of a token travels with it to the experts that it selects. Experts decide by the first
    part of their gate only.

    Source:
        arXiv:2302.14703 for the gate; arXiv:2501.13074 for the factorised experts.
    """

    keep_float32 = False  # the down projections are expert weights, and large; the gate's own maps stay float32
    keys_read = "low_rank"

    def __init__(self, config: AttentiveLowRankConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer, config.gate_rank)
        self.config = config
        self.down_weight = nn.Parameter(torch.empty(num_experts, config.gate_rank, hidden_size))

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Make every expert's key."""
        low = functional.linear(hidden, self.down_weight.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        factor = router_logits(hidden, self.gate.query_weight) @ self.gate.key_weight
        scores = (low.float() * factor[:, None]).sum(dim=-1) / self.config.key_size**0.5
        return self.decide(scores, self.all_experts(hidden), hidden, context, low=low)
