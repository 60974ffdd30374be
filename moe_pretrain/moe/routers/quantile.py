"""Quantile balancing: the bias that selection sees is set where each expert gets its share, in one step."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moe_pretrain.moe.routers.base import even_load
from moe_pretrain.moe.routers.config import Fraction
from moe_pretrain.moe.routers.pooled_quantile import NumBins, count_in_bins, value_at
from moe_pretrain.moe.routers.top_k import BiasedTopKRouter, TopKRouterConfig
from moe_pretrain.moe.types import RoutingContext, StepUse


@dataclass(frozen=True, kw_only=True)
class QuantileRouterConfig(TopKRouterConfig):
    """Fields of ``router=quantile``: those of ``top_k``, which must be below the number of experts, and the bias's.

    Attributes:
        name: ``quantile``.
        score: As for ``top_k``; only scores in [0, 1], which bound the histogram.
        num_bins: Bins of the histogram per expert, >= 2. Each layer sums ``num_experts * num_bins`` float64 numbers
            over ranks once per step.
        ema_decay: How much of the old bias stays at each step, in [0, 1); 0 replaces it, as published.
    """

    name: Literal["quantile"]  # type: ignore[assignment]  # a variant of its own in the union of routers
    score: Literal["softmax", "sigmoid"]
    num_bins: NumBins
    ema_decay: Fraction

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups > 1:
            raise ValueError(
                f"router.num_groups={self.num_groups} must be 1 with router=quantile: its cutoffs are over all experts"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        if self.top_k >= num_experts:
            raise ValueError(
                f"router.top_k={self.top_k} must be below model.moe.num_experts={num_experts} for router=quantile: "
                "where all experts are taken there is nothing to balance"
            )

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The quantiles' quotas."""
        return "quotas"

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "QuantileRouter":
        """The module of layer ``layer``."""
        return QuantileRouter(self, hidden_size, num_experts, layer)


class QuantileRouter(BiasedTopKRouter):
    """Top-k of ``score + expert_bias``, weighted by the score alone; the bias comes from quantiles of the margins.

    In training each token's cutoff is ``alpha_t``, its ``top_k + 1``-th largest biased score, and ``alpha_t - s_te``
    is the bias with which expert ``e`` would just be cut off. After the step each expert's bias becomes the value that
    ``top_k * tokens / num_experts`` of these are below, minus the mean over experts: with all cutoffs as they were,
    every expert then gets exactly its share. That is one exact coordinate step on the dual of the balanced assignment
    problem, on which ``loss_free`` takes steps of fixed size. Where experts differ in cost, shares are as the inverse
    of the cost. No loss, no rate, no gradient. The quantile is that of
    the whole global batch (see ``pooled_quantile``), padding left out; evaluation uses the bias as it is.

    Source:
        Quantile Balancing (J. Su 2026, kexue.fm 11619), as in the Kimi K3 report (arXiv:2607.24653), eq. 13-14 and
        appendix D: sigmoid scores, renormalised weights, 1000 bins over ``[min bias - 1, max bias + 1]``.
    """

    def __init__(self, config: QuantileRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        self._num_bins, self._ema_decay = config.num_bins, config.ema_decay
        self.num_sums = num_experts * config.num_bins

    def sums(self, scores: Float[Tensor, "tokens experts"], context: RoutingContext) -> Float[Tensor, "sums"] | None:
        """The histogram of every expert's margins, in training."""
        if not self.training:
            return None
        cutoff = (scores + self.expert_bias).topk(self.config.top_k + 1, dim=1).values[:, -1:]
        low, high = bias_range(self.expert_bias)
        return count_in_bins(cutoff - scores, low, high, self._num_bins, context.token_mask).flatten()

    def after_step(self, use: StepUse) -> None:
        """Set the bias to the margins' quantiles, or move it there with an average."""
        if use.tokens == 0:
            return
        counts = use.sums.view(self.num_experts, self._num_bins)
        quota = even_load(counts.sum(dim=1) * self.config.top_k, self.num_experts, self.balanced_costs)
        self.expert_bias.lerp_(balancing_bias(counts, self.expert_bias, quota), 1 - self._ema_decay)


def bias_range(bias: Float[Tensor, "experts"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Ends of the histogram: a cutoff less a score lies between them when scores are in [0, 1]."""
    return bias.min() - 1, bias.max() + 1


def balancing_bias(
    counts: Float[Tensor, "experts bins"], bias: Float[Tensor, "experts"], quota: Float[Tensor, "experts"]
) -> Float[Tensor, "experts"]:
    """The bias with which expert ``e`` gets ``quota[e]`` tokens, as long as the cutoffs stay where they are.

    Args:
        counts: Margins ``alpha_t - s_te`` in equal bins of ``bias_range(bias)``.
        bias: With which the cutoffs were made.
        quota: Tokens that each expert is to get; they need not be equal.

    Returns:
        As ``bias``, its mean zero.
    """
    low, high = (end.double() for end in bias_range(bias))
    wanted = value_at(counts, low, high, quota)
    return (wanted - wanted.mean()).to(bias)
