"""Rows of the certificate: what the configuration says of weights and coefficients holds of the router.

What a function raises: ``route_properties``.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import starmap, zip_longest
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import step_uses
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    SHARP,
    TOLERANCE,
    Decision,
    NotApplicable,
    Subject,
    parameters_set,
    relative,
    require,
    routers_of,
    same_routes,
)

ADD_UP = ("renormalised", "zero_dropped", "mixtral", "selected", "equal", "learned")
"""Choices of a field ``weights`` with which those of a token add up to the field ``weight_scale``, or to 1."""
DO_NOT = ("raw", "full")
"""Choices with which they do not."""
FEW_STEPS = 3
STATE_STEPS = 120
"""Steps on two batches in turn, so that an average of either moves."""


@torch.no_grad()
def _add_up(subject: Subject) -> str:
    """Weights that the field ``weights`` calls normalised add up for every token, and raw ones not for all.

    A token without routes, or with none that weighs anything, has nothing to add up.
    """
    router: Any = subject.config.router
    settings = vars(router)
    choice, scale = settings.get("weights"), settings.get("weight_scale", 1.0)
    if choice not in ADD_UP + DO_NOT:
        raise NotApplicable("no field weights says whether a token's weights add up")
    model, worst, some, apart = subject.warm_model(), 0.0, False, False
    for training in (True, False):
        for module, decision in zip(
            routers_of(model.train(training)), subject.run(model, subject.batch()).decisions, strict=False
        ):
            for factor in (1.0, SHARP):
                with parameters_set(module, partial(torch.mul, other=factor)):
                    routing = module(decision.hidden, decision.context).exact()
                table = subject.table(Decision(decision.hidden, decision.context, routing))
                sums = table.nansum(dim=1)
                asked = sums[(sums > 0) & table.isnan().any(dim=1)]
                some |= len(asked) > 0
                off = float((asked / scale - 1).abs().max()) if len(asked) else 0.0
                worst, apart = max(worst, off), apart or off > TOLERANCE
    if not some:
        raise NotApplicable("every token takes all experts")
    if choice not in ADD_UP:
        require(apart, f"router.weights={choice}, but those of every token add up to {scale:g}")
        return f"router.weights={choice}: they do not add up to {scale:g}"
    require(not apart, f"router.weights={choice}, but the sum of a token's differs from {scale:g} by {worst:.0%}")
    return f"router.weights={choice}: those of every token add up to {scale:g}"


@torch.no_grad()
def _act_once(subject: Subject) -> str:
    """A coefficient of the configuration that is doubled doubles what it weighs, and changes nothing else.

    The fields ``NAME_weight``, of losses, which themselves are unweighted, and ``weight_scale``, of routes. And
    coefficients are the same in all layers, of which the model takes the lowest's.
    """
    router: Any = subject.config.router
    fields = [
        name
        for name, value in vars(router).items()
        if (name.endswith("_weight") or name == "weight_scale") and isinstance(value, float) and value > 0
    ]
    if not fields:
        raise NotApplicable("no coefficient is configured")
    model = subject.model()
    _differs_by_no_layer(subject, model)
    one, coefficients = _first(subject, model), model.aux_weights
    for field in fields:
        changes: dict[str, Any] = {field: 2 * getattr(router, field)}
        doubled = subject.model(router=replace(router, **changes))
        other = _first(subject, doubled)
        ratios = {name: doubled.aux_weights[name] / value for name, value in coefficients.items() if value}
        wrong = [name for name, ratio in ratios.items() if min(abs(ratio - 1), abs(ratio - 2)) > TOLERANCE]
        for name in wrong:
            require(False, f"router.{field} doubled makes the coefficient of {name} {ratios[name]:.2g} times as large")
        for name, value in one.routing.aux.items():
            apart = relative(other.routing.aux[name], value)
            require(
                apart <= TOLERANCE,
                f"router.{field} doubled changes the {name} loss by {apart:.0e}: losses are unweighted, what weighs "
                "them belongs in Router.aux_weights",
            )
        factor = 2.0 if field == "weight_scale" else 1.0
        require(
            same_routes(subject.table(other), factor * subject.table(one)),
            f"router.{field} doubled does not make routes weigh {factor:g} times as much",
        )
        require(
            factor == 2 or any(abs(ratio - 2) <= TOLERANCE for ratio in ratios.values()),
            f"router.{field} doubled doubles no coefficient",
        )
    return f"doubled: {', '.join(fields)}"


def _first(subject: Subject, model: DecoderLM) -> Decision:
    """Decision of the lowest router, of an input that no router has changed."""
    return subject.run(model, subject.batch()).decisions[0]


def _differs_by_no_layer(subject: Subject, model: DecoderLM) -> None:
    """Raise if coefficients differ between layers after steps in which one was busy and the next idle."""
    routers: list[Router] = routers_of(model)
    uses = step_uses(subject.run(model, subject.batch()).output.uses)
    loads = [use.tokens_per_expert * (2.0 if layer % 2 else 0.1) for layer, use in enumerate(uses)]
    mean = float(torch.stack(loads).sum()) / max(1, len(uses) * uses[0].tokens)
    for router, use, load in zip(routers, uses, loads, strict=True):
        for _ in range(FEW_STEPS):
            router.after_step(replace(use, tokens_per_expert=load, experts_per_token=mean))
    for router in routers[1:]:
        require(
            router.aux_weights == routers[0].aux_weights,
            f"coefficients {router.aux_weights} in layer {router.layer} and {routers[0].aux_weights} in layer "
            f"{routers[0].layer} after steps with other loads: a model has one, see StepUse.experts_per_token",
        )
    model.load_state_dict(subject.model().state_dict())


@torch.no_grad()
def _are_read(subject: Subject) -> str:
    """Every field of the configuration that gets another value changes something: one that no code reads misleads.

    Seen are parameters and state as they begin, coefficients, all of a decision in both modes, early and late, and
    where ``STATE_STEPS`` steps take the state.
    """
    router: Any = subject.config.router
    read, fixed = list[str](), list[str]()
    for name in (field.name for field in fields(router) if field.name != "name"):
        others = list(_with_other(subject, router, name, _choices(router, name)))
        if not others:
            fixed.append(name)
            continue
        # What the scheme's checks refuse, they have read.
        values = " or ".join(str(getattr(other, name)) for other in others[:2] if other is not None)
        require(
            None in others or any(_differ(subject, router, other) for other in others) or _waits(subject, router, name),
            f"with router.{name}={values} all is as with {getattr(router, name)}, every decision, loss, count, "
            "coefficient and state: nothing reads it",
        )
        read.append(name)
    if not read:
        raise NotApplicable("no field can have another value")
    return ", ".join(read) + (f"; nothing else fits {', '.join(fixed)}" if fixed else "")


def _waits(subject: Subject, router: Any, name: str) -> bool:
    """Whether the field ``name`` changes something once other fields have other values.

    All whole numbers, of which some may be steps, are 1; or a choice or something that is off is another.
    """
    names = [field.name for field in fields(router) if field.name not in ("name", name)]
    off = [one for one in names if isinstance(getattr(router, one), str | bool | None) or getattr(router, one) == 0]
    bases = [base for one in off for base in _with_other(subject, router, one, _choices(router, one))]
    ones = router
    for one in names:
        if type(getattr(router, one)) is int:
            ones = next(_with_other(subject, ones, one, [1]), None) or ones
    return any(
        _differ(subject, base, other)
        for base in (ones, *bases)
        if base is not None
        for other in _with_other(subject, base, name, _choices(base, name))
        if other is not None
    )


def _choices(router: Any, name: str) -> list[Any]:
    """Other values to try for a field."""
    value, hint = getattr(router, name), get_type_hints(type(router))[name]
    words = [one for part in (hint, *get_args(hint)) if get_origin(part) is Literal for one in get_args(part)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [2 * value, value / 2, 10 * value, 1, 0.5, 0]  # a far one too: a limit need not bind from near
    return words or ([1, 2, 0.5, True] if value is None else [])


def _with_other(subject: Subject, router: Any, name: str, choices: list[Any]) -> Iterator[Any]:
    """The configuration with each value that the field's type allows; None for one that the scheme's checks refuse."""
    valid = TypeAdapter(get_type_hints(type(router), include_extras=True)[name])
    for choice in choices:
        try:
            changes: dict[str, Any] = {name: valid.validate_python(choice)}
        except ValidationError:
            continue
        if changes[name] == getattr(router, name):
            continue
        try:
            other = replace(router, **changes)
            other.check_num_experts(subject.num_experts)
            other.check_sequence_length(subject.sequence)
        except ValueError:
            yield None
        else:
            yield other


def _differ(subject: Subject, ours: Any, theirs: Any) -> bool:
    """Whether anything that is seen of two configurations' routers is not the same but for rounding."""
    try:
        return not all(starmap(_are_same, zip_longest(_seen_of(subject, ours), _seen_of(subject, theirs))))
    except Exception:  # a value that its type allows and its router does not is one that is read
        return True


def _are_same(ours: object, theirs: object) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return type(ours) is type(theirs) and ours == theirs
    if ours.shape != theirs.shape:
        return False
    return torch.allclose(ours.double(), theirs.double(), rtol=TOLERANCE, atol=0.0, equal_nan=True)


def _seen_of(subject: Subject, config: Any) -> Iterator[object]:
    """All that can be seen of a configuration's routers, what is quickly found first."""
    yield config.mean_experts_per_token, config.two_pass_weight
    model = subject.model(router=config)
    routers = routers_of(model)
    for router in routers:
        yield list(router.state_dict()), router.aux_weights, router.num_sums
        yield from router.state_dict().values()
    decisions = []
    for step in (0, *LATE_STEPS):
        for training in (True, False):
            # Routes of a global batch that is not the micro-batch.
            told = (lambda layer, own: own.flip(0)) if training else None
            for seed in (0, 1):
                decisions.append(subject.run(model.train(training), subject.batch(seed=seed), step, told).decisions[0])
                routing = decisions[-1].routing
                yield from (routing.token_index, routing.expert_index, routing.weight, routing.payload, routing.carried)
                yield from (value for _, value in sorted(routing.aux.items()))
                yield from (getattr(routing.use, field.name) for field in fields(routing.use))
    router = routers[0].train()
    for step in range(1 if type(router).after_step is Router.after_step else STATE_STEPS):
        hidden, context, _ = decisions[step % 2]
        use = step_uses([router(hidden, context).exact().use])[0]
        yield repr(router.after_step(use))
        yield router.metrics(use), router.aux_weights
        yield from router.buffers()


CONFIGURED: dict[str, Callable[[Subject], str]] = {
    "weights add up as configured": _add_up,
    "coefficients act once": _act_once,
    "every field is read": _are_read,
}
"""Name of the row -> the question behind it."""
