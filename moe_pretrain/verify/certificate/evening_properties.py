"""Row of the certificate: where losses take the load that they are to even.

What a function raises: ``route_properties``.
The lowest router is called by itself, on tokens that have something in common, so that the load is uneven at first.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Routing, RoutingContext
from moe_pretrain.verify.certificate.subject import (
    NotApplicable,
    Subject,
    even_costs,
    parameters_set,
    require,
    routers_of,
    unevenness,
    with_much_in_common,
)

ROWS = 32
"""Rows of the batch: 384 tokens, of which an expert gets enough for a share to mean something."""
STEPS = 100
FIRST_STEP = 0.05
"""Length of the first step relative to a parameter's; later ones fall to 0 with their number."""
LEFT = 0.5
"""Largest part of what was uneven that the losses may leave."""
EVEN = 0.25
"""Part by which the busiest expert may exceed the mean where the load is nearly even from the start."""
WORSE = 1.15
"""Largest factor by which a loss that makes routes fewer may leave the busiest expert busier."""
SAME = 1e-4
"""Largest relative difference of a loss whose terms are added up otherwise."""
ALIKE = 0.999
"""Cosine above which two directions are the same but for rounding."""
FACTORS = (1.0, -1.0, 5.0)
"""Factors of the router's parameters with which it prefers others, and is surer."""


class _Uneven(NamedTuple):
    """A router, tokens of which it gives some experts more than others, and what a route to each expert is to cost."""

    router: Router
    hidden: Tensor
    context: RoutingContext
    costs: Tensor

    def route(self) -> Routing:
        return self.router(self.hidden, self.context).exact()


def _even_the_load(subject: Subject) -> str:
    """Aux losses alone, descended from an uneven load, leave an even one: each route times what it is to cost.

    Asked of schemes whose configuration says that a loss evens it (``RouterConfig.evens_load``). One of their losses
    pushes a token otherwise when other tokens have other experts. And of a global batch whose load is even a balance
    loss is the same whatever the router prefers, that of ``relu`` the gates' sum.
    """
    if subject.config.router.evens_load != "loss":
        raise NotApplicable("no loss is to even the load (RouterConfig.evens_load)")
    uneven = _uneven(subject)
    notes = [_descend(uneven), *_when_told_of_even_load(subject, uneven), _reads_the_load(uneven)]
    return "; ".join(notes)


def _uneven(subject: Subject) -> _Uneven:
    model = subject.model()
    router, (hidden, context, _) = routers_of(model)[0], subject.run(model, subject.batch(rows=ROWS)).decisions[0]
    return _Uneven(router, with_much_in_common(hidden), context, even_costs(subject, router))


def _descend(uneven: _Uneven) -> str:
    """Follow the gradient of the weighted losses for ``STEPS`` steps, of lengths that say nothing of its size."""
    parameters, router = list(uneven.router.parameters()), uneven.router
    found: list[float] = []
    routes: list[float] = []
    with parameters_set(router, torch.clone):
        for step in range(STEPS + 1):
            routing = uneven.route()
            routes.append(float(routing.use.tokens_per_expert.sum()))
            if 2 * routes[-1] < routes[0]:
                break  # a loss that makes routes fewer; few of them are even by chance alone
            found.append(unevenness(routing.use.tokens_per_expert, uneven.costs))
            losses = [weight * routing.aux[name] for name, weight in router.aux_weights.items() if weight]
            total = torch.stack(losses).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=False):
                    if gradient is not None and gradient.any():
                        length = FIRST_STEP * (1 - step / STEPS) * parameter.norm() / gradient.norm()
                        parameter.sub_(length * gradient)
    start, end = found[0], found[-1]
    said = f"down the losses the busiest expert goes from {start:.2f} to {end:.2f} times the mean"
    if len(found) <= STEPS:
        allowed = WORSE * start
        said += f" in {len(found) - 1} steps, in which half of the routes close"
    else:
        allowed = 1 + max(EVEN, LEFT * (start - 1))
    require(end <= allowed, f"{said}: they do not even the load")
    return said


@torch.no_grad()
def _when_told_of_even_load(subject: Subject, uneven: _Uneven) -> list[str]:
    """Compare losses of routers with other preferences that hear of the same even load; empty where none listens."""
    if not uneven.router.needs_global_routes:
        return []
    router, tokens = uneven.router, int(uneven.context.token_mask.sum())
    target = vars(subject.config.router).get("target_experts")
    even = 1 / uneven.costs
    load = (target or subject.config.router.mean_experts_per_token) * tokens * even / even.sum()
    context = replace(uneven.context, sum_over_global_batch=lambda layer, own: load, global_tokens=tokens)
    values: dict[str, list[float]] = {}
    for factor in FACTORS:
        with parameters_set(router, partial(torch.mul, other=factor)):
            routing = router(uneven.hidden, context).exact()
        of_gates = float(routing.weight.sum()) / tokens
        for name, weight in router.aux_weights.items():
            if weight > 0 and "balance" in name:
                values.setdefault(name, []).append(float(routing.aux[name]))
            elif weight > 0 and name == "sparsity" and of_gates:
                values.setdefault(name, []).append(float(routing.aux[name]) / of_gates)
    for name, found in values.items():
        wanted = 1.0 if name == "sparsity" else found[0]
        apart = max(abs(value - wanted) for value in found)
        words = "times a token's gates" if name == "sparsity" else "for routers that prefer other experts"
        numbers = ", ".join(f"{value:.4f}" for value in found)
        require(
            apart <= SAME * wanted,
            f"of a global batch whose load is even the {name} loss is {numbers} {words}"
            + (", and is to be 1" if name == "sparsity" else ": it aims at another load"),
        )
    return [f"{', '.join(values)} of an even load the same for every router"] if values else []


def _reads_the_load(uneven: _Uneven) -> str:
    """Raise unless the direction in which some loss pushes the first tokens of rows depends on where all others go."""
    router, hidden, context = uneven.router, uneven.hidden, uneven.context
    first = torch.arange(len(hidden)) % (len(hidden) // context.num_sequences) == 0
    elsewhere = torch.where(first[:, None], hidden, -hidden)
    told = context
    if router.needs_global_routes:
        told = replace(context, sum_over_global_batch=lambda layer, own: own.flip(0))
    pushes: dict[str, list[Tensor]] = {}
    for given, facts in ((hidden, context), (elsewhere, told)):
        given = given.clone().requires_grad_()
        routing = router(given, facts)
        for name, weight in router.aux_weights.items():
            value = routing.aux[name]
            if weight > 0 and value.requires_grad:
                gradient = torch.autograd.grad(value, given, retain_graph=True, allow_unused=True)[0]
                pushes.setdefault(name, []).append(torch.zeros(1) if gradient is None else gradient[first].flatten())
    found = [
        name
        for name, (one, other) in pushes.items()
        if one.any() and other.any() and cosine_similarity(one, other, dim=0) < ALIKE
    ]
    require(
        bool(found),
        "no loss reads the load: whatever experts other tokens have, each pushes a token the same way",
    )
    return f"what {', '.join(found)} presses on depends on the load"


EVENING: dict[str, Callable[[Subject], str]] = {"losses even the load": _even_the_load}
"""Name of the row -> the question behind it."""
