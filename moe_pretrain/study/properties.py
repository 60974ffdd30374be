"""What every routing scheme must do: one function per row of the certificate.

A function returns what it found, or raises: ``Broken`` when the property does not hold, ``NotApplicable`` with the reason
when the scheme cannot have it, ``DeclaredNonCausal`` when the scheme says itself that it looks at later tokens.
"""

import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.engine.objective import GlobalCounts
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe import RouterConfig
from moe_pretrain.moe.dispatch import run_experts, sum_rows
from moe_pretrain.moe.types import Router, RowOrder
from moe_pretrain.study.oracle import Oracle
from moe_pretrain.study.subject import (
    ROWS,
    TOLERANCE,
    Decision,
    Pass,
    Subject,
    move_state,
    routers_of,
    rows_of,
    same_routes,
)

DRAWS = 3
"""Replacements of the later tokens per cut."""
STATE_STEPS = 100
SURE_LOGIT = 30.0
"""A logit at which float32's softmax and sigmoid are sure."""


class Broken(Exception):
    """The property does not hold."""


class NotApplicable(Exception):
    """The property says nothing about this scheme; the message is the reason."""


class DeclaredNonCausal(Exception):
    """A token's route depends on later tokens, and the scheme says so."""


def _require(holds: bool | Tensor, complaint: str) -> None:
    if not holds:
        raise Broken(complaint)


# ---- what a decision may depend on


def _is_causal(subject: Subject, training: bool) -> str:
    """Replacing later tokens moves no earlier logit and no earlier route (C28).

    The whole model is run, with rows cut at several positions and everything from there on replaced; then with the last
    row replaced, which must not be seen by the rows before it either.
    """
    model = subject.warm_model().train(training)
    batch = subject.batch(one_document=True)
    logits, decisions = subject.logits(model, batch)
    position, row = torch.arange(subject.sequence)[None], torch.arange(ROWS)[:, None]
    cuts = sorted({1, subject.sequence // 3, 2 * subject.sequence // 3, subject.sequence - 1})
    kept_parts = {f"position {cut}": (position < cut).expand(ROWS, -1) for cut in cuts}
    kept_parts["the last row"] = (row < ROWS - 1).expand(-1, subject.sequence)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for where, kept in kept_parts.items():
        for _ in range(DRAWS):
            vocab = subject.config.model.vocab_size
            other = torch.randint(1, vocab, kept.shape, generator=generator)
            input_ids = torch.where(kept, batch.input_ids, (batch.input_ids + other) % vocab)
            new_logits, new_decisions = subject.logits(model, replace(batch, input_ids=input_ids))
            error = float((new_logits - logits)[kept].abs().max() / logits.abs().max())
            worst = max(worst, error)
            routes = zip(_tables(subject, decisions), _tables(subject, new_decisions), strict=True)
            same = all(same_routes(ours[kept.flatten()], theirs[kept.flatten()]) for ours, theirs in routes)
            if not (error <= TOLERANCE and same):
                moved = f"tokens from {where} on move earlier " + (f"logits by {error:.0e}" if same else "routes")
                _judge_dependence(model, training, moved)
    return f"{len(cuts)} cuts, {len(kept_parts) * DRAWS} suffixes, earlier logits move by at most {worst:.0e}"


def _is_cut_free(subject: Subject, training: bool) -> str:
    """A row's routes do not depend on which rows share its micro-batch."""
    model = subject.warm_model().train(training)
    batch = subject.batch()
    whole = _tables(subject, subject.logits(model, batch)[1])
    for cut in (1, 2):
        parts = [
            _tables(subject, subject.logits(model, rows_of(batch, part))[1]) for part in (slice(cut), slice(cut, None))
        ]
        for layer, table in enumerate(whole):
            joined = torch.cat([part[layer] for part in parts])
            if not same_routes(joined, table):
                _judge_dependence(model, training, f"routes change when {ROWS} rows become {cut} and {ROWS - cut}")
    return "2 cuts of the batch"


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
        pairs = zip(_tables(subject, own), _tables(subject, decisions), strict=True)
        if not (error <= TOLERANCE and all(same_routes(ours, theirs[tokens]) for ours, theirs in pairs)):
            _judge_dependence(model, False, f"row {row} by itself differs by {error:.0e}")
    return f"logits differ by at most {worst:.0e}"


def _judge_dependence(model: DecoderLM, training: bool, found: str) -> None:
    """Raise as the scheme's own declaration says."""
    name = "causal_in_training" if training else "causal_in_evaluation"
    if all(getattr(router, name) for router in routers_of(model)):
        raise Broken(f"{name} is declared, but {found}")
    raise DeclaredNonCausal(found)


def _ignores_padding(subject: Subject) -> str:
    """What stands in a padding row, or whether there is one, changes no count, loss or route of text (C17)."""
    batch = subject.batch(padding=(1,))
    text = (batch.document_ids >= 0).flatten()
    other_ids = torch.where(batch.document_ids < 0, (batch.input_ids + 1) % 7, batch.input_ids)
    without = rows_of(batch, torch.tensor([row for row in range(ROWS) if row != 1]))
    for training in (True, False):
        model = subject.warm_model().train(training)
        seen = subject.run(model, batch)
        for what, other, tokens in (
            ("the content of padding", replace(batch, input_ids=other_ids), text),
            ("a padding row", without, slice(None)),
        ):
            changed = subject.run(model, other)
            for ours, theirs in zip(seen.output.uses, changed.output.uses, strict=True):
                for name in ("tokens_per_expert", "tokens", "dropped_routes"):
                    _require(torch.equal(getattr(ours, name), getattr(theirs, name)), f"{what} changes {name}")
            for name, value in seen.output.aux.items():
                _require(_relative(changed.output.aux[name], value) <= TOLERANCE, f"{what} changes the {name} loss")
            _require(_relative(changed.output.loss_sum, seen.output.loss_sum) <= TOLERANCE, f"{what} changes the loss")
            tables = zip(_tables(subject, seen.decisions), _tables(subject, changed.decisions), strict=True)
            _require(all(same_routes(a[text], b[tokens]) for a, b in tables), f"{what} changes routes of text")
    return "counts, losses and routes of text, with and without a padding row"


def _is_deterministic(subject: Subject) -> str:
    """The same input routes the same again, whatever global random generators did in between."""
    for training in (True, False):
        model = subject.warm_model().train(training)
        passes = []
        for repeat in range(3):
            random.seed(repeat)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(repeat)
                passes.append(subject.run(model, subject.batch()))
        for again in passes[1:]:
            _require(_same_bits(subject, passes[0], again), f"routes differ, {'training' if training else 'evaluation'}")
    return "3 passes, bitwise, in training and evaluation"


def _survives_recompute(subject: Subject) -> str:
    """Loss, gradients and counts are bitwise the same with every kind of recomputation (C14, C24)."""
    batch = subject.batch()
    results = {}
    for recompute in ("none", "selective", "full"):
        model = subject.model(recompute)
        seen = subject.run(model, batch)
        loss = subject.loss(model, seen, batch)
        loss.backward()
        counts = torch.stack([use.tokens_per_expert for use in seen.output.uses])
        results[recompute] = {"loss": loss.detach(), "tokens_per_expert": counts}
        results[recompute] |= {name: _gradient(parameter) for name, parameter in model.named_parameters()}
        _require(len(seen.decisions) == len(routers_of(model)), f"recompute={recompute} routes again in backward")
    for recompute in ("selective", "full"):
        for name, value in results["none"].items():
            _require(torch.equal(results[recompute][name], value), f"recompute={recompute} changes {name}")
    return "none, selective and full agree bit for bit"


# ---- what a decision is


def _conserves_routes(subject: Subject) -> str:
    """Routes are in token order, unique and in range; the counts are those of the routes of text (C27)."""
    total = 0
    for training in (True, False):
        model = subject.warm_model().train(training)
        for decision in subject.run(model, subject.batch(padding=(1,))).decisions:
            _check_routes(decision, subject.num_experts)
            total += len(decision.routing.token_index)
    return f"{total} routes, each once, in token order; counts equal the routes of text"


def _check_routes(decision: Decision, num_experts: int) -> None:
    routing, use, text = decision.routing, decision.routing.use, decision.context.token_mask
    token, expert, num_tokens = routing.token_index, routing.expert_index, len(decision.hidden)
    for name, index, end in (("token_index", token, num_tokens), ("expert_index", expert, num_experts)):
        _require(((index >= 0) & (index < end)).all(), f"{name} is outside [0, {end})")
    _require((token.diff() >= 0).all(), "token_index is not ascending")
    twice = len(token) - len((token * num_experts + expert).unique())
    _require(twice == 0, f"{twice} of {len(token)} routes are there twice")
    _require(routing.weight.isfinite().all(), "a weight is not finite")
    if routing.routes_per_token is not None:
        own = torch.bincount(token, minlength=num_tokens)
        _require((own == routing.routes_per_token).all(), f"routes_per_token={routing.routes_per_token} is not so")
    counted = torch.bincount(expert[text[token]], minlength=num_experts).double()
    _require(torch.equal(use.tokens_per_expert, counted), "tokens_per_expert is not the number of routes of text")
    _require(use.tokens.item() == int(text.sum()), "RouterUse.tokens is not the number of text tokens")
    highest = float(use.tokens) * math.log(num_experts) * (1 + 1e-6)
    _require(0 <= use.router_entropy <= highest, "router_entropy is outside [0, tokens * ln(num_experts)]")
    _require(not (use.tokens_per_expert.requires_grad or use.router_entropy.requires_grad), "RouterUse has a gradient")


def _combines_identity(subject: Subject) -> str:
    """Experts that return their input give ``sum over routes of weight * x`` (C27)."""
    decisions = subject.run(subject.warm_model(), subject.batch()).decisions
    worst = 0.0
    for hidden, _, routing in decisions:
        output, _ = run_experts(hidden, routing, subject.num_experts, _identity, None)
        weighted = routing.weight.detach()[:, None] * hidden[routing.token_index]
        worst = max(worst, _relative(output, torch.zeros_like(hidden).index_add(0, routing.token_index, weighted)))
    _require(worst <= TOLERANCE, f"differs from the sum of weight * x by {worst:.0e}")
    return f"equal to the sum of weight * x within {worst:.0e}"


def _identity(sources: Tensor, weight: Tensor, order: RowOrder) -> Tensor:
    return sum_rows(sources[order.source_of_row], order, weight.detach())


def _names_losses(subject: Subject) -> str:
    """Every aux loss is a float32 scalar with a coefficient, and every coefficient has its loss (C18)."""
    for router, decision in zip(routers_of(model := subject.model()), subject.run(model, subject.batch()).decisions):
        aux = decision.routing.aux
        _require(aux.keys() == router.aux_weights.keys(), f"losses {sorted(aux)}, coefficients {sorted(router.aux_weights)}")
        for name, value in aux.items():
            _require(value.dtype == torch.float32 and value.ndim == 0, f"{name} is not a float32 scalar")
            _require(value.isfinite(), f"{name} is {value}")
    names = ", ".join(sorted(routers_of(model)[0].aux_weights))
    return names or "none"


def _is_float32(subject: Subject) -> str:
    """Weights, parameters and state are float32, and nothing on the way to the weights was rounded (C23).

    Rounded logits show in two ways: a bfloat16 input routes otherwise than the same numbers in float32; and along a line
    of almost equal tokens the weights move in steps.
    """
    model = subject.model().eval()
    for router in routers_of(model):
        _require(router.keep_float32, "keep_float32 is off: a bfloat16 engine would round the parameters")
        for name, value in router.state_dict().items():
            _require(not value.is_floating_point() or value.dtype == torch.float32, f"{name} is {value.dtype}")
    decision = subject.run(model, subject.batch()).decisions[0]
    router, (hidden, context, routing) = routers_of(model)[0], decision
    _require(routing.weight.dtype == torch.float32, f"weights are {routing.weight.dtype}")
    rounded = hidden.bfloat16()
    tables = [_table(subject, Decision(x, context, router(x, context))) for x in (rounded, rounded.float())]
    _require(same_routes(*tables), "a bfloat16 input routes otherwise than the same numbers in float32")
    line = hidden[0] + hidden[1] * 2e-5 * torch.arange(len(hidden))[:, None]
    steps = [_table(subject, Decision(x, context, router(x, context))) for x in (hidden, line)]
    various, along = (len(table.unique(dim=0)) for table in (table.nan_to_num(-1.0) for table in steps))
    _require(various < len(hidden) / 2 or along > len(hidden) / 2, f"{len(hidden)} close tokens have {along} weights")
    return "weights, parameters and state; a bfloat16 input routes like the same numbers in float32"


# ---- losses and gradients


def _learns_from_lm_loss(subject: Subject, router: RouterConfig | None = None) -> str:
    """Every router parameter gets a gradient from the cross-entropy alone (C5)."""
    if subject.num_experts == 1:
        raise NotApplicable("with one expert there is nothing to choose")
    model = subject.model(router=router)
    parameters = {
        f"{layer}.{name}": parameter
        for layer, module in enumerate(routers_of(model))
        for name, parameter in module.named_parameters()
    }
    if not parameters:
        raise NotApplicable("the router has no parameters")
    seen = subject.run(model, subject.batch())
    gradients = torch.autograd.grad(seen.output.loss_sum, list(parameters.values()), allow_unused=True)
    constant = all((decision.routing.weight == 1).all() for decision in seen.decisions)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None or not gradient.any():
            raise Broken(f"{name} gets none" + (": every weight is 1, whatever the parameters are" if constant else ""))
        _require(gradient.isfinite().all(), f"{name} gets one that is not finite")
    tokens = subject.batch().num_valid_labels()
    least = min(float(gradient.norm()) for gradient in gradients if gradient is not None) / tokens
    return f"norm {least:.0e} or more in every layer"


def _learns_with_one_expert(subject: Subject) -> str:
    """The same with ``top_k=1``, where a renormalised weight is always 1."""
    router = subject.config.router
    if "top_k" not in {field.name for field in fields(router)}:
        raise NotApplicable("the scheme has no top_k")
    changes: dict[str, Any] = {"top_k": 1}
    if getattr(router, "weights", None) == "renormalised":
        changes["weights"] = "raw"
    try:
        one = replace(router, **changes)
    except ValueError as refusal:
        raise NotApplicable(f"top_k=1 is refused: {refusal}") from refusal
    found = _learns_from_lm_loss(subject, one)
    return found + (", weights=raw (renormalised is always 1: refused)" if "weights" in changes else "")


def _is_one_when_uniform(subject: Subject) -> str:
    """The balance loss is 1, unweighted, at uniform probabilities (C15).

    ``num_experts * sum_e(f_e * 1 / num_experts)`` is 1 for any shares ``f``, so it does not matter where ties go.
    """
    router, (hidden, context, routing) = _balanced_router(subject)
    with _parameters_set(router, lambda parameter: torch.zeros_like(parameter)):
        routing = router(hidden, context)
    entropy = float(routing.use.router_entropy / routing.use.tokens)
    if abs(entropy - math.log(subject.num_experts)) > 1e-4:
        raise NotApplicable(f"weights of zero do not make its probabilities uniform (entropy {entropy:.3f} nats)")
    value = float(routing.aux["load_balance"])
    _require(abs(value - 1) <= 1e-6, f"{value:.6f} at uniform probabilities instead of 1")
    return "1 at uniform probabilities (exact for any routes, so ties do not matter)"


def _has_closed_form_when_collapsed(subject: Subject) -> str:
    """The balance loss is ``num_experts / m * (share of routes to m experts)`` when those ``m`` surely get every token.

    That is ``num_experts / top_k`` for top-k routing (C15). ``m`` is ``top_k``, or 1 for a scheme without it.
    """
    router, (hidden, context, _) = _balanced_router(subject)
    shape = (subject.num_experts, hidden.shape[1])
    if [parameter.shape for parameter in router.parameters()] != [shape]:
        raise NotApplicable("its probabilities are not set by one weight [experts, hidden]")
    few = getattr(subject.config.router, "top_k", 1)
    sign = torch.where(torch.arange(subject.num_experts) < few, 1.0, -1.0)[:, None]
    with _parameters_set(router, lambda parameter: (sign * SURE_LOGIT / shape[1]).expand(shape)):
        routing = router(torch.ones_like(hidden), context)
    entropy = float(routing.use.router_entropy / routing.use.tokens)
    if abs(entropy - math.log(few)) > 1e-3:
        raise NotApplicable(f"its probabilities do not collapse on {few} experts (entropy {entropy:.3f} nats)")
    share = float(routing.use.tokens_per_expert[:few].sum() / routing.use.tokens_per_expert.sum())
    expected, value = subject.num_experts / few * share, float(routing.aux["load_balance"])
    _require(abs(value - expected) <= 1e-4 * expected, f"{value:.4f} when collapsed on {few} instead of {expected:.4f}")
    more = "" if share == 1 else f", which get {share:.2f} of the routes"
    return f"{value:.4f} when {few} of {subject.num_experts} experts have all probability{more}"


def _balanced_router(subject: Subject) -> tuple[Router, Decision]:
    """The first router and what it decided, if it has a balance loss."""
    model = subject.model()
    decision = subject.run(model, subject.batch()).decisions[0]
    if "load_balance" not in decision.routing.aux:
        names = ", ".join(sorted(decision.routing.aux)) or "none"
        raise NotApplicable(f"the scheme has no load_balance loss; its aux losses: {names}")
    return routers_of(model)[0], decision


def _is_finite_at_ties(subject: Subject) -> str:
    """Weights, losses and gradients are finite where probabilities tie, vanish or are sure (C21)."""
    model = subject.model()
    router, (hidden, context, _) = routers_of(model)[0], subject.run(model, subject.batch()).decisions[0]
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "equal logits": (torch.zeros_like, hidden),
        "equal experts": (lambda parameter: torch.full_like(parameter, 0.1), hidden),
        "equal tokens": (torch.clone, hidden[:1].expand_as(hidden)),
        "hidden states of zero": (torch.clone, torch.zeros_like(hidden)),
        "sure probabilities": (lambda parameter: parameter * 1e4, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    for case, (change, given) in cases.items():
        given = given.clone().requires_grad_()
        with _parameters_set(router, change):
            routing = router(given, context)
            _check_routes(Decision(given, context, routing), subject.num_experts)
            upstream = torch.rand(routing.weight.shape, generator=generator)
            total = (routing.weight * upstream).sum() + sum(routing.aux.values())
            _require(total.isfinite(), f"{case}: a weight or a loss is not finite")
            wanted = [given, *router.parameters()]
            gradients = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else []
        for gradient in gradients:
            _require(gradient is None or gradient.isfinite().all(), f"{case}: a gradient is not finite")
    return ", ".join(cases)


def _survives_no_text(subject: Subject) -> str:
    """A micro-batch of nothing but padding has finite losses and gradients and counts nothing (C7, C21)."""
    batch = subject.batch(padding=range(ROWS))
    model = subject.warm_model()
    seen = subject.run(model, batch)
    loss = subject.loss(model, seen, batch, GlobalCounts(labels=10, tokens=10))
    for name, value in seen.output.aux.items():
        _require(value.isfinite(), f"the {name} loss is {float(value)}")
    _require(loss.isfinite(), f"the loss is {float(loss)}")
    (loss + sum(seen.output.aux.values())).backward()
    for name, parameter in model.named_parameters():
        _require(_gradient(parameter).isfinite().all(), f"the gradient of {name} is not finite")
    _require(not any(use.tokens_per_expert.any() for use in seen.output.uses), "padding is counted")
    return "losses and gradients finite, no route counted"


def _agrees_with_oracle(subject: Subject) -> str:
    """Loss, aux losses and all gradients of a global batch are the oracle's, also when it is cut (C5, C6, C12)."""
    batch = subject.batch(padding=(1,))
    model = subject.model()
    routers = routers_of(model)
    halves = [rows_of(batch, slice(0, 2)), rows_of(batch, slice(2, None))]
    # A scheme whose tokens compete routes each micro-batch in its own way, and the oracle sees the whole batch.
    cuts = halves if all(router.causal_in_training for router in routers) else [batch]
    with torch.no_grad():
        ahead = [subject.run(model, cut).output.uses for cut in cuts]
    totals = {
        router.layer: torch.stack([uses[index].tokens_per_expert for uses in ahead]).sum(dim=0)
        for index, router in enumerate(routers)
    }
    text = int((batch.document_ids >= 0).sum())
    counts = GlobalCounts(labels=batch.num_valid_labels(), tokens=text)
    loss, aux = 0.0, dict.fromkeys(routers[0].aux_weights, 0.0)
    for cut in cuts:
        seen = subject.run(model, cut, 0, lambda layer, own: totals[layer])
        subject.loss(model, seen, cut, counts).backward()
        loss += float(seen.output.loss_sum.detach()) / counts.labels
        for name, value in seen.output.aux.items():
            aux[name] += float(value.detach()) * int((cut.document_ids >= 0).sum()) / text
    expected = Oracle(subject.config, 1).step(0, cuts)
    errors = {"loss": _relative(torch.tensor(loss), torch.tensor(expected.loss))}
    errors |= {name: _relative(torch.tensor(aux[name]), torch.tensor(expected.aux[name])) for name in aux}
    for name, parameter in model.named_parameters():
        errors[name] = _relative(_gradient(parameter), expected.gradients[name])
    worst = max(errors, key=lambda name: errors[name])
    _require(all(error <= TOLERANCE for error in errors.values()), f"{worst} differs by {errors[worst]:.0e}")
    return f"{len(cuts)} micro-batches, {len(expected.gradients)} gradients, at most {errors[worst]:.0e} apart"


# ---- state


def _keeps_state(subject: Subject) -> str:
    """What ``after_step`` moves is in buffers, survives saving, and is moved by nothing else (C22, C33)."""
    model = subject.model()
    batch = subject.batch()
    before = deep = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        seen = subject.run(model.train(training), batch)
    _require(not _moved(deep, model.state_dict()), "a forward pass moves state")
    attributes = _attributes(model)
    _move(model, subject)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    moved = _moved(before, model.state_dict())
    lost = [name for name, value in _attributes(model).items() if attributes.get(name) != value]
    _require(not lost, f"after_step moves {', '.join(lost)}, which is not saved: it must be a persistent buffer")
    loaded = subject.model()
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for when in ("after loading", "a step after loading"):
        for training in (True, False):
            ours, theirs = (subject.run(one.train(training), batch) for one in (model, loaded))
            _require(_same_bits(subject, ours, theirs), f"routes differ {when}")
        move_state(model, seen)
        move_state(loaded, seen)
    names = sorted({name.rpartition(".")[2] for name in moved})
    if not names:
        return "after_step moves nothing"
    return f"{', '.join(names)}: routes the same after loading"


def _move(model: DecoderLM, subject: Subject) -> None:
    """Many steps of uneven load, so that whatever moves has moved far enough to change routes."""
    load = torch.arange(subject.num_experts, 0, -1, dtype=torch.float64)
    for _ in range(STATE_STEPS):
        for router in routers_of(model):
            router.after_step(load.clone(), int(load.sum()))


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in after.items() if not torch.equal(before[name], value)]


def _attributes(model: DecoderLM) -> dict[str, Any]:
    """Numbers and tensors of the routers that ``state_dict`` does not have, by name."""
    found: dict[str, Any] = {}
    for router in routers_of(model):
        for path, module in router.named_modules():
            kept = module.state_dict()
            loose = {**{name: value for name, value in vars(module).items()}, **dict(module.named_buffers(recurse=False))}
            for name, value in loose.items():
                if name in kept or name == "training":
                    continue
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    found[f"{router.layer}.{path}{name}"] = value.tolist()
                elif isinstance(value, int | float | list | tuple):
                    found[f"{router.layer}.{path}{name}"] = repr(value)
    return found


# ---- shared


def _table(subject: Subject, decision: Decision) -> Tensor:
    """``[tokens, experts]``: the weight of each route, NaN where there is none."""
    routing = decision.routing
    table = torch.full((len(decision.hidden), subject.num_experts), math.nan)
    return table.index_put((routing.token_index, routing.expert_index), routing.weight.detach().float())


def _tables(subject: Subject, decisions: list[Decision]) -> list[Tensor]:
    return [_table(subject, decision) for decision in decisions]


def _same_bits(subject: Subject, ours: Pass, theirs: Pass) -> bool:
    pairs = zip(_tables(subject, ours.decisions), _tables(subject, theirs.decisions), strict=True)
    return all(same_routes(a, b, tolerance=0.0) for a, b in pairs)


@contextmanager
def _parameters_set(router: Router, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
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


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """``|ours - theirs| / |theirs|``; what is zero must be zero."""
    difference, size = float((ours - theirs).double().norm()), float(theirs.double().norm())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "causality in training": partial(_is_causal, training=True),
    "causality in evaluation": partial(_is_causal, training=False),
    "conservation of routes": _conserves_routes,
    "combine of identity experts": _combines_identity,
    "router gradient from the LM loss": _learns_from_lm_loss,
    "the same with top_k=1": _learns_with_one_expert,
    "aux losses named": _names_losses,
    "balance loss at uniform": _is_one_when_uniform,
    "balance loss at collapse": _has_closed_form_when_collapsed,
    "padding ignored": _ignores_padding,
    "no text tokens": _survives_no_text,
    "finite at ties": _is_finite_at_ties,
    "float32 routing": _is_float32,
    "determinism": _is_deterministic,
    "recompute": _survives_recompute,
    "state round trip": _keeps_state,
    "batch of one in evaluation": _is_alone_the_same,
    "cut of the batch in training": partial(_is_cut_free, training=True),
    "cut of the batch in evaluation": partial(_is_cut_free, training=False),
    "gradient parity with the oracle": _agrees_with_oracle,
}
"""Row of the certificate -> the question behind it."""
