"""Rows of the certificate: steps, layers, rows and numbers of experts that the tiny model itself does not have.

Routers are called by themselves here, with what those of the tiny model were told. What a function raises:
``route_properties``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import RoutingContext
from moe_pretrain.verify.certificate.balance_properties import has_closed_form_when_collapsed
from moe_pretrain.verify.certificate.route_properties import check_routes, gives_best_of
from moe_pretrain.verify.certificate.subject import (
    TOLERANCE,
    Broken,
    Decision,
    NotApplicable,
    Subject,
    context_of,
    judge_dependence,
    parameters_set,
    relative,
    require,
    route_table,
    routers_of,
    same_routes,
)

STEPS = (
    *range(17),
    20,
    32,
    50,
    64,
    100,
    128,
    200,
    300,
    500,
    512,
    700,
    1000,
    2000,
    5000,
    10_000,
    32_768,
    100_000,
    10**6,
)
"""Steps at which routers are asked once more: phases of a schedule rarely fit between two of them."""
LAYER_STEPS = (0, 100, 10_000)
"""The same of layers above the lowest."""
MORE_LAYERS = (7, 15, 31, 63)
"""Layers of larger models, for which the scheme will be chosen."""
LONG_ROW = 1024
"""Tokens of a long row: beyond chunks and windows that rows of 12 are too short for."""
MANY_ROWS = 32
"""Rows of that length in the largest batch: counts there are beyond what float16 and bfloat16 can count."""
MANY_EXPERTS = 288
"""Experts of a layer: more than a byte counts, a multiple of what experts are usually cut into."""
NEAR_TIES = 8
"""Tokens of those that may have two experts so near each other that a product of another shape decides otherwise."""
ROUNDING = 1e-4
"""Relative error of a float32 sum of as many terms."""


@dataclass(frozen=True)
class _Place:
    """A router at a layer of the whole model, and what the tiny model's router there was given."""

    layer: int
    router: Router
    hidden: Tensor
    context: RoutingContext


def _places(subject: Subject, training: bool) -> list[_Place]:
    """Routers of all layers with experts that the model has before it is shrunk, and of ``MORE_LAYERS``.

    Parameters and state are those of the tiny model's lowest router for the lowest, of its topmost for the others.
    """
    model = subject.warm_model().train(training)
    _, decisions = subject.logits(model, subject.batch(one_document=True))
    layers, routers, found = subject.unshrunk.model.moe_layers, routers_of(model), []
    for layer in (*layers, *(more for more in MORE_LAYERS if more > layers[-1])):
        at = 0 if layer == layers[0] else -1
        router = subject.router_at(layer, routers[at])
        if router is not None:
            found.append(_Place(layer, router, decisions[at].hidden, decisions[at].context))
    return found


def _holds_at_every_step_and_layer(subject: Subject) -> str:
    """At every step of ``STEPS``, and in every layer, a router is what it is at first in the lowest.

    Later tokens of a row move no earlier route, weight or payload, as far as the scheme declares to be causal; and
    what has a gradient somewhere, weights or an aux loss with a coefficient, has one everywhere. Losses of the same
    decision are the same everywhere.
    """
    asked = 0
    with_gradient: dict[str, tuple[int, int]] = {}
    without: dict[str, tuple[int, int]] = {}
    for training in (True, False):
        places = _places(subject, training)
        for place in places:
            for step in STEPS if place is places[0] else LAYER_STEPS:
                asked += 1
                context = replace(place.context, step=step)
                if _declares_causal(place.router, training):
                    moved = _moves_earlier(subject, place.router, place.hidden, context, 2 * subject.sequence // 3)
                    if moved:
                        where = f"{'training' if training else 'evaluation'}, step {step}, layer {place.layer}"
                        judge_dependence([place.router], training, f"later tokens move earlier {moved} in {where}")
                if not training:
                    _has_the_same_losses(subject, places[0] if place is places[0] else places[1], place, step)
                if training:
                    for what, has in _gradients(place.router, place.hidden, context).items():
                        (with_gradient if has else without).setdefault(what, (step, place.layer))
    for what, (step, layer) in without.items():
        if what in with_gradient:
            other = "at step {} in layer {}".format(*with_gradient[what])
            require(False, f"{what} has no gradient at step {step} in layer {layer}, and has one {other}")
    what = ", ".join(with_gradient) or "nothing"
    top = places[-1].layer
    return f"{asked} times, steps up to {STEPS[-1]}, layers up to {top}; with a gradient everywhere: {what}"


@torch.no_grad()
def _has_the_same_losses(subject: Subject, one: _Place, other: _Place, step: int) -> None:
    """Raise where the same tokens, routed alike, have other losses in another layer or at another step."""
    ours = one.router(one.hidden, one.context).exact()
    theirs = other.router(other.hidden, replace(other.context, step=step)).exact()
    one_table, other_table = (route_table(routing, len(one.hidden), subject.num_experts) for routing in (ours, theirs))
    if not same_routes(one_table, other_table):
        return  # what decides moves, and so may losses
    for name, value in ours.aux.items():
        apart = relative(theirs.aux[name], value)
        require(
            apart <= ROUNDING,
            f"in evaluation the {name} loss differs by {apart:.0e} between layer {one.layer} at step 0 and layer "
            f"{other.layer} at step {step}: what weighs a loss belongs in Router.aux_weights",
        )


def _declares_causal(router: Router, training: bool) -> bool:
    return router.causal_in_training if training else router.causal_in_evaluation


@torch.no_grad()
def _moves_earlier(subject: Subject, router: Router, hidden: Tensor, context: RoutingContext, cut: int) -> str:
    """Name of what changes of tokens before ``cut`` in their rows when all others are replaced; empty for nothing."""
    place = torch.arange(len(hidden)) % (len(hidden) // context.num_sequences)
    kept = place < cut
    other = torch.where(kept[:, None], hidden, hidden.flip(0))
    before = router(hidden, context).exact()
    after = router(other, context).exact()
    ours, theirs = (route_table(routing, len(hidden), subject.num_experts)[kept] for routing in (before, after))
    if not same_routes(ours, theirs):
        return "routes or weights"
    if before.payload is None or after.payload is None:
        return ""
    ours, theirs = (routing.payload[kept[routing.token_index]] for routing in (before, after))
    return "" if torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) else "payloads"


def _gradients(router: Router, hidden: Tensor, context: RoutingContext) -> dict[str, bool]:
    """Whether weights, and each aux loss with a coefficient, have a gradient here."""
    given = hidden.clone().requires_grad_()
    routing = router(given, context)
    wanted = [given, *router.parameters()]
    upstream = torch.randn(routing.weight.shape, generator=torch.Generator().manual_seed(0))
    values = {"weight": (routing.weight * upstream).sum()} | {
        f"the {name} loss": routing.aux[name] for name, weight in router.aux_weights.items() if weight > 0
    }
    load = routing.use.tokens_per_expert
    found = {}
    for name, value in values.items():
        if name.removeprefix("the ").removesuffix(" loss") in router.gradients_by_design:
            continue
        if name != "weight" and bool((load == load.mean()).all()):
            continue  # a balance loss is constant there
        gradients = (
            torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=True) if value.requires_grad else ()
        )
        found[name] = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    return found


def _serves_long_rows(subject: Subject) -> str:
    """In rows of ``LONG_ROW`` tokens no later token moves an earlier route, and ``MANY_ROWS`` of them route like each.

    Counts and entropy of so many tokens are the sums of the rows', though numbers are beyond what float16 counts.
    """
    cuts = (LONG_ROW // 2 + 5, LONG_ROW - 1)
    reached = 0
    for training in (True, False):
        model = subject.warm_model().train(training)
        router, decision = routers_of(model)[0], subject.logits(model, subject.batch(one_document=True))[1][0]
        hidden, context = _long(decision, MANY_ROWS)
        with torch.no_grad():
            whole = router(hidden, context).exact()
        check_routes(Decision(hidden, context, whole), subject.num_experts)
        reached = max(reached, int(whole.use.tokens_per_expert.max()))
        if not _declares_causal(router, training):
            continue
        first, told = hidden[:LONG_ROW], _row(context, 0)
        for cut in cuts:
            moved = _moves_earlier(subject, router, first, told, cut)
            if moved:
                judge_dependence([router], training, f"tokens from place {cut} of a row on move earlier {moved}")
        with torch.no_grad():
            parts = [router(of_row, _row(context, row)).exact() for row, of_row in enumerate(hidden.split(LONG_ROW))]
        tables = torch.cat([route_table(part, LONG_ROW, subject.num_experts) for part in parts])
        other = ~_same_tokens(route_table(whole, len(hidden), subject.num_experts), tables)
        if other.sum() > NEAR_TIES:
            judge_dependence(
                [router],
                training,
                f"{int(other.sum())} of {len(hidden)} tokens route otherwise than in a row by itself",
            )
        apart = relative(torch.stack([part.use.router_entropy for part in parts]).sum(), whole.use.router_entropy)
        require(apart <= ROUNDING, f"router_entropy of {len(hidden)} tokens differs from its rows' sum by {apart:.0e}")
    return (
        f"rows of {LONG_ROW} tokens, cut at {' and '.join(map(str, cuts))}; {MANY_ROWS} of them together, "
        f"up to {reached} routes of one expert"
    )


def _same_tokens(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mask of the tokens that have the same routes and weights in two route tables."""
    return torch.isclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True).all(dim=1)


def _long(decision: Decision, rows: int) -> tuple[Tensor, RoutingContext]:
    """Rows of ``LONG_ROW`` tokens like those of ``decision``, each near one of them, every row one document."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(decision.hidden), (rows * LONG_ROW,), generator=generator)
    hidden = decision.hidden[chosen]
    hidden = hidden + 0.1 * hidden.square().mean().sqrt() * torch.randn(hidden.shape, generator=generator)
    context = context_of(decision.context, chosen)
    return hidden, replace(
        context,
        num_sequences=rows,
        token_position=torch.arange(len(chosen)),
        document_ids=torch.zeros_like(chosen),
        global_tokens=None if context.global_tokens is None else len(chosen),
    )


def _row(context: RoutingContext, row: int) -> RoutingContext:
    """One row of a batch of long ones, as a batch of its own."""
    part = context_of(context, slice(row * LONG_ROW, (row + 1) * LONG_ROW))
    return replace(part, num_sequences=1, global_tokens=None if context.global_tokens is None else LONG_ROW)


@torch.no_grad()
def _routes_a_new_token_alone(subject: Subject) -> str:
    """In evaluation a token decides alike in its row and without the tokens before it, told its place: generation.

    A scheme that reads earlier tokens says so in ``Router.reads_earlier_tokens``, and is then not asked. All that are
    causal decide alike at the beginning of a row, however long it is, in training too.
    """
    _routes_short_rows(subject)
    model = subject.warm_model().eval()
    routers = routers_of(model)
    if not all(router.causal_in_evaluation for router in routers):
        raise NotApplicable("evaluation is declared non-causal")
    if any(router.reads_earlier_tokens for router in routers):
        raise NotApplicable("a decision is made of earlier tokens too, as is declared (Router.reads_earlier_tokens)")
    decisions = subject.logits(model, subject.batch(one_document=True))[1]
    length, alone = subject.sequence, 0
    for router, (hidden, context, _) in zip(routers, decisions, strict=True):
        place = torch.arange(len(hidden)) % length
        # What generation tells a router: neither seed nor step, and a position within the text.
        told = replace(context, token_position=place, seed=0, step=0, document_ids=None)
        whole = route_table(router(hidden, told).exact(), len(hidden), subject.num_experts)
        for row in range(context.num_sequences):
            for start, stop in ((0, 1), (1, 2), (2, length // 2), (length // 2, length - 1), (length - 1, length)):
                tokens = torch.arange(row * length + start, row * length + stop)
                part = replace(context_of(told, tokens), num_sequences=1, first_place=start)
                own = route_table(router(hidden[tokens], part).exact(), len(tokens), subject.num_experts)
                alone += stop - start
                require(
                    same_routes(own, whole[tokens]),
                    f"tokens {start} to {stop - 1} of a row have other routes or weights when those before them lie in "
                    "a cache, as in generation: see RoutingContext.first_place and Router.reads_earlier_tokens",
                )
    return f"{alone} tokens, one or several at a time, route as in their row"


def _routes_short_rows(subject: Subject) -> None:
    """Raise unless the first tokens of rows decide alike when nothing comes after them."""
    for training in (True, False):
        model = subject.warm_model().train(training)
        routers = routers_of(model)
        decisions = subject.logits(model, subject.batch(one_document=True))[1]
        for router, (hidden, context, routing) in zip(routers, decisions, strict=True):
            if not _declares_causal(router, training):
                continue
            whole = route_table(routing, len(hidden), subject.num_experts)
            for length in (1, subject.sequence // 2, subject.sequence - 1):
                tokens = torch.arange(len(hidden)).view(context.num_sequences, -1)[:, :length].flatten()
                own = route_table(
                    router(hidden[tokens], context_of(context, tokens)).exact(), len(tokens), subject.num_experts
                )
                if not same_routes(own, whole[tokens]):
                    found = (
                        f"the first {length} tokens of rows have other routes or weights when nothing comes after them"
                    )
                    judge_dependence([router], training, f"{found}, in {'training' if training else 'evaluation'}")


def _serves_other_numbers(subject: Subject) -> str:
    """With one expert more, and with more than a byte counts, routes are what they promise to be.

    Unique, in range, counted, and to the experts that tokens like best; with one more a balance loss has its value at
    collapse.
    """
    more, notes = subject.num_experts + 1, []
    for number in (more, MANY_EXPERTS):
        other = subject.with_experts(number)
        if other is None:
            continue
        # Not a state that has moved: so few tokens for so many experts move it far.
        questions: list[Callable[[], object]] = [
            partial(_checks_routes, other),
            partial(gives_best_of, other, other.model()),
        ]
        if number == more:
            questions.append(partial(has_closed_form_when_collapsed, other))
        for question in questions:
            try:
                question()
            except NotApplicable:
                continue
            except Broken as broken:
                raise Broken(f"with {number} experts: {broken}") from None
        notes.append(str(number))
    if not notes:
        raise NotApplicable("it takes neither one expert more nor many")
    return f"the same with {' and '.join(notes)} experts"


@torch.no_grad()
def _checks_routes(subject: Subject) -> None:
    model = subject.model()
    for training in (True, False):
        for decision in subject.run(model.train(training), subject.batch(padding=(1,))).decisions:
            check_routes(decision, subject.num_experts)


def _counts_experts_as_declared(subject: Subject) -> str:
    """Routes per token, and their payload, are those by which the configuration sizes lists and counts FLOPs.

    With ``top_k``, also when that is 1 and the number of experts.
    """
    router: Any = subject.config.router
    found = [_count_experts(subject, router)]
    if "top_k" in vars(router):
        for top_k in sorted({1, subject.num_experts} - {vars(router)["top_k"]}):
            changes: dict[str, Any] = {"top_k": top_k}
            try:
                other = replace(router, **changes)
                other.check_num_experts(subject.num_experts)
            except ValueError:
                continue
            try:
                _count_experts(subject, other)
            except RuntimeError as error:
                require(False, f"top_k={top_k} raises {' '.join(str(error).split())[:150]}")
            found.append(f"top_k={top_k} too")
    return "; ".join(found)


def _count_experts(subject: Subject, config: Any) -> str:
    """Compare one configuration's declarations with what its router does."""
    if config.merges_experts:
        raise NotApplicable("parameters are merged: no token is sent to an expert")
    fixed, limit = config.fixed_experts_per_token, config.experts_per_token_limit
    most, wanted = config.most_experts_per_token(subject.num_experts), config.mean_experts_per_token
    counts = []
    with torch.no_grad():
        for training in (True, False):
            model = subject.model(router=config).train(training)
            for router, (hidden, context, _) in zip(
                routers_of(model), subject.logits(model, subject.batch())[1], strict=True
            ):
                for factor in (1.0, 30.0, 0.0):  # as it starts, nearly sure, and undecided
                    with parameters_set(router, partial(torch.mul, other=factor)):
                        routing = router(hidden, context).exact()
                    check_routes(Decision(hidden, context, routing), subject.num_experts)
                    counts.append(torch.bincount(routing.token_index, minlength=len(hidden)))
                    columns = 0 if routing.payload is None else routing.payload.shape[1]
                    size = config.payload_size
                    require(columns == size, f"payload_size={size}, but {columns} numbers travel with a route")
                    mean = float(counts[-1].double().mean())
                    if training:
                        allowed = most + subject.num_experts / len(hidden)
                        require(mean <= allowed, f"most_experts_per_token={most:g}, but a batch has {mean:.2f}")
    least, largest = int(torch.cat(counts).min()), int(torch.cat(counts).max())
    if fixed is not None:
        require(
            least == largest == fixed, f"fixed_experts_per_token={fixed}, but tokens have {least} to {largest} experts"
        )
    require(limit is None or largest <= limit, f"experts_per_token_limit={limit}, but a token has {largest} experts")
    if least == largest:
        require(
            wanted == least, f"mean_experts_per_token={wanted:g}, but every token has {least}: FLOPs are miscounted"
        )
    mean = float(torch.cat([count for place, count in enumerate(counts) if place % 3 < 2]).double().mean())
    return f"{wanted:g} declared, {mean:.2f} measured on random text" + (" (varies)" if least < largest else "")


RANGE: dict[str, Callable[[Subject], str]] = {
    "every step and layer": _holds_at_every_step_and_layer,
    "long rows": _serves_long_rows,
    "a new token alone": _routes_a_new_token_alone,
    "experts per token as declared": _counts_experts_as_declared,
    "other numbers of experts": _serves_other_numbers,
}
"""Name of the row -> the question behind it."""
