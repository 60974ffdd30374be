"""Tokens into expert order and back, dropless.

Without expert parallelism the experts read token rows directly. With it, rows and route weights travel to
the ranks that hold the experts in one exchange, and weighted outputs travel back in another; the sizes
are exchanged once and serve both. In halves, each half of the tokens makes its own way, and one half's rows travel
while the other's are with the experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.row_layout import ExpertRowLayout, gather, order_by, plain_sum
from moe_pretrain.moe.types import Combine, Exchange, Experts, PendingRows, Routing


class _Pick(torch.autograd.Function):
    """``values[index]`` with each place at most once: its gradient adds nothing up, for which a GPU would sort."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.shape = values.shape
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        if inverse is not None:
            return grads[0].index_select(0, inverse), None, None
        return grads[0].new_zeros(ctx.shape).index_copy_(0, index, grads[0]), None, None


def _routes_in_order(routing: Routing, route_of_row: Tensor, order: ExpertRowLayout) -> tuple[Tensor, Tensor | None]:
    """Weight and payload of each row."""
    inverse = order.rows_of_source.flatten() if order.is_full else None
    payload = None if routing.payload is None else _Pick.apply(routing.payload, route_of_row, inverse)
    return _Pick.apply(routing.weight, route_of_row, inverse), payload


def run_experts(
    hidden: Float[Tensor, "tokens hidden"],
    routing: Routing,
    num_experts: int,
    experts: Experts,
    exchange: Exchange | None,
    meanwhile: Callable[[], Tensor] | None = None,
    experts_of_sender: Callable[[int], Experts] | None = None,
    combine: Combine | None = None,
    in_halves: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Send every route to its expert and combine the outputs per token.

    Args:
        hidden: Input of the layer.
        routing: The routes.
        num_experts: Experts over all ranks.
        experts: This rank's experts.
        exchange: How rows reach other ranks; None when this rank holds all experts.
        meanwhile: Work that does not need the routed experts (the shared experts); it runs while the
            first exchange is in flight.
        experts_of_sender: ``experts`` as they run the rows of one sending rank; None to run all senders' rows together.
            Needs an ``exchange``.
        combine: Makes a token's output of its experts' unsummed ones; None for their weighted sum, which experts make
            themselves.
        in_halves: Whether the first half of the tokens is exchanged apart from the second, so that rows of one travel
            while experts run those of the other, forward and backward. Needs an ``exchange``.

    Returns:
        ``sum over a token's routes of weight * expert(hidden)``, or what ``combine`` makes of ``expert(hidden)`` and
        weights, ``[tokens, hidden]``, and the result of ``meanwhile``.
    """
    if exchange is not None:
        return _run_exchanged(
            hidden, routing, num_experts, experts, exchange, meanwhile, experts_of_sender, combine, in_halves
        )
    with part("permute"):
        counts = _count(routing.expert_index, num_experts)
        route_of_row, order = order_by(
            *(routing.expert_index, routing.token_index, hidden.shape[0], routing.routes_per_token, counts),
            is_padded=routing.num_routes is not None,
        )
        weight, payload = _routes_in_order(routing, route_of_row, order)
    other = meanwhile() if meanwhile else None
    if combine is None:
        with part("experts"):
            return experts(hidden, weight, order, payload), other
    with part("permute"):
        rows = gather(hidden, order)
    with part("experts"):
        # Experts scale and sum per source: with a source for each route and weights of 1 they return plain outputs.
        unsummed = experts(rows, torch.ones_like(weight), _of_each_row(order), payload)
    with part("combine"):
        return combine(unsummed, weight, order), other


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one exchange: rows of each expert that every rank sends this one, and of the blocks sent and received.

    Lists are on the host.
    """

    received_counts: Int[Tensor, "ranks local_experts"]
    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class _Travel:
    """Tokens whose rows go to the experts in one exchange, and back in another.

    ``order`` is that in which their rows leave, ``order_there`` that of the rows which come to this rank's experts.
    """

    hidden: Tensor
    weight: Tensor
    payload: Tensor | None
    order: ExpertRowLayout
    sizes: _Sizes
    order_there: ExpertRowLayout


def _run_exchanged(
    hidden: Tensor,
    routing: Routing,
    num_experts: int,
    experts: Experts,
    exchange: Exchange,
    meanwhile: Callable[[], Tensor] | None,
    experts_of_sender: Callable[[int], Experts] | None,
    combine: Combine | None,
    in_halves: bool,
) -> tuple[Tensor, Tensor | None]:
    """``run_experts`` with experts on other ranks.

    Backward runs the graph from its end, so what overlaps in forward overlaps there too: the exchange that was waited
    for last is begun first.
    """
    travels = _travels(hidden, routing, num_experts, exchange, in_halves)

    def depart(travel: _Travel) -> PendingRows:
        with part("permute"):
            rows = gather(travel.hidden, travel.order)
            # A source is a row there: with weights of 1 experts return plain outputs.
            weight = travel.weight if combine is None else torch.ones_like(travel.weight)
        with part("exchange"):
            travelling = [rows, weight[:, None], *([] if travel.payload is None else [travel.payload])]
            return exchange.start(travelling, travel.sizes.send, travel.sizes.receive)

    def visit(travel: _Travel, pending: PendingRows) -> PendingRows:
        with part("exchange"):
            received = pending.wait()
        with part("experts"):
            if experts_of_sender is None:
                output = _run_received(experts, received, travel.order_there)
            else:
                output = _run_by_sender(experts_of_sender, received, travel.sizes)
        with part("exchange"):
            return exchange.start([output], travel.sizes.receive, travel.sizes.send)

    def arrive(travel: _Travel, pending: PendingRows) -> Tensor:
        with part("exchange"):
            (returned,) = pending.wait()
        with part("combine"):
            if combine is not None:
                return combine(returned, travel.weight, travel.order)
            return plain_sum(returned, travel.order)

    going = [depart(travel) for travel in travels]
    other = meanwhile() if meanwhile else None
    returning = [visit(travel, pending) for travel, pending in zip(travels, going, strict=True)]
    outputs = [arrive(travel, pending) for travel, pending in zip(travels, returning, strict=True)]
    with part("combine"):
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), other


def _travels(hidden: Tensor, routing: Routing, num_experts: int, exchange: Exchange, in_halves: bool) -> list[_Travel]:
    """All tokens at once, or the first half of them and the second; waits for the sizes of their blocks, once."""
    tokens = len(hidden)
    is_padded = routing.num_routes is not None
    lengths = [tokens // 2, tokens - tokens // 2] if in_halves else [tokens]
    with part("permute"):
        key = routing.expert_index
        if in_halves:
            key = torch.add(key, routing.token_index >= lengths[0], alpha=num_experts)
            if is_padded:
                key = key.masked_fill_(routing.expert_index == num_experts, 2 * num_experts)
        counts = _count(key, num_experts * len(lengths))
        route_of_row, order = order_by(
            *(key, routing.token_index, tokens, routing.routes_per_token, counts, is_padded),
            in_halves=in_halves,
        )
    with part("exchange"):
        sizes = _exchange_sizes(counts.view(len(lengths), num_experts), exchange)
    rows = [sum(own.send) for own in sizes]
    with part("permute"):
        if is_padded:  # it stays here
            route_of_row = route_of_row[: sum(rows)]
        weight, payload = _routes_in_order(routing, route_of_row, order)
        came = [sum(own.receive) for own in sizes]
        order_there = _order_received([own.received_counts for own in sizes], sum(came))
        if not in_halves:
            return [_Travel(hidden, weight, payload, order.first(rows[0]), sizes[0], order_there)]
        payloads = [None, None] if payload is None else payload.split(rows)
        orders = order.split(rows, lengths), sizes, order_there.split(came, came)
        halves = zip(hidden.split(lengths), weight.split(rows), payloads, *orders, strict=True)
        return [_Travel(*half) for half in halves]


def _of_each_row(order: ExpertRowLayout) -> ExpertRowLayout:
    """Layout in which every row of ``order`` is a source of its own."""
    rows = torch.arange(len(order.source_of_row), device=order.source_of_row.device)
    return ExpertRowLayout(rows, rows[:, None], True, order.rows_per_expert)


def _run_received(experts: Experts, received: Sequence[Tensor], order: ExpertRowLayout) -> Tensor:
    """Weighted expert outputs of rows as they came, with their weights and perhaps payloads."""
    sources, weight, *payload = received
    with part("permute"):
        inverse = order.rows_of_source[:, 0]  # a row that came is a source
        local_weight = _Pick.apply(weight, order.source_of_row, inverse).view(-1)
        local_payload = _Pick.apply(payload[0], order.source_of_row, inverse) if payload else None
    return experts(sources, local_weight, order, local_payload)


def _run_by_sender(experts_of_sender: Callable[[int], Experts], received: Sequence[Tensor], sizes: _Sizes) -> Tensor:
    """``_run_received`` for the rows of each sending rank by themselves."""
    blocks = zip(*(tensor.split(sizes.receive) for tensor in received), strict=True)
    outputs = []
    for sender, block in enumerate(blocks):
        with part("permute"):
            order = _order_received([sizes.received_counts[sender : sender + 1]], sizes.receive[sender])
        outputs.append(_run_received(experts_of_sender(sender), block, order))
    return torch.cat(outputs)


def score_routes(
    hidden: Float[Tensor, "tokens hidden"],
    candidates: Int[Tensor, "tokens slots"],
    query: Float[Tensor, "tokens key"],
    key_weight: Float[Tensor, "key width"],
    num_experts: int,
    score: Callable[[Tensor, Tensor, Tensor, ExpertRowLayout], Tensor],
    exchange: Exchange | None,
) -> Float[Tensor, "tokens slots"]:
    """``types.ScoreRoutes``: with experts on other ranks, token and query travel there and one number comes back.

    Args:
        hidden: See ``ScoreRoutes``, as ``candidates``, ``query`` and ``key_weight``.
        candidates: Experts to ask.
        query: Query of each token.
        key_weight: What makes keys.
        num_experts: Experts over all ranks.
        score: This rank's experts: sources, their queries, ``key_weight`` and an order to scores of its rows.
        exchange: How rows reach other ranks; None when this rank holds all experts.
    """
    num_tokens, slots = candidates.shape
    counts = _count(candidates.flatten(), num_experts)
    token = torch.arange(num_tokens, device=hidden.device).repeat_interleave(slots)
    _, order = order_by(candidates.flatten(), token, num_tokens, slots, counts)
    if exchange is None:
        scores = score(hidden, query, key_weight, order)
    else:
        (sizes,) = _exchange_sizes(counts[None], exchange)
        travelling = [gather(hidden, order), gather(query, order)]
        received, received_query = exchange.start(travelling, sizes.send, sizes.receive).wait()
        local_order = _order_received([sizes.received_counts], sum(sizes.receive))
        by_expert = score(received, received_query, key_weight, local_order)
        as_received = by_expert[local_order.rows_of_source]  # one column: a received row is one route
        (returned,) = exchange.start([as_received], sizes.receive, sizes.send).wait()
        scores = returned[:, 0]
    return scores[order.rows_of_source]


def _count(expert_index: Int[Tensor, "routes"], num_experts: int) -> Int[Tensor, "experts"]:
    return _count_of_each(expert_index, num_experts)[:num_experts]


@one_kernel_on_cuda
def _count_of_each(expert_index: Tensor, num_experts: int) -> Tensor:
    """Routes to each expert, and after them those of padding; added up in 32 bits, as compiled kernels can."""
    counts = expert_index.new_zeros(num_experts + 1, dtype=torch.int32)
    return counts.scatter_add_(0, expert_index, torch.ones_like(expert_index, dtype=torch.int32)).long()


def _exchange_sizes(counts: Int[Tensor, "exchanges experts"], exchange: Exchange) -> list[_Sizes]:
    """Sizes of some exchanges, made known in one."""
    sent = counts.view(len(counts), exchange.size, -1).transpose(0, 1)
    received = exchange.exchange_counts(sent.flatten(1)).view_as(sent)
    # The one host synchronisation that a dropless exchange needs: the sizes of the blocks.
    blocks = torch.stack([sent.sum(2), received.sum(2)]).permute(2, 0, 1).tolist()
    return [
        _Sizes(own, [int(n) for n in send], [int(n) for n in receive])
        for own, (send, receive) in zip(received.unbind(1), blocks, strict=True)
    ]


def _order_received(received_counts: Sequence[Int[Tensor, "ranks local_experts"]], num_rows: int) -> ExpertRowLayout:
    """Order by exchange and expert of rows that arrive by exchange and sending rank, each sender's sorted by expert."""
    counts = received_counts[0][None] if len(received_counts) == 1 else torch.stack(list(received_counts))
    exchanges, _, local_experts = counts.shape
    key_of_block = torch.arange(exchanges * local_experts, device=counts.device).view(exchanges, 1, local_experts)
    key = key_of_block.expand_as(counts).flatten().repeat_interleave(counts.flatten(), output_size=num_rows)
    source = torch.arange(num_rows, device=counts.device)
    return order_by(key, source, num_rows, 1, counts.sum(1).flatten())[1]
