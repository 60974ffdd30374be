"""Scale of balance losses: 1 when routing is uniform, and their closed form when it has collapsed (C15)."""

import math

import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Routing
from moe_pretrain.verify.certificate.subject import (
    Decision,
    NotApplicable,
    Subject,
    is_noisy,
    parameters_set,
    require,
    routers_of,
)

SURE_LOGIT = 30.0
"""A logit at which float32's softmax and sigmoid are sure."""


def is_one_when_uniform(subject: Subject) -> str:
    """A balance loss is 1, unweighted, at uniform probabilities (C15).

    ``num_experts * sum_e(f_e * 1 / num_experts)`` is 1 for any shares ``f``, so it does not matter where ties go.
    """
    router, decision, names = _balance_losses(subject)
    routing = _routed_when_uniform(subject, router, decision)
    if isinstance(routing, str):
        raise NotApplicable(routing)
    for name in names:
        value = routing.aux[name].item()
        require(abs(value - 1) <= 1e-6, f"{name} is {value:.6f} at uniform probabilities instead of 1")
    others = ", ".join(sorted(routing.aux.keys() - set(names)))
    unchecked = f"; nothing checks the scale of {others}" if others else ""
    return f"{', '.join(names)} is 1 at uniform probabilities (exact for any routes, so ties do not matter){unchecked}"


def has_closed_form_when_collapsed(subject: Subject) -> str:
    """A balance loss is ``num_experts / m * (share of routes to m experts)`` when those ``m`` surely get every token.

    That is ``num_experts / top_k`` for top-k routing (C15). ``m`` is ``top_k``, or 1 for a scheme without it.
    """
    router, decision, names = _balance_losses(subject)
    routing = _routed_when_collapsed(subject, router, decision)
    if isinstance(routing, str):
        raise NotApplicable(routing)
    few, expected = _few(subject), _when_collapsed(subject, routing)
    for name in names:
        value = routing.aux[name].item()
        right = abs(value - expected) <= 1e-4 * expected
        require(right, f"{name} is {value:.4f} when collapsed on {few} instead of {expected:.4f}")
    share = expected * few / subject.num_experts
    verb = "has" if few == 1 else "have"
    more = "" if share == 1 else f" and {share:.2f} of the routes"
    return f"{expected:.4f} when {few} of {subject.num_experts} experts {verb} all probability{more}"


def _few(subject: Subject) -> int:
    """Experts on which a router is made to collapse."""
    return vars(subject.config.router).get("top_k", 1)


def _routed_when_uniform(subject: Subject, router: Router, decision: Decision) -> Routing | str:
    """Routing with uniform probabilities, or the reason why it cannot be brought there."""
    with parameters_set(router, torch.zeros_like):
        routing = router(decision.hidden, decision.context)
    entropy = float(routing.use.router_entropy / routing.use.tokens)
    if abs(entropy - math.log(subject.num_experts)) > 1e-4:
        return f"weights of zero do not make its probabilities uniform (entropy {entropy:.3f} nats)"
    return routing


def _routed_when_collapsed(subject: Subject, router: Router, decision: Decision) -> Routing | str:
    """Routing when the router is sure of few experts, or the reason why it cannot be brought there."""
    num_experts, few, hidden = subject.num_experts, _few(subject), decision.hidden
    if not all(parameter.shape[0] == num_experts for parameter in router.parameters()):
        return "its parameters do not belong to one expert each, so they cannot be set to collapse"
    for others in (-1.0, 0.0):  # a logit may be negative, a norm not

        def collapsed(parameter: Tensor, others: float = others) -> Tensor:
            level = torch.where(torch.arange(num_experts) < few, 1.0, others) * SURE_LOGIT / hidden.shape[1]
            return level.view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)

        with parameters_set(router, collapsed):
            routing = router(torch.ones_like(hidden), decision.context)
        entropy = float(routing.use.router_entropy / routing.use.tokens)
        if abs(entropy - math.log(few)) <= 1e-3:
            return routing
    return f"its probabilities do not collapse on {few} experts (entropy {entropy:.3f} nats)"


def _when_collapsed(subject: Subject, routing: Routing) -> float:
    """The balance loss of a collapsed decision."""
    few, load = _few(subject), routing.use.tokens_per_expert
    return subject.num_experts / few * float(load[:few].sum() / load.sum())


def _balance_losses(subject: Subject) -> tuple[Router, Decision, list[str]]:
    """The first router, what it decided, and its losses that are called or behave like a balance loss.

    A loss behaves like one if from uniform to collapsed probabilities it grows by the factor of the balance loss.
    """
    model = subject.model()
    router, decision = routers_of(model)[0], subject.run(model, subject.batch()).decisions[0]
    # Probabilities with noise are neither uniform nor sure; evaluation has none.
    router.train(not is_noisy(router, decision.hidden, decision.context))
    names = [name for name in decision.routing.aux if "balance" in name]
    others = [name for name in decision.routing.aux if name not in names]
    uniform, collapsed = (route(subject, router, decision) for route in (_routed_when_uniform, _routed_when_collapsed))
    if others and not isinstance(uniform, str) and not isinstance(collapsed, str):
        factor = _when_collapsed(subject, collapsed)
        for name in others:
            low, high = uniform.aux[name].item(), collapsed.aux[name].item()
            if low > 1e-6 and factor > 1 and abs(high / low - factor) <= 1e-3 * factor:
                names.append(name)
    if names and router.balanced_costs:
        raise NotApplicable(f"{', '.join(names)} weighs routes by the width of their expert: an even load is not 1")
    other_scales = {name: router.other_scales[name] for name in names if name in router.other_scales}
    names = [name for name in names if name not in other_scales]
    if not names and other_scales:
        raise NotApplicable("; ".join(f"{name} is in another unit: {why}" for name, why in other_scales.items()))
    if not names:
        found = ", ".join(sorted(others))
        unchecked = f"; nothing checks the scale of {found}" if found else ": it has no aux loss"
        raise NotApplicable(f"no loss is called or behaves like a balance loss{unchecked}")
    return router, decision, names
