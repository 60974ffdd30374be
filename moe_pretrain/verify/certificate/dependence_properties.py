"""Rows of the certificate: what a decision may not know. What a function raises: ``route_properties``."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import RouterUse, RoutingContext, step_uses
from moe_pretrain.verify.certificate.route_properties import require_same_use
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    ROWS,
    SHARP,
    Broken,
    Decision,
    NotApplicable,
    Subject,
    context_of,
    judge_dependence,
    parameters_set,
    require,
    route_table,
    routers_of,
    rows_of,
    same_routes,
    twice,
)

LARGE_ROWS = 96
"""Rows of the large batch: 1152 tokens, beyond the floors that capacities usually have."""
ALIKE = 1e-3
"""How far apart tokens are that are almost the same, relative to tokens as they are."""
SHARED_STEPS = 5
ROUNDED = 0.1
"""Largest part of a step's sums that rounding may bring from twice as much to nearer what it was."""
LOUDER = 1.5
"""Largest factor between the mean sums of a token's weights in training and in evaluation."""
LAST_NUMBER = 101
"""Documents are numbered anew from here downwards: odd is even, and first is last."""


def _keeps_documents_apart(subject: Subject, training: bool) -> str:
    """Replacing one document of a row moves no logit, route, weight or payload of the row's others.

    Nor do the numbers of documents, which say how many lie before one in its row.
    """
    if not subject.config.packing.isolate_documents:
        raise NotApplicable("packing.isolate_documents=false: documents of a row attend to each other")
    replaced, worst = 0, 0.0
    model = subject.warm_model().train(training)
    batch = subject.batch()
    vocab = subject.config.model.vocab_size
    generator = torch.Generator().manual_seed(0)
    first = batch.document_ids[:, :1]
    places = {"the first": batch.document_ids == first, "the last": batch.document_ids == batch.document_ids[:, -1:]}
    places["the second"] = batch.document_ids == first + 1
    for step in (0, *LATE_STEPS):
        logits, decisions = subject.logits(model, batch, step)
        for which, document in places.items():
            # A row of one document has nothing that may not move.
            kept = ~document & document.any(dim=1, keepdim=True)
            other = torch.randint(1, vocab, document.shape, generator=generator)
            input_ids = torch.where(document, (batch.input_ids + other) % vocab, batch.input_ids)
            new_logits, new = subject.logits(model, replace(batch, input_ids=input_ids), step)
            replaced += int((document.any(dim=1) & kept.any(dim=1)).sum())
            error = float((new_logits - logits)[kept].abs().max() / logits.abs().max()) if kept.any() else 0.0
            worst = max(worst, error)
            if error > 2e-5 or not _same(subject, decisions, new, kept.flatten()):
                what = "routes or weights" if error <= 2e-5 else f"logits by {error:.0e}"
                judge_dependence(
                    routers_of(model),
                    training,
                    f"replacing {which} document of a row moves the others' {what} at step {step}",
                )
        numbers = torch.where(batch.document_ids < 0, batch.document_ids, LAST_NUMBER - batch.document_ids)
        renumbered = subject.logits(model, replace(batch, document_ids=numbers), step)[1]
        everything = torch.ones(numbers.numel(), dtype=torch.bool)
        require(
            _same(subject, decisions, renumbered, everything),
            f"other numbers of documents in RoutingContext.document_ids change routes or weights at step {step}",
        )
    return f"{replaced} documents replaced, the others' logits move by at most {worst:.0e}; all numbered anew"


def _same(subject: Subject, ours: list[Decision], theirs: list[Decision], kept: Tensor) -> bool:
    """Whether the tokens ``kept`` have the same routes, weights and payloads in every layer."""
    for a, b in zip(ours, theirs, strict=True):
        if not same_routes(subject.table(a)[kept], subject.table(b)[kept]):
            return False
        mine, other = a.routing.payload, b.routing.payload
        if mine is not None and other is not None:
            mine, other = mine[kept[a.routing.token_index]], other[kept[b.routing.token_index]]
            if not torch.allclose(mine, other, rtol=1e-4, atol=1e-5):
                return False
    return True


def _knows_no_moment(subject: Subject) -> str:
    """In evaluation another seed, step or position in the run changes no bit of a decision."""
    model = subject.warm_model().eval()
    batch = subject.batch()
    base = subject.context(batch, 0, None)
    seen = subject.logits_in(model, batch, base)
    position = base.token_position
    others: dict[str, RoutingContext] = {
        "seed": replace(base, seed=base.seed + 1),
        **{f"step {step}": replace(base, step=step) for step in (1, *LATE_STEPS)},
        "position": replace(base, token_position=position.flip(0) * 3 + 10**6),
    }
    for what, context in others.items():
        changed = subject.logits_in(model, batch, context)
        same = torch.equal(seen[0], changed[0]) and all(
            same_routes(subject.table(a), subject.table(b), tolerance=0.0)
            for a, b in zip(seen[1], changed[1], strict=True)
        )
        require(same, f"routes or weights change in evaluation with another {what}")
    return f"bitwise the same with another seed, step ({', '.join(map(str, (1, *LATE_STEPS)))}) and position"


def _evaluates_as_it_trains(subject: Subject) -> str:
    """Without noise, training and evaluation decide alike, unless the scheme declares a rule of its own.

    A token's weights add up to about as much whatever the rule.
    """
    model = subject.warm_model()
    routers = routers_of(model)
    rule = model.evaluation_rule
    _weighs_as_it_trains(subject, model)
    if rule:
        raise NotApplicable(f"evaluation has a rule of its own: {rule}")
    if any(router.causal_in_training != router.causal_in_evaluation for router in routers):
        raise NotApplicable("evaluation has a rule of its own: tokens compete in training only, as is declared")
    batch = subject.batch()
    training = [subject.context(batch, step, lambda layer, own: own) for step in (0, 1, *LATE_STEPS)]
    training.append(replace(training[0], seed=training[0].seed + 1))
    passes = [subject.logits_in(model, batch, context)[1] for context in training]
    everything = torch.ones(len(training[0].token_mask), dtype=torch.bool)
    own = subject.logits_in(model.eval(), batch, subject.context(batch, 0, None))[1]
    changed = [
        f"step {context.step}" if context.seed == training[0].seed else "seed"
        for context, other in zip(training[1:], passes[1:], strict=True)
        if not _same(subject, passes[0], other, everything)
    ]
    if changed:
        raise NotApplicable(f"routes in training change with the {changed[-1]}: noise, or a rule that moves")
    require(
        _same(subject, passes[0], own, everything),
        "decisions differ between training and evaluation, without noise and without Router.evaluation_rule",
    )
    return "same routes, weights and payloads in both modes"


def _weighs_as_it_trains(subject: Subject, model: DecoderLM) -> None:
    """Raise if evaluation weighs experts by more than ``LOUDER`` more or less than training, in any layer."""
    batch = subject.batch(rows=LARGE_ROWS)
    modes = []
    with torch.no_grad():
        for training in (True, False):
            decisions = subject.run(model.train(training), batch).decisions
            # Of tokens with a route: a rule may leave out some in training that have one in evaluation.
            modes.append([float(one.routing.weight.sum()) / len(one.routing.token_index.unique()) for one in decisions])
    model.train()
    for trained, evaluated in zip(*modes, strict=False):
        require(
            trained <= LOUDER * evaluated and evaluated <= LOUDER * trained,
            f"a token's weights add up to {trained:.2f} in training and {evaluated:.2f} in evaluation",
        )


def _serves_large_batches(subject: Subject, training: bool) -> str:
    """In a large batch every token has the routes and weights that it has in a small one, also when all want the same.

    Three batches of ``LARGE_ROWS`` rows: as they are; with a router that is nearly sure; with tokens almost alike. The
    same tokens are routed in parts of ``ROWS`` rows. A scheme whose tokens compete keeps its mean instead: what it
    drops must be in ``dropped_routes``.
    """
    model = subject.warm_model().train(training)
    batch = subject.batch(rows=LARGE_ROWS)
    declared = "causal_in_training" if training else "causal_in_evaluation"
    most, complaints = 0.0, []
    with torch.no_grad():
        for step in (0, LATE_STEPS[-1]):
            for router, (hidden, context, _) in zip(
                routers_of(model), subject.logits(model, batch, step)[1], strict=True
            ):
                alike = hidden[:1] + ALIKE * (hidden - hidden[:1])
                for case, given, factor in (
                    ("as it is", hidden, 1.0),
                    ("with a sure router", hidden, SHARP),
                    ("of tokens almost alike", alike, 1.0),
                ):
                    with parameters_set(router, partial(torch.mul, other=factor)):
                        whole = router(given, context)
                        parts = [router(part, own) for part, own in _parts(given, context)]
                    load = float(whole.use.tokens_per_expert.max() / whole.use.tokens)
                    most = max(most, load)
                    if getattr(router, declared):
                        small = torch.cat(
                            [route_table(part, len(given) * ROWS // LARGE_ROWS, subject.num_experts) for part in parts]
                        )
                        large = route_table(whole, len(given), subject.num_experts)
                        if not same_routes(large, small):
                            lost = int((large.isnan() & ~small.isnan()).sum())
                            complaints.append(
                                f"a batch of {len(given)} tokens {case} has other routes or weights than its parts of "
                                f"{ROWS * subject.sequence}: {lost} of {int((~small.isnan()).sum())} routes are missing"
                            )
                    else:
                        _keeps_mean(whole.use, [part.use for part in parts], subject.num_experts, case)
    if complaints:
        raise Broken(f"{declared} is declared, but {complaints[0]}")
    return (
        f"{len(batch.input_ids)} rows route like their parts of {ROWS}; at most {most:.0%} of the tokens on one expert"
    )


def _keeps_mean(whole: RouterUse, parts: list[RouterUse], num_experts: int, case: str) -> None:
    """Raise unless routes per token, dropped ones included, are those of the parts up to a route for each expert."""

    def mean(uses: list[RouterUse]) -> float:
        routes = sum(float(use.tokens_per_expert.sum() + use.dropped_routes) for use in uses)
        return routes / sum(float(use.tokens) for use in uses)

    small, large = mean(parts), mean([whole])
    allowed = num_experts / float(parts[0].tokens)
    require(
        abs(large - small) <= allowed,
        f"{large:.2f} routes per token in a large batch {case}, {small:.2f} in small ones: dropped_routes must say so",
    )


def _parts(hidden: Tensor, context: RoutingContext) -> list[tuple[Tensor, RoutingContext]]:
    """The batch in parts of ``ROWS`` rows."""
    length = len(hidden) // context.num_sequences * ROWS
    return [
        (
            hidden[start : start + length],
            replace(context_of(context, slice(start, start + length)), num_sequences=ROWS),
        )
        for start in range(0, len(hidden), length)
    ]


def _moves_state_alike_on_ranks(subject: Subject) -> str:
    """Two copies of a router that see different tokens of a global batch keep the same state and the same routes.

    What ranks do, in one process: each copy runs its own micro-batches, and ``after_step`` gives both the pooled use.
    That is the same sum however the batch is cut. And one copy has routed something else since, as in an evaluation.
    """
    batches = [subject.batch(seed=100 + step, padding=(step % ROWS,)) for step in range(SHARED_STEPS)]
    copies = [subject.warm_model(), subject.warm_model()]
    before = {name: value.clone() for name, value in copies[0].state_dict().items()}
    _require_sums(subject, batches[0])
    for step, batch in enumerate(batches):
        cut = 1 + step % (ROWS - 1)
        shares: list[list[MicroBatch]] = [
            [rows_of(batch, slice(cut))],
            [rows_of(batch, slice(cut, cut + 1)), rows_of(batch, slice(cut + 1, None))],
        ]
        uses: list[list[RouterUse]] = []
        for model, share in zip(copies, shares, strict=True):
            uses += [subject.run(model, part, step).output.uses for part in share if len(part.input_ids)]
        _route_something_else(subject, copies[1], rows_of(batch, slice(1)))
        pooled = step_uses([_sum(of_layer) for of_layer in zip(*uses, strict=True)])
        for model in copies:
            for router, use in zip(routers_of(model), pooled, strict=True):
                router.after_step(use)
        ours, theirs = (model.state_dict() for model in copies)
        apart = [name.rpartition(".")[2] for name, value in ours.items() if not torch.equal(value, theirs[name])]
        require(
            not apart,
            f"{', '.join(sorted(set(apart)))} differs after {step + 1} steps between two ranks with different tokens: "
            "after_step must use nothing but its argument",
        )
    for training in (True, False):
        one, other = (subject.run(model.train(training), batches[0]) for model in copies)
        require(subject.has_same_bits(one, other), "routes differ between two ranks that saw different tokens")
    after = copies[0].state_dict()
    moved = sorted({name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])})
    return f"{', '.join(moved) or 'no state'}: bitwise the same on two shares of the tokens, {SHARED_STEPS} steps"


@torch.no_grad()
def _route_something_else(subject: Subject, model: DecoderLM, batch: MicroBatch) -> None:
    """Decide in both modes with parameters of zero: if a router keeps anything of its last pass, it is of this one."""
    with ExitStack() as stack:
        for router in routers_of(model):
            stack.enter_context(parameters_set(router, torch.zeros_like))
        for training in (False, True):
            subject.run(model.train(training), batch)


@torch.no_grad()
def _require_sums(subject: Subject, batch: MicroBatch) -> None:
    """Raise unless what ``after_step`` gets of a batch is the sum of what it gets of parts.

    Where tokens compete, parts are routed otherwise; but a batch of the same rows twice is routed like two of them.
    """
    model = subject.warm_model()
    seen = subject.run(model, batch)
    whole = seen.output.uses
    for router, decision in zip(routers_of(model), seen.decisions, strict=False):
        once = decision.routing.use.sums
        if once is not None:
            doubled = router(*twice(decision)).use.sums
            # An expert's number of tokens may be rounded, and its cut-off be another token's.
            nearer_to_one = (doubled - once).abs() < (doubled - 2 * once).abs()
            require(
                nearer_to_one.sum() <= ROUNDED * max(1, int(once.count_nonzero())),
                f"{int(nearer_to_one.sum())} of RouterUse.sums are no larger where each row is there twice: they are "
                "to be sums over tokens, as the engine adds up those of all micro-batches and ranks",
            )
    if not all(router.causal_in_training for router in routers_of(model)):
        return
    parts = [subject.run(model, rows_of(batch, part)).output.uses for part in (slice(1), slice(1, None))]
    pooled = [_sum(of_layer) for of_layer in zip(*parts, strict=True)]
    require_same_use(whole, pooled, "the cut of the batch")


def _sum(uses: tuple[RouterUse, ...]) -> RouterUse:
    """One layer's use, pooled over micro-batches."""
    counts = ("tokens_per_expert", "tokens", "router_entropy", "dropped_routes")
    pooled = {name: torch.stack([getattr(use, name) for use in uses]).sum(dim=0) for name in counts}
    sums = None if uses[0].sums is None else torch.stack([use.sums for use in uses if use.sums is not None]).sum(dim=0)
    return RouterUse(**pooled, sums=sums)


DEPENDENCE: dict[str, Callable[[Subject], str]] = {
    "documents apart in training": partial(_keeps_documents_apart, training=True),
    "documents apart in evaluation": partial(_keeps_documents_apart, training=False),
    "no seed or step in evaluation": _knows_no_moment,
    "evaluation as in training": _evaluates_as_it_trains,
    "large batch in training": partial(_serves_large_batches, training=True),
    "large batch in evaluation": partial(_serves_large_batches, training=False),
    "state alike on ranks": _moves_state_alike_on_ranks,
}
"""Name of the row -> the question behind it."""
