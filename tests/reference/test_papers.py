"""Self-checks of the papers' references: what must hold by mathematics, each failing under the obvious mistake."""

import torch
from reference.papers import dynmoe, merged_experts, moe_plus_plus, orthogonal, thor
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


def expert(e: int, x: Tensor, bank: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return swiglu(x, bank[0][e], bank[1][e], bank[2][e])


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
    for fallback, has_gradient in (("constant", False), ("straight_through", True)):
        routing = dynmoe.route(x, keys, high, active, fallback=fallback)  # type: ignore[arg-type]
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


def plus_plus_layer(x: Tensor, logits: Tensor, **options: object) -> moe_plus_plus.Layer:
    """A layer whose router gives ``logits``: a zero router with the logits carried in through an identity."""
    router = (torch.zeros(len(KINDS), HIDDEN, dtype=torch.float64),)
    carry = torch.eye(len(KINDS), dtype=torch.float64)
    constants = normal(2, 2, HIDDEN, seed=20), normal(2, HIDDEN, seed=21)
    return moe_plus_plus.forward(x, KINDS, router, carry, logits, *experts(2), *constants, tau=0.75, **options)  # type: ignore[arg-type]


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
    torch.testing.assert_close(plus_plus_layer(x, logits, expert_input_scale=2.0).y[1], 2 * x[1])


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
    clones = tuple(theta[:1].expand_as(theta) for theta in bank)
    for weights, equal in ((clones, True), (bank, False)):
        ensemble = torch.stack([sum(mixture[e] * expert(e, row, weights) for e in range(EXPERTS)) for row in x])  # type: ignore[arg-type, misc]
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
