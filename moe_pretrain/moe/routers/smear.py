"""SMEAR: experts are merged for each document, by its mean hidden state."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.router import MergingRouter
from moe_pretrain.moe.routers.config import Fraction, MergingConfig
from moe_pretrain.moe.segments import Segments, cut, merge_by, segment_means
from moe_pretrain.moe.types import Merging, RoutingContext

DROPOUT_STREAM = 7


@dataclass(frozen=True, kw_only=True)
class SmearConfig(MergingConfig):
    """Fields of ``router=smear``.

    Attributes:
        name: ``smear``.
        expert_dropout: Probability in training that a document does without an expert, in [0, 1).
        router_gain: Gain of the norm of each expert's row in the router, > 0.
        evaluation_segment_tokens: In evaluation, tokens that share a network: it is merged by what comes before them.
    """

    name: Literal["smear"]
    expert_dropout: Fraction
    router_gain: PositiveFloat
    evaluation_segment_tokens: PositiveInt

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "SmearRouter":
        """The module of layer ``layer``."""
        return SmearRouter(self, hidden_size, num_experts, layer)

    def for_sequence_length(self, sequence_length: int) -> "SmearConfig":
        """The same scheme with several segments of evaluation in shorter rows."""
        tokens = min(self.evaluation_segment_tokens, max(1, sequence_length // 4))
        return replace(self, evaluation_segment_tokens=tokens)

    def mean_segment_tokens(self, sequence_length: int) -> float:
        """One document for each row, as far as is known before a run, which measures it."""
        return float(sequence_length)


class SmearRouter(MergingRouter):
    """``p = softmax(LN(document's mean) LN(W_r)^T + b)``, then one network with the parameters ``sum_e p_e theta_e``.

    An example of the paper is a document's stretch in a row here, a whole row where documents are not isolated. So in
    training every token's network knows the later tokens of its document: the scheme is **not causal in training**, and
    says so. The paper's language models are T5, whose decoder is routed by the encoder's text, which hides this.

    Evaluation has a causal rule of its own: a document is cut into segments, and each is merged by the mean of all
    tokens before it; the first by ``softmax(b)``, as ``LN(0) = 0``. Losses of training know more than those of
    validation, and the two must not be compared.

    In training each ``p_e`` is zero with probability ``expert_dropout``; the rest is normalised (after adding 1e-10).
    The norms' gains are constants (1, and ``router_gain`` for the rows of ``W_r``), which the released code trains.

    Source:
        Muqeeth et al. 2023 (arXiv:2306.03745), section 3, and the released code for norms and dropout.
    """

    causal_in_training = False
    causal_in_evaluation = True
    evaluation_rule = "segments are merged by the tokens of their document that come before them"

    def __init__(self, config: SmearConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Merging:
        """Merge the experts of every document, in evaluation of every segment."""
        segments = cut(context, None if self.training else self.config.evaluation_segment_tokens)
        means = segment_means(hidden, segments)
        if not self.training:
            means = _means_before(means, segments)
        size = (hidden.shape[1],)
        rows = functional.layer_norm(self.weight.float(), size) * self.config.router_gain
        logits = functional.linear(functional.layer_norm(means, size), rows, self.bias.float())
        mixture = logits.softmax(dim=-1)
        if self.training and self.config.expert_dropout > 0:
            mixture = mixture * self._kept(segments, context) + 1e-10
            mixture = mixture / mixture.sum(dim=-1, keepdim=True)
        return merge_by(mixture, segments, context, self.training)

    def _kept(self, segments: Segments, context: RoutingContext) -> Bool[Tensor, "segments experts"]:
        """Experts that a document keeps, drawn by the place of its first token in the run."""
        first = segments.lengths.cumsum(0) - segments.lengths
        keys = (context.seed, DROPOUT_STREAM, context.step, self.layer)
        return counter_uniform(context.token_position[first], self.num_experts, *keys) >= self.config.expert_dropout


def _means_before(means: Float[Tensor, "segments hidden"], segments: Segments) -> Float[Tensor, "segments hidden"]:
    """Mean of all tokens of a segment's document before it, zero for the first one.

    Differences of running sums over the whole micro-batch, in float64, so that what other rows hold leaves no trace.
    """
    lengths = segments.lengths.double()[:, None]
    sums = (means.double() * lengths).cumsum(0) - means.double() * lengths
    tokens = lengths.cumsum(0) - lengths
    place = torch.arange(len(means), device=means.device)
    first = torch.where(segments.continues, 0, place).cummax(0).values
    before = tokens - tokens[first]
    return torch.where(before > 0, (sums - sums[first]) / before.clamp(min=1), 0.0).float()
