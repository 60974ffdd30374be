"""Rows of the certificate: what an aux loss is a mean of, and what losses and entropy are where it is known.

What a function raises: ``route_properties``.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Routing
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    ROWS,
    Decision,
    NotApplicable,
    Subject,
    is_noisy,
    parameters_set,
    relative,
    require,
    routers_of,
    rows_of,
    twice,
)

SAME = 1e-4
"""Largest relative difference of a float32 mean over tokens in another order."""
BATCHES = 3
UPPER_LAYER = 31
AT_UNIFORM: dict[str, Callable[[int], float]] = {
    "router_z": lambda experts: math.log(experts) ** 2,
    "entropy": math.log,
    "dynamic": math.log,
}
"""Losses of ``moe.losses``, by the names that routers give them -> value when all logits are 0."""


def _are_means_of_text(subject: Subject) -> str:
    """Every aux loss with a coefficient is a mean over the text of the global batch, and of all of it.

    The same tokens twice have the same loss. Parts of a batch, weighted by their text, have that of the whole, unless
    ``Router.losses_depend_on_cut`` or the level says otherwise: the engine tells parts the global batch's routes if
    ``Router.needs_global_routes``. And every place of the batch moves a loss that any token moves.
    """
    model = subject.warm_model()
    router = routers_of(model)[0]
    weighted = [name for name, weight in router.aux_weights.items() if weight > 0]
    if not weighted:
        raise NotApplicable("no aux loss has a weight")
    notes = []
    batch = subject.batch(padding=(1,))
    seen = subject.run(model, batch)
    decision = seen.decisions[0]
    with torch.no_grad():
        doubled = router(*twice(decision))
    for name in weighted:
        apart = relative(doubled.aux[name], decision.routing.aux[name])
        require(apart <= SAME, f"the {name} loss of the same tokens twice differs by {apart:.0e}: it is no mean")
    if router.losses_depend_on_cut or subject.config.router.balance_level == "micro_batch":
        notes.append("depends on the cut, as is declared")
    elif not router.causal_in_training:
        notes.append("routes depend on the cut, as is declared")
    else:
        for name, apart in _apart_when_cut(subject, batch, weighted).items():
            require(
                apart <= SAME,
                f"the {name} loss differs by {apart:.0e} when 4 rows become 1 and 3: see Router.needs_global_routes "
                "and Router.losses_depend_on_cut",
            )
        notes.append("the same in parts of 1 and 3 rows")
    unmoved = _places_that_do_not_move(subject, weighted)
    for name, (places, all_places) in unmoved.items():
        require(
            places == 0,
            f"{places} of {all_places} places of text do not move the {name} loss: it is a mean over some of the text",
        )
    if unmoved:
        notes.append(f"every place moves {', '.join(unmoved)}")
    return f"{', '.join(weighted)}: the same for the same tokens twice; {'; '.join(notes)}"


def _apart_when_cut(subject: Subject, batch: MicroBatch, names: list[str]) -> dict[str, float]:
    """Relative difference between each loss of the whole batch and that of its parts."""
    model = subject.warm_model()
    router, text = routers_of(model)[0], int((batch.document_ids >= 0).sum())
    with torch.no_grad():
        whole = subject.run(model, batch).decisions[0].routing
        parts = [rows_of(batch, slice(1)), rows_of(batch, slice(1, ROWS))]
        total = whole.use.tokens_per_expert
        # The engine counts ahead for those alone that say that they need it.
        pooled = (lambda layer, own: total) if router.needs_global_routes else (lambda layer, own: own)
        sums = dict.fromkeys(names, torch.zeros(()))
        for part in parts:
            routing = subject.run(model, part, 0, pooled, text).decisions[0].routing
            share = int((part.document_ids >= 0).sum()) / text
            sums = {name: sums[name] + share * routing.aux[name] for name in names}
    return {name: relative(sums[name], whole.aux[name]) for name in names}


def _places_that_do_not_move(subject: Subject, names: list[str]) -> dict[str, tuple[int, int]]:
    """Places of text, of several batches, whose tokens have no gradient of a loss; losses of parameters alone aside."""
    model = subject.warm_model()
    router = routers_of(model)[0]
    moving: dict[str, Tensor] = {}
    for seed in range(BATCHES):
        decision = subject.run(model, subject.batch(seed=seed, padding=(ROWS - 1,))).decisions[0]
        given = decision.hidden.clone().requires_grad_()
        routing: Routing = router(given, decision.context)
        for name in names:
            value = routing.aux[name]
            gradient = (
                torch.autograd.grad(value, given, allow_unused=True, retain_graph=True)
                if value.requires_grad
                else (None,)
            )
            if gradient[0] is not None and gradient[0].any():
                moving[name] = moving.get(name, torch.zeros(len(given), dtype=torch.bool)) | (gradient[0] != 0).any(
                    dim=1
                )
    text = (ROWS - 1) * subject.sequence
    return {name: (text - int(moved[:text].sum()), text) for name, moved in moving.items()}


def _are_right_when_uniform(subject: Subject) -> str:
    """At uniform probabilities the entropy is ``ln(num_experts)``, the z-loss its square, a balance loss 1.

    With this number of experts, and with another, in the lowest layer at the first step and in an upper one at a late
    step. Whether probabilities are uniform with parameters of zero is not
    asked of the scheme: one of these that is right says so, and then all must be.
    """
    if not list(routers_of(subject.model())[0].parameters()):
        raise NotApplicable("the router has no parameters")
    found = [_judge_when_uniform(subject)]
    for other in (2 * subject.num_experts, 3 * subject.num_experts):
        one = subject.with_experts(other)
        if one is not None:
            found.append(_judge_when_uniform(one))
            break
    return "; ".join(found)


def _judge_when_uniform(subject: Subject) -> str:
    model = subject.model()
    decisions = subject.run(model, subject.batch()).decisions
    found = _judge_router_when_uniform(subject, routers_of(model)[0], decisions[0])
    upper = subject.router_at(UPPER_LAYER, routers_of(model)[-1])
    if upper is not None:
        late = replace(decisions[-1].context, step=LATE_STEPS[-1])
        _judge_router_when_uniform(subject, upper, decisions[-1]._replace(context=late))
    return found


def _judge_router_when_uniform(subject: Subject, router: Router, decision: Decision) -> str:
    with parameters_set(router, torch.zeros_like), torch.no_grad():
        # Probabilities with noise are not uniform; evaluation has none.
        router.train(not is_noisy(router, decision.hidden, decision.context))
        routing = router(decision.hidden, decision.context)
    router.train()
    experts, use = subject.num_experts, routing.use
    wanted = {"router_entropy": (float(use.router_entropy / use.tokens), math.log(experts))}
    for name, value in routing.aux.items():
        if name in AT_UNIFORM:
            wanted[f"the {name} loss"] = (float(value), AT_UNIFORM[name](experts))
    uneven = bool((use.tokens_per_expert != use.tokens_per_expert[0]).any())  # else it is 1 for all probabilities
    if "load_balance" in routing.aux and uneven and not router.balanced_costs:
        wanted["the load_balance loss"] = (float(routing.aux["load_balance"]), 1.0)
    right = {name for name, (value, expected) in wanted.items() if abs(value - expected) <= SAME * expected}
    if not right:
        raise NotApplicable(
            f"weights of zero do not make its probabilities uniform (entropy {wanted['router_entropy'][0]:.3f} nats)"
        )
    for name, (value, expected) in wanted.items():
        require(
            name in right,
            f"{name} is {value:.4f} at uniform probabilities of {experts} experts instead of {expected:.4f}, and "
            f"{', '.join(sorted(right))} is right",
        )
    return f"{', '.join(wanted)} with {experts} experts"


LOSSES: dict[str, Callable[[Subject], str]] = {
    "losses are means of the text": _are_means_of_text,
    "entropy and losses at uniform": _are_right_when_uniform,
}
"""Name of the row -> the question behind it."""
