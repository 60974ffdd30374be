"""Rows of the certificate: losses, gradients, recomputation and state. What a function raises: ``certify_routes``."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moe_pretrain.engine.micro_batch import GlobalCounts
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import step_uses
from moe_pretrain.verify.certificate.balance_properties import has_closed_form_when_collapsed, is_one_when_uniform
from moe_pretrain.verify.certificate.route_properties import check_routes
from moe_pretrain.verify.certificate.subject import (
    ROWS,
    TOLERANCE,
    Broken,
    Decision,
    NotApplicable,
    Pass,
    Subject,
    generators_at,
    move_state,
    parameters_set,
    relative,
    require,
    routers_of,
    rows_of,
)
from moe_pretrain.verify.oracle import Oracle

STATE_STEPS = 100
SMALL_INTEGERS = (torch.int8, torch.uint8, torch.int16)
"""What counts fewer steps than a run may have."""
ROUNDING = 1e-5
"""A gradient that is a smaller part of the whole model's is zero but for rounding."""
_WEIGHTS_OF_ONE = {"renormalised": "raw", "zero_dropped": "raw", "selected": "full"}
"""Weights that a scheme may refuse for one expert per token -> what it has instead."""


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
    seen.output.loss_sum.backward(retain_graph=True)
    norms = {name: float(_gradient(parameter).norm()) for name, parameter in parameters.items()}
    whole = math.sqrt(sum(float(_gradient(parameter).square().sum()) for parameter in model.parameters()))
    constant = all((decision.routing.weight == 1).all() for decision in seen.decisions)
    why = ": every weight is 1, whatever the parameters are" if constant else ""
    excused = {
        f"{layer}.{name}": (name, reason)
        for layer, module in enumerate(routers_of(model))
        for name, reason in module.without_lm_gradient.items()
    }
    learnt = {name: norm for name, norm in norms.items() if name not in excused}
    for name, norm in norms.items():
        require(math.isfinite(norm), f"that of {name} is not finite")
        require(norm > ROUNDING * whole or name not in learnt, f"{name} gets none{why}")
    reasons = "; ".join(f"not {name}: {reason}" for name, reason in dict(excused.values()).items())
    untaught = [name for name in _untaught(subject, model, seen, parameters) if name in excused]
    require(
        not untaught, f"{', '.join(untaught)} gets none, as is declared, and none from any aux loss with a coefficient"
    )
    if not learnt:
        raise NotApplicable(reasons)
    found = f"{min(learnt.values()) / whole:.0e} or more of the whole gradient's norm, in every layer"
    return found + (", past weights that are always 1" if constant else "") + (f"; {reasons}" if reasons else "")


def _untaught(subject: Subject, model: DecoderLM, seen: Pass, parameters: dict[str, Parameter]) -> list[str]:
    """Names of parameters that no part of the training loss moves."""
    without = [name for name, parameter in parameters.items() if not _gradient(parameter).any()]
    losses = [
        weight * seen.output.aux[name]
        for name, weight in model.aux_weights.items()
        if weight and seen.output.aux[name].requires_grad
    ]
    if not losses or not without:
        return without
    gradients = torch.autograd.grad(
        torch.stack(losses).sum(), [parameters[name] for name in without], allow_unused=True
    )
    return [name for name, gradient in zip(without, gradients, strict=True) if gradient is None or not gradient.any()]


def _learns_with_one_expert(subject: Subject) -> str:
    """The same with ``top_k=1``, where a renormalised weight is always 1."""
    router: Any = subject.config.router
    if "top_k" not in vars(router):
        raise NotApplicable("the scheme has no top_k")
    changes: dict[str, Any] = {"top_k": 1}
    weights, note = vars(router).get("weights"), ""
    try:
        one = replace(router, **changes)
    except ValueError as refusal:
        if weights not in _WEIGHTS_OF_ONE:
            raise NotApplicable(f"top_k=1 is refused: {refusal}") from refusal
        changes["weights"] = _WEIGHTS_OF_ONE[weights]
        note = f", weights={changes['weights']} ({weights} is always 1: refused)"
        one = replace(router, **changes)
    return _learns_from_lm_loss(subject, one) + note


def _is_finite_at_ties(subject: Subject) -> str:
    """Weights, losses and gradients are finite where probabilities tie, vanish or are sure (C21)."""
    model = subject.model()
    router, (hidden, context, _) = routers_of(model)[0], subject.run(model, subject.batch()).decisions[0]
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "equal logits (parameters of 0)": (torch.zeros_like, hidden),
        "equal experts (parameters of 0.1)": (lambda parameter: torch.full_like(parameter, 0.1), hidden),
        "equal tokens": (torch.clone, hidden[:1].expand_as(hidden)),
        "hidden states of zero": (torch.clone, torch.zeros_like(hidden)),
        "sure probabilities (parameters times 10,000)": (lambda parameter: parameter * 1e4, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    for case, (change, given) in cases.items():
        given = given.clone().requires_grad_()
        with parameters_set(router, change):
            routing = router(given, context)
            try:
                check_routes(Decision(given, context, routing), subject.num_experts)
            except Broken as broken:
                raise Broken(f"{case}: {broken}") from None
            upstream = torch.rand(routing.weight.shape, generator=generator)
            total = (routing.weight * upstream).sum() + sum(routing.aux.values())
            require(total.isfinite(), f"{case}: a weight or a loss is not finite")
            wanted = [given, *router.parameters()]
            gradients = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else []
        for gradient in gradients:
            require(gradient is None or gradient.isfinite().all(), f"{case}: a gradient is not finite")
    return ", ".join(cases)


def _survives_no_text(subject: Subject) -> str:
    """A micro-batch of nothing but padding has finite losses and gradients and counts nothing (C7, C21).

    State stays finite in a step of it, too.
    """
    batch = subject.batch(padding=range(ROWS))
    model = subject.warm_model()
    seen = subject.run(model, batch)
    loss = subject.loss(model, seen, batch, GlobalCounts(labels=10, tokens=10))
    for name, value in seen.output.aux.items():
        require(value.isfinite(), f"the {name} loss is {value.item()}")
    require(loss.isfinite(), f"the loss is {loss.item()}")
    (loss + sum(seen.output.aux.values())).backward()
    for name, parameter in model.named_parameters():
        require(_gradient(parameter).isfinite().all(), f"the gradient of {name} is not finite")
    require(not any(use.tokens_per_expert.any() for use in seen.output.uses), "padding is counted")
    move_state(model, seen)
    for name, value in model.state_dict().items():
        require(bool(value.isfinite().all()), f"after_step makes {name} not finite in a step without text")
    return "losses, gradients and state finite, no route counted"


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
    loss, aux = 0.0, dict.fromkeys(model.aux_weights, 0.0)
    for cut in cuts:
        seen = subject.run(model, cut, 0, lambda layer, own: totals[layer], text)
        subject.loss(model, seen, cut, counts).backward()
        loss += float(seen.output.loss_sum.detach()) / counts.labels
        for name, value in seen.output.aux.items():
            aux[name] += float(value.detach()) * int((cut.document_ids >= 0).sum()) / text
    expected = Oracle(subject.config, 1).step(0, cuts)
    errors = {"loss": relative(torch.tensor(loss), torch.tensor(expected.loss))}
    errors |= {name: relative(torch.tensor(aux[name]), torch.tensor(expected.aux[name])) for name in aux}
    for name, parameter in model.named_parameters():
        errors[name] = relative(_gradient(parameter), expected.gradients[name])
    worst = max(errors, key=lambda name: errors[name])
    require(all(error <= TOLERANCE for error in errors.values()), f"{worst} differs by {errors[worst]:.0e}")
    return f"{len(cuts)} micro-batches, {len(expected.gradients)} gradients, at most {errors[worst]:.0e} apart"


def _names_losses(subject: Subject) -> str:
    """Every aux loss is a float32 scalar with a coefficient, and every coefficient has its loss (C18).

    Where the configuration has a field ``NAME_weight``, that is the coefficient of the loss ``NAME`` at the start.
    """
    model = subject.model()
    for router in routers_of(model):
        settings = vars(subject.config.router.of_layer(router.layer))
        for name, weight in router.aux_weights.items():
            wanted = settings.get(f"{name}_weight", weight)
            require(weight == wanted, f"the coefficient of {name} is {weight:g}, but router.{name}_weight={wanted:g}")
    seen = subject.run(model, subject.batch())
    for router, decision in zip(routers_of(model) * seen.output.num_passes, seen.decisions, strict=True):
        aux = decision.routing.aux
        require(
            aux.keys() == router.aux_weights.keys(), f"losses {sorted(aux)}, coefficients {sorted(router.aux_weights)}"
        )
        for name, value in aux.items():
            require(value.dtype == torch.float32 and value.ndim == 0, f"{name} is not a float32 scalar")
            require(value.isfinite(), f"{name} is {value.item()}")
    found, known = sorted(seen.output.aux), sorted(model.aux_weights)
    require(found == known, f"the model has losses {found}, coefficients {known}")
    return ", ".join(known) or "none"


def _survives_recompute(subject: Subject) -> str:
    """Loss, gradients and counts are bitwise the same with every kind of recomputation (C14, C24)."""
    batch = subject.batch()
    results: dict[str, dict[str, Tensor]] = {}
    for recompute in ("none", "selective", "full"):
        model = subject.model(recompute)
        with generators_at(len(results)):
            seen = subject.run(model, batch)
            loss = subject.loss(model, seen, batch)
            loss.backward()
        counts = torch.stack([use.tokens_per_expert for use in seen.output.uses])
        results[recompute] = {"loss": loss.detach(), "tokens_per_expert": counts}
        results[recompute] |= {name: _gradient(parameter) for name, parameter in model.named_parameters()}
        decided = seen.output.num_passes * len(routers_of(model))
        require(len(seen.decisions) == decided, f"recompute={recompute} routes again in backward")
    for recompute in ("selective", "full"):
        for name, value in results["none"].items():
            require(torch.equal(results[recompute][name], value), f"recompute={recompute} changes {name}")
    return "none, selective and full agree bit for bit"


def _keeps_state(subject: Subject) -> str:
    """State moved by ``after_step`` is in buffers, survives saving, and is moved by nothing else (C22, C33)."""
    model, batch = subject.model(), subject.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (False, True):
        seen = subject.run(model.train(training), batch)
    require(not _moved(before, model), "a forward pass moves state")
    unsaved = _unsaved(model)
    _move(model, seen)
    lost = [name for name, value in _unsaved(model).items() if unsaved.get(name) != value]
    require(not lost, f"after_step moves {', '.join(lost)}, which is lost: it must be a persistent buffer")
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = subject.model()
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    other = subject.run(model, subject.batch(seed=1))
    for when in ("after loading", "a step after loading"):
        apart = sorted({name.rpartition(".")[2] for name in _moved(model.state_dict(), loaded)})
        require(not apart, f"{', '.join(apart)} differs {when} from what was saved")
        for training in (True, False):
            ours, theirs = (subject.run(one.train(training), batch) for one in (model, loaded))
            require(subject.has_same_bits(ours, theirs), f"routes differ {when}")
        for one in (model, loaded):
            move_state(one, other)
    for name in _moved(before, model):
        kind = model.state_dict()[name].dtype
        require(kind not in SMALL_INTEGERS, f"{name} is {kind} and moves: a count of steps overflows in it")
    names = sorted({name.rpartition(".")[2] for name in _moved(before, model)})
    return f"{', '.join(names)}: the same routes after loading" if names else "after_step moves nothing"


def _move(model: DecoderLM, seen: Pass) -> None:
    """Many steps of uneven load, so that whatever moves has moved far enough to change routes."""
    for layer, use in zip(model.moe_layers(), step_uses(seen.output.uses), strict=True):
        load = torch.arange(layer.kinds.total, 0, -1, dtype=torch.float64)
        for _ in range(STATE_STEPS):
            layer.router.after_step(replace(use, tokens_per_expert=load.clone(), tokens=int(load.sum())))


def _moved(before: dict[str, Tensor], model: DecoderLM) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(before[name], value)]


def _unsaved(model: DecoderLM) -> dict[str, Any]:
    """Values of the routers' numbers and tensors that ``state_dict`` does not have."""
    found: dict[str, Any] = {}
    for router in routers_of(model):
        for path, module in router.named_modules():
            for name, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items():
                if name in module.state_dict() or name == "training":
                    continue
                if isinstance(value, Tensor):
                    value = value.tolist()
                if isinstance(value, int | float | list | tuple):
                    found[f"{path}.{name}".lstrip(".")] = repr(value)
    return found


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


LEARNING: dict[str, Callable[[Subject], str]] = {
    "router gradient from the LM loss": _learns_from_lm_loss,
    "router gradient with top_k=1": _learns_with_one_expert,
    "aux losses named": _names_losses,
    "balance loss at uniform": is_one_when_uniform,
    "balance loss at collapse": has_closed_form_when_collapsed,
    "no text tokens": _survives_no_text,
    "finite at ties": _is_finite_at_ties,
    "recompute": _survives_recompute,
    "state round trip": _keeps_state,
    "gradient parity with the oracle": _agrees_with_oracle,
}
"""Name of the row -> the question behind it."""
