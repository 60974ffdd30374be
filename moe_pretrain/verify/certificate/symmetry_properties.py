"""Row of the certificate: an expert's number means nothing. What a function raises: ``route_properties``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Routing, RoutingContext
from moe_pretrain.verify.certificate.subject import (
    NotApplicable,
    Subject,
    is_noisy,
    parameters_set,
    relative,
    require,
    route_table,
    routers_of,
    same_routes,
)

SATURATING = 1e4
"""Factor of the router's parameters with which scores are exactly 0 or 1."""
SAME = 1e-4
"""Largest relative difference of losses whose sums are taken in another order."""
ZERO = 1e-6
"""A loss or an entropy that is 0 but for rounding."""


@torch.no_grad()
def _are_alike(subject: Subject) -> str:
    """Experts that change places, with their rows of parameters and state, take their routes along, and nothing else.

    Losses and entropy stay. Also of a router so sure that its scores saturate, where nothing but the number would tell
    experts apart unless logits do. Those that differ in cost or kind, or belong to other groups, do not change places.
    """
    model = subject.warm_model()
    for reason in (router.numbered_experts for router in routers_of(model)):
        if reason:
            raise NotApplicable(f"an expert's number decides, as is declared: {reason}")
    axes, asked = _axes_of_experts(subject), list[str]()
    for training in (True, False):
        decisions = subject.run(model.train(training), subject.batch(padding=(1,))).decisions
        for router, (hidden, context, _) in zip(routers_of(model), decisions, strict=False):
            order = _other_order(subject, router)
            if order is None:
                raise NotApplicable("no two experts are alike by cost and kind")
            other = subject.router_at(router.layer, router)
            assert other is not None, "a router of its own layer has its own parameters"
            if not _reorder(other, order, axes):
                raise NotApplicable("no parameter and no state has a row for every expert")
            if training and is_noisy(router, hidden, context):
                continue
            for factor in (1.0, SATURATING):
                sure = partial(torch.mul, other=factor)
                with parameters_set(router, sure), parameters_set(other, sure):
                    ours, theirs = router(hidden, context).exact(), other(hidden, _reordered(context, order)).exact()
                    words = "" if factor == 1 else f", with parameters times {factor:g}"
                    _require_alike(subject, (ours, theirs), order, len(hidden), words)
            asked.append("training" if training else "evaluation")
    return f"in {' and '.join(dict.fromkeys(asked))}: routes, weights, payloads, losses and entropy go with the experts"


def _other_order(subject: Subject, router: Router) -> Tensor | None:
    """Old number of each expert, with every one in the place of the next that is like it; None if none is."""
    kinds, groups = subject.config.model.moe.kinds, vars(subject.config.router).get("num_groups", 1)
    starts = (kinds.ffn, kinds.ffn + kinds.constant, kinds.ffn + kinds.constant + kinds.copy)
    alike: dict[tuple, list[int]] = {}
    for expert in range(subject.num_experts):
        kind = sum(expert >= start for start in starts)
        cost = router.balanced_costs[expert] if router.balanced_costs else 1.0
        alike.setdefault((kind, cost, expert * groups // subject.num_experts), []).append(expert)
    order = torch.arange(subject.num_experts)
    for experts in alike.values():
        order[experts] = order[[*experts[1:], experts[0]]]
    return None if torch.equal(order, torch.arange(len(order))) else order


def _axes_of_experts(subject: Subject) -> Callable[[str, Tensor], list[int]]:
    """Says which axes of a router's tensor are of experts: as long as there are, also where there are more of them.

    Where the layer cannot have another number, the first axis alone is one if its length fits.
    """
    for number in (subject.num_experts + 1, 2 * subject.num_experts):
        more = subject.with_experts(number)
        if more is not None:
            break
    if more is None:
        return lambda name, value: [0] if value.shape[:1] == (subject.num_experts,) else []
    others = [router.state_dict() for router in routers_of(more.model())]

    def axes(name: str, value: Tensor) -> list[int]:
        assert more is not None
        same = [state[name].shape for state in others if name in state]
        lengths = (subject.num_experts, more.num_experts)
        return [axis for axis in range(value.ndim) if same and (value.shape[axis], same[0][axis]) == lengths]

    return axes


def _reorder(router: Router, order: Tensor, axes: Callable[[str, Tensor], list[int]]) -> bool:
    """Have the experts of ``router`` change places; False where nothing is theirs."""
    found = False
    for name, value in router.state_dict().items():
        moved = value
        for axis in axes(name, value):
            found, moved = True, moved.index_select(axis, order)
        value.copy_(moved)
    return found


def _reordered(context: RoutingContext, order: Tensor) -> RoutingContext:
    """Context of a router whose experts have changed places."""
    score = context.score_routes

    def scores_of_old(hidden: Tensor, candidates: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
        assert score is not None
        return score(hidden, order[candidates], query, key_weight)

    carried = None if context.carried is None else context.carried[:, order]
    return replace(context, carried=carried, score_routes=None if score is None else scores_of_old)


def _require_alike(subject: Subject, both: tuple[Routing, Routing], order: Tensor, tokens: int, words: str) -> None:
    ours, theirs = both
    old, new = (route_table(routing, tokens, subject.num_experts) for routing in both)
    require(same_routes(new, old[:, order]), f"routes or weights go by an expert's number{words}")
    if ours.payload is not None and theirs.payload is not None:
        old, new = (_payloads(routing, tokens, subject.num_experts) for routing in both)
        require(relative(new, old[:, order]) <= SAME, f"payloads go by an expert's number{words}")
    values = {f"the {name} loss": (value, theirs.aux[name]) for name, value in ours.aux.items()}
    values["router_entropy"] = (ours.use.router_entropy, theirs.use.router_entropy)
    for name, (first, second) in values.items():
        apart = relative(second, first)
        is_zero = max(abs(float(first)), abs(float(second))) < ZERO
        require(apart <= SAME or is_zero, f"{name} changes by {apart:.0e} where experts change places{words}")


def _payloads(routing: Routing, tokens: int, num_experts: int) -> Tensor:
    assert routing.payload is not None
    table = routing.payload.new_zeros(tokens, num_experts, routing.payload.shape[1])
    return table.index_put((routing.token_index, routing.expert_index), routing.payload)


SYMMETRY: dict[str, Callable[[Subject], str]] = {"experts are alike": _are_alike}
"""Name of the row -> the question behind it."""
