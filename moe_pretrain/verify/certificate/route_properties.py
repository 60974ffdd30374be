"""Rows of the certificate: what a routing decision is, and what it may depend on.

A function returns what it found, or raises ``Broken`` when the property does not hold, ``NotApplicable`` with the
reason when the scheme cannot have it, ``DeclaredNonCausal`` when the scheme itself says that it looks at later tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.dispatch import run_experts
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.row_layout import ExpertRowLayout, sum_rows
from moe_pretrain.moe.types import Merging, RouterUse, Routing
from moe_pretrain.verify.certificate.elsewhere import elsewhere
from moe_pretrain.verify.certificate.subject import (
    LATE_STEPS,
    ROWS,
    TOLERANCE,
    Decision,
    NotApplicable,
    Subject,
    generators_at,
    judge_dependence,
    relative,
    require,
    routers_of,
    rows_of,
    same_routes,
)

DRAWS = 2
"""Replacements of the later tokens per cut."""
ASKED_EXPERTS = 3
"""Experts whose answers are changed where experts are asked."""
LOUD = 1e3
"""What is added to an answer, beyond all others."""
OPPOSITE_EXPERTS = 8
"""Experts whose rows are made the opposite of tokens, each of every fifth one: they are alike, and take their time."""
OPPOSITE_STRIDE = 5
SUMS_TOLERANCE = 0.01
"""Largest part of a scheme's sums that rounding may move, which a padding row exceeds by far."""


def _is_causal(subject: Subject, training: bool) -> str:
    """Replacing later tokens moves no earlier logit and no earlier route (C28).

    The whole model is run, with rows cut at several positions and everything from there on replaced; then with the last
    row replaced, which must not be seen by the rows before it either. All of it once more at late steps.
    """
    model = subject.warm_model().train(training)
    batch = subject.batch(one_document=True)
    position, row = torch.arange(subject.sequence)[None], torch.arange(ROWS)[:, None]
    cuts = sorted({1, subject.sequence // 3, 2 * subject.sequence // 3, subject.sequence - 1})
    kept_parts = {f"position {cut}": (position < cut).expand(ROWS, -1) for cut in cuts}
    kept_parts["the last row"] = (row < ROWS - 1).expand(-1, subject.sequence)
    generator = torch.Generator().manual_seed(0)
    worst, suffixes = 0.0, 0
    vocab = subject.config.model.vocab_size
    for step, draws in ((0, DRAWS), *((late, 1) for late in LATE_STEPS)):
        logits, decisions = subject.logits(model, batch, step)
        for where, kept in kept_parts.items():
            for _ in range(draws):
                other = torch.randint(1, vocab, kept.shape, generator=generator)
                input_ids = torch.where(kept, batch.input_ids, (batch.input_ids + other) % vocab)
                new_logits, new_decisions = subject.logits(model, replace(batch, input_ids=input_ids), step)
                error = float((new_logits - logits)[kept].abs().max() / logits.abs().max())
                worst, suffixes = max(worst, error), suffixes + 1
                routes = zip(subject.tables(decisions), subject.tables(new_decisions), strict=True)
                same = all(same_routes(ours[kept.flatten()], theirs[kept.flatten()]) for ours, theirs in routes)
                if not (error <= TOLERANCE and same):
                    moved = f"tokens from {where} on move earlier " + (f"logits by {error:.0e}" if same else "routes")
                    judge_dependence(routers_of(model), training, moved + (f" at step {step}" if step else ""))
    steps = ", ".join(str(step) for step in (0, *LATE_STEPS))
    return f"{len(cuts)} cuts, {suffixes} suffixes, steps {steps}; earlier logits move by at most {worst:.0e}"


def _is_cut_free(subject: Subject, training: bool) -> str:
    """A row's routes do not depend on which rows share its micro-batch."""
    model = subject.warm_model().train(training)
    batch = subject.batch()
    for step in (0, *LATE_STEPS):
        whole = subject.tables(subject.logits(model, batch, step)[1])
        for cut in (1, 2):
            parts = [
                subject.tables(subject.logits(model, rows_of(batch, part), step)[1])
                for part in (slice(cut), slice(cut, None))
            ]
            for layer, table in enumerate(whole):
                joined = torch.cat([part[layer] for part in parts])
                if not same_routes(joined, table):
                    judge_dependence(
                        routers_of(model), training, f"routes change when {ROWS} rows become {cut} and {ROWS - cut}"
                    )
    return "2 cuts of the batch, at 3 steps"


def _is_alone_the_same(subject: Subject) -> str:
    """In evaluation a row by itself gets the logits and routes that it gets among others (C29)."""
    model = subject.warm_model().eval()
    batch = subject.batch()
    logits, decisions = subject.logits(model, batch)
    worst = 0.0
    for row in range(ROWS):
        alone, own = subject.logits(model, rows_of(batch, slice(row, row + 1)))
        tokens = slice(row * subject.sequence, (row + 1) * subject.sequence)
        error = float((alone[0] - logits[row]).abs().max() / logits.abs().max())
        worst = max(worst, error)
        pairs = zip(subject.tables(own), subject.tables(decisions), strict=True)
        if not (error <= TOLERANCE and all(same_routes(ours, theirs[tokens]) for ours, theirs in pairs)):
            judge_dependence(routers_of(model), False, f"row {row} by itself differs by {error:.0e}")
    return f"logits differ by at most {worst:.0e}"


def _ignores_padding(subject: Subject) -> str:
    """Padding, its contents and amount, changes no count, sum, entropy, loss or route of text (C17)."""
    for rows, steps in (((1, 2), (0, *LATE_STEPS)), ((2, 3), (0,)), ((0, 1), (0,))):
        _ignores_rows_of_padding(subject, rows, steps)
    return "counts, sums, entropy, losses and routes of text, with other padding, less of it and none"


def _ignores_rows_of_padding(subject: Subject, rows: tuple[int, int], steps: Sequence[int]) -> None:
    batch = subject.batch(padding=rows)
    text = (batch.document_ids >= 0).flatten()
    other_ids = torch.where(batch.document_ids < 0, (batch.input_ids + 1) % 7, batch.input_ids)
    fewer = rows_of(batch, torch.tensor([row for row in range(ROWS) if row != rows[1]]))
    without = rows_of(batch, torch.tensor([row for row in range(ROWS) if row not in rows]))
    for training in (True, False):
        model = subject.warm_model().train(training)
        for step in steps:
            seen = subject.run(model, batch, step)
            for what, other in (
                ("the content of padding", replace(batch, input_ids=other_ids)),
                ("a padding row", fewer),
                ("any padding", without),
            ):
                changed = subject.run(model, other, step)
                require_same_use(seen.output.uses, changed.output.uses, what)
                for name, value in seen.output.aux.items():
                    require(relative(changed.output.aux[name], value) <= TOLERANCE, f"{what} changes the {name} loss")
                loss = relative(changed.output.loss_sum, seen.output.loss_sum)
                require(loss <= TOLERANCE, f"{what} changes the loss")
                its_text = (other.document_ids >= 0).flatten()
                tables = zip(subject.tables(seen.decisions), subject.tables(changed.decisions), strict=True)
                same = all(same_routes(ours[text], theirs[its_text]) for ours, theirs in tables)
                require(same, f"{what} changes routes of text")


def require_same_use(ours: Sequence[RouterUse], theirs: Sequence[RouterUse], what: str) -> None:
    """Raise if two passes over the same text count it otherwise; one use for each layer."""
    for a, b in zip(ours, theirs, strict=True):
        for name in ("tokens_per_expert", "tokens", "dropped_routes"):
            require(torch.equal(getattr(a, name), getattr(b, name)), f"{what} changes {name}")
        entropy = relative(b.router_entropy, a.router_entropy)
        require(entropy <= TOLERANCE or float(a.router_entropy) < 1e-6, f"{what} changes router_entropy")
        require((a.sums is None) == (b.sums is None), f"{what} changes whether there are sums")
        if a.sums is not None and b.sums is not None:
            # Sums may be counts in bins, and rounding may put a token on the other side of an edge.
            apart = float((a.sums - b.sums).abs().sum()) / max(float(a.sums.abs().sum()), 1e-20)
            require(apart <= SUMS_TOLERANCE, f"{what} changes RouterUse.sums by {apart:.0e} of their size")


def _is_deterministic(subject: Subject) -> str:
    """The same input routes the same again, whatever global random generators did in between.

    So does a router that another rank builds and asks, at another time.
    """
    for training in (True, False):
        model = subject.warm_model().train(training)
        passes = []
        for repeat in range(3):
            with generators_at(repeat):
                passes.append(subject.run(model, subject.batch()))
        for again in passes[1:]:
            require(
                subject.has_same_bits(passes[0], again), f"routes differ, {'training' if training else 'evaluation'}"
            )
        # Of several passes the first.
        for router, decision in zip(routers_of(model), passes[0].decisions, strict=False):
            _decides_alike(subject, router, decision)
    return "3 passes, bitwise, in training and evaluation; and as another rank at another time"


@torch.no_grad()
def _decides_alike(subject: Subject, router: Router, decision: Decision) -> None:
    """Raise unless a router that is asked again and again, or anywhere else, decides, counts and weighs as it did."""
    hidden, context, _ = decision
    mode = "training" if router.training else "evaluation"

    def said_by(who: Router, routing: Routing) -> dict[str, Tensor]:
        table = subject.table(Decision(hidden, context, routing)).nan_to_num(-1.0)
        counts = {field.name: getattr(routing.use, field.name) for field in fields(routing.use)}
        said = {"routes": table} | {name: value for name, value in counts.items() if value is not None}
        said |= {f"the {name} loss": value for name, value in routing.aux.items()}
        return said | {f"the coefficient of {name}": torch.tensor(weight) for name, weight in who.aux_weights.items()}

    here = said_by(router, decision.routing)
    with elsewhere():
        other = subject.router_at(router.layer, router)
        assert other is not None, "a router of its own layer has its own parameters"
        there = said_by(other, other(hidden, context).exact())
        born = dict(subject.build_router(router.layer).named_buffers())
    differ = [name for name, value in here.items() if name not in there or not torch.equal(there[name], value)]
    require(
        not differ,
        f"{', '.join(differ)} differ in {mode} on another rank at another time, by the same tokens, parameters and "
        "state",
    )
    begins = subject.build_router(router.layer).named_buffers()
    apart = [name for name, value in begins if not torch.equal(value, born[name])]
    require(not apart, f"{', '.join(apart)} begins otherwise on another rank at another time")


def _conserves_routes(subject: Subject) -> str:
    """Routes are in token order, unique and in range; the counts are those of the routes of text (C27)."""
    total = 0
    for training in (True, False):
        model = subject.warm_model().train(training)
        for step in (0, *LATE_STEPS):
            for decision in subject.run(model, subject.batch(padding=(1,)), step).decisions:
                check_routes(decision, subject.num_experts)
                total += len(decision.routing.token_index)
    return f"{total} routes, each once, in token order; counts equal the routes of text"


def check_routes(decision: Decision, num_experts: int) -> None:
    """Raise ``Broken`` if a decision contradicts what ``Routing`` promises."""
    routing, use, text = decision.routing, decision.routing.use, decision.context.token_mask
    token, expert, num_tokens = routing.token_index, routing.expert_index, len(decision.hidden)
    for name, index, end in (("token_index", token, num_tokens), ("expert_index", expert, num_experts)):
        require(((index >= 0) & (index < end)).all(), f"{name} is outside [0, {end})")
    require((token.diff() >= 0).all(), "token_index is not ascending")
    twice = len(token) - len((token * num_experts + expert).unique())
    require(twice == 0, f"{twice} of {len(token)} routes are there twice")
    require(routing.weight.isfinite().all(), "a weight is not finite")
    if routing.routes_per_token is not None:
        own = torch.bincount(token, minlength=num_tokens)
        require((own == routing.routes_per_token).all(), f"routes_per_token={routing.routes_per_token} is not so")
    if isinstance(routing, Merging):
        _check_merging(routing, num_tokens, text)
    else:
        counted = torch.bincount(expert[text[token]], minlength=num_experts).double()
        require(torch.equal(use.tokens_per_expert, counted), "tokens_per_expert is not the number of routes of text")
    require(use.tokens.item() == int(text.sum()), "RouterUse.tokens is not the number of text tokens")
    highest = float(use.tokens) * math.log(num_experts) * (1 + 1e-6)
    require(0 <= use.router_entropy <= highest, "router_entropy is outside [0, tokens * ln(num_experts)]")
    require(not (use.tokens_per_expert.requires_grad or use.router_entropy.requires_grad), "RouterUse has a gradient")


def _check_merging(merging: Merging, num_tokens: int, text: Tensor) -> None:
    """Raise ``Broken`` if a decision to merge contradicts what ``Merging`` promises."""
    mixture = merging.mixture.detach()
    require(int(merging.lengths.sum()) == num_tokens, "the segments do not add up to the tokens")
    require((mixture >= 0).all(), "a share of an expert is negative")
    require((mixture.sum(dim=1) - 1).abs().max() <= TOLERANCE, "shares of experts do not add up to 1")
    shares = mixture.repeat_interleave(merging.lengths, dim=0)
    require(torch.equal(shares.flatten(), merging.weight.detach()), "weights are not the mixtures of the segments")
    counted = (shares.double() * text[:, None]).sum(dim=0)
    require(relative(merging.use.tokens_per_expert, counted) <= TOLERANCE, "tokens_per_expert is not what text mixes")


def _combines_identity(subject: Subject) -> str:
    """Experts that return their input give ``sum over routes of weight * x`` (C27)."""
    decisions = subject.run(subject.warm_model(), subject.batch()).decisions
    if isinstance(decisions[0].routing, Merging):
        raise NotApplicable("parameters are merged and no token is sent: there are no outputs to combine")
    worst = 0.0
    for hidden, _, routing in decisions:
        output, _ = run_experts(hidden, routing, subject.num_experts, _identity, None)
        weighted = routing.weight.detach()[:, None] * hidden[routing.token_index]
        worst = max(worst, relative(output, torch.zeros_like(hidden).index_add(0, routing.token_index, weighted)))
    require(worst <= TOLERANCE, f"differs from the sum of weight * x by {worst:.0e}")
    return f"equal to the sum of weight * x within {worst:.0e}"


def _identity(sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None) -> Tensor:
    return sum_rows(sources[order.source_of_row], order, weight.detach())


def _is_float32(subject: Subject) -> str:
    """Weights, parameters and state are float32, and nothing on the way to the weights was rounded (C23).

    Rounded logits show in two ways: a bfloat16 input routes otherwise than the same numbers in float32; and along a
    line of almost equal tokens the weights move in steps.
    """
    model = subject.model().eval()
    router = routers_of(model)[0]
    for name, value in router.state_dict().items():
        require(not value.is_floating_point() or value.dtype == torch.float32, f"{name} is {value.dtype}")
    hidden, context, routing = subject.run(model, subject.batch()).decisions[0]
    require(routing.weight.dtype == torch.float32, f"weights are {routing.weight.dtype}")
    for name, loss in routing.aux.items():
        require(loss.dtype == torch.float32, f"the {name} loss is {loss.dtype}")

    def route(tokens: Tensor) -> Tensor:
        return subject.table(Decision(tokens, context, router(tokens, context)))

    # Several lines, since a token may have a constant weight by the scheme's rule.
    away = hidden[1] * 2e-5 * torch.arange(len(hidden))[:, None]
    lines = [hidden[start] + away for start in (0, *range(2, 5))]
    # A scheme with constant weights has few on any tokens, and nothing to be learnt from that.
    various, *each = (len(route(tokens).nan_to_num(-1.0).unique(dim=0)) for tokens in (hidden, *lines))
    along = max(each)
    half = len(hidden) / 2
    require(
        various < half or along > half, f"{len(hidden)} almost equal tokens have {along} weights: logits are rounded"
    )
    if not router.keep_float32:
        return "weights and state; keep_float32=False, so a bfloat16 engine rounds its parameters and their products"
    rounded = hidden.bfloat16()
    same = same_routes(route(rounded), route(rounded.float()))
    require(same, "a bfloat16 input routes otherwise than the same numbers in float32")
    return "weights, parameters and state; a bfloat16 input routes like the same numbers in float32"


def gives_experts_their_best(subject: Subject) -> str:
    """A token that is an expert's own row of the router goes to that expert, and no other of it weighs more.

    One that is the opposite of the row does not go there, unless it goes to all. Both in training and in evaluation.
    Where experts are asked (``RoutingContext.score_routes``), one that answers loudest gets the token, and weighs most;
    one that answers least does not get it.

    Asked of parameters with a row for every expert, as wide as a token: of dot products, cosines and distances alike
    the token is then the expert's best, and its worst. One such parameter must have it; of competing tokens half.
    """
    return gives_best_of(subject, subject.warm_model())


@torch.no_grad()
def gives_best_of(subject: Subject, model: DecoderLM) -> str:
    """The same of a model whose state has moved or not."""
    notes = []
    for training in (True, False):
        router, decision = routers_of(model.train(training))[0], subject.run(model, subject.batch()).decisions[0]
        if isinstance(decision.routing, Merging):
            raise NotApplicable("parameters are merged and no token is sent")
        free = router.free_slots
        experts = [one for one in range(model.moe_layers()[0].kinds.ffn) if free is None or not free[one]]
        shape = (subject.num_experts, decision.hidden.shape[1])
        found = [
            (*_best_and_worst(subject, router, decision, parameter, experts), name)
            for name, parameter in router.named_parameters()
            if parameter.shape == shape and name not in router.without_lm_gradient
        ]
        if router.needs_expert_scores:
            notes.append(_listens(subject, router, decision, experts))
        if not found:
            if notes:
                continue
            raise NotApplicable("no parameter has a row for every expert, as wide as a token")
        best, right, name = max(found)
        mode, causal = (
            ("training", router.causal_in_training) if training else ("evaluation", router.causal_in_evaluation)
        )
        said = f"{best} of {len(experts)} experts get a token that is their own row of {name}, with the largest weight"
        require(best >= (len(experts) if causal else len(experts) / 2), f"only {said}, in {mode}")
        opposite = f"{right:.0%} of the tokens that are the opposite of an expert's row do not go there"
        require(right >= (1.0 if causal else 0.5), f"only {opposite}, in {mode}")
        notes.append(f"{said}; {opposite}" if training else "in evaluation too")
    return "; ".join(notes)


def _listens(subject: Subject, router: Router, decision: Decision, experts: list[int]) -> str:
    """Raise unless tokens go to an expert that answers louder than all others, and not to one that answers least."""
    hidden, context, _ = decision
    mode, answer = "training" if router.training else "evaluation", context.score_routes
    assert answer is not None, "the layer of a router that asks experts has answers"

    def table_if(expert: int, louder: float) -> Tensor:
        """Routes of the tokens that ask the expert and leave somebody out, with its answer changed."""
        asked = torch.zeros(len(hidden), subject.num_experts, dtype=torch.bool)

        def scores(hidden: Tensor, candidates: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
            asked.scatter_(1, candidates, True)
            return answer(hidden, candidates, query, key_weight) + louder * (candidates == expert)

        routing = router(hidden, replace(context, score_routes=scores)).exact()
        table = subject.table(Decision(hidden, context, routing))
        return table[asked[:, expert] & (asked & table.isnan()).any(dim=1)]

    for expert in experts[:ASKED_EXPERTS]:
        table = table_if(expert, LOUD)
        best = table.nan_to_num(-math.inf).amax(dim=1) * (1 - TOLERANCE)
        require((table[:, expert] >= best).all(), f"an expert that answers loudest does not weigh most, in {mode}")
        least = table_if(expert, -LOUD)[:, expert]
        require(least.isnan().all(), f"tokens go to an expert that answers least, in {mode}")
    return f"in {mode} tokens go to an expert that answers loudest, and not to one that answers least"


def _best_and_worst(
    subject: Subject, router: Router, decision: Decision, parameter: Tensor, experts: list[int]
) -> tuple[int, float]:
    """Experts that get a token like their row of ``parameter``, and the part of tokens opposite to one that stay away.

    Tokens that take every expert say nothing of the latter.
    """
    hidden, context, _ = decision

    def weights(expert: int, token: int, row: Tensor) -> Tensor:
        kept = parameter[expert].clone()
        parameter[expert] = row
        found = subject.table(Decision(hidden, context, router(hidden, context).exact()))[token]
        parameter[expert] = kept
        return found

    best, taken, asked = 0, 0, 0
    for expert in experts:
        token = 5 * expert % len(hidden)
        own = weights(expert, token, hidden[token])
        best += bool(own[expert] >= own.nan_to_num(-math.inf).max() * (1 - TOLERANCE))
        opposite = range(expert % OPPOSITE_STRIDE, len(hidden), OPPOSITE_STRIDE) if expert < OPPOSITE_EXPERTS else ()
        for token in opposite:
            own = weights(expert, token, -hidden[token])
            choosy = bool(own[experts].isnan().any())
            asked, taken = asked + choosy, taken + (choosy and not bool(own[expert].isnan()))
    return best, 1.0 if asked == 0 else 1 - taken / asked


ROUTES: dict[str, Callable[[Subject], str]] = {
    "causality in training": partial(_is_causal, training=True),
    "causality in evaluation": partial(_is_causal, training=False),
    "batch of one in evaluation": _is_alone_the_same,
    "cut of the batch in training": partial(_is_cut_free, training=True),
    "cut of the batch in evaluation": partial(_is_cut_free, training=False),
    "padding ignored": _ignores_padding,
    "determinism": _is_deterministic,
    "conservation of routes": _conserves_routes,
    "experts get their best tokens": gives_experts_their_best,
    "combine of identity experts": _combines_identity,
    "float32 routing": _is_float32,
}
"""Name of the row -> the question behind it."""
