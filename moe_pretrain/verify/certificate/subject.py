"""The tiny model on which ``certify`` tries a router: how to run it, watch its routers, and say what was found."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import PADDING_POSITION, MicroBatch, build_micro_batch
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss, routing_context
from moe_pretrain.model.block import Recompute
from moe_pretrain.model.decoder import DecoderLM, LMOutput
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.build import build_router
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard, RouterUse, Routing, RoutingContext, step_uses
from moe_pretrain.verify.small_twin import shrink

ROWS = 4
WARM_STEPS = 3
LATE_STEPS = (1_000, 1_000_000)
"""Optimizer steps at which a schedule has surely changed what it changes."""
AGE_STEPS = 300
"""Steps of ``after_step`` after which state has gone where it goes."""
SHARP = 30.0
"""Factor of a router's parameters with which it is nearly sure of everything."""
TOLERANCE = 2e-5
"""Largest relative difference that float32 sums in another order may make."""


class Broken(Exception):
    """The property does not hold."""


class NotApplicable(Exception):
    """The property says nothing about this scheme; the message is the reason."""


class DeclaredNonCausal(Exception):
    """A token's route depends on other tokens, and the scheme says so."""


def require(holds: bool | Tensor, complaint: str) -> None:
    """Raise ``Broken`` with ``complaint`` unless ``holds``."""
    if not holds:
        raise Broken(complaint)


class Decision(NamedTuple):
    """One call of one router."""

    hidden: Tensor
    context: RoutingContext
    routing: Routing


@dataclass(frozen=True)
class Pass:
    """One forward pass, with what every router saw and decided in it, bottom up."""

    output: LMOutput
    decisions: list[Decision]


@dataclass(frozen=True)
class Aged:
    """A router that many steps have moved.

    Attributes:
        router: As the last step left it.
        first: What it was given, and what it decided before the first step.
        before: Its state then.
        build: Makes another router of the same layer, in training.
        uses: Use in every step, the first one that of ``first``.
    """

    router: Router
    first: Decision
    before: dict[str, Tensor]
    build: Callable[[], Router]
    uses: list[RouterUse]

    @property
    def moved(self) -> list[str]:
        """Names of what is not as it was."""
        return [name for name, value in self.router.state_dict().items() if not torch.equal(value, self.before[name])]

    def fresh(self) -> Router:
        """A router of its own with the state of the beginning, which has decided once as all do before a step."""
        router = self.build()
        router.load_state_dict(self.before)
        with torch.no_grad():
            router(self.first.hidden, self.first.context)
        return router


class Subject:
    """``config``, shrunk as ``verify`` shrinks it, and what the properties do with it."""

    def __init__(self, config: Config):
        self.unshrunk = config
        small = shrink(config, plan_run(config, 1))
        self.config = replace(small, model=replace(small.model, recompute="none"))
        self.sequence = small.model.sequence_length
        self.num_experts = small.model.moe.kinds.total

    def model(self, recompute: Recompute = "none", router: RouterConfig | None = None) -> DecoderLM:
        """A model with the initial weights, in training mode; always the same ones."""
        shape = replace(self.config.model, recompute=recompute)
        model = DecoderLM(shape, router or self.config.router, ExpertShard())
        initialise(model, self.config.seed)
        return model

    def router_at(self, layer: int, like: Router) -> Router | None:
        """A router built for decoder layer ``layer``, with the values and the mode of ``like``.

        The tiny model need not have that layer; its scheme must not go by layer. None if the layer's router has other
        parameters than ``like``, as where logits are carried up to all but the lowest.
        """
        router = self.build_router(layer)
        if router.state_dict().keys() != like.state_dict().keys():
            return None
        router.load_state_dict(like.state_dict())
        return router.train(like.training)

    def build_router(self, layer: int) -> Router:
        """A router for decoder layer ``layer`` as it is built: ``model.init`` has not filled its parameters."""
        model = self.config.model
        router = build_router(model.moe, self.config.router, model.hidden_size, layer)
        router.use_token_counts(torch.ones(model.vocab_size, dtype=torch.int64))  # for buffers of the right size
        return router

    def with_experts(self, number: int) -> "Subject | None":
        """The subject with another number of networks in a layer; None where it cannot have so many."""
        config, moe = self.unshrunk, self.unshrunk.model.moe
        try:
            config.router.check_num_experts(number)
            return Subject(replace(config, model=replace(config.model, moe=replace(moe, num_experts=number))))
        except ValueError:
            return None

    @cached_property
    def aged(self) -> "Aged":
        """The lowest router after ``AGE_STEPS`` steps on one batch, in training; its parameters stand still."""
        model = self.model()
        router, decision = routers_of(model)[0], self.run(model, self.batch()).decisions[0]
        before = {name: value.clone() for name, value in router.state_dict().items()}
        uses = [decision.routing.use]
        # Most schemes have no state, and need no steps to show it.
        steps = 0 if type(router).after_step is Router.after_step else AGE_STEPS
        with torch.no_grad():
            for _ in range(steps):
                router.after_step(step_uses(uses[-1:])[0])
                uses.append(router(decision.hidden, decision.context).use)
        return Aged(router, decision, before, partial(self.build_router, router.layer), uses)

    def warm_model(self) -> DecoderLM:
        """A model whose routers have moved their state for a few steps."""
        model = self.model()
        model.load_state_dict(self._warm_state)
        return model

    @cached_property
    def _warm_state(self) -> dict[str, Tensor]:
        model = self.model()
        for step in range(WARM_STEPS):
            move_state(model, self.run(model, self.batch(seed=step), step))
        return model.state_dict()

    def batch(
        self, seed: int = 0, padding: Sequence[int] = (), one_document: bool = False, rows: int = ROWS
    ) -> MicroBatch:
        """``rows`` random rows of several documents each; those in ``padding`` are not text."""
        random = np.random.default_rng(seed)
        shape = (rows, self.sequence + 1)
        tokens = random.integers(0, self.config.model.vocab_size, shape)
        starts = random.random(shape) < (0.0 if one_document else 0.2)
        starts[:, 0] = False
        positions = np.arange(rows)
        positions[list(padding)] = PADDING_POSITION
        packing = self.config.packing
        return build_micro_batch(tokens, starts, positions, packing.isolate_documents, packing.reset_positions)

    def context(
        self,
        batch: MicroBatch,
        step: int,
        global_routes: Callable[[int, Tensor], Tensor] | None,
        global_tokens: int | None = None,
    ) -> RoutingContext:
        """Facts that the engine tells the routers of ``batch``: the global batch unless ``global_tokens`` differs."""
        if global_tokens is None and global_routes is not None:
            global_tokens = int((batch.document_ids >= 0).sum())
        return routing_context(batch, self.config.seed, step, global_routes, global_tokens)

    def run(
        self,
        model: DecoderLM,
        batch: MicroBatch,
        step: int = 0,
        global_routes: Callable[[int, Tensor], Tensor] | None = None,
        global_tokens: int | None = None,
    ) -> Pass:
        """Forward in the model's mode; in training ``batch`` is the global batch unless the last arguments differ."""
        if model.training and global_routes is None:
            global_routes = _own_counts
        context = self.context(batch, step, global_routes, global_tokens)
        with _watched(model) as decisions:
            output = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        return Pass(output, decisions)

    def logits(self, model: DecoderLM, batch: MicroBatch, step: int = 0) -> tuple[Tensor, list[Decision]]:
        """Logits ``[batch, sequence, vocab]`` in the model's mode, and the routers' decisions."""
        return self.logits_in(model, batch, self.context(batch, step, _own_counts if model.training else None))

    def logits_in(self, model: DecoderLM, batch: MicroBatch, context: RoutingContext) -> tuple[Tensor, list[Decision]]:
        """The same, with what the routers are told."""
        with _watched(model) as decisions:
            logits = model.logits(batch.input_ids, batch.document_ids, batch.position_ids, context)
        return logits, decisions

    def table(self, decision: Decision) -> Tensor:
        """``[tokens, experts]``: the weight of each route, NaN where there is none."""
        return route_table(decision.routing, len(decision.hidden), self.num_experts)

    def tables(self, decisions: list[Decision]) -> list[Tensor]:
        """The table of every router."""
        return [self.table(decision) for decision in decisions]

    def has_same_bits(self, ours: Pass, theirs: Pass) -> bool:
        """Whether two passes route exactly alike."""
        pairs = zip(self.tables(ours.decisions), self.tables(theirs.decisions), strict=True)
        return all(same_routes(a, b, tolerance=0.0) for a, b in pairs)

    def loss(self, model: DecoderLM, seen: Pass, batch: MicroBatch, totals: GlobalCounts | None = None) -> Tensor:
        """The training loss with aux losses; ``batch`` is its share of ``totals``, by default all."""
        tokens = int((batch.document_ids >= 0).sum())
        own = GlobalCounts(labels=batch.num_valid_labels(), tokens=tokens)
        return micro_batch_loss(seen.output, model.aux_weights, tokens, totals or own)


def _own_counts(layer: int, tokens_per_expert: Tensor) -> Tensor:
    return tokens_per_expert


@contextmanager
def _watched(model: DecoderLM) -> Iterator[list[Decision]]:
    """Collect every router's decision in the block."""
    decisions: list[Decision] = []

    def note(module: torch.nn.Module, inputs: tuple, routing: Routing) -> None:
        decisions.append(Decision(inputs[0].detach().clone(), inputs[1], routing.exact()))

    handles = [router.register_forward_hook(note) for router in routers_of(model)]
    try:
        yield decisions
    finally:
        for handle in handles:
            handle.remove()


def routers_of(model: DecoderLM) -> list[Router]:
    """The routers, bottom up."""
    return [layer.router for layer in model.moe_layers()]


def move_state(model: DecoderLM, seen: Pass) -> None:
    """Move the routers' state as the engine does after an optimizer step."""
    for router, use in zip(routers_of(model), step_uses(seen.output.uses), strict=True):
        router.after_step(use)


def rows_of(batch: MicroBatch, rows: slice | Tensor) -> MicroBatch:
    """Some rows of a micro-batch."""
    return MicroBatch(
        batch.input_ids[rows],
        batch.labels[rows],
        batch.document_ids[rows],
        batch.position_ids[rows],
        batch.row_positions[rows],
        token_hash=0,
    )


def context_of(context: RoutingContext, tokens: Tensor | slice) -> RoutingContext:
    """Context of some of the tokens; the numbers of sequences and of global tokens stay as they are."""
    told = {field.name: getattr(context, field.name) for field in fields(context)}
    some: dict[str, Any] = {name: value[tokens] for name, value in told.items() if isinstance(value, Tensor)}
    return replace(context, **some)


def twice(decision: Decision) -> tuple[Tensor, RoutingContext]:
    """Input of a router, of the decision's rows, in a micro-batch that has each of them twice."""
    tokens, told = torch.arange(len(decision.hidden)).repeat(2), decision.context
    total = None if told.global_tokens is None else 2 * told.global_tokens
    doubled = replace(
        context_of(told, tokens), num_sequences=2 * told.num_sequences, global_tokens=total, document_lengths=None
    )
    return decision.hidden[tokens], doubled


@contextmanager
def parameters_set(router: Router, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every parameter replaced by ``change`` of it inside the block."""
    kept = [parameter.detach().clone() for parameter in router.parameters()]
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(change(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(router.parameters(), kept, strict=True):
                parameter.copy_(value)


def with_much_in_common(hidden: Tensor) -> Tensor:
    """The tokens, each with the same vector added, as long as they are: of these a router prefers some experts."""
    common = normalize(torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(0)), dim=0)
    return hidden + hidden.norm(dim=1).mean() * common


def even_costs(subject: Subject, router: Router) -> Tensor:
    """Cost of a route to each expert, by which the scheme's load is even where routes times cost are; float64."""
    costs = torch.ones(subject.num_experts, dtype=torch.float64)
    costs[subject.config.model.moe.kinds.ffn :] /= subject.config.router.zero_computation_load
    return costs * torch.tensor(router.balanced_costs) if router.balanced_costs else costs


def unevenness(tokens_per_expert: Tensor, costs: Tensor) -> float:
    """Load of the busiest expert over the mean, in routes times ``even_costs``; 1 where it is even."""
    load = tokens_per_expert * costs
    return float(load.max() / load.mean().clamp(min=1e-20))


def judge_dependence(routers: Sequence[Router], training: bool, found: str) -> None:
    """Raise what a decision's dependence on other tokens is by the scheme's own declaration."""
    name = "causal_in_training" if training else "causal_in_evaluation"
    if all(getattr(router, name) for router in routers):
        raise Broken(f"{name} is declared, but {found}")
    raise DeclaredNonCausal(found)


def route_table(routing: Routing, num_tokens: int, num_experts: int) -> Tensor:
    """``[tokens, experts]``: the weight of each route, NaN where there is none."""
    table = torch.full((num_tokens, num_experts), math.nan)
    return table.index_put((routing.token_index, routing.expert_index), routing.weight.detach().float())


def same_routes(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two route tables have the same routes and, up to ``tolerance``, the same weights."""
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return False
    return bool(torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True))


@torch.no_grad()
def is_noisy(router: Router, hidden: Tensor, context: RoutingContext) -> bool:
    """Whether decisions of ``hidden`` change with the seed, in the router's mode."""
    both = (router(hidden, replace(context, seed=context.seed + more)).exact() for more in (0, 1))
    ours, theirs = ((routing.token_index, routing.expert_index, routing.weight) for routing in both)
    return not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@contextmanager
def generators_at(seed: int) -> Iterator[None]:
    """Global random generators at ``seed``, so that a scheme that asks them never gets the same twice."""
    random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def relative(ours: Tensor, theirs: Tensor) -> float:
    """``|ours - theirs| / |theirs|``; what is zero must be zero, and NaN is infinitely far."""
    difference, size = float((ours - theirs).detach().double().norm()), float(theirs.detach().double().norm())
    if size == 0 or math.isnan(difference):
        return 0.0 if difference == 0 else math.inf
    return difference / size
