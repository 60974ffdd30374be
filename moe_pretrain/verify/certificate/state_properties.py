"""Rows of the certificate: where state goes that ``after_step`` moves, and what it may touch.

Parameters stand still meanwhile, so what changes routes is the state alone. What a function raises:
``route_properties``.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Merging, RouterUse, RoutingContext, StepUse, step_uses
from moe_pretrain.verify.certificate.subject import (
    AGE_STEPS,
    ROWS,
    Aged,
    NotApplicable,
    Subject,
    context_of,
    even_costs,
    judge_dependence,
    require,
    route_table,
    routers_of,
    same_routes,
    unevenness,
    with_much_in_common,
)

SAME_COUNT = 0.02
"""Largest part of a batch's routes by which their number may change where loads are compared."""
LESS_EVEN = 1.1
"""Largest factor by which a scheme's own state may make the busiest expert busier."""
TOLD_STEPS = 50
"""Steps in which a router is told of loads that it does not have."""
NEAR_TARGET = 0.15
"""Largest part of the wanted number of experts by which the number may differ."""
EVEN = 0.03
"""Largest part by which the busiest expert may exceed the mean where a scheme's state evens the load."""
STILL_FALLING = 0.98
"""Factor that a load still falls by within ``SETTLED_STEPS`` that has not come to where it goes."""
LARGE_ROWS = 96
"""Rows of which experts get so many tokens that ``EVEN`` is some of them."""
EVEN_STEPS = 160
"""Steps on so many rows."""
LEFT = 0.5
"""Largest part of what is uneven in evaluation that tokens which compete may leave."""
SETTLED_STEPS = 50
"""Last steps in which a number of routes that stands still has settled."""
FEW_STEPS = 20
FREED_STEPS = 2000
"""Steps within which a scheme takes experts out of use, if it does."""


@torch.no_grad()
def _evens_load(subject: Subject) -> str:
    """State moved by ``after_step`` over ``AGE_STEPS`` steps on one batch makes the load no less even.

    An expert that a router is told to be busy gets no more tokens than one that is told to be idle. Where that moves
    anything, or quotas are to even the load (``RouterConfig.evens_load``), it comes to be even, or is still on the way.
    Where tokens compete in training alone, their load is more even than evaluation's, or even.
    """
    aged = subject.aged
    if isinstance(aged.first.routing, Merging):
        raise NotApplicable("parameters are merged and no token is sent")
    notes = []
    if not aged.router.causal_in_training and aged.router.causal_in_evaluation and aged.router.evaluation_rule:
        notes.append(_competes_for_even_load(subject, aged))
    if aged.moved:
        told = _believes_loads(subject, aged)
        start, end = (float(use.tokens_per_expert.max() / use.tokens_per_expert.sum()) for use in _ends(aged))
        count = _count(aged.uses[-1]) / _count(aged.uses[0])
        found = f"the busiest expert has {start:.2f} of the routes at first, {end:.2f} after {AGE_STEPS} steps"
        notes += [told] if told else []
        if told or subject.config.router.evens_load == "quotas":
            notes.append(_comes_to_even_load(subject))
        if abs(count - 1) <= SAME_COUNT:
            require(end <= LESS_EVEN * start, f"{found}: state moves the wrong way")
            notes.append(found)
        elif not notes:
            raise NotApplicable(f"after_step moves the number of routes, to {count:.2f} of what it was")
    if not notes:
        raise NotApplicable("after_step moves nothing")
    return "; ".join(notes)


def _comes_to_even_load(subject: Subject) -> str:
    """Raise unless the load of a large batch is even after ``EVEN_STEPS`` steps on it, or still gets more so."""
    model = subject.model()
    router, (hidden, context, _) = routers_of(model)[0], subject.run(model, subject.batch(rows=LARGE_ROWS)).decisions[0]
    costs, loads = even_costs(subject, router), []
    for _ in range(EVEN_STEPS):
        use = router(hidden, context).use
        loads.append(use.tokens_per_expert)
        router.after_step(step_uses([use])[0])
    # Of many steps together: what goes to and fro, as a bias by long steps does, is even if its middle is.
    parts = (loads[:1], loads[-2 * SETTLED_STEPS : -SETTLED_STEPS], loads[-SETTLED_STEPS:])
    first, before, end = (unevenness(torch.stack(part).sum(dim=0), costs) for part in parts)
    said = f"of {len(hidden)} tokens the busiest expert has {first:.2f} times the mean at first, {end:.2f} at last"
    require(end <= 1 + EVEN or end <= STILL_FALLING * before, f"{said}, and there it stays: state aims at another load")
    return said


def _ends(aged: Aged) -> tuple[RouterUse, RouterUse]:
    return aged.uses[0], aged.uses[-1]


def _count(use: RouterUse) -> float:
    """Routes per token."""
    return float(use.tokens_per_expert.sum() / use.tokens)


def _competes_for_even_load(subject: Subject, aged: Aged) -> str:
    """Compare a load for which tokens compete with evaluation's, of tokens that all prefer the same experts."""
    hidden, context, _ = subject.run(subject.model(), subject.batch(rows=LARGE_ROWS)).decisions[0]
    hidden = with_much_in_common(hidden)
    router, costs = aged.fresh(), even_costs(subject, aged.router)
    competing, evaluated = (
        unevenness(router.train(training)(hidden, context).use.tokens_per_expert, costs) for training in (True, False)
    )
    found = f"competing tokens give the busiest expert {competing:.2f} times the mean, evaluation {evaluated:.2f} times"
    require(competing <= max(LESS_EVEN, 1 + LEFT * (evaluated - 1)), f"{found}: competing does not even the load")
    return found


def _believes_loads(subject: Subject, aged: Aged) -> str:
    """Compare routers that are told opposite loads of the two halves of the experts; empty where none listens."""
    (busy, _), (idle, _) = ((_routes_of_first_half(router, aged), router) for router in _told_loads(subject, aged))
    if busy == idle:
        return ""
    require(
        busy < idle,
        f"the first half of the experts has {busy:.0f} routes after {TOLD_STEPS} steps in which it is said to be busy, "
        f"{idle:.0f} after as many in which it is said to be idle: state moves the wrong way",
    )
    return f"experts that are said to be busy have {busy:.0f} routes, said to be idle {idle:.0f}"


def _told_loads(subject: Subject, aged: Aged) -> tuple[Router, Router]:
    """Routers that hear for ``TOLD_STEPS`` steps that the first half of the experts has most routes, and hardly any."""
    load = aged.first.routing.use.tokens_per_expert
    uneven = torch.where(torch.arange(len(load)) < len(load) // 2, 9.0, 1.0).to(load)
    routers = aged.fresh(), aged.fresh()
    for router, shape in zip(routers, (uneven, 10 - uneven), strict=True):
        use = replace(step_uses([aged.first.routing.use])[0], tokens_per_expert=load.sum() * shape / shape.sum())
        for _ in range(TOLD_STEPS):
            router.after_step(use)
    return routers


def _routes_of_first_half(router: Router, aged: Aged) -> float:
    load = router(aged.first.hidden, aged.first.context).use.tokens_per_expert
    return float(load[: len(load) // 2].sum())


@torch.no_grad()
def _weighs_without_the_load(subject: Subject) -> str:
    """State of single experts moves no weight: a token that keeps its experts keeps their weights.

    Asked of state with one number for each expert, such as a bias or a threshold, that moves by the load it is told
    (``StepUse.tokens_per_expert``), or in whatever way where quotas are to even the load (``RouterConfig.evens_load``).
    """
    aged = subject.aged
    if isinstance(aged.first.routing, Merging):
        raise NotApplicable("parameters are merged and no token is sent")
    busy, idle = (router.state_dict() for router in _told_loads(subject, aged))
    of_experts = [name for name, value in busy.items() if value.shape == (subject.num_experts,)]
    of_experts = [name for name in of_experts if busy[name].is_floating_point()]
    moved = {name: busy[name] for name in of_experts if not torch.equal(busy[name], idle[name])}
    if subject.config.router.evens_load == "quotas":
        settled = aged.router.state_dict()
        moved = {name: settled[name] for name in of_experts if name in aged.moved} | moved
    if not moved:
        raise NotApplicable("no state of single experts is moved by their load")
    hidden, context, _ = aged.first
    kept = 0
    for training in (True, False):
        tables = []
        for share in (0.0, 0.01, 0.1, 1.0):
            router = aged.fresh().train(training)
            state = router.state_dict()
            for name, value in moved.items():
                state[name].copy_(aged.before[name].lerp(value, share))
            tables.append(route_table(router(hidden, context).exact(), len(hidden), subject.num_experts))
        for table in tables[1:]:
            same = (tables[0].isnan() == table.isnan()).all(dim=1)
            kept += int(same.sum())
            require(
                same_routes(tables[0][same], table[same]),
                f"{', '.join(moved)} moves weights of routes that stay: what selects is not to scale an output",
            )
    return f"{', '.join(moved)}: {kept} tokens with the same experts have the same weights"


def _keeps_number(subject: Subject) -> str:
    """State moves the number of experts per token, or the coefficient that presses on it, towards what is wanted.

    That is the field ``target_experts``. Without one, evaluation by a rule of its own takes as many as training. An
    expert goes out of use only without routes.
    """
    aged = subject.aged
    if isinstance(aged.first.routing, Merging):
        raise NotApplicable("parameters are merged and no token is sent")
    if aged.router.free_slots is not None:
        return _frees_idle_experts(aged)
    if not aged.moved:
        raise NotApplicable("after_step moves nothing")
    notes = []
    pressed = _presses_towards_target(aged)
    notes += [pressed] if pressed else []
    config = subject.config.router
    target = vars(config).get("target_experts")
    if config.fixed_experts_per_token is None:
        for training in (True, False):
            counts = _counts_in(aged, training)
            if max(counts) - min(counts) <= SAME_COUNT * max(counts):
                continue  # state moves nothing of it
            mode = "training" if training else "evaluation"
            if target is not None:
                notes.append(_comes_to(counts, target, f"target_experts={target:g}", mode, subject.num_experts, aged))
            elif not training and aged.router.evaluation_rule:
                wanted = _count(aged.uses[-1])
                notes.append(_comes_to(counts, wanted, f"training's {wanted:.2f}", mode, subject.num_experts, aged))
    if not notes:
        raise NotApplicable("state moves no number of experts that is wanted")
    return "; ".join(notes)


@torch.no_grad()
def _counts_in(aged: Aged, training: bool) -> list[float]:
    """Routes per token: at the start, and in the last steps; of evaluation, at the start and at the end."""
    if training:
        return [_count(aged.uses[0]), *(_count(use) for use in aged.uses[-SETTLED_STEPS:])]
    hidden, context, _ = aged.first
    found = [_count(router.eval()(hidden, context).use) for router in (aged.fresh(), aged.router)]
    aged.router.train()
    return found


def _comes_to(counts: list[float], wanted: float, words: str, mode: str, num_experts: int, aged: Aged) -> str:
    """Raise where the number has settled elsewhere than it is wanted, or is farther from it than at first."""
    start, end = counts[0], counts[-1]
    found = (
        f"{start:.2f} experts per token at first and {end:.2f} after {AGE_STEPS} steps in {mode}, {words} are wanted"
    )
    allowed = NEAR_TARGET * wanted + num_experts / float(aged.uses[0].tokens)
    settled = max(counts[1:]) == min(counts[1:])
    off = abs(end - wanted)
    require(off <= allowed or off <= abs(start - wanted), f"{found}: state moves the wrong way")
    require(off <= allowed or not settled, f"{found}, and it has settled there")
    return found


def _presses_towards_target(aged: Aged) -> str:
    """Coefficients of losses that state moves: larger after steps with too many routes where the loss makes them fewer.

    Empty where no coefficient moves.
    """
    use = step_uses([aged.first.routing.use])[0]
    coefficients = []
    for number in (float(len(use.tokens_per_expert)), 1 / 8):
        router = aged.fresh()
        for _ in range(FEW_STEPS):
            router.after_step(_with_routes(use, number))
        coefficients.append(router.aux_weights)
    many, few = coefficients
    notes = []
    for name in many:
        if many[name] == few[name]:
            continue
        fewer = _makes_fewer(aged, name)
        if fewer == 0:
            continue
        require(
            (many[name] > few[name]) == (fewer > 0),
            f"the coefficient of {name} is {many[name]:.2g} after {FEW_STEPS} steps in which every expert has every "
            f"token and {few[name]:.2g} after as many with hardly any, but the loss makes routes "
            f"{'fewer' if fewer > 0 else 'more'}: it moves the wrong way",
        )
        notes.append(
            f"the coefficient of {name} is {many[name]:.2g} after too many routes, {few[name]:.2g} after too few"
        )
    return "; ".join(notes)


def _with_routes(use: StepUse, per_token: float) -> StepUse:
    load = torch.full_like(use.tokens_per_expert, per_token * use.tokens / len(use.tokens_per_expert))
    return replace(use, tokens_per_expert=load, experts_per_token=per_token)


def _makes_fewer(aged: Aged, loss: str) -> float:
    """Routes per token that a step down the loss takes away."""
    router, (hidden, context, _) = aged.fresh(), aged.first
    value = router(hidden, context).aux[loss]
    parameters = list(router.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else []
    before = _count(aged.uses[0])
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is not None and gradient.any():
                parameter.sub_(0.3 * parameter.norm() * gradient / gradient.norm())
        return before - _count(router(hidden, context).use)


@torch.no_grad()
def _frees_idle_experts(aged: Aged) -> str:
    """Tell a router the same use until it takes experts out of use, or has not within ``FREED_STEPS``."""
    router, use = aged.fresh(), step_uses(aged.uses[:1])[0]
    before = router.free_slots
    assert before is not None
    reached = before.logical_and(use.tokens_per_expert > 0).nonzero()[:, 0].tolist()
    require(not reached, f"experts {reached} are out of use (Router.free_slots), and have routes")
    for step in range(1, FREED_STEPS + 1):
        router.after_step(use)
        free = router.free_slots
        if free is None or torch.equal(free, before):
            continue
        taken = (free & ~before).nonzero()[:, 0].tolist()
        wrong = [expert for expert in taken if use.tokens_per_expert[expert] > 0]
        require(not wrong, f"experts {wrong} go out of use at step {step}, though they have had routes in every step")
        return f"{len(taken)} experts go out of use at step {step}, none that has routes"
    return f"no expert goes out of use or comes into it within {FREED_STEPS} steps"


@torch.no_grad()
def _holds_after_many_steps(subject: Subject) -> str:
    """After ``AGE_STEPS`` steps decisions know as little of other tokens as at first.

    Later tokens and other rows move no route, and evaluation decides as training if it did.
    """
    aged = subject.aged
    if not aged.moved:
        raise NotApplicable("after_step moves nothing")
    hidden, context, _ = aged.first
    length, asked = len(hidden) // ROWS, []
    place = torch.arange(len(hidden)) % length
    for training in (True, False):
        router = aged.router.train(training)
        if not (router.causal_in_training if training else router.causal_in_evaluation):
            continue
        mode = "training" if training else "evaluation"
        whole = _table(subject, router, hidden, context)
        for cut in (length // 3, length - 1):
            kept = place < cut
            other = torch.where(kept[:, None], hidden, hidden.flip(0))
            if not same_routes(_table(subject, router, other, context)[kept], whole[kept]):
                judge_dependence(
                    [router], training, f"after {AGE_STEPS} steps later tokens move earlier routes in {mode}"
                )
        rows = [
            _table(subject, router, hidden[row], replace(context_of(context, row), num_sequences=1))
            for row in (slice(start, start + length) for start in range(0, len(hidden), length))
        ]
        if not same_routes(torch.cat(rows), whole):
            judge_dependence([router], training, f"after {AGE_STEPS} steps other rows move a row's routes in {mode}")
        asked.append(mode)
    aged.router.train()
    if asked == ["training", "evaluation"] and not aged.router.evaluation_rule:
        alike = []
        for router in (aged.fresh(), aged.router):
            own = _table(subject, router.eval(), hidden, context)
            trained = _table(subject, router.train(), hidden, context)
            other_seed = replace(context, seed=context.seed + 1)
            noisy = not same_routes(_table(subject, router, hidden, other_seed), trained)
            alike.append(noisy or same_routes(own, trained))
        young, old = alike
        require(
            old or not young,
            f"after {AGE_STEPS} steps evaluation decides otherwise than training, and at first it does not",
        )
    if not asked:
        raise NotApplicable("declared non-causal")
    return f"{' and '.join(asked)} after {AGE_STEPS} steps: {', '.join(aged.moved)} moved"


def _table(subject: Subject, router: Router, hidden: Tensor, context: RoutingContext) -> Tensor:
    return route_table(router(hidden, context).exact(), len(hidden), subject.num_experts)


STATE: dict[str, Callable[[Subject], str]] = {
    "state evens the load": _evens_load,
    "state leaves weights alone": _weighs_without_the_load,
    "state keeps the number of experts": _keeps_number,
    "after many steps of state": _holds_after_many_steps,
}
"""Name of the row -> the question behind it."""
