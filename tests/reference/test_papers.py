"""Self-checks of the papers' references: what must hold by mathematics, each failing under the obvious mistake."""

import itertools
from collections.abc import Iterable

import pytest
import torch
from reference.papers import (
    dynmoe,
    matrix_product,
    merged_experts,
    merging,
    moe_plus_plus,
    orthogonal,
    pruning,
    self_contrast,
    thor,
    unequal,
)
from reference.papers.swiglu import swiglu
from torch import Tensor
from torch.nn import functional as F

TOKENS, EXPERTS, HIDDEN, FFN = 7, 4, 6, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(number: int = EXPERTS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(number, FFN, HIDDEN, seed=seed),
        normal(number, FFN, HIDDEN, seed=seed + 1),
        normal(number, HIDDEN, FFN, seed=seed + 2),
    )


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(dim=0)


def expert(e: int, x: Tensor, bank: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return swiglu(x, bank[0][e], bank[1][e], bank[2][e])


def test_swiglu_by_hand() -> None:
    x, (w_gate, w_up, w_down) = normal(HIDDEN, seed=1), experts(1)
    expected = w_down[0] @ (F.silu(w_gate[0] @ x) * (w_up[0] @ x))
    torch.testing.assert_close(swiglu(x, w_gate[0], w_up[0], w_down[0]), expected)


# DynMoE


def dynmoe_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, keys = normal(TOKENS, HIDDEN, seed=10), normal(HIDDEN, EXPERTS, seed=11)
    thresholds = torch.tensor([0.25, 0.1, -1.0, 0.2], dtype=torch.float64)
    return x, keys.requires_grad_(), thresholds.requires_grad_(), torch.tensor([True, True, False, True])


def test_dynmoe_weights_are_equal_shares_and_inactive_experts_never_run() -> None:
    x, keys, thresholds, active = dynmoe_case()
    routing = dynmoe.route(x, keys, thresholds, active, scale=2.0)
    passes = (F.normalize(x, dim=1) @ F.normalize(keys, dim=0) > thresholds) & active
    assert torch.equal(routing.mask, passes) and 0 in routing.active_count and 2 in routing.active_count
    for t in range(TOKENS):
        k = int(routing.active_count[t])
        assert torch.equal(routing.weights[t], routing.mask[t] / max(k, 1))
    y = dynmoe.forward(x, routing, *experts())
    assert torch.equal(y[routing.active_count == 0], torch.zeros_like(y[routing.active_count == 0]))
    y.square().sum().backward()
    assert keys.grad is not None and torch.count_nonzero(keys.grad[:, 2]) == 0
    assert torch.count_nonzero(keys.grad[:, 0]) == HIDDEN


def test_dynmoe_straight_through_rule() -> None:
    x, keys, thresholds, active = dynmoe_case()
    bank, scale, upstream = experts(), 2.0, normal(TOKENS, HIDDEN, seed=12)
    routing = dynmoe.route(x, keys, thresholds, active, scale)
    (dynmoe.forward(x, routing, *bank) * upstream).sum().backward()
    expected = torch.zeros(EXPERTS, dtype=torch.float64)
    for t in range(TOKENS):
        for e in range(EXPERTS):
            if routing.mask[t, e]:
                expected[e] -= upstream[t] @ expert(e, x[t], bank) / routing.active_count[t]
    sigmoid = torch.sigmoid(scale * thresholds.detach())
    torch.testing.assert_close(thresholds.grad, expected * scale * sigmoid * (1 - sigmoid))


def test_dynmoe_fallback_is_the_best_active_expert() -> None:
    x, keys, _, active = dynmoe_case()
    keys.requires_grad_(False)
    high = torch.full((EXPERTS,), 2.0, dtype=torch.float64, requires_grad=True)
    cases: list[tuple[dynmoe.Fallback, bool]] = [("constant", False), ("straight_through", True)]
    for fallback, has_gradient in cases:
        routing = dynmoe.route(x, keys, high, active, fallback=fallback)
        assert torch.equal(routing.active_count, torch.zeros(TOKENS, dtype=torch.int64))
        best = routing.cosine.masked_fill(~active, -2).argmax(dim=1)
        assert torch.equal(routing.weights.detach(), F.one_hot(best, EXPERTS).double())
        assert routing.weights.requires_grad is has_gradient


def test_dynmoe_losses_at_known_points() -> None:
    keys = 3 * torch.eye(HIDDEN, EXPERTS, dtype=torch.float64)
    active = torch.tensor([True, True, False, True])
    diversity, simplicity = dynmoe.key_losses(keys, active)
    assert diversity == 0 and simplicity == 3
    keys[:, 1] = keys[:, 0]
    keys[:, 2] = 7 * keys[:, 0]
    diversity, simplicity = dynmoe.key_losses(keys, active)
    torch.testing.assert_close(diversity, torch.tensor(2.0, dtype=torch.float64).sqrt())
    assert simplicity == (3 + 3 + 21 + 3) / 4  # the inactive column counts here, not above
    even, collapsed = torch.eye(EXPERTS).bool(), F.one_hot(torch.zeros(EXPERTS, dtype=torch.int64), EXPERTS).bool()
    assert dynmoe.load_balance_loss(even.double(), even) == 1
    assert dynmoe.load_balance_loss(collapsed.double(), collapsed) == EXPERTS


def test_dynmoe_updates_its_experts() -> None:
    x = normal(TOKENS, HIDDEN, seed=13)
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    mask[:4, 0] = mask[2:5, 3] = True
    window = dynmoe.Window(torch.zeros(EXPERTS), torch.zeros(HIDDEN, dtype=torch.float64), 0)
    window = dynmoe.record(dynmoe.record(window, x, mask), x, mask)
    assert window.unrouted_tokens == 4 and window.counts.tolist() == [8, 0, 0, 6]
    keys, thresholds = normal(HIDDEN, EXPERTS, seed=14), torch.ones(EXPERTS, dtype=torch.float64)
    state = dynmoe.update(dynmoe.State(keys, thresholds, torch.tensor([True, True, False, True])), window)
    assert state.active.tolist() == [True, True, False, True]  # slot 1 removed, then taken again
    torch.testing.assert_close(state.keys[:, 1], F.normalize(x[5:].mean(dim=0), dim=0))
    assert state.thresholds.tolist() == [1, 0, 1, 1] and torch.equal(state.keys[:, [0, 2, 3]], keys[:, [0, 2, 3]])
    routed = dynmoe.record(dynmoe.Window(torch.zeros(EXPERTS), window.unrouted_sum * 0, 0), x[:5], mask[:5])
    assert dynmoe.update(state, routed).active.tolist() == [True, False, False, True]


def test_dynmoe_windows() -> None:
    for published, recorded, update_at in ((False, 300, 599), (True, 301, 600)):
        actions = [dynmoe.window_action(i, published) for i in range(900)]
        assert sum(record for record, _ in actions) == recorded
        assert [i for i, (_, update) in enumerate(actions) if update] == [update_at]


# MoE++

KINDS: list[moe_plus_plus.Kind] = ["ffn", "ffn", "constant", "constant", "copy", "zero"]


def plus_plus_layer(
    x: Tensor, logits: Tensor, rule: moe_plus_plus.Rule = "drop_zero", scale: float = 1.0
) -> moe_plus_plus.Layer:
    """A layer whose router gives ``logits``: a zero router with the logits carried in through an identity."""
    router = (torch.zeros(len(KINDS), HIDDEN, dtype=torch.float64),)
    carry = torch.eye(len(KINDS), dtype=torch.float64)
    constants = normal(2, 2, HIDDEN, seed=20), normal(2, HIDDEN, seed=21)
    weights = (*experts(2), *constants)
    return moe_plus_plus.forward(
        x, KINDS, router, carry, logits, *weights, tau=0.75, rule=rule, expert_input_scale=scale
    )


def test_moe_plus_plus_zero_expert_leaves_its_partner_alone() -> None:
    x, bank = normal(3, HIDDEN, seed=22), experts(2)
    logits = torch.zeros(3, len(KINDS), dtype=torch.float64)
    logits[:, 5] = 2.0
    logits[0, 1] = logits[1, 4] = logits[2, 2] = 1.0
    y = plus_plus_layer(x, logits).y
    torch.testing.assert_close(y[0], expert(1, x[0], bank))
    torch.testing.assert_close(y[1], x[1])
    alpha = torch.softmax(normal(2, 2, HIDDEN, seed=20)[0] @ x[2], dim=0)
    torch.testing.assert_close(y[2], alpha[0] * x[2] + alpha[1] * normal(2, HIDDEN, seed=21)[0])
    share = torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(plus_plus_layer(x, logits, rule="keep_zero").y, y * share)
    torch.testing.assert_close(plus_plus_layer(x, logits, scale=2.0).y[1], 2 * x[1])


def test_moe_plus_plus_carries_logits() -> None:
    x, bank = normal(TOKENS, HIDDEN, seed=23), experts(2)
    first = normal(len(KINDS), HIDDEN, seed=24).requires_grad_()
    second, carry = normal(len(KINDS), HIDDEN, seed=25), normal(len(KINDS), len(KINDS), seed=26)
    rest = (*bank, normal(2, 2, HIDDEN, seed=20), normal(2, HIDDEN, seed=21))
    one = moe_plus_plus.forward(x, KINDS, (first,), None, None, *rest, tau=0.5)
    two = moe_plus_plus.forward(x, KINDS, (second,), carry, one.logits, *rest, tau=0.5)
    torch.testing.assert_close(two.logits, x @ second.T + one.logits @ carry.T)
    (gradient,) = torch.autograd.grad(two.y.sum(), first)
    assert torch.count_nonzero(gradient) == gradient.numel()
    plain = moe_plus_plus.forward(x, KINDS, (second,), None, None, *rest, tau=0.5)
    cut = moe_plus_plus.forward(x, KINDS, (second,), carry * 0, one.logits, *rest, tau=0.5)
    assert torch.equal(plain.y, cut.y) and not torch.equal(plain.y, two.y)


def test_moe_plus_plus_order_of_experts_does_not_matter() -> None:
    x, logits = normal(TOKENS, HIDDEN, seed=27), normal(TOKENS, len(KINDS), seed=28)
    order = [5, 2, 0, 4, 3, 1]  # keeps the order within a kind
    probs, mask, weights = moe_plus_plus.gate_weights(logits, KINDS)
    kinds = [KINDS[i] for i in order]
    moved = moe_plus_plus.gate_weights(logits[:, order], kinds)
    for before, after in zip((probs, mask, weights), moved, strict=True):
        torch.testing.assert_close(after, before[:, order])
    loss = moe_plus_plus.balance_loss(probs, mask, KINDS, 0.3)
    torch.testing.assert_close(loss, moe_plus_plus.balance_loss(moved[0], moved[1], kinds, 0.3))
    constants = normal(2, 2, HIDDEN, seed=20), normal(2, HIDDEN, seed=21)
    router, carry = (torch.zeros(6, HIDDEN, dtype=torch.float64),), torch.eye(6, dtype=torch.float64)
    layer = moe_plus_plus.forward(x, kinds, router, carry, logits[:, order], *experts(2), *constants, tau=0.3)
    torch.testing.assert_close(layer.y, plus_plus_layer(x, logits).y)


def test_moe_plus_plus_balance_loss_rests_where_an_ffn_gets_tau_times_a_zero_computation_expert() -> None:
    """``dL/dz_tj = p_tj (eta_j f_j - sum_i eta_i f_i p_ti) / T`` vanishes exactly where eta f is equal."""
    tau = 0.5
    kinds: list[moe_plus_plus.Kind] = ["ffn", "ffn", "zero", "copy"]
    for ffn_tokens, at_rest in ((2, True), (3, False)):
        chosen = torch.zeros(6, 4, dtype=torch.bool)  # f: FFN ffn_tokens/6, the others 4/6
        chosen[:ffn_tokens, 0] = chosen[-ffn_tokens:, 1] = chosen[:4, 2] = chosen[2:, 3] = True
        logits = normal(6, 4, seed=29).requires_grad_()
        loss = moe_plus_plus.balance_loss(torch.softmax(logits, dim=1), chosen, kinds, tau)
        (gradient,) = torch.autograd.grad(loss, logits)
        pull = gradient.sum(dim=0)
        if at_rest:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient))
        else:
            assert pull[0] > 0 and pull[1] > 0 and pull[2] < 0 and pull[3] < 0


def test_moe_plus_plus_capacity_is_gamma_tokens_in_all() -> None:
    kinds: list[moe_plus_plus.Kind] = ["ffn" for _ in range(16)]
    kinds += ["zero", "copy", "constant", "constant"]
    capacity = moe_plus_plus.expert_capacity(1000, kinds, tau=0.75, gamma=1.1)
    assert abs(sum(capacity) - 1100) < 1e-9 and abs(sum(capacity[:16]) / 1100 - 0.75) < 1e-12


# SMEAR and Lory


def test_merged_experts_are_not_an_ensemble() -> None:
    x, bank = normal(3, HIDDEN, seed=30), experts()
    one_hot = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        merged_experts.dense(x, one_hot, *bank), torch.stack([expert(2, row, bank) for row in x])
    )
    mixture = torch.softmax(normal(EXPERTS, seed=31), dim=0)
    clones = (bank[0][:1].expand_as(bank[0]), bank[1][:1].expand_as(bank[1]), bank[2][:1].expand_as(bank[2]))
    for weights, equal in ((clones, True), (bank, False)):
        ensemble = torch.stack([total(mixture[e] * expert(e, row, weights) for e in range(EXPERTS)) for row in x])
        assert torch.allclose(merged_experts.dense(x, mixture, *weights), ensemble) is equal


def test_smear_routes_by_normalised_mean_and_drops_experts() -> None:
    x, bank = normal(2, 3, HIDDEN, seed=32), experts()
    w_router, b_router = normal(EXPERTS, HIDDEN, seed=33).requires_grad_(), normal(EXPERTS, seed=34)
    merged = merged_experts.smear(x, w_router, b_router, *bank)
    v, w = F.layer_norm(x.mean(dim=1), (HIDDEN,)), F.layer_norm(w_router, (HIDDEN,)) * 1e-2
    torch.testing.assert_close(merged.mixture, torch.softmax(v @ w.T + b_router, dim=1))
    torch.testing.assert_close(merged_experts.smear(3 * x, 5 * w_router, b_router, *bank).mixture, merged.mixture,
                               rtol=1e-4, atol=0)  # fmt: skip
    valid = torch.tensor([[True, True, False], [True, True, True]])
    short = merged_experts.smear(x[:, :2], w_router, b_router, *bank)
    padded = merged_experts.smear(x, w_router, b_router, *bank, valid=valid)
    torch.testing.assert_close(padded.mixture[0], short.mixture[0])
    keep = torch.tensor([[True, False, True, False], [False] * 4])
    dropped = merged_experts.smear(x, w_router, b_router, *bank, keep=keep).mixture
    torch.testing.assert_close(dropped[1], torch.full((EXPERTS,), 0.25, dtype=torch.float64))
    expected = merged.mixture[0] * keep[0]
    torch.testing.assert_close(dropped[0], expected / expected.sum(), rtol=0, atol=1e-8)
    (gradient,) = torch.autograd.grad(merged.y.sum(), w_router)
    assert torch.count_nonzero(gradient) == gradient.numel()


def test_lory_is_causal_with_a_prior_and_leaks_within_the_published_first_segment() -> None:
    x, bank, w_router = normal(1, 7, HIDDEN, seed=35), experts(), normal(EXPERTS, HIDDEN, seed=36)
    prior = normal(EXPERTS, seed=37)
    published = merged_experts.lory(x, w_router, *bank, segment_tokens=3)
    causal = merged_experts.lory(x, w_router, *bank, segment_tokens=3, first="prior", prior_logits=prior)
    torch.testing.assert_close(published.y[:, 3:], causal.y[:, 3:])
    torch.testing.assert_close(published.mixture[0, 1], torch.softmax(w_router @ x[0, :3].mean(dim=0), dim=0))
    for t in range(7):
        changed = x.clone()
        changed[0, t] += 1
        again = merged_experts.lory(changed, w_router, *bank, segment_tokens=3, first="prior", prior_logits=prior)
        assert torch.equal(again.y[0, :t], causal.y[0, :t])
        leaks = not torch.equal(
            merged_experts.lory(changed, w_router, *bank, segment_tokens=3).y[0, :t], published.y[0, :t]
        )
        assert leaks is (t in (1, 2))


def test_lory_stops_the_gradient_of_the_first_segment_only() -> None:
    x, bank = normal(1, 6, HIDDEN, seed=38), experts()
    w_router = normal(EXPERTS, HIDDEN, seed=39).requires_grad_()
    for theta in bank:
        theta.requires_grad_()
    y = merged_experts.lory(x, w_router, *bank, segment_tokens=3).y
    (stopped,) = torch.autograd.grad(y[:, :3].sum(), w_router, retain_graph=True)
    assert torch.count_nonzero(stopped) == 0
    for gradient in torch.autograd.grad(y[:, 3:].sum(), (w_router, *bank)):
        assert all(torch.count_nonzero(gradient[e]) > 0 for e in range(EXPERTS))
    prompt = merged_experts.lory_prompt_only(x, 3, w_router, *bank)
    torch.testing.assert_close(prompt.y[:, 3:], y[:, 3:])


# THOR


def test_thor_runs_the_drawn_expert_with_weight_one() -> None:
    x, bank, drawn = normal(TOKENS, HIDDEN, seed=40), experts(), torch.tensor([3, 0, 0, 1, 3, 2, 3])
    y, mask = thor.forward(x, drawn, *bank)
    torch.testing.assert_close(y, torch.stack([expert(int(e), row, bank) for e, row in zip(drawn, x, strict=True)]))
    assert mask.sum(dim=0).tolist() == [2, 1, 1, 3]


def test_thor_loss() -> None:
    first, second = normal(TOKENS, 9, seed=41).requires_grad_(), normal(TOKENS, 9, seed=42).requires_grad_()
    targets, valid = torch.tensor([1, 8, 0, 3, 3, 2, 5]), torch.tensor([True] * 5 + [False] * 2)
    loss = thor.two_pass_loss(first, second, targets, alpha=5.0, valid=valid)
    torch.testing.assert_close(loss.ce_first, F.cross_entropy(first[:5], targets[:5], reduction="sum"))
    p, q = (torch.log_softmax(z[:5], dim=1) for z in (first, second))
    symmetric = (
        F.kl_div(p, q, log_target=True, reduction="sum") + F.kl_div(q, p, log_target=True, reduction="sum")
    ) / 2
    torch.testing.assert_close(loss.consistency, symmetric)
    torch.testing.assert_close(loss.total, loss.ce_first + loss.ce_second + 5 * symmetric)
    mean = thor.two_pass_loss(first, second, targets, alpha=5.0, valid=valid, reduction="mean")
    torch.testing.assert_close(mean.total * 5, loss.total)
    swapped = thor.two_pass_loss(second, first, targets, alpha=5.0, valid=valid)
    torch.testing.assert_close(swapped.consistency, loss.consistency)
    same = thor.two_pass_loss(first, first, targets, alpha=5.0)
    assert same.consistency == 0 and same.total == 2 * same.ce_first
    short = lambda a, b: thor.two_pass_loss(a, b, targets[:2], alpha=2.0).total  # noqa: E731
    assert torch.autograd.gradcheck(short, (first[:2].detach().requires_grad_(), second[:2].detach().requires_grad_()))


def test_thor_loss_is_finite_for_vanishing_probabilities() -> None:
    sure = torch.tensor([[2000.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = thor.two_pass_loss(sure, -sure, torch.tensor([0]), alpha=1.0)
    loss.total.backward()
    assert loss.consistency == 2000 and sure.grad is not None and torch.isfinite(sure.grad).all()


# OMoE

FORMS: tuple[orthogonal.Form, ...] = ("unit", "parts", "magnitude", "loewdin", "loewdin_magnitude")


def test_orthogonal_components() -> None:
    v, g = normal(3, HIDDEN, seed=50), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for form in FORMS:
        c = orthogonal.combine(v, g, form).components
        assert (c @ c.T - torch.diag((c**2).sum(dim=1))).abs().max() < 1e-12
        lengths = c.norm(dim=1)
        if form in ("unit", "loewdin"):
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
        elif form != "parts":
            torch.testing.assert_close(lengths, v.norm(dim=1))
        assert torch.autograd.gradcheck(lambda a, b, form=form: orthogonal.combine(a, b, form).y,
                                        (v.clone().requires_grad_(), g.clone().requires_grad_()))  # fmt: skip
    q, r = torch.linalg.qr(v.T)
    torch.testing.assert_close(orthogonal.combine(v, g, "unit").components, (q * r.diagonal().sign()).T)
    u, _, vh = torch.linalg.svd(v, full_matrices=False)
    torch.testing.assert_close(orthogonal.loewdin(v), u @ vh)


def test_orthogonal_order() -> None:
    v, g = normal(3, HIDDEN, seed=51), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    by_weight = orthogonal.combine(v, g, "parts", order="weight")
    assert by_weight.order == [1, 2, 0] and torch.equal(by_weight.components[0], v[1])
    swap = torch.tensor([2, 0, 1])
    for form in FORMS:
        moved = orthogonal.combine(v[swap], g[swap], form, order="weight").y
        torch.testing.assert_close(moved, orthogonal.combine(v, g, form, order="weight").y)
        moved_as_given = torch.allclose(orthogonal.combine(v[swap], g[swap], form).y, orthogonal.combine(v, g, form).y)
        assert moved_as_given is form.startswith("loewdin")  # Gram-Schmidt depends on the order


def test_orthogonal_outputs_are_summed_as_they_are() -> None:
    v = torch.linalg.qr(normal(HIDDEN, 3, seed=52)).Q.T * torch.tensor([[2.0], [2.0], [0.5]], dtype=torch.float64)
    v.requires_grad_()
    g = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for form in ("parts", "magnitude", "loewdin_magnitude"):
        torch.testing.assert_close(orthogonal.combine(v, g, form).y, g @ v)
        (gradient,) = torch.autograd.grad(orthogonal.combine(v, g, form).y.sum(), v)
        assert torch.isfinite(gradient).all()
    torch.testing.assert_close(orthogonal.combine(v, g, "unit").y, g @ F.normalize(v, dim=1))
    assert orthogonal.output_similarity_loss([v, v[:1]]).abs() < 1e-24
    assert orthogonal.parameter_similarity_loss(v).abs() < 1e-24


def test_orthogonal_duplicate_contributes_nothing() -> None:
    v = normal(3, HIDDEN, seed=53)
    v[1] = 3 * v[0]
    v.requires_grad_()
    g = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    result = orthogonal.combine(v, g, "parts")
    torch.testing.assert_close(result.y, orthogonal.combine(v[[0, 2]], g[[0, 2]], "parts").y)
    result.y.sum().backward()
    assert torch.equal(result.components[1], torch.zeros_like(v[1]))
    assert v.grad is not None and torch.isfinite(v.grad).all()
    pair = v.detach()[:2]
    torch.testing.assert_close(orthogonal.output_similarity_loss([pair]), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(orthogonal.parameter_similarity_loss(pair), torch.tensor(2.0, dtype=torch.float64))


def test_orthogonal_layer_with_one_expert_is_the_plain_layer() -> None:
    x, bank = normal(3, HIDDEN, seed=54), experts()
    weights = torch.tensor([[0, 0.7, 0, 0], [0.2, 0, 0, 0.8], [0, 0, 0, 0]], dtype=torch.float64)
    y = orthogonal.forward(x, weights > 0, weights, *bank, form="parts", order="weight")
    torch.testing.assert_close(y[0], 0.7 * expert(1, x[0], bank))
    best, other = expert(3, x[1], bank), expert(0, x[1], bank)
    torch.testing.assert_close(y[1], 0.8 * best + 0.2 * (other - best * (best @ other) / (best @ best)))
    assert torch.equal(y[2], torch.zeros_like(y[2]))


# Unequal experts


def test_unequal_widths_are_padding_with_zeros() -> None:
    x, routing = normal(TOKENS, HIDDEN, seed=60), unequal.route(normal(TOKENS, EXPERTS, seed=61), top_k=2)
    widths, bank = (1, 2, 4, 5), experts()
    narrow = []
    for e, width in enumerate(widths):
        bank[0][e, width:] = bank[1][e, width:] = bank[2][e, :, width:] = 0
        narrow.append((bank[0][e, :width], bank[1][e, :width], bank[2][e, :, :width]))
    y = unequal.mixture(x, routing.mask, routing.weights, narrow)
    expected = [total(routing.weights[t, e] * expert(e, x[t], bank) for e in range(EXPERTS)) for t in range(TOKENS)]
    torch.testing.assert_close(y, torch.stack(expected))
    counts = routing.mask.sum(dim=0)
    by_hand = sum(int(counts[e]) * 3 * HIDDEN * widths[e] for e in range(EXPERTS)) / TOKENS
    assert unequal.mean_active_parameters(routing.mask, narrow) == by_hand


def test_unequal_top_p_takes_the_fewest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]], dtype=torch.float64).log()
    routing = unequal.route(logits, top_p=0.6)
    assert routing.mask.tolist() == [[True, True, False, False], [False, True, False, False]]
    torch.testing.assert_close(routing.weights[0], torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64))
    half = torch.zeros(1, 2, dtype=torch.float64)  # exactly 0.5 after the first
    assert int(unequal.route(half, top_p=0.5).mask.sum()) == 1
    assert int(unequal.route(half, top_p=0.5, strict=True).mask.sum()) == 2


def test_unequal_p_penalty_rests_where_use_is_inverse_to_width() -> None:
    for chosen_tokens, at_rest in (((4, 2, 1), True), ((4, 3, 1), False)):
        mask = torch.zeros(8, 3, dtype=torch.bool)
        for e, tokens in enumerate(chosen_tokens):
            mask[:tokens, e] = True
        logits = normal(8, 3, seed=62).requires_grad_()
        loss = unequal.p_penalty(torch.softmax(logits, dim=1), mask, widths=(1, 2, 4))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.allclose(gradient, torch.zeros_like(gradient)) is at_rest
        if not at_rest:
            assert gradient[:, 1].sum() > 0 > gradient[:, 0].sum()
    uniform = torch.full((8, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(unequal.p_penalty(uniform, mask, (5, 5, 5), normalise=True), mask.double().mean() * 3)


def test_unequal_entropy_sign() -> None:
    logits = normal(TOKENS, EXPERTS, seed=63).requires_grad_()
    for printed, sharper in ((True, False), (False, True)):
        loss = unequal.router_entropy_loss(torch.softmax(logits, dim=1), printed)
        (gradient,) = torch.autograd.grad(loss, logits)
        moved = torch.softmax(logits - 0.1 * gradient, dim=1)
        entropy = torch.distributions.Categorical
        assert bool((entropy(moved).entropy() < entropy(logits=logits).entropy()).all()) is sharper
    uniform = torch.full((1, EXPERTS), 0.25, dtype=torch.float64)
    torch.testing.assert_close(unequal.router_entropy_loss(uniform), EXPERTS * uniform[0, 0].log())


def test_complexity_experts_loss() -> None:
    logits, noise = normal(TOKENS, EXPERTS, seed=64), normal(TOKENS, EXPERTS, seed=65)
    routing = unequal.complexity_route(logits, noise, parameters=(1, 2, 4, 8))
    noisy = logits + noise / EXPERTS
    assert torch.equal(routing.mask, F.one_hot(noisy.argmax(dim=1), EXPERTS).bool())
    torch.testing.assert_close(routing.gates, torch.softmax(noisy, dim=1) * routing.mask)
    above = noisy.max(dim=1, keepdim=True).values - logits
    stays = 1 - torch.distributions.Normal(0.0, 1 / EXPERTS).cdf(above)
    torch.testing.assert_close(routing.load, stays.mean(dim=0))
    importance = torch.softmax(logits, dim=1).sum(dim=0) * torch.tensor([1.0, 2, 4, 8]) / 8
    cv = lambda v: (v.std() / v.mean()) ** 2  # noqa: E731
    torch.testing.assert_close(routing.aux_loss, (cv(importance) + cv(stays.mean(dim=0))) / 2)
    low = unequal.complexity_route(logits, noise, parameters=(1, 2, 4, 8), scaling="min")
    torch.testing.assert_close(low.aux_loss, routing.aux_loss)
    assert torch.autograd.gradcheck(lambda z: unequal.complexity_route(z, noise).aux_loss, logits.requires_grad_())
    share = torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)  # importance inverse to cost: no loss from that term
    even = unequal.complexity_route(share.log()[None], noise[:1], parameters=(1, 2, 4, 8))
    torch.testing.assert_close(even.aux_loss, unequal.squared_cv(even.load) / 2)


# MPOE

ROWS, COLUMNS = (2, 3, 2), (2, 2, 3)


def test_matrix_product_rebuilds_what_it_took_apart() -> None:
    w = normal(12, 12, seed=70)
    cores = matrix_product.decompose(w, ROWS, COLUMNS)
    assert [core.numel() for core in cores] == matrix_product.core_parameters(ROWS, COLUMNS)
    torch.testing.assert_close(matrix_product.rebuild(cores), w)
    short = matrix_product.rebuild(matrix_product.decompose(w, ROWS, COLUMNS, truncation=3))
    assert 0.01 < (short - w).norm() / w.norm() < 1
    vectors = [
        normal(i * j, seed=71 + m).reshape(1, i, j, 1) for m, (i, j) in enumerate(zip(ROWS, COLUMNS, strict=True))
    ]
    kronecker = torch.kron(torch.kron(vectors[0][0, :, :, 0], vectors[1][0, :, :, 0]), vectors[2][0, :, :, 0])
    torch.testing.assert_close(matrix_product.rebuild(vectors), kronecker)  # fixes the order of the indices


def test_matrix_product_counts_of_the_paper() -> None:
    rows, columns = (3, 4, 4, 4, 4), (4, 4, 8, 6, 4)
    assert matrix_product.core_parameters(rows, columns) == [144, 36864, 2359296, 147456, 256]
    for num_experts, ratio in ((8, 4.9), (16, 7.1), (64, 10.6)):
        total = matrix_product.layer_parameters(rows, columns, num_experts)
        assert abs(num_experts * 768 * 3072 / total - ratio) < 0.05


def test_matrix_product_shared_core_gets_every_experts_gradient() -> None:
    cores = matrix_product.decompose(normal(12, 12, seed=74), ROWS, COLUMNS)
    shared = cores[1].requires_grad_()
    auxiliaries = [[cores[0] + normal(*cores[0].shape, seed=75 + e), cores[2]] for e in range(3)]
    experts_w, upstream = matrix_product.rebuild_experts(shared, auxiliaries), normal(3, 12, 12, seed=78)
    (together,) = torch.autograd.grad((experts_w * upstream).sum(), shared, retain_graph=True)
    parts = [torch.autograd.grad((experts_w[e] * upstream[e]).sum(), shared, retain_graph=True)[0] for e in range(3)]
    torch.testing.assert_close(together, total(parts))
    for e in range(3):
        torch.testing.assert_close(experts_w[e], matrix_product.rebuild([auxiliaries[e][0], shared, cores[2]]))
    assert torch.equal(matrix_product.mask_gradient(together, 0.0, 0.0), together)
    assert torch.count_nonzero(matrix_product.mask_gradient(together, 0.999, 1.0)) == 0
    probs = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    x = normal(2, HIDDEN, seed=79)
    switched = matrix_product.switch_input(x, probs)
    (gradient,) = torch.autograd.grad(switched.sum(), probs)
    torch.testing.assert_close(switched.detach(), x)
    torch.testing.assert_close(gradient, x.sum(dim=1) / probs.detach())


# SCMoE


def test_self_contrast_without_contrast_is_the_base_decoder() -> None:
    strong, weak = normal(9, seed=80), normal(9, seed=81)
    assert torch.equal(self_contrast.contrast(strong, weak, alpha=1e-9, beta=0.0), strong)
    for seed in range(5):
        only = self_contrast.contrast(strong, normal(9, seed=seed), alpha=1.0, beta=5.0)
        assert torch.isfinite(only).sum() == 1 and only.argmax() == strong.argmax()
    logits = self_contrast.contrast(strong, weak, alpha=0.2, beta=0.7)
    probs = torch.softmax(strong, dim=0)
    kept = probs >= 0.2 * probs.max()
    assert 1 < kept.sum() < 9 and torch.equal(torch.isfinite(logits), kept)
    torch.testing.assert_close(logits[kept], (strong + 0.7 * (strong - weak))[kept])
    cool = self_contrast.contrast(strong, weak, 0.2, 0.7, strong_temperature=0.5, weak_temperature=4.0)
    torch.testing.assert_close(cool, self_contrast.contrast(strong * 2, weak / 4, 0.2, 0.7))
    assert 0 < torch.isfinite(cool).sum() < kept.sum()  # the cut is of the scaled logits


def test_self_contrast_ranks() -> None:
    scores = torch.softmax(normal(TOKENS, EXPERTS, seed=82), dim=1)
    top = self_contrast.select_ranks(scores, [0, 1])
    values, index = scores.topk(2, dim=1)
    expected = torch.zeros_like(scores).scatter(1, index, values / values.sum(dim=1, keepdim=True))
    torch.testing.assert_close(top.weights, expected)
    second = self_contrast.select_ranks(scores, [1])
    assert torch.equal(second.weights, F.one_hot(index[:, 1], EXPERTS).double())
    for ranks in ([EXPERTS], [1, 1], [-1]):
        with pytest.raises(ValueError, match="ranks"):
            self_contrast.select_ranks(scores, ranks)


def test_self_contrast_decodes_both_models_on_the_chosen_tokens() -> None:
    embeddings, w_router, bank = normal(9, HIDDEN, seed=83), normal(EXPERTS, HIDDEN, seed=84), experts()

    def model(ranks: list[int], tokens: list[int]) -> Tensor:
        x = embeddings[tokens].mean(dim=0, keepdim=True)
        return (x + self_contrast.moe_layer(x, w_router, ranks, *bank))[0] @ embeddings.T

    seen: list[list[int]] = []

    def weak(tokens: list[int]) -> Tensor:
        seen.append(tokens)
        return model([1], tokens)

    decoded = self_contrast.greedy_decode(lambda t: model([0, 1], t), weak, [3, 1], 4, beta=2.0, alpha=1e-3)
    assert seen == [[3, 1, *decoded.tokens[:n]] for n in range(4)]
    step = 3 * model([0, 1], seen[2]) - 2 * model([1], seen[2])
    torch.testing.assert_close(decoded.logits[2].max(), step[decoded.tokens[2]])
    banned = self_contrast.greedy_decode(lambda t: model([0, 1], t), weak, [3, 1], 1, 1e-3, 2.0, [decoded.tokens[0]])
    assert banned.tokens[0] != decoded.tokens[0] and torch.isfinite(banned.logits[0][banned.tokens[0]])


# Pruning and merging


def test_seer_counts_and_floor() -> None:
    logits = normal(TOKENS, EXPERTS, seed=90)
    actual, soft = pruning.heavy_hitters(logits, top_k=2)
    assert actual.sum() == 2 * TOKENS
    torch.testing.assert_close(actual, F.one_hot(logits.topk(2).indices, EXPERTS).sum(dim=(0, 1)).double())
    torch.testing.assert_close(soft, torch.softmax(logits, dim=1).sum(dim=0))
    counts = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert pruning.prune_globally(counts, 2, keep_at_least=2) == [[2, 3], [0, 1, 2, 3]]
    assert pruning.prune_globally(counts, 3, keep_at_least=2) == [[2, 3], [1, 2, 3]]
    assert pruning.prune_globally(counts, 99, keep_at_least=2) == [[2, 3], [2, 3]]


def test_seer_entropy_is_of_the_kept_experts() -> None:
    logits = normal(TOKENS, EXPERTS, seed=91).requires_grad_()
    entropy = pruning.router_entropy(logits, [0, 2, 3])
    kept = torch.distributions.Categorical(logits=logits[:, [0, 2, 3]])
    torch.testing.assert_close(entropy, kept.entropy().mean())
    (gradient,) = torch.autograd.grad(entropy, logits)
    assert torch.count_nonzero(gradient[:, 1]) == 0
    assert pruning.router_entropy(logits - 0.1 * gradient, [0, 2, 3]) < entropy


def test_router_norm_change_is_signed() -> None:
    pretrained = F.normalize(normal(EXPERTS, HIDDEN, seed=92), dim=1)
    finetuned = pretrained * torch.tensor([[1.5], [-0.5], [2.0], [1.0]], dtype=torch.float64)
    change = pruning.router_norm_change(pretrained, finetuned)
    torch.testing.assert_close(change, torch.tensor([0.5, -0.5, 1.0, 0.0], dtype=torch.float64))
    assert pruning.keep_highest(change, 2) == [0, 2] and pruning.keep_highest(change * 0, 2) == [0, 1]


def test_pruned_mixture_modes() -> None:
    x, logits, bank = normal(TOKENS, HIDDEN, seed=93), normal(TOKENS, EXPERTS, seed=94), experts()
    everything = list(range(EXPERTS))
    full = pruning.pruned_mixture(x, logits, 2, everything, bank, "zero")
    assert torch.equal(full, pruning.pruned_mixture(x, logits, 2, everything, bank, "renormalise"))
    kept = [0, 2, 3]
    silent = bank[2] * torch.tensor([1, 0, 1, 1])[:, None, None]
    masked = pruning.pruned_mixture(x, logits, 2, everything, (bank[0], bank[1], silent), "zero")
    torch.testing.assert_close(pruning.pruned_mixture(x, logits, 2, kept, bank, "zero"), masked)
    rest = (bank[0][kept], bank[1][kept], bank[2][kept])
    sliced = pruning.pruned_mixture(x, logits[:, kept], 2, [0, 1, 2], rest, "zero")
    torch.testing.assert_close(pruning.pruned_mixture(x, logits, 2, kept, bank, "renormalise"), sliced)
    assert not torch.allclose(masked, sliced)
    never = logits.clone()
    never[:, 1] = -50.0
    torch.testing.assert_close(
        pruning.pruned_mixture(x, never, 2, kept, bank, "renormalise"),
        pruning.pruned_mixture(x, never, 2, everything, bank, "zero"),
    )


def test_reap_scores() -> None:
    x, logits, bank = normal(TOKENS, HIDDEN, seed=95), normal(TOKENS, EXPERTS, seed=96), experts()
    logits[:, 3] = -50.0
    base = pruning.expert_statistics(x, logits, 2, bank)
    assert base.frequency.sum() == 2 * TOKENS and base.reap[3] == 0 == base.mean_norm[3]
    assert pruning.keep_highest(base.reap, 3) == [0, 1, 2]
    chosen = [t for t in range(TOKENS) if 0 in logits[t].topk(2).indices]
    shares = [
        torch.zeros(EXPERTS).double().scatter(0, z.topk(2).indices, torch.softmax(z.topk(2).values, 0)) for z in logits
    ]
    g = [float(shares[t][0]) for t in chosen]
    norms = [float(expert(0, x[t], bank).norm()) for t in chosen]
    assert 0 < len(chosen) < TOKENS
    assert abs(float(base.reap[0]) - sum(a * b for a, b in zip(g, norms, strict=True)) / len(chosen)) < 1e-12
    assert abs(float(base.norm_sum[0]) - sum(norms)) < 1e-12
    scale = torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    scaled = pruning.expert_statistics(x, logits, 2, (bank[0], bank[1], bank[2] * scale[:, None, None]))
    torch.testing.assert_close(scaled.reap, base.reap * scale)
    halves = [pruning.expert_statistics(x[part], logits[part], 2, bank) for part in (slice(0, 3), slice(3, None))]
    online = total(half.reap * half.frequency for half in halves) / base.frequency.clamp(min=1)
    torch.testing.assert_close(online, base.reap)


def permuted_clones() -> tuple[pruning.Bank, Tensor]:
    """Six experts: 0, 2, 3, 5 and 1, 4 are the same up to the order of their hidden units, with equal router rows."""
    bank, rows = experts(2), normal(2, HIDDEN, seed=97)
    source, orders = (
        [0, 1, 0, 0, 1, 0],
        [torch.randperm(FFN, generator=torch.Generator().manual_seed(i)) for i in range(6)],
    )
    gate, up = (torch.stack([bank[m][s][o] for s, o in zip(source, orders, strict=True)]) for m in (0, 1))
    down = torch.stack([bank[2][s][:, o] for s, o in zip(source, orders, strict=True)])
    return (gate, up, down), rows[source]


def test_merging_permuted_clones_loses_nothing() -> None:
    bank, w_router = permuted_clones()
    x, groups, counts = normal(TOKENS, HIDDEN, seed=98), [[0, 2, 3, 5], [1, 4]], torch.tensor([1, 2, 5, 0, 0, 3])
    for e in (2, 5):
        torch.testing.assert_close(expert(e, x[0], bank), expert(0, x[0], bank))
    merged, rows, log_size = merging.merge_groups(bank, w_router, groups, counts, aligned=True)
    for g, group in enumerate(groups):
        torch.testing.assert_close(expert(g, x[0], merged), expert(group[0], x[0], bank))
    plain = merging.merge_groups(bank, w_router, groups)[0]
    assert not torch.allclose(expert(0, x[0], plain), expert(0, x[0], bank))
    full = torch.softmax(x @ w_router.T, dim=1)
    corrected = torch.softmax(x @ rows.T + log_size, dim=1)
    torch.testing.assert_close(corrected, torch.stack([full[:, group].sum(dim=1) for group in groups], dim=1))


def test_merging_weighs_by_use_around_the_most_used() -> None:
    bank, w_router, counts = experts(), normal(EXPERTS, HIDDEN, seed=99), torch.tensor([1, 3, 0, 0])
    merged, rows, _ = merging.merge_groups(bank, w_router, [[0, 1], [2, 3]], counts)
    for theta, out in zip((*bank, w_router), (*merged, rows), strict=True):
        torch.testing.assert_close(out, torch.stack([(theta[0] + 3 * theta[1]) / 4, (theta[2] + theta[3]) / 2]))
    assert torch.equal(merging.merge_groups(bank, w_router, [[0, 1]], counts, router_row="anchor")[1][0], w_router[1])
    order = merging.align(bank, 1, 0)
    units = [torch.cat([bank[0][e], bank[1][e], bank[2][e].T], dim=1) for e in (1, 0)]
    costs = {p: float(((units[0] - units[1][list(p)]) ** 2).sum()) for p in itertools.permutations(range(FFN))}
    assert tuple(order) == min(costs, key=costs.__getitem__)
    alone = merging.merge_groups(bank, w_router, [[e] for e in range(EXPERTS)], counts, aligned=True)
    for theta, out in zip((*bank, w_router), (*alone[0], alone[1]), strict=True):
        assert torch.equal(theta, out)


def test_groups_of_similar_experts() -> None:
    bank, w_router = permuted_clones()
    x, expected = normal(20, HIDDEN, seed=100), [[0, 2, 3, 5], [1, 4]]
    logits = x @ w_router.T + 0.1 * normal(20, 6, seed=101)
    similarity = merging.logit_similarity(logits)
    torch.testing.assert_close(similarity, torch.corrcoef(logits.T))
    assert merging.spectral_groups(similarity, 2) == expected
    cka = merging.cka_matrix(x, bank)
    torch.testing.assert_close(cka.diagonal(), torch.ones(6, dtype=torch.float64))
    assert merging.agglomerate(cka, 2) == merging.agglomerate(cka, 2, "complete") == expected
    for group in (merging.agglomerate, merging.spectral_groups):
        assert group(cka + 0.01 * torch.eye(6), 6) == [[e] for e in range(6)]


def test_cka_sees_neither_rotation_nor_scale_nor_shift() -> None:
    x, y = normal(12, HIDDEN, seed=102), normal(12, HIDDEN, seed=103)
    q, shift = torch.linalg.qr(normal(HIDDEN, HIDDEN, seed=104)).Q, 5.0
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(merging.linear_cka(x, x @ q), one)
    torch.testing.assert_close(merging.linear_cka(x, 3 * x + shift), one)
    assert merging.linear_cka(x, y) < 0.9
    torch.testing.assert_close(merging.linear_cka(x, y), merging.linear_cka(y, x))
    stretch = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert merging.linear_cka(x, x @ stretch) < 0.99
