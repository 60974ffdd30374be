"""One pre-norm block: attention, then a dense or a mixture-of-experts feed-forward network."""

from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_pretrain.model.attention import Attention, DocumentMask
from moe_pretrain.model.attention_statistic import check_attention_statistic
from moe_pretrain.model.norms import ResidualNorm
from moe_pretrain.moe.experts.swiglu import SwiGLU
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import MoEOutput, RoutingContext

Recompute = Literal["none", "selective", "full"]


class Block(nn.Module):
    """``h = h + attention(norm(h)); h = h + feed_forward(norm(h))``.

    What a half adds is handed on beside ``h``: the norm that comes next adds it up, on CUDA in the same kernel.

    ``recompute``: ``none`` keeps all activations; ``selective`` makes those of attention again in backward;
    ``full`` also those of the feed-forward network. The router's decision is kept in every mode, so
    recomputation can neither route differently nor count twice (defects C14, C24). Nor is the statistic of attention
    that a router may ask for made twice.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: SwiGLU | MoELayer,
        hidden_size: int,
        norm_epsilon: float,
        recompute: Recompute,
    ):
        super().__init__()
        self.attention_norm = ResidualNorm(hidden_size, norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = ResidualNorm(hidden_size, norm_epsilon)
        self.feed_forward = feed_forward
        self.recompute = recompute
        if isinstance(feed_forward, MoELayer) and feed_forward.router.attention_statistic is not None:
            check_attention_statistic(feed_forward.router.attention_statistic)

    def forward(
        self,
        hidden: Float[Tensor, "batch sequence hidden"],
        delta: Float[Tensor, "batch sequence hidden"] | None,
        rotary: tuple[Tensor, Tensor],
        mask: DocumentMask,
        context: RoutingContext,
    ) -> tuple[Float[Tensor, "batch sequence hidden"], Float[Tensor, "batch sequence hidden"], MoEOutput | None]:
        """Return the new hidden states, what is to be added to them, and from a MoE layer its output record.

        Args:
            hidden: Hidden states.
            delta: What the block before has left to be added to them.
            rotary: See ``Attention``, as ``mask``.
            mask: Document borders.
            context: What the router may know.
        """
        statistics: list[Tensor] = []
        if self.recompute == "none":
            hidden, attended = self._attend(hidden, delta, rotary, mask, statistics)
        else:  # which keeps the sum instead of its two parts
            total = hidden if delta is None else hidden + delta
            hidden, attended = checkpoint(self._attend, total, None, rotary, mask, statistics, use_reentrant=False)
        if isinstance(self.feed_forward, MoELayer):
            if statistics:
                context = replace(context, attention=statistics[0].flatten())
            hidden, normed = self.feed_forward_norm(hidden, attended)
            moe = self.feed_forward(normed.flatten(0, 1), context, self.recompute == "full")
            return hidden, moe.hidden.view_as(hidden), moe
        if self.recompute == "full":
            return *checkpoint(self._feed_forward, hidden + attended, None, use_reentrant=False), None
        return *self._feed_forward(hidden, attended), None

    def _attend(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: DocumentMask,
        statistics: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``statistics`` receives what the router asks for; a recomputation finds it there."""
        router = self.feed_forward.router if isinstance(self.feed_forward, MoELayer) else None
        wanted = None if router is None or statistics else router.attention_statistic
        hidden, normed = self.attention_norm(hidden, delta)
        attended, statistic = self.attention(normed, rotary, mask, wanted)
        if statistic is not None:
            statistics.append(statistic)
        return hidden, attended

    def _feed_forward(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, normed = self.feed_forward_norm(hidden, delta)
        return hidden, self.feed_forward(normed)
