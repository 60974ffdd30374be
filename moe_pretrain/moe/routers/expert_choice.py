"""Expert choice: experts take tokens, each the same number; in evaluation by thresholds that training has left."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.routers.linear import router_use
from moe_pretrain.moe.routers.logits import router_logits
from moe_pretrain.moe.types import Router, Routing, RoutingContext, StepUse


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig:
    """Fields of ``router=expert_choice``.

    Attributes:
        name: ``expert_choice``.
        capacity_factor: Mean experts per token, in (0, num_experts]; an expert takes ``capacity_factor * text tokens /
            num_experts`` tokens of a micro-batch.
        threshold_decay: Decay per step of the running mean of each expert's cut-off, by which evaluation routes, in
            [0, 1); 0 keeps the last step's alone.
    """

    name: Literal["expert_choice"]
    capacity_factor: float
    threshold_decay: float

    def __post_init__(self) -> None:
        if not self.capacity_factor > 0:
            raise ValueError(f"router.capacity_factor={self.capacity_factor} must be positive")
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"router.threshold_decay={self.threshold_decay} must be in [0, 1)")

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        if self.capacity_factor > num_experts:
            raise ValueError(
                f"router.capacity_factor={self.capacity_factor} must be at most model.moe.num_experts={num_experts}"
            )

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.capacity_factor


class ExpertChoiceRouter(Router):
    """Scores ``softmax(hidden @ weight.T)`` over experts; every expert takes the tokens that score highest with it.

    Training: each expert takes exactly ``C = capacity_factor * T / experts`` of the micro-batch's ``T`` text tokens,
    rounded to the nearest whole number (a half to the even one), but at least 1 and at most ``T``. Of equal scores
    the earlier token goes first. The weight of a route is its score. A token may have any number of experts, none too;
    load is even by construction and there is no loss. A token's routes depend on later tokens and on other
    sequences, and on the micro-batch's size: training is not causal.

    Evaluation, which must be causal: a token goes to every expert with which it scores above that expert's threshold,
    whatever else is in the batch. The threshold is the exponential mean, over training steps and free of the
    bias to its start, of the expert's cut-off: the best score that it did not take (0 when it took all), averaged over
    the micro-batches of all ranks by their text tokens. In a micro-batch the rule "above the cut-off" is exactly what
    the expert took. Before the first step thresholds are ``1 / experts``, a score that is better than even.

    Source:
        Zhou et al. 2022 (arXiv:2202.09368), eq. 1-2 without the limit on experts per token. The paper leaves
        evaluation open; the thresholds are ours, in the way of Expert Threshold (arXiv:2603.11535).
    """

    causal_in_training = False
    causal_in_evaluation = True

    def __init__(self, config: ExpertChoiceConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_experts = self.num_sums = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.thresholds: Tensor
        self.threshold_steps: Tensor
        self.register_buffer("thresholds", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("threshold_steps", torch.zeros(()))

    @property
    def aux_weights(self) -> dict[str, float]:
        """There is no loss."""
        return {}

    @property
    def needs_global_routes(self) -> bool:
        """Never: experts choose within the micro-batch."""
        return False

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Let every expert choose its tokens; in evaluation let thresholds decide."""
        text = context.token_mask
        probs = router_logits(hidden, self.weight).softmax(dim=-1)
        cutoffs = None
        if self.training:
            taken, cutoffs = self.choose(probs.detach(), text)
        else:
            taken = (probs > self.thresholds) & text[:, None]
        token_index, expert_index = taken.nonzero(as_tuple=True)
        counts = count_routes(expert_index, text[token_index], torch.zeros_like(token_index), 1, self.num_experts)[0]
        sums = None if cutoffs is None else cutoffs.double() * text.sum()
        return Routing(
            token_index,
            expert_index,
            probs[token_index, expert_index],
            routes_per_token=None,
            use=router_use(counts, probs.detach(), context, sums),
        )

    def choose(
        self, probs: Float[Tensor, "tokens experts"], text: Bool[Tensor, "tokens"]
    ) -> tuple[Bool[Tensor, "tokens experts"], Float[Tensor, "experts"]]:
        """Which tokens each expert takes, and its cut-off: the best score of text that it does not take, or 0."""
        num_tokens = text.sum()
        capacity = (self.config.capacity_factor * num_tokens.double() / self.num_experts).round().clamp(min=1)
        capacity = torch.minimum(capacity, num_tokens.double()).long()  # stays on the device
        best_first, token = probs.masked_fill(~text[:, None], -1.0).sort(dim=0, descending=True, stable=True)
        is_within = torch.arange(len(probs), device=probs.device) < capacity
        taken = torch.zeros_like(probs, dtype=torch.bool).scatter(0, token, is_within[:, None].expand_as(probs))
        # A row of zeros below, for when all is taken; padding's -1 is no score either.
        cutoff = functional.pad(best_first, (0, 0, 0, 1)).index_select(0, capacity[None])[0].clamp(min=0.0)
        return taken, cutoff

    def after_step(self, use: StepUse) -> None:
        """Move the thresholds towards the cut-offs of the step; a step without text has none."""
        if not use.tokens:
            return
        self.threshold_steps += 1
        # What the first of n steps of an exponential mean weighs, over what all n weigh: 1 in the first step.
        decay = self.config.threshold_decay
        rate = (1 - decay) / (1 - decay ** self.threshold_steps.double())
        self.thresholds += (rate * (use.sums / use.tokens - self.thresholds.double())).float()
