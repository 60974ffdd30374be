"""The values that cross the seams of the MoE layer, and the one legend of its axis names.

Axis names (one meaning each, in every file under ``moe/``):
    tokens         token positions on this rank in one micro-batch (batch * sequence), padding included
    hidden         model width
    experts        experts in the layer, over all ranks
    local_experts  experts held by this rank
    routes         (token, expert) pairs that the router chose
    slots          the most routes that any one token has; ``top_k`` for top-k routing
    rows           rows of an expert's input on this rank, sorted by local expert
    sources        rows before that sort: tokens without expert parallelism, received rows with it
    groups         sets of tokens over which a balance statistic is taken
    width          inner width of one expert
    low            columns of a route's payload; the rank of a factorised gate
    key            width of a query and of a key, for routers that ask experts for one
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_pretrain.moe.row_layout import ExpertRowLayout

BalanceLevel = Literal["micro_batch", "sequence", "global_batch", "last_step"]
POOLED_LEVELS = ("global_batch", "last_step")
"""Levels whose shares of routes are of a whole global batch: that of the step itself, or of the one before."""

AttentionStatistic = Literal["row_max", "corrected_row_max", "corrected_row_max_without_self", "entropy", "received"]
"""One number per token from its block's attention; ``model/attention_statistic.py`` defines each."""


@dataclass(frozen=True)
class RoutingContext:
    """Facts that a router may know beside the hidden states of its layer.

    Attributes:
        token_mask: True where a token is text, False where it is padding.
        token_position: Position of each token in the run (row position * sequence length + offset).
            Keys the counter-based noise, so noise does not depend on ranks or micro-batches.
        token_ids: Vocabulary id of each token; None only where a router is called by itself.
        num_sequences: Sequences in the micro-batch; ``tokens`` is a multiple of it.
        seed: Seed of the run.
        step: Optimizer step, counted from 0.
        document_ids: Document of each token within its row, -1 for padding; None where a row is one document.
        document_lengths: Tokens of each run of one document id, known to the host; None where they are to be read from
            the device.
        pass_index: Pass over the micro-batch, counted from 0; 0 for schemes with one.
        sum_over_global_batch: Given this layer's index and this micro-batch's routes per expert,
            returns the routes per expert of the whole global batch, that of the step before at the level
            ``last_step``. Needed by ``POOLED_LEVELS`` in training; None in evaluation.
        global_tokens: Text tokens of the whole global batch, for shares of them; None where
            ``sum_over_global_batch`` is.
        first_place: Place in its row of each sequence's first token: more than 0 where earlier ones lie in a cache.
        ranks: Ranks of the experts that every token takes instead of the scheme's own choice, from 0; None for that.
        attention: The router's ``attention_statistic`` of each token in this block's attention, no gradient;
            None unless the router asks for one.
        score_routes: Runs candidate experts as far as their keys; None unless the router asks for it.
        proxy_norms: Says how strongly experts respond to rows that are no tokens; None unless the router asks for it,
            and in evaluation.
        carried: ``Routing.carried`` of the MoE layer below, with gradient; None in the lowest one, and where that
            layer's router carries nothing.
    """

    token_mask: Bool[Tensor, "tokens"]
    token_position: Int[Tensor, "tokens"]
    num_sequences: int
    seed: int
    step: int
    sum_over_global_batch: Callable[[int, Tensor], Tensor] | None = None
    global_tokens: int | None = None
    token_ids: Int[Tensor, "tokens"] | None = None
    first_place: int = 0
    ranks: tuple[int, ...] | None = None
    attention: Float[Tensor, "tokens"] | None = None
    score_routes: "ScoreRoutes | None" = None
    proxy_norms: Callable[[Tensor], Tensor] | None = None
    carried: Float[Tensor, "tokens experts"] | None = None
    pass_index: int = 0
    document_ids: Int[Tensor, "tokens"] | None = None
    document_lengths: list[int] | None = None

    @classmethod
    def of_rows(cls, ids: Int[Tensor, "rows sequence"], seed: int = 0) -> "RoutingContext":
        """Facts of whole rows of text, each one document, before the first step: for uses outside training."""
        tokens = ids.numel()
        return cls(
            token_mask=torch.ones(tokens, dtype=torch.bool, device=ids.device),
            token_position=torch.arange(tokens, device=ids.device),
            num_sequences=len(ids),
            seed=seed,
            step=0,
            token_ids=ids.flatten(),
        )


@runtime_checkable
class ScoreRoutes(Protocol):
    """Asks the experts themselves how well tokens fit, wherever the experts are."""

    def __call__(self, hidden: Tensor, candidates: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
        """``query[token] @ key_weight @ h`` with ``h`` the expert's inner activation for the token; differentiable.

        Args:
            hidden: The router's input, ``[tokens, hidden]``.
            candidates: Experts to ask for each token, ``[tokens, slots]``, each once.
            query: Query of each token, ``[tokens, key]``, float32.
            key_weight: ``[key, width]``, float32, a dense parameter that all experts share.

        Returns:
            Scores ``[tokens, slots]``, float32, not scaled.
        """


@dataclass(frozen=True)
class Routing:
    """A router's decision as one flat list of routes, token-major, each (token, expert) pair once.

    On a GPU nobody waits to learn how many routes there are where their number is not fixed: the list is then as long
    as it can get, and ends in padding (``moe.route_list``). Whoever is not the layer reads ``exact()``.

    Attributes:
        token_index: Token of each route, ascending.
        expert_index: Expert of each route, in ``[0, num_experts)``; of padding ``num_experts``.
        weight: Factor of the expert's output, float32, differentiable.
        routes_per_token: The number of routes of every token if all have the same, else None.
        aux: Named auxiliary losses, unweighted scalars; means over the micro-batch's text tokens.
        use: What the router did, for statistics; detached.
        payload: Rows that travel to the expert with the route, with gradient; None for most schemes.
        carried: What the router of the next MoE layer gets in ``RoutingContext.carried``, float32, with gradient; None
            for most schemes. Routers are never run again in backward, so this needs no care under recomputation.
        num_routes: Routes before the padding; None where there is none.
    """

    token_index: Int[Tensor, "routes"]
    expert_index: Int[Tensor, "routes"]
    weight: Float[Tensor, "routes"]
    routes_per_token: int | None
    use: "RouterUse"
    aux: dict[str, Tensor] = field(default_factory=dict)
    payload: Float[Tensor, "routes low"] | None = None
    carried: Float[Tensor, "tokens experts"] | None = None
    num_routes: Int[Tensor, ""] | None = None

    def exact(self) -> "Routing":
        """The same decision without padding; waits for the number of routes if there may be some."""
        if self.num_routes is None:
            return self
        return self._only(slice(int(self.num_routes)))

    def networks(self, num_networks: int) -> "Routing":
        """The routes to experts below ``num_networks`` alone; all others are padding."""
        is_network = self.expert_index < num_networks
        networks_first = torch.argsort((~is_network).to(torch.uint8), stable=True)
        routed = self._only(networks_first)
        return replace(routed, expert_index=routed.expert_index.clamp(max=num_networks), num_routes=is_network.sum())

    def _only(self, routes: Int[Tensor, "kept"] | slice) -> "Routing":
        return replace(
            self,
            token_index=self.token_index[routes],
            expert_index=self.expert_index[routes],
            weight=self.weight[routes],
            payload=None if self.payload is None else self.payload[routes],
            routes_per_token=None,
            num_routes=None,
        )


@dataclass(frozen=True, kw_only=True)
class Merging(Routing):
    """A decision to merge experts. To whoever looks on, every token has a route to each with its mixture's weight.

    No token is sent by it: the layer reads ``mixture``, ``lengths`` and ``ends`` alone. ``use.tokens_per_expert`` are
    sums of the weights instead of numbers of routes.

    Attributes:
        mixture: Share of each expert in the parameters of each segment's network, float32, with gradient.
        lengths: Tokens of each segment, in the order of tokens.
        ends: Where each segment ends, on the host.
    """

    mixture: Float[Tensor, "segments experts"]
    lengths: Int[Tensor, "segments"]
    ends: list[int]


@dataclass(frozen=True)
class ExpertRanking:
    """All experts of each token in a scheme's own order, for choices by rank.

    Attributes:
        scores: Orders the experts, the largest first.
        gates: Weights, not negative; those of the chosen experts are divided by their sum.
        scale: Factor of these shares.
        payload: Row that travels to each expert if it is chosen; None for most schemes.
    """

    scores: Float[Tensor, "tokens experts"]
    gates: Float[Tensor, "tokens experts"]
    scale: float = 1.0
    payload: Float[Tensor, "tokens experts low"] | None = None


@dataclass(frozen=True)
class RouterUse:
    """Detached counts of one layer in one micro-batch. Sums, so that they add over micro-batches and ranks.

    Attributes:
        tokens_per_expert: Routes of text tokens to each expert, float64 so that sums stay exact.
        tokens: Number of text tokens, float64 scalar.
        router_entropy: Sum over text tokens of the entropy of the routing distribution, nats, float64 scalar.
        dropped_routes: Routes of text tokens that no expert computed, float64 scalar.
        sums: What the scheme itself wants summed over the global batch for ``Router.after_step``, float64
            ``[Router.num_sums]``; None in evaluation and for schemes without.
    """

    tokens_per_expert: Float[Tensor, "experts"]
    tokens: Float[Tensor, ""]
    router_entropy: Float[Tensor, ""]
    dropped_routes: Float[Tensor, ""]
    sums: Float[Tensor, "sums"] | None = None


def mean_use(uses: Sequence[RouterUse]) -> RouterUse:
    """Use of one layer in several passes over the same tokens, each of which counts once: the mean over passes."""
    if len(uses) == 1:
        return uses[0]
    counts = ("tokens_per_expert", "tokens", "router_entropy", "dropped_routes")
    means = {name: torch.stack([getattr(use, name) for use in uses]).mean(dim=0) for name in counts}
    sums = [use.sums for use in uses if use.sums is not None]
    return RouterUse(**means, sums=torch.stack(sums).mean(dim=0) if sums else None)


@dataclass(frozen=True)
class StepUse:
    """Use of one layer's router in one optimizer step, over the whole global batch; the same on every rank.

    Attributes:
        tokens_per_expert: Routes of text tokens to each expert, float64.
        tokens: Text tokens.
        experts_per_token: Mean routes per text token over all MoE layers of the model.
        sums: The scheme's own ``RouterUse.sums``, ``[num_sums]``.
    """

    tokens_per_expert: Float[Tensor, "experts"]
    tokens: int
    experts_per_token: float
    sums: Float[Tensor, "sums"]


@dataclass(frozen=True)
class MoEOutput:
    """Output of a MoE layer: new hidden states, named unweighted aux losses, statistics, ``Routing.carried``."""

    hidden: Float[Tensor, "tokens hidden"]
    aux: dict[str, Tensor]
    use: RouterUse
    carried: Float[Tensor, "tokens experts"] | None = None


@dataclass(frozen=True)
class ExpertKinds:
    """Numbers of the experts that a router chooses among, over all ranks, in the order of their ids.

    Attributes:
        ffn: Feed-forward networks, which are sharded over ranks and reached by the exchange.
        constant: ``a x + b v`` with a learnt vector ``v``; this and what follows is computed where the token is.
        copy: ``x``.
        zero: 0.
        costs: Of a route to each network, over the mean of the networks; empty where all cost the same.
        balances_cost: Whether balance is of routes times cost.
    """

    ffn: int
    constant: int = 0
    copy: int = 0
    zero: int = 0
    costs: tuple[float, ...] = ()
    balances_cost: bool = False

    @property
    def zero_computation(self) -> int:
        """Experts that are no feed-forward network."""
        return self.constant + self.copy + self.zero

    @property
    def total(self) -> int:
        """All of them."""
        return self.ffn + self.zero_computation

    @property
    def zeros(self) -> range:
        """Ids of the experts whose output is 0."""
        return range(self.total - self.zero, self.total)


@dataclass(frozen=True)
class LayerPlace:
    """Facts of the layer that a router is built for.

    Attributes:
        layer: Index of the decoder layer.
        is_lowest: Whether the MoE layer below it, if any, carries nothing to it.
        kinds: Its experts.
        expert_width: Inner width of a feed-forward expert.
    """

    layer: int
    is_lowest: bool
    kinds: ExpertKinds
    expert_width: int


@dataclass(frozen=True)
class ExpertShard:
    """Share of the layer's experts that this rank holds: a contiguous block of ``num_experts / size``."""

    rank: int = 0
    size: int = 1

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts on this rank."""
        count = num_experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)


def step_uses(uses: Sequence[RouterUse]) -> list[StepUse]:
    """Uses that the routers of all MoE layers get after a step in which this micro-batch was the global batch."""
    routes = torch.stack([use.tokens_per_expert for use in uses])
    tokens = int(uses[0].tokens)
    mean = float(routes.sum()) / max(1, len(uses) * tokens)
    none = routes.new_zeros(0)
    return [StepUse(use.tokens_per_expert, tokens, mean, none if use.sums is None else use.sums) for use in uses]


@dataclass(frozen=True)
class ExpertStart:
    """An expert that a router has put into use after a step, which begins anew; on every rank alike.

    Attributes:
        slot: Its id.
        router_rows: Parameters of the router whose row ``slot`` the router has written; their master copies follow.
        sources: Experts whose mean weights it begins with; None to leave its weights as they are.
        noise: Standard deviation of what is added to that mean, over the root mean square of the mean.
        key: Number of the event, for the noise.
    """

    slot: int
    router_rows: tuple[str, ...]
    sources: Bool[Tensor, "experts"] | None
    noise: float
    key: int


@runtime_checkable
class Exchange(Protocol):
    """Moves rows between the ranks that hold the experts; the only thing in ``moe/`` that knows of ranks."""

    size: int

    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Send row ``r`` of ``counts [size, local_experts]`` to rank ``r``; return what came, same shape."""

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "PendingRows":
        """Start sending consecutive blocks of ``send[r]`` rows to rank ``r``; differentiable."""


@runtime_checkable
class PendingRows(Protocol):
    """An exchange in flight."""

    def wait(self) -> list[Tensor]:
        """Rows received, in order of the sending rank; one tensor per tensor sent."""


@runtime_checkable
class Experts(Protocol):
    """The experts of one rank."""

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        """Weighted expert outputs, summed back to ``[sources, hidden]``; ``weight`` and ``payload`` are per row."""


@runtime_checkable
class Combine(Protocol):
    """Makes a token's output of its experts' outputs, on the rank of the token."""

    def __call__(self, rows: Tensor, weight: Tensor, order: ExpertRowLayout) -> Tensor:
        """``[sources, hidden]`` from the unweighted outputs ``rows [rows, hidden]``; ``weight`` is per row, float32.

        With every router: a source may have any number of rows, none among them, and the output for none is 0.
        """


def sharded_parameters(experts: nn.Module) -> list[nn.Parameter]:
    """Parameters of which every rank of a group has its own part: all but those that ``dense_names`` of it names."""
    dense = getattr(experts, "dense_names", ())
    return [parameter for name, parameter in experts.named_parameters() if name not in dense]


def float32_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that stay float32 in a bfloat16 engine: those of modules that set ``keep_float32``.

    A router rounded to bfloat16 makes ties and sends tokens to other experts (known defect C23).
    """
    kept: dict[int, nn.Parameter] = {}
    for child in module.modules():
        if getattr(child, "keep_float32", False):
            kept.update({id(parameter): parameter for parameter in child.parameters()})
    return list(kept.values())


def as_count(value: Tensor) -> Tensor:
    """Detached float64 copy, the dtype in which statistics are summed."""
    return value.detach().to(torch.float64)
