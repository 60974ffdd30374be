"""Lory: experts are merged for each segment of a document, by what the segment before it was about."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.router import MergingRouter
from moe_pretrain.moe.routers.config import MergingConfig
from moe_pretrain.moe.segments import cut, merge_by, segment_means
from moe_pretrain.moe.types import Merging, RoutingContext


@dataclass(frozen=True, kw_only=True)
class LoryConfig(MergingConfig):
    """Fields of ``router=lory``.

    Attributes:
        name: ``lory``.
        segment_tokens: Tokens of a segment, below ``model.sequence_length``. Merging costs ``num_experts /
            segment_tokens`` of the merged network itself.
        first_segment: Mixture of a document's first segment in a row: a learnt ``prior`` that sees no token, or
            ``own_stop_gradient``, as published: the segment's own, without gradient.
    """

    name: Literal["lory"]
    segment_tokens: PositiveInt
    first_segment: Literal["prior", "own_stop_gradient"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "LoryRouter":
        """The module of layer ``layer``."""
        return LoryRouter(self, hidden_size, num_experts, layer)

    def check_sequence_length(self, sequence_length: int) -> None:
        """Raise unless a row has more than one segment: with one, the router would never be used."""
        if self.segment_tokens >= sequence_length:
            raise ValueError(
                f"router.segment_tokens={self.segment_tokens} must be below model.sequence_length={sequence_length}: "
                "a segment is merged by the one before it"
            )

    def for_sequence_length(self, sequence_length: int) -> "LoryConfig":
        """The same scheme with segments that fit into shorter rows: four at the least."""
        return replace(self, segment_tokens=min(self.segment_tokens, max(1, sequence_length // 4)))

    def mean_segment_tokens(self, sequence_length: int) -> float:
        """``segment_tokens``; documents that end before make it less, which a run measures."""
        return sequence_length / -(-sequence_length // self.segment_tokens)


class LoryRouter(MergingRouter):
    """``e_n = softmax(W_r mean(segment n))``; the network of segment n + 1 of the same document is merged by ``e_n``.

    Segments are counted from a document's first token in its row, so that documents never mix. A first segment has
    nothing before it. As published it takes its own ``e_0`` without gradient, and a stopped gradient does not stop
    information: its later tokens reach its earlier ones, in every training step. Here a learnt prior ``softmax(b)`` is
    the default, which is causal; ``own_stop_gradient`` says that it is not, and in evaluation merges a first segment
    evenly, since its own mixture would know what is to be predicted.

    No auxiliary loss. The published recipe around it (dense training for the first 5 % of the steps, then the same
    network in every expert; neighbouring documents by similarity) is not part of the scheme. ``model.init`` draws
    merged experts ``sqrt(num_experts)`` times as large, so that the evenly merged network starts as a dense one does.

    Source:
        Zhong et al. 2024 (arXiv:2405.03133), algorithm 1.
    """

    causal_in_evaluation = True

    def __init__(self, config: LoryConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        has_prior = config.first_segment == "prior"
        self.prior = nn.Parameter(torch.empty(num_experts)) if has_prior else None
        self.causal_in_training = has_prior
        if not has_prior:
            self.gradients_by_design = {"weight": "a first segment's own mixture is held constant"}
            self.evaluation_rule = "a document's first segment is merged evenly, not by its own tokens"

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Merging:
        """Merge the experts of every segment."""
        segments = cut(context, self.config.segment_tokens)
        own = functional.linear(segment_means(hidden, segments), self.weight.float()).softmax(dim=-1)
        if self.prior is not None:
            first = self.prior.float().softmax(dim=-1).expand_as(own)
        elif self.training:
            first = own.detach()
        else:
            first = torch.full_like(own, 1 / self.num_experts)
        mixture = torch.where(segments.continues[:, None], own.roll(1, dims=0), first)
        return merge_by(mixture, segments, context, self.training)
