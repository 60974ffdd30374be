"""The layer of schemes that merge experts: parameters are mixed, and no token goes to an expert."""

from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Exchange, Merging, MoEOutput, RoutingContext


class MergedLayer(MoELayer):
    """One merged network for each segment of tokens, plus shared experts; to the model a layer like any other.

    Under expert parallelism every rank of a group computes its slice of the inner width for the tokens of all of them:
    tokens and mixtures travel to every rank, and partial outputs come back to be summed, in the order of ranks.
    """

    def __init__(self, config: MoEConfig, router: Router, experts: MergedExperts, hidden_size: int):
        super().__init__(config, router, experts, hidden_size)
        self._merged_experts = [experts]  # in a list, which does not register it twice

    def forward(
        self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext, recompute_experts: bool
    ) -> MoEOutput:
        """Apply the layer; arguments as for ``MoELayer``."""
        with part("router"):
            merging: Merging = self.router(hidden, context)
        arguments = hidden, merging.mixture, merging.lengths, merging.ends
        if recompute_experts:
            output = checkpoint(self._merged_and_shared, *arguments, use_reentrant=False)
        else:
            output = self._merged_and_shared(*arguments)
        return MoEOutput(output, merging.aux, merging.use)

    def go_on(
        self, earlier: Float[Tensor, "rows seen hidden"], new: Float[Tensor, "rows new hidden"]
    ) -> Float[Tensor, "rows new hidden"]:
        """Outputs of the last tokens of rows, each one document, in evaluation; what comes before them merges too."""
        every = torch.cat([earlier, new], dim=1)
        rows, length, _ = every.shape
        place = torch.arange(length, device=every.device).repeat(rows)
        context = RoutingContext(torch.ones_like(place, dtype=torch.bool), place, num_sequences=rows, seed=0, step=0)
        with part("router"):
            merging: Merging = self.router(every.flatten(0, 1), context)
        segment = torch.arange(len(merging.lengths), device=every.device).repeat_interleave(merging.lengths)
        kept, lengths = segment.view(rows, -1)[:, earlier.shape[1] :].flatten().unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0).tolist()
        return self._merged_and_shared(new.flatten(0, 1), merging.mixture[kept], lengths, ends).view_as(new)

    def _merged_and_shared(self, hidden: Tensor, mixture: Tensor, lengths: Tensor, ends: list[int]) -> Tensor:
        output = self._merged(hidden, mixture, lengths, ends)
        if self.shared_experts is None:
            return output
        shared = self._run_shared(self.shared_experts, hidden)
        with part("combine"):
            return output + shared

    def _merged(self, hidden: Tensor, mixture: Tensor, lengths: Tensor, ends: list[int]) -> Tensor:
        (experts,) = self._merged_experts
        if self.exchange is None:
            with part("experts"):
                return experts(hidden, mixture, lengths, ends)
        with part("exchange"):
            gathered, sizes = _gather(hidden, mixture, lengths, self.exchange, is_even=self.training)
        with part("experts"):
            partial_outputs = experts(*gathered)
        with part("exchange"):
            to_all = [len(hidden)] * self.exchange.size
            (returned,) = self.exchange.start([partial_outputs], sizes, to_all).wait()
        with part("combine"):
            parts = returned.view(self.exchange.size, *hidden.shape)
            return parts.sum(dim=0, dtype=torch.float32).to(hidden.dtype)


def _gather(
    hidden: Tensor, mixture: Tensor, lengths: Tensor, exchange: Exchange, is_even: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, list[int]], list[int]]:
    """Gather all ranks' tokens and segments, by rank: the arguments of the experts; and the tokens of each rank.

    Where ``is_even`` says that every rank has as many tokens, as in training, the host waits once: for the segments of
    the others, while their rows are on their way.
    """
    ranks = exchange.size
    to_all = [len(hidden)] * ranks
    tokens = to_all if is_even else exchange.exchange_counts(lengths.new_full((ranks, 1), len(hidden)))[:, 0].tolist()
    everywhere = partial(torch.Tensor.repeat, repeats=(ranks, 1))
    is_last = torch.zeros(len(hidden), 1, dtype=torch.uint8, device=hidden.device)
    is_last.scatter_(0, lengths.cumsum(0)[:, None] - 1, 1)
    (all_last,) = exchange.start([everywhere(is_last)], to_all, tokens).wait()
    rows = exchange.start([everywhere(hidden)], to_all, tokens)
    on_host = all_last[:, 0].cpu().numpy()
    ends = (on_host.nonzero()[0] + 1).tolist()
    segments = [int(on_host[end - own : end].sum()) for own, end in zip(tokens, accumulate(tokens), strict=True)]
    described = exchange.start([everywhere(mixture)], [len(mixture)] * ranks, segments)
    all_ends = torch.nonzero_static(all_last[:, 0], size=len(ends))[:, 0] + 1
    all_lengths = all_ends.diff(prepend=all_ends.new_zeros(1))
    (all_rows,), (all_mixtures,) = rows.wait(), described.wait()
    return (all_rows, all_mixtures, all_lengths, ends), tokens
