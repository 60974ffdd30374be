"""Experts of several widths: one stack of SwiGLU networks for each width."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_pretrain.moe.experts.activation import SWIGLU, Activation
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.host_values import on_device_of
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import ExpertShard


class UnequalExperts(nn.Module):
    """This rank's SwiGLU experts, whose widths repeat after ``len(pattern)`` ids.

    A rank holds a whole number of repetitions, so every rank has the same widths and the same bytes. All experts of one
    width are a ``SwiGLUExperts`` of their own, in the order of their ids: one grouped product on a GPU for each width.

    Source:
        Wang et al. 2024 (arXiv:2408.10681), HMoE; Zamfir et al. 2024 (arXiv:2411.18466), MoCE-IR. Widths in a
        repeating pattern, so that ranks are alike, are ours.
    """

    def __init__(
        self,
        pattern: Sequence[int],
        num_experts: int,
        hidden_size: int,
        shard: ExpertShard,
        activation: Activation = SWIGLU,
    ):
        super().__init__()
        self.expert_ids = shard.local_experts(num_experts)
        repeats = num_experts // len(pattern)
        self.widths = sorted(set(pattern))
        self.classes = nn.ModuleList(
            SwiGLUExperts(repeats * list(pattern).count(width), hidden_size, width, shard, activation)
            for width in self.widths
        )
        self.members = [
            [place for place, expert in enumerate(self.expert_ids) if pattern[expert % len(pattern)] == width]
            for width in self.widths
        ]
        """Of each width, its experts as places among this rank's."""
        self.class_of_expert = [self.widths.index(pattern[expert % len(pattern)]) for expert in self.expert_ids]

    def forward(
        self,
        sources: Float[Tensor, "sources hidden"],
        weight: Float[Tensor, "rows"],
        order: ExpertRowLayout,
        payload: None = None,
    ) -> Float[Tensor, "sources hidden"]:
        """As ``SwiGLUExperts.forward``: each width's rows through its own stack, outputs added."""
        counts = order.rows_per_expert
        class_of_expert = on_device_of(counts, self.class_of_expert)
        rows = len(order.source_of_row)
        class_of_row = class_of_expert.repeat_interleave(counts, output_size=rows)
        # One wait of a GPU for all widths.
        sizes = counts.new_zeros(len(self.members)).scatter_add_(0, class_of_expert, counts).tolist()
        total: Tensor | None = None
        for number, (places, experts) in enumerate(zip(self.members, self.stacks, strict=True)):
            kept = torch.nonzero_static(class_of_row == number, size=sizes[number])[:, 0]
            new_row = class_of_row.new_full((rows + 1,), -1)  # the last is where a source has no row
            new_row[kept] = torch.arange(len(kept), device=kept.device)
            own = ExpertRowLayout(
                order.source_of_row[kept],
                new_row[order.rows_of_source],
                is_full=False,
                rows_per_expert=counts[on_device_of(counts, places)],
            )
            output = experts(sources, weight[kept], own)
            total = output if total is None else total + output
        assert total is not None
        return total

    @property
    def stacks(self) -> list[SwiGLUExperts]:
        """The stack of each width, narrowest first."""
        return [experts for experts in self.classes if isinstance(experts, SwiGLUExperts)]

    def locate(self, place: int) -> tuple[SwiGLUExperts, int]:
        """The stack of the expert at ``place`` among this rank's, and its index there."""
        for places, experts in zip(self.members, self.stacks, strict=True):
            if place in places:
                return experts, places.index(place)
        raise IndexError(place)


def class_widths(pattern: Sequence[int], mean_width: int) -> list[int]:
    """Widths in the proportions of ``pattern`` with mean ``mean_width``.

    Raises:
        ValueError: They are not whole numbers.
    """
    total = sum(pattern)
    if any(mean_width * len(pattern) * part % total for part in pattern):
        step = total // math.gcd(total, *(len(pattern) * part for part in pattern))
        raise ValueError(
            f"model.moe.expert_hidden_size={mean_width} must be a multiple of {step} with model.moe.experts.pattern="
            f"{list(pattern)}: it is the mean of the widths, which are whole numbers"
        )
    return [mean_width * len(pattern) * part // total for part in pattern]
