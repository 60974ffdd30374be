"""Rows of the certificate: what the configuration says of weights and coefficients holds of the router.

What a function raises: ``route_properties``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import step_uses
from moe_pretrain.verify.certificate.subject import (
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


CONFIGURED: dict[str, Callable[[Subject], str]] = {
    "weights add up as configured": _add_up,
    "coefficients act once": _act_once,
}
"""Name of the row -> the question behind it."""
