"""Base of every routing scheme in ``moe/routers``."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor, nn

from moe_pretrain.moe.types import AttentionStatistic, ExpertRanking, ExpertStart, Routing, RoutingContext, StepUse


class Router(nn.Module):
    """Decides which experts serve which token. The base of the modules in ``moe/routers``.

    Attributes:
        layer: Index of the decoder layer, for noise streams and statistics.
        keep_float32: The router's parameters stay float32 in a bfloat16 engine.
        causal_in_training: Whether a token's route in training depends on no other token of its micro-batch that it
            does not attend to. A scheme in which tokens compete says False.
        causal_in_evaluation: The same for evaluation.
        balanced_costs: What a route to each expert costs where routes are balanced, by a loss, a bias or quotas; empty
            where all cost the same.
        num_sums: Length of ``RouterUse.sums``.
        attention_statistic: Name of the statistic of its block's attention that the router wants in
            ``RoutingContext.attention``; None for most schemes.
        needs_expert_scores: Whether the router wants ``RoutingContext.score_routes``.
        needs_proxy_norms: Whether the router wants ``RoutingContext.proxy_norms`` in training.
        needs_token_counts: Whether ``use_token_counts`` is to be called with the corpus's counts before training.
        frozen_weights: Names of buffers that ``model.init`` draws like weights and nothing trains: matrices by which a
            token is multiplied. They stay float32.
        without_lm_gradient: Parameters that by the scheme's mathematics get no gradient from the LM loss -> why.
        gradients_by_design: What has on purpose a gradient that is not its derivative -> why: names of aux losses that
            hold something constant, or ``weight``.
        evaluation_rule: Rule by which evaluation decides, if it is not that of training.
        numbered_experts: Why an expert's number decides, where it does: experts that change places with all that is
            theirs then have other tokens.
        other_scales: Aux losses that measure balance in another unit than ``load_balance_loss``, which is 1 for an even
            load -> why.
        start_values: Parameters that ``model.init`` fills with one number.
        start_stds: Parameters that ``model.init`` gives a standard deviation of their own, at every width.
        buffer_ranges: Smallest and largest value of a buffer, by its name, where not every finite number is one: a
            checkpoint with others is refused.
        reads_earlier_tokens: Whether a decision is made of hidden states of earlier tokens too, so that it cannot be
            made for a new token alone.
        losses_depend_on_cut: Whether an aux loss is a statistic of the micro-batch (level ``micro_batch``), so that
            it depends on how the global batch is cut.
    """

    keep_float32: ClassVar[bool] = True
    causal_in_training: bool
    causal_in_evaluation: bool
    num_sums: int = 0
    balanced_costs: tuple[float, ...] = ()
    attention_statistic: AttentionStatistic | None = None
    needs_expert_scores: bool = False
    needs_proxy_norms: bool = False
    needs_token_counts: bool = False
    frozen_weights: tuple[str, ...] = ()
    without_lm_gradient: Mapping[str, str] = MappingProxyType({})
    gradients_by_design: Mapping[str, str] = MappingProxyType({})
    evaluation_rule: str = ""
    reads_earlier_tokens: ClassVar[bool] = False
    losses_depend_on_cut: bool = False
    numbered_experts: str = ""
    other_scales: Mapping[str, str] = MappingProxyType({})
    start_values: Mapping[str, float] = MappingProxyType({})
    start_stds: Mapping[str, float] = MappingProxyType({})
    buffer_ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficient of each aux loss in ``Routing.aux``; read in every step, so a scheme may move them."""
        return {}

    @property
    def needs_global_routes(self) -> bool:
        """Whether training needs ``RoutingContext.sum_over_global_batch``."""
        return False

    def logits(self, hidden: Tensor, context: RoutingContext) -> Tensor | None:
        """Logits ``[tokens, experts]`` of ``hidden``; None for schemes whose scores are not linear in it."""
        return None

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Order of all experts for each token; None for schemes that have none, such as a table."""
        return None

    @property
    def free_slots(self) -> Bool[Tensor, "experts"] | None:
        """Experts that the scheme has out of use for now and no token can reach; None where there are none."""
        return None

    def after_step(self, use: StepUse) -> ExpertStart | None:
        """Move state that has no gradient; called once per optimizer step, on every rank alike.

        Such state is kept in buffers, which checkpoints save. A scheme that puts an expert into use returns it, and the
        engine gives it its weights and has the optimizer forget what it knew of the slot.
        """
        return None

    def metrics(self, use: StepUse) -> dict[str, float]:
        """The scheme's own numbers of a step for the metrics row, asked after ``after_step(use)``; names with units."""
        return {}

    def use_token_counts(self, token_counts: Int[Tensor, "vocab"]) -> None:
        """Learn how often each token id occurs in the corpus; called before training, with ones if it is unknown."""

    def expert_arguments(self, experts: range) -> dict[str, Tensor]:
        """Dense parameters of the router that the experts ``experts`` use on the rank that holds them."""
        return {}

    def weight_norm(self) -> float:
        """Euclidean norm of all router parameters."""
        return math.sqrt(sum(float(parameter.detach().square().sum()) for parameter in self.parameters()))

    def forward(self, hidden: Tensor, context: RoutingContext) -> Routing:
        """Route ``hidden [tokens, hidden]``."""
        raise NotImplementedError


class MergingRouter(Router):
    """Decides how experts are merged for which tokens. No aux losses; it measures how long segments are."""

    num_sums = 1
    reads_earlier_tokens = True

    def metrics(self, use: StepUse) -> dict[str, float]:
        """Mean tokens that share a merged network."""
        return {"tokens_per_merge": use.tokens / max(1.0, float(use.sums[0]))}
