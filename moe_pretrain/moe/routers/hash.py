"""Hash routing: a token's experts are looked up by its vocabulary id."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor, nn

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import router_logits
from moe_pretrain.moe.routers.config import FixedCountConfig
from moe_pretrain.moe.routers.top_k import scores_of
from moe_pretrain.moe.types import RouterUse, Routing, RoutingContext, as_count

TABLE_STREAM = 2


@dataclass(frozen=True, kw_only=True)
class HashConfig(FixedCountConfig):
    """Fields of ``router=hash``, beside that of ``FixedCountConfig``.

    Attributes:
        name: ``hash``.
        table: ``balanced``: ids are dealt out by how often they occur in the corpus, so that experts get equal
            numbers of tokens. ``random``: every id gets random experts.
        weights: ``equal``: ``1 / top_k`` each (Hash layers). ``learned``: ``sqrt(softplus(x W))`` of the looked-up
            experts, divided by their sum (the first layers of DeepSeek-V4).
        weight_scale: Factor of all weights, > 0 (DeepSeek-V4: 1.5 and 2.5).
    """

    name: Literal["hash"]
    table: Literal["balanced", "random"]
    weights: Literal["equal", "learned"]
    weight_scale: PositiveFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.weights == "learned":
            raise ValueError("router.weights=learned must be equal when router.top_k=1: it would always be 1")

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The table, if it is balanced."""
        return "quotas" if self.table == "balanced" else None

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "HashRouter":
        """The module of layer ``layer``."""
        return HashRouter(self, hidden_size, num_experts, layer)


class HashRouter(Router):
    """Experts by vocabulary id, from a table that is made once and saved with the run.

    The choice looks at nothing but the token itself, so it is causal, needs no balance loss and never moves. Layers
    have different tables. A balanced table comes from the ids' counts in the first rows of the run; ids that do
    not occur there count once.

    Source:
        Roller et al. 2021 (arXiv:2106.04426), sec. 3.1, balanced assignment; DeepSeek-V4 (arXiv:2606.19348) for
        ``learned`` weights and several experts per id. V4 routes so in its first layers only; here all layers do.
    """

    causal_in_training = True
    causal_in_evaluation = True
    needs_token_counts = True
    numbered_experts = "a table says which experts a token has"

    def __init__(self, config: HashConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size)) if config.weights == "learned" else None
        self.table: Tensor
        self.register_buffer("table", torch.zeros(0, config.top_k, dtype=torch.int64))
        self.buffer_ranges = {"table": (0, num_experts - 1)}

    def use_token_counts(self, token_counts: Int[Tensor, "vocab"]) -> None:
        """Make the table ``[vocab, top_k]``."""
        token_counts = token_counts.cpu()
        top_k = self.config.top_k
        ids = torch.arange(len(token_counts))
        if self.config.table == "balanced":
            table = balanced_table(token_counts, self.num_experts, top_k, self.layer, self.balanced_costs)
        else:
            order = counter_uniform(ids, self.num_experts, TABLE_STREAM, self.layer).sort(dim=1, stable=True)
            table = order.indices[:, :top_k].contiguous()
        self.table = table.to(self.table.device)

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Look the experts up and weigh them."""
        if context.token_ids is None:
            raise ValueError("router=hash needs RoutingContext.token_ids")
        config, num_tokens = self.config, hidden.shape[0]
        expert_index = self.table[context.token_ids]
        if self.weight is None:
            weight = torch.full(expert_index.shape, config.weight_scale / config.top_k, device=hidden.device)
            entropy = torch.full((num_tokens,), math.log(config.top_k), device=hidden.device)
        else:
            scores = scores_of(router_logits(hidden, self.weight), "sqrt_softplus").gather(1, expert_index)
            probs = scores / scores.sum(dim=-1, keepdim=True)
            weight = config.weight_scale * probs
            entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
        token_index = torch.arange(num_tokens, device=hidden.device).repeat_interleave(config.top_k)
        routes = expert_index.flatten()
        mask = context.token_mask
        counts = count_routes(routes, mask[token_index], torch.zeros_like(routes), 1, self.num_experts)[0]
        use = RouterUse(counts, as_count(mask.sum()), as_count((entropy * mask).sum()), counts.new_zeros(()))
        return Routing(token_index, routes, weight.flatten(), config.top_k, use)


def balanced_table(
    token_counts: Int[Tensor, "vocab"], num_experts: int, top_k: int, layer: int, costs: Sequence[float] = ()
) -> Int[Tensor, "vocab slots"]:
    """Deal token ids out to experts so that all get nearly equal numbers of tokens.

    Greedy bin packing: the most frequent id first, each to the ``top_k`` experts with the least load so far. The order
    of ids is shaken by up to a tenth of their counts with a hash of ``layer``, or all layers would have the same table.

    Args:
        token_counts: Occurrences of each id; every id counts once more, so that unseen ones are spread too.
        num_experts: Experts.
        top_k: Distinct experts per id.
        layer: Index of the layer.
        costs: What a token costs each expert, of which all are to have the same; empty where all cost the same.
    """
    ids = torch.arange(len(token_counts))
    counts = token_counts.double() + 1
    shaken = counts * (1 + 0.1 * counter_uniform(ids, 1, TABLE_STREAM, layer)[:, 0])
    load = [(0.0, expert) for expert in range(num_experts)]
    table = [[0] * top_k] * len(token_counts)
    numbers = counts.tolist()
    for token_id in shaken.argsort(descending=True, stable=True).tolist():
        least = [heapq.heappop(load) for _ in range(top_k)]
        table[token_id] = [expert for _, expert in least]
        for amount, expert in least:
            cost = costs[expert] if costs else 1.0
            heapq.heappush(load, (amount + cost * numbers[token_id], expert))
    return torch.tensor(table)
