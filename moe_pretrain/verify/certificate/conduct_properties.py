"""Rows of the certificate: noise, and what a router does beside deciding.

What a function raises: ``route_properties``.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import RoutingContext, StepUse, step_uses
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    ROWS,
    NotApplicable,
    Subject,
    context_of,
    move_state,
    require,
    route_table,
    routers_of,
    same_routes,
)

EQUAL_TOKENS = 256
MANY_DRAWS = 4096
"""Tokens by which an expert that is drawn too often shows."""
NOISE_STEPS = (*range(5), 8, 10, 16, 32, 64, 100, 128, 256, 500, 512, 1000, 1024, 10_000)
"""Steps whose noise is compared: those after which a counter begins anew."""
FIRST_POSITIONS = (0, 256, 1000, 1024, 4096, 2**15, 2**16, 2**20, 2**31, 2**32)
"""The same of positions."""
SURELY = 5.0
"""Standard deviations by which the number of draws of an expert does not differ by chance."""
LATE_POSITION = 2**42
"""Tokens after a million steps of four million: float32 counts up to 2**24."""


def _draws_noise_anew(subject: Subject) -> str:
    """Noise in training is another one in every step and layer, and late in a run as various as early.

    A router whose decisions change with the seed is given equal tokens. If it tells them apart, that is noise. A second
    pass over a micro-batch draws anew. No seed, layer, step or part of the run has the noise of another. Where draws
    alone decide, every expert is drawn equally often: in training with parameters of zero, and of a scheme without
    parameters in evaluation too.
    """
    model = subject.warm_model()
    decision = subject.run(model, subject.batch(one_document=True)).decisions[-1]
    tokens = torch.zeros(EQUAL_TOKENS, dtype=torch.long)
    hidden = decision.hidden[tokens]
    context = replace(
        context_of(decision.context, tokens),
        num_sequences=ROWS,
        token_position=torch.arange(EQUAL_TOKENS),
        global_tokens=EQUAL_TOKENS,
        document_ids=torch.zeros_like(tokens),
    )
    layers = subject.unshrunk.model.moe_layers[-2:]
    # A model of one layer has no other; that which would be above it serves as one.
    layers = layers if len(layers) == 2 else [layers[0], layers[0] + 1]
    like = routers_of(model)[-1]

    @torch.no_grad()
    def decide(layer: int = layers[0], **told: Any) -> Tensor:
        router = subject.router_at(layer, like)
        if router is None:
            raise NotApplicable("the router of another layer has other parameters")
        return route_table(router(hidden, replace(context, **told)), EQUAL_TOKENS, subject.num_experts)

    def changes(table: Tensor) -> bool:
        return not same_routes(first, table, tolerance=0.0)

    first = decide()
    if not changes(decide(seed=context.seed + 1)):
        raise NotApplicable("no decision in training changes with the seed: there is no noise")
    various, moves = _various(first), changes(decide(step=1))
    if various == 1 and context.token_ids is not None:
        ids = torch.arange(EQUAL_TOKENS) % subject.config.model.vocab_size
        require(
            _various(decide(token_ids=ids)) == 1 or bool(like.numbered_experts),
            "the noise of a token is that of its vocabulary id: context.token_position must be a key",
        )
    if various == 1 and not moves:
        raise NotApplicable("the seed changes decisions, but equal tokens route alike in all steps: it is no noise")
    require(moves, "the noise of a token is the same in every step: context.step must be one of its keys")
    require(changes(decide(layers[1])), "the noise of a token is the same in every layer: Router.layer must be a key")
    if subject.config.router.num_passes > 1:
        require(
            changes(decide(pass_index=1 - context.pass_index)),
            "both passes draw the same: context.pass_index must be a key",
        )
    by_token = _is_of_each_token(first)  # a scheme may draw for a whole row
    if by_token:
        _repeats_nothing(decide, layers, context)
    if not list(like.parameters()):
        _draws_all_alike(like, hidden[:1], context, (True, False) if by_token else (False,))
    elif not like.numbered_experts:
        undecided = subject.build_router(layers[0])
        with torch.no_grad():
            for parameter in undecided.parameters():
                parameter.zero_()
            drawn = undecided(hidden, context)
        if _is_of_each_token(route_table(drawn, EQUAL_TOKENS, subject.num_experts)):
            _draws_all_alike(undecided, hidden[:1], context, (True,))
    late = _various(decide(step=LATE_STEPS[-1], token_position=context.token_position + LATE_POSITION))
    require(
        2 * late >= various,
        f"{EQUAL_TOKENS} equal tokens have {various} decisions early in a run and {late} after {LATE_POSITION} tokens: "
        "positions are rounded",
    )
    return f"another one in every step and layer; {EQUAL_TOKENS} equal tokens have {various} decisions, late {late}"


def _is_of_each_token(table: Tensor) -> bool:
    """Whether equal tokens differ from their neighbours so often that no two tables are the same by chance."""
    decided = table.nan_to_num(-1.0)
    return int((decided[1:] != decided[:-1]).any(dim=1).sum()) > EQUAL_TOKENS // 4


def _repeats_nothing(decide: Callable[..., Tensor], layers: Sequence[int], context: RoutingContext) -> None:
    """Raise if two seeds, layers, steps or parts of a run have the same noise."""
    found: dict[bytes, str] = {}
    position = context.token_position
    for seed, layer, step in product((context.seed, context.seed + 1), layers, NOISE_STEPS):
        for first in FIRST_POSITIONS if (seed, layer, step) == (context.seed, layers[0], 0) else (0,):
            told = f"seed {seed}, layer {layer}, step {step}, tokens from {first}"
            drawn = decide(layer, seed=seed, step=step, token_position=position + first).nan_to_num(-1.0)
            other = found.setdefault(drawn.numpy().tobytes(), told)
            require(other == told, f"the noise of {told} is that of {other}")


@torch.no_grad()
def _draws_all_alike(router: Router, hidden: Tensor, context: RoutingContext, modes: Sequence[bool]) -> None:
    """Raise unless a router that nothing but draws decides gives every expert as many tokens, but for chance."""
    tokens = torch.zeros(MANY_DRAWS, dtype=torch.long)
    context = replace(
        context_of(context, tokens), num_sequences=1, token_position=torch.arange(MANY_DRAWS), global_tokens=MANY_DRAWS
    )
    for training in modes:
        load = router.train(training)(hidden[tokens], context).use.tokens_per_expert
        mean = float(load.mean())
        require(
            float((load - mean).abs().max()) <= SURELY * mean**0.5,
            f"{MANY_DRAWS} draws in {'training' if training else 'evaluation'} give an expert {float(load.min()):.0f} "
            f"to {float(load.max()):.0f} tokens, by chance it would be {mean:.0f} each",
        )
    router.train()


def _various(table: Tensor) -> int:
    return len(table.nan_to_num(-1.0).unique(dim=0))


def _leaves_alone_what_it_is_given(subject: Subject) -> str:
    """A router changes neither its input, nor what it is told, nor a step's counts, nor global random generators.

    Nor what other routers of its class have: a second model begins as the first did.
    """
    model, batch = subject.model(), subject.batch(padding=(1,))
    routers = routers_of(model)
    complaints: list[str] = []
    kept: list[dict[str, Any]] = []

    def before(module: torch.nn.Module, inputs: tuple) -> None:
        kept.append(_given(*inputs) | _generators())

    def after(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        now = _given(*inputs) | _generators()
        complaints.extend(name for name, value in kept.pop().items() if not _equal(value, now[name]))

    handles = [
        handle
        for router in routers
        for handle in (router.register_forward_pre_hook(before), router.register_forward_hook(after))
    ]
    first = []
    for training in (False, True):
        first.append(subject.run(model.train(training), batch))
        require(not complaints, f"forward changes {', '.join(sorted(set(complaints)))}")
    for handle in handles:
        handle.remove()
    uses = step_uses(first[-1].output.uses)
    for router, use in zip(routers, uses, strict=True):
        expected, generators = _of_use(use), _generators()
        router.after_step(use)
        router.metrics(use)
        changed = [name for name, value in _of_use(use).items() if not _equal(expected[name], value)]
        changed += [name for name, value in _generators().items() if not _equal(generators[name], value)]
        require(not changed, f"after_step or metrics changes {', '.join(changed)}")
    for step in range(20):
        seen = subject.run(model, subject.batch(seed=step), step)
        move_state(model, seen)
    again = subject.model()
    for training, ours in zip((False, True), first, strict=True):
        theirs = subject.run(again.train(training), batch)
        require(
            subject.has_same_bits(ours, theirs),
            "a second model routes otherwise than the first did, which has been trained since: routers share state",
        )
    require(
        again.aux_weights == subject.model().aux_weights, "routers share state: coefficients of a second model differ"
    )
    return "input, context, counts of a step, random generators and other models' routers"


def _given(hidden: Tensor, context: RoutingContext) -> dict[str, Any]:
    """Copies of the tensors that a forward pass is given."""
    told = {field.name: getattr(context, field.name) for field in fields(context)}
    tensors = {f"context.{name}": value.detach().clone() for name, value in told.items() if isinstance(value, Tensor)}
    return {"its input": hidden.detach().clone()} | tensors


def _of_use(use: StepUse) -> dict[str, Tensor]:
    return {
        f"StepUse.{field.name}": value.clone()
        for field in fields(use)
        if isinstance(value := getattr(use, field.name), Tensor)
    }


def _generators() -> dict[str, Any]:
    """States of the process that all share."""
    return {
        "torch's random generator": torch.get_rng_state(),
        "numpy's random generator": repr(np.random.get_state()),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
    }


def _equal(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else bool(ours == theirs)


CONDUCT: dict[str, Callable[[Subject], str]] = {
    "noise": _draws_noise_anew,
    "leaves alone what it is given": _leaves_alone_what_it_is_given,
}
"""Name of the row -> the question behind it."""
