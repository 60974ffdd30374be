"""Expert choice: experts take tokens, each the same number; in evaluation by thresholds that training has left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first, even_load, even_proportions, router_logits, router_use
from moe_pretrain.moe.routers.config import CapacityConfig
from moe_pretrain.moe.types import ExpertRanking, Routing, RoutingContext, StepUse

NUM_CUTOFF_SUMS = 3
"""Numbers for each expert that ``EvaluationThresholds`` need of a step."""


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(CapacityConfig):
    """Fields of ``router=expert_choice``: those of ``CapacityConfig``; cut-offs are z-scores of an expert's own."""

    name: Literal["expert_choice"]

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """Numbers of tokens that experts take."""
        return "quotas"

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "ExpertChoiceRouter":
        """The module of layer ``layer``."""
        return ExpertChoiceRouter(self, hidden_size, num_experts, layer)


def choose_tokens(
    scores: Float[Tensor, "tokens experts"],
    text: Bool[Tensor, "tokens"],
    capacity_factor: float,
    ties: Float[Tensor, "tokens experts"] | None = None,
    costs: Sequence[float] = (),
) -> tuple[Bool[Tensor, "tokens experts"], Float[Tensor, "experts"]]:
    """Let every expert take its best tokens, all the same number unless they differ in cost.

    Args:
        scores: Not negative; no gradient.
        text: True for text tokens; the others are never taken.
        capacity_factor: An expert takes ``capacity_factor * text tokens / experts`` tokens, rounded to the nearest
            whole number (a half to the even one), but at least 1 and at most all.
        ties: Decide between equal scores, the larger first: for scores that saturate.
        costs: What a route to each expert costs, see ``even_load``.

    Returns:
        Which tokens each expert takes (of equal scores and ties the earlier token), and its cut-off: the best score of
        text that it does not take, or 0. No host synchronisation takes place.
    """
    num_tokens = text.sum().double()
    wanted = even_load(capacity_factor * num_tokens, scores.shape[1], costs).round().clamp(min=1)
    capacity = torch.minimum(wanted, num_tokens).long()
    eligible = scores.masked_fill(~text[:, None], -1.0)
    token = best_first(eligible, ties, dim=0)
    is_within = torch.arange(len(scores), device=scores.device)[:, None] < capacity
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, token, is_within)
    # A row of zeros below, for when all is taken; padding's -1 is no score either.
    cutoff = functional.pad(eligible.gather(0, token), (0, 0, 0, 1)).gather(0, capacity[None])[0].clamp(min=0.0)
    return taken, cutoff


def most_taken(
    taken: Bool[Tensor, "tokens experts"], capacity_factor: float | None, costs: Sequence[float] = ()
) -> int:
    """Most routes that there can be: all, or where experts choose what ``choose_tokens`` takes of nothing but text."""
    num_tokens, num_experts = taken.shape
    if capacity_factor is None:
        return taken.numel()
    wanted = even_proportions(num_experts, costs)
    total = sum(wanted)
    return sum(min(num_tokens, max(1, round(capacity_factor * num_tokens * part / total))) for part in wanted)


def margins(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    """Distance of each logit from the best other one of its token: goes on growing where the softmax saturates."""
    best, second = functional.pad(logits, (0, 1), value=-torch.inf).topk(2, dim=-1).values.split(1, dim=-1)
    return logits - torch.where(logits == best, second.nan_to_num(neginf=0.0), best)


def cutoff_sums(
    scores: Float[Tensor, "tokens experts"], cutoffs: Float[Tensor, "experts"], text: Bool[Tensor, "tokens"]
) -> Float[Tensor, "sums"]:
    """A micro-batch's part of what ``EvaluationThresholds`` need: ``NUM_CUTOFF_SUMS`` numbers for each expert.

    Args:
        scores: Those that the experts chose by; no gradient.
        cutoffs: ``choose_tokens`` of them.
        text: True for text tokens; the others count for nothing.

    Returns:
        float64: cut-offs weighted by text tokens, sums of the text's scores, sums of their squares.
    """
    seen = scores.double().masked_fill(~text[:, None], 0.0)
    return torch.cat([cutoffs.double() * text.sum(), seen.sum(dim=0), seen.square().sum(dim=0)])


class EvaluationThresholds(nn.Module):
    """Every expert's threshold, by which evaluation routes where experts choose in training.

    ``thresholds [experts]`` stand at the running mean of the cut-offs' z-scores in the last step's scores: that step's
    mean and standard deviation of the expert's scores say where that is. Cut-offs themselves grow with the scores for
    the first tens of steps (of ``autonomy_expert_choice`` fourfold within 20), so that their running mean lags
    behind them and lets most tokens pass; the z-score of a quantile stays where it is. The running mean is
    exponential and free of the bias to its start, so that after one step the threshold is the cut-off.

    Args:
        num_experts: Experts.
        start: Every threshold before the first step.
        decay: How much of the mean stays at each step, in [0, 1).
    """

    later_buffers = frozenset({"cutoff_z_scores", "z_score_steps"})
    """Not in checkpoints of the releases in which the thresholds were running means of the cut-offs themselves."""

    def __init__(self, num_experts: int, start: float, decay: float):
        super().__init__()
        self._decay = decay
        self.thresholds: Tensor
        self.cutoff_z_scores: Tensor
        self.z_score_steps: Tensor
        self.register_buffer("thresholds", torch.full((num_experts,), start))
        self.register_buffer("cutoff_z_scores", torch.zeros(num_experts))
        self.register_buffer("z_score_steps", torch.zeros(()))
        self.buffer_ranges = {"z_score_steps": (0.0, math.inf)}

    def after_step(self, use: StepUse) -> None:
        """Move by a step's ``cutoff_sums``, added up over micro-batches and ranks."""
        if not use.tokens:
            return
        cutoff, mean, square = (use.sums / use.tokens).view(NUM_CUTOFF_SUMS, -1)
        spread = (square - mean.square()).clamp(min=0).sqrt()
        now = torch.where(spread > 0, (cutoff - mean) / spread, 0.0)
        self.z_score_steps += 1
        # What the first of n steps of an exponential mean weighs, over what all n weigh: 1 in the first step.
        rate = (1 - self._decay) / (1 - self._decay ** self.z_score_steps.double())
        running = self.cutoff_z_scores.double().lerp(now, rate)
        self.cutoff_z_scores.copy_(running)
        # Written as a move from the cut-off, so that without a past it is the cut-off to the last bit: the best token
        # that was not taken has exactly that score. A cut-off of 0 says that all tokens are taken.
        self.thresholds.copy_(torch.where(cutoff > 0, (cutoff + spread * (running - now)).clamp(min=0), 0.0))


class ExpertChoiceRouter(Router):
    """Scores ``softmax(hidden @ weight.T)`` over experts; every expert takes the tokens that score highest with it.

    Training: each expert takes exactly ``C = capacity_factor * T / experts`` of the micro-batch's ``T`` text tokens,
    rounded to the nearest whole number (a half to the even one), but at least 1 and at most ``T``. Where they differ in
    cost, ``C`` is as the inverse of the cost, the same on average. Of equal scores
    the earlier token goes first. The weight of a route is its score. A token may have any number of experts, none too;
    load is even by construction and there is no loss. A token's routes depend on later tokens and on other
    sequences, and on the micro-batch's size: training is not causal.

    Evaluation, which must be causal: a token goes to every expert with which it scores above that expert's threshold,
    whatever else is in the batch. The threshold is the last step's mean score of the expert plus its standard deviation
    times the exponential mean, over training steps and free of the bias to its start, of the z-score of the
    expert's cut-off: the best score that it did not take (0 when it took all), averaged over
    the micro-batches of all ranks by their text tokens. In a micro-batch the rule "above the cut-off" is exactly what
    the expert took. Before the first step thresholds are ``1 / experts``, a score that is better than even.

    Source:
        Zhou et al. 2022 (arXiv:2202.09368), eq. 1-2 without the limit on experts per token. The paper leaves
        evaluation open; the thresholds are ours, in the way of Expert Threshold (arXiv:2603.11535).
    """

    causal_in_training = False
    causal_in_evaluation = True
    evaluation_rule = "a token takes the experts whose running threshold it exceeds; in training experts choose tokens"

    def __init__(self, config: ExpertChoiceConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_experts, self.num_sums = num_experts, NUM_CUTOFF_SUMS * num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.evaluation = EvaluationThresholds(num_experts, 1 / num_experts, config.threshold_decay)

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Let every expert choose its tokens; in evaluation let thresholds decide."""
        text = context.token_mask
        logits = router_logits(hidden, self.weight)
        probs = logits.softmax(dim=-1)
        sums = None
        if self.training:
            ties = margins(logits.detach())
            taken, cutoffs = choose_tokens(
                *(probs.detach(), text, self.config.capacity_factor, ties, self.balanced_costs)
            )
            sums = cutoff_sums(probs.detach(), cutoffs, text)
        else:
            taken = (probs > self.evaluation.thresholds) & text[:, None]
        capacity_factor = self.config.capacity_factor if self.training else None
        routes = list_routes(taken, most_taken(taken, capacity_factor, self.balanced_costs))
        groups = torch.zeros_like(routes.token)
        (counts,) = count_routes(routes.slot, text[routes.token], groups, 1, self.num_experts)
        return Routing(
            routes.token,
            routes.slot,
            routes.take(probs),
            routes_per_token=None,
            use=router_use(counts, probs.detach(), context, sums),
            num_routes=routes.num_routes,
        )

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their logits, with the scores as gates."""
        logits = router_logits(hidden, self.weight)
        return ExpertRanking(logits, logits.softmax(dim=-1))

    def after_step(self, use: StepUse) -> None:
        """Move the thresholds by the cut-offs of the step."""
        self.evaluation.after_step(use)
