"""Rows of the certificate: gradients beside finite differences. What a function raises: ``route_properties``.

A router is called by itself on few tokens, and its parameters or its input are moved along random directions: the
lowest router at the first step, and the topmost at a late one. Only directions along which no route changes count,
since at a change of routes there is no derivative. The quotient is taken from four points (an error of fourth order in
the step), so float32 leaves about four digits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Routing
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    NotApplicable,
    Subject,
    require,
    route_table,
    routers_of,
    rows_of,
)

STEPS = (0.03, 0.01, 3e-3, 1e-3, 3e-4)
"""Sizes of a move relative to what is moved, largest first: a large one has less rounding, a small one keeps routes."""
PLACES = ((0, 0), (-1, LATE_STEPS[0]))
"""The lowest router at the first step and the topmost at a late one: index, step."""
DIRECTIONS = 8
ENOUGH = 3
"""Directions without a change of routes that a comparison needs."""
ALLOWED = 0.02
"""Largest part of the derivative by which gradient and quotient may differ, beside the quotient's rounding."""
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Relative error of a float32 sum of about a hundred terms, generously."""
SMOOTH = 0.1
"""Largest relative difference of the quotients over one and over two steps where there is no jump between."""


@dataclass(frozen=True)
class _Comparison:
    """A gradient beside difference quotients along some directions.

    Attributes:
        gradient: Derivatives along the directions by autograd.
        quotient: The same by finite differences.
        noise: What rounding may make of a quotient.
    """

    gradient: Tensor
    quotient: Tensor
    noise: float

    @property
    def size(self) -> float:
        """Root mean square of the larger of the two."""
        return max(_rms(self.gradient), _rms(self.quotient))

    @property
    def error(self) -> float:
        """Root mean square of the difference."""
        return _rms(self.gradient - self.quotient)

    @property
    def agrees(self) -> bool:
        """Whether they are the same up to rounding."""
        return self.error <= ALLOWED * self.size + self.noise


class _Probe:
    """One router on few tokens, called as often as need be with the same random numbers: a layer's, at a step."""

    def __init__(self, subject: Subject, at: int, step: int):
        self.num_experts = subject.num_experts
        model = subject.warm_model()
        batch = rows_of(subject.batch(), slice(0, 1))
        hidden, self.context, _ = subject.run(model, batch, step).decisions[at]
        self.router: Router = routers_of(model)[at]
        self.hidden = hidden.requires_grad_()
        self.places: dict[str, Tensor] = dict(self.router.named_parameters()) | {"the router's input": self.hidden}
        if self.context.carried is not None:
            self.context = replace(self.context, carried=self.context.carried.detach().clone().requires_grad_())
            assert self.context.carried is not None
            self.places["what the layer below carries up"] = self.context.carried
        torch.manual_seed(0)
        self.directions = {name: [_direction(place) for _ in range(DIRECTIONS)] for name, place in self.places.items()}

    def route(self) -> Routing:
        """The decision at the present parameters and input."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.router(self.hidden, self.context)

    def compare(self, name: str, value: Callable[[Routing], Tensor]) -> _Comparison | None:
        """The derivative of ``value`` along directions of ``name``; None if all small moves change routes."""
        place, routing = self.places[name], self.route()
        base = value(routing)
        gradient = torch.autograd.grad(base, place, allow_unused=True)[0] if base.requires_grad else None
        gradient = torch.zeros_like(place) if gradient is None else gradient
        routes = self._routes(routing)
        for step in STEPS:
            derivatives, quotients = [], []
            for direction in self.directions[name]:
                quotient = self._quotient(place, direction, step, value, routes)
                if quotient is not None:
                    quotients.append(quotient)
                    derivatives.append(float((gradient.double() * direction.double()).sum()))
            if len(quotients) >= ENOUGH:
                noise = ROUNDING * max(1e-6, abs(float(base.detach()))) / step
                return _Comparison(torch.tensor(derivatives), torch.tensor(quotients), noise)
        return None

    def _quotient(
        self, place: Tensor, direction: Tensor, step: float, value: Callable[[Routing], Tensor], routes: Tensor
    ) -> float | None:
        kept, values = place.detach().clone(), {}
        try:
            for times in (-2, -1, 1, 2):
                with torch.no_grad():
                    place.copy_(kept + times * step * direction)
                moved = self.route()
                if not torch.equal(self._routes(moved), routes):
                    return None
                values[times] = float(value(moved).detach())
        finally:
            with torch.no_grad():
                place.copy_(kept)
        near, far = (values[1] - values[-1]) / (2 * step), (values[2] - values[-2]) / (4 * step)
        # A choice that is no route, as of candidates, may jump as well; then the two have nothing in common.
        if abs(near - far) > SMOOTH * max(abs(near), abs(far)) + ROUNDING * max(map(abs, values.values())) / step:
            return None
        return (4 * near - far) / 3

    def _routes(self, routing: Routing) -> Tensor:
        return route_table(routing, len(self.hidden), self.num_experts).isnan()


def _direction(place: Tensor) -> Tensor:
    """A random direction as long as ``place``."""
    direction = torch.randn_like(place)
    return direction * (place.detach().norm() / direction.norm())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _moves_router_by_losses(subject: Subject) -> str:
    """The gradient of every aux loss with a weight is not zero, and is the loss's derivative at fixed routes.

    A loss that holds something constant by design says so in ``Router.gradients_by_design``; its gradient is compared
    along those parameters that have one, and the reason is printed.
    """
    if subject.num_experts == 1:
        raise NotApplicable("with one expert there is nothing to choose")
    probes = [_Probe(subject, *place) for place in PLACES]
    weighted = [name for name, weight in probes[0].router.aux_weights.items() if weight > 0]
    if not weighted:
        raise NotApplicable("no aux loss has a weight")
    notes = [f"{loss} {[_judge_loss(probe, loss) for probe in probes][0]}" for loss in weighted]
    return "; ".join(notes)


def _judge_loss(probe: _Probe, loss: str) -> str:
    """Verdict on one loss."""
    router = probe.router
    reason = router.gradients_by_design.get(loss)

    def value(routing: Routing) -> Tensor:
        require(loss in routing.aux, f"the {loss} loss has a weight, but is not in Routing.aux")
        return routing.aux[loss].double()

    found: list[_Comparison] = []
    for name in probe.places:
        one = probe.compare(name, value)
        if one is None or (reason is not None and not one.gradient.any()):
            continue
        require(
            one.agrees or reason is not None,
            f"the gradient of the {loss} loss is not its derivative: along {name} {_both(one)}",
        )
        found.append(one)
    if not found and reason is None:
        return "not compared: every small move changes routes"
    largest = max(found, key=lambda one: one.size, default=None)
    if largest is None or not largest.gradient.any():
        load = probe.route().use.tokens_per_expert
        # With even load the balance loss is 1 whatever the probabilities are.
        if bool((load == load.mean()).all()):
            return "is constant, since the load is even whatever the router does"
        require(False, f"the {loss} loss has a weight, but no gradient: it moves nothing")
    assert largest is not None
    return f"{_apart(largest)}" + (f" ({reason})" if reason else "")


def _has_derivative_of_weights(subject: Subject) -> str:
    """Gradients of the weights, of the payload and of what is carried up are the derivatives at fixed routes.

    Along parameters, the router's input, and what the layer below carries up.
    """
    return [_judge_weights(_Probe(subject, *place)) for place in PLACES][0]


def _judge_weights(probe: _Probe) -> str:
    """Verdict on one layer at one step."""
    reason = probe.router.gradients_by_design.get("weight")
    if reason is not None:
        raise NotApplicable(f"the scheme declares that its weights' gradient is not the derivative: {reason}")
    generator = torch.Generator().manual_seed(0)
    base = probe.route()
    columns = 0 if base.payload is None else base.payload.shape[1]
    upstream = torch.randn(len(probe.hidden), probe.num_experts, 1 + columns, generator=generator).double()

    def value(routing: Routing) -> Tensor:
        factor = upstream[routing.token_index, routing.expert_index]
        total = (routing.weight.double() * factor[:, 0]).sum()
        if routing.payload is not None:
            total = total + (routing.payload.double() * factor[:, 1:]).sum()
        if routing.carried is not None:
            total = total + (routing.carried.double() * upstream[:, :, 0]).sum()
        return total

    found = {}
    for name in probe.places:
        one = probe.compare(name, value)
        if one is None:
            continue
        require(one.agrees, f"along {name} {_both(one)}")
        found[name] = one
    if not found:
        raise NotApplicable("every small move changes routes, and there is no derivative")
    if not any(one.gradient.any() for one in found.values()):
        raise NotApplicable("weights are constant, and so is the payload")
    moving = {name: one for name, one in found.items() if one.gradient.any()}
    worst = max(moving.values(), key=lambda one: one.error / one.size)
    return f"along {', '.join(moving)}: {_apart(worst)}"


def _apart(one: _Comparison) -> str:
    return f"within {max(one.error / one.size, 1e-9):.0e} of the difference quotient"


def _both(one: _Comparison) -> str:
    """The direction in which they differ most."""
    worst = int((one.gradient - one.quotient).abs().argmax())
    return f"it is {float(one.gradient[worst]):.3g}, the difference quotient {float(one.quotient[worst]):.3g}"


DERIVATIVES: dict[str, Callable[[Subject], str]] = {
    "aux losses move the router": _moves_router_by_losses,
    "weights' gradient is a derivative": _has_derivative_of_weights,
}
"""Name of the row -> the question behind it."""
