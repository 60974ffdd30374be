"""The top-p router against one token at a time in plain Python; core.md section 2 lists what must hold."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, step_use, tiny
from helpers.routing import by_token, refusal
from torch import Tensor

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.dispatch import run_experts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.top_p import TopPRouter, TopPRouterConfig, top_p_mask
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import ExpertShard, Routing, RoutingContext

TOKENS, HIDDEN, EXPERTS = 12, 8, 5
CONFIG = TopPRouterConfig(
    name="top_p",
    threshold=0.6,
    weights="raw",
    dynamic_weight=1e-4,
    max_experts=None,
    target_experts=None,
    controller_rate=0.0,
    expected_experts=2.0,
    jitter=0.0,
    load_balance_weight=0.01,
    load_balance_level="micro_batch",
    router_z_weight=0.001,
)


def make_router(num_experts: int = EXPERTS, **changes: Any) -> TopPRouter:
    router = TopPRouter(replace(CONFIG, **changes), HIDDEN, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def same_weight(router: TopPRouter, **changes: Any) -> TopPRouter:
    other = make_router(router.num_experts, **changes)
    other.weight = router.weight
    return other


def make_context(tokens: int = TOKENS, sequences: int = 1, **changes: Any) -> RoutingContext:
    mask = torch.ones(tokens, dtype=torch.bool)
    return replace(RoutingContext(mask, torch.arange(tokens), sequences, seed=11, step=4), **changes)


def token_by_hand(
    logits: list[float], threshold: float, weights: str = "raw", max_experts: int | None = None
) -> dict[int, float]:
    """Expert -> weight of one token: take the best expert left until the mass has passed the threshold."""
    total = sum(math.exp(logit) for logit in logits)
    probs = [math.exp(logit) / total for logit in logits]
    chosen: list[int] = []
    mass = 0.0
    while len(chosen) < len(probs) and len(chosen) < (max_experts or len(probs)):
        best = max((e for e in range(len(probs)) if e not in chosen), key=lambda e: (probs[e], -e))
        chosen.append(best)
        mass += probs[best]
        if mass > threshold and threshold < 1:
            break
    return {expert: probs[expert] / (mass if weights == "renormalised" else 1.0) for expert in chosen}


def counts(routing: Routing, tokens: int) -> Tensor:
    return torch.bincount(routing.token_index, minlength=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_experts", [None, 2])
@pytest.mark.parametrize("weights", ["raw", "renormalised"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_equals_one_token_at_a_time(
    threshold: float, weights: str, max_experts: int | None, dtype: torch.dtype
) -> None:
    """Enough tokens that a bfloat16 product or softmax would move some of them."""
    tokens = 300
    router = make_router(threshold=threshold, weights=weights, max_experts=max_experts)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    routing = router(hidden, make_context(tokens))
    assert routing.weight.dtype == torch.float32 and routing.routes_per_token is None
    logits = (hidden.double() @ router.weight.double().t()).tolist()
    found = by_token(routing, tokens)
    for token in range(tokens):
        assert found[token] == pytest.approx(token_by_hand(logits[token], threshold, weights, max_experts), rel=1e-5)
    if max_experts is None and threshold < 1:
        assert len(counts(routing, tokens).unique()) > 1  # the point of the scheme


@pytest.mark.parametrize(
    ("probs", "threshold", "taken"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, [0, 1]),  # the mass must exceed the threshold, not reach it
        ([0.5, 0.25, 0.125, 0.125], 0.49, [0]),
        ([0.125, 0.25, 0.125, 0.5], 0.75, [0, 1, 3]),  # of the two equal ones the lower id
        ([0.25] * 4, 0.3, [0, 1]),
        ([1 / 16] * 16, 0.4, list(range(7))),
        ([1 / 16] * 16, 0.5, list(range(9))),
        ([0.0, 1.0, 0.0], 0.999, [1]),
    ],
)
def test_strict_at_ties(probs: list[float], threshold: float, taken: list[int]) -> None:
    router = make_router(len(probs), threshold=threshold)
    assert taken_by(router, torch.tensor([probs]))[0].nonzero()[:, 0].tolist() == taken


def test_strict_at_ties_of_any_float() -> None:
    """A threshold equal to the best probability is not exceeded by it, however sums and differences round."""
    router = make_router()
    for probs in torch.randn(300, EXPERTS).softmax(1):
        router.threshold.copy_(probs.max())
        assert taken_by(router, probs[None]).sum() == 2


def test_threshold_one_takes_all_although_masses_round_past_one() -> None:
    num_experts, tokens = 64, 200
    router = make_router(num_experts, threshold=1.0)
    hidden = torch.randn(tokens, HIDDEN) * 3
    probs = (hidden @ router.weight.t()).softmax(1)
    assert (probs.sort(dim=1, descending=True).values.cumsum(1)[:, :-1] > 1).any()  # what would cut the tail
    routing = router(hidden, make_context(tokens))
    assert routing.expert_index.tolist() == list(range(num_experts)) * tokens
    torch.testing.assert_close(routing.weight.view(tokens, num_experts), probs)
    guarded = same_weight(router, threshold=1.0, max_experts=5)(hidden, make_context(tokens))
    assert counts(guarded, tokens).tolist() == [5] * tokens


@pytest.mark.parametrize("threshold", [1e-6, 0.0])
def test_tiny_threshold_is_top_1_with_the_raw_probability(threshold: float) -> None:
    router = make_router()
    router.threshold.fill_(threshold)  # 0 cannot be configured, but the controller may get there
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    best = (hidden @ router.weight.t()).softmax(1).max(dim=1)
    assert routing.token_index.tolist() == list(range(TOKENS))
    assert torch.equal(routing.expert_index, best.indices)
    torch.testing.assert_close(routing.weight, best.values)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_mass_passes_the_threshold_and_would_not_without_the_last(threshold: float) -> None:
    tokens = 100
    router = make_router(threshold=threshold)
    for token in by_token(router(torch.randn(tokens, HIDDEN), make_context(tokens)), tokens):
        assert threshold < sum(token.values()) < 1 + 1e-6
        assert sum(token.values()) - min(token.values()) <= threshold + 1e-6


def test_renormalised_weights_sum_to_one() -> None:
    routing = make_router(weights="renormalised")(torch.randn(TOKENS, HIDDEN), make_context())
    mass = torch.zeros(TOKENS).index_add(0, routing.token_index, routing.weight)
    torch.testing.assert_close(mass, torch.ones(TOKENS))


def test_sets_grow_with_the_threshold() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    before: list[set[int]] = [set() for _ in range(TOKENS)]
    for threshold in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0):
        router.threshold.fill_(threshold)
        sets = [set(token) for token in by_token(router(hidden, make_context()), TOKENS)]
        assert all(small <= large for small, large in zip(before, sets, strict=True))
        before = sets
    assert before == [set(range(EXPERTS))] * TOKENS


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
@pytest.mark.parametrize("threshold", [0.01, 0.6])
def test_gradient_of_the_weights(threshold: float, weights: str) -> None:
    """Raw weights reach every row of the router, also of experts that no token took, through the softmax."""
    router = make_router(threshold=threshold, weights=weights)
    with torch.no_grad():
        router.weight[4] = router.weight[:4].mean(dim=0)  # never the best
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context())
    factor = torch.randn(len(routing.weight))
    grads = torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden])
    probs = (hidden @ router.weight.t()).softmax(1)
    taken = torch.zeros(TOKENS, EXPERTS)
    taken[routing.token_index, routing.expert_index] = 1.0
    if weights == "renormalised":
        probs = probs / (probs * taken).sum(dim=1, keepdim=True)
    expected = torch.autograd.grad((probs[taken.bool()] * factor).sum(), [router.weight, hidden])
    for value, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(value, reference)
    if weights == "raw":
        assert (grads[0].abs().sum(dim=1) > 1e-3).all()
        assert threshold > 0.5 or 4 not in routing.expert_index


def test_dynamic_loss_is_the_mean_entropy() -> None:
    router = make_router()
    hidden = torch.eye(HIDDEN)[: EXPERTS + 1].repeat(2, 1)

    def loss_at(weight: Tensor) -> tuple[float, Tensor]:
        with torch.no_grad():
            router.weight.copy_(weight)
        value = router(hidden, make_context()).aux["dynamic"]
        (grad,) = torch.autograd.grad(value, router.weight)
        return value.item(), grad

    assert loss_at(torch.zeros(EXPERTS, HIDDEN))[0] == pytest.approx(math.log(EXPERTS), rel=1e-6)
    one_hot = torch.zeros(EXPERTS, HIDDEN)
    one_hot[2] = 500.0
    value, grad = loss_at(one_hot)
    assert value == pytest.approx(0.0, abs=1e-6) and grad.isfinite().all()
    weight = torch.randn(EXPERTS, HIDDEN)
    value, grad = loss_at(weight)
    probs = (hidden @ weight.t()).softmax(1)
    entropy = torch.stack([-sum(p * p.log() for p in row) for row in probs])
    assert value == pytest.approx(entropy.mean().item(), rel=1e-6)
    # dH/dz_i = -P_i (ln P_i + H), over all experts, those that are not taken too.
    torch.testing.assert_close(grad, (-probs * (probs.log() + entropy[:, None]) / TOKENS).t() @ hidden)
    sharper, _ = loss_at(weight - 0.1 * grad)
    assert sharper < value - 1e-4  # descent makes distributions narrow
    assert router.aux_weights == {"load_balance": 0.01, "router_z": 0.001, "dynamic": 1e-4}


@pytest.mark.parametrize("sequences", [1, 3])
def test_balance_loss_divides_by_routes(sequences: int) -> None:
    """The paper's ``N sum_i f_i Q_i`` divides by tokens and so grows with the mean number of experts; ours is that
    divided by it. A sequence's routes are its own, however many the sequences before it have."""
    router = make_router(load_balance_level="sequence")
    hidden = torch.randn(TOKENS, HIDDEN) * torch.tensor([0.1, 1.0, 3.0]).repeat_interleave(4)[:, None]
    routing = router(hidden, make_context(sequences=sequences))
    probs = (hidden @ router.weight.t()).softmax(1)
    found = by_token(routing, TOKENS)
    ours, means = [], []
    for group in torch.arange(TOKENS).chunk(sequences):
        tokens = [found[token] for token in group.tolist()]
        shares = [sum(expert in token for token in tokens) / len(tokens) for expert in range(EXPERTS)]
        papers = EXPERTS * sum(share * probs[group, expert].mean().item() for expert, share in enumerate(shares))
        means.append(sum(map(len, tokens)) / len(tokens))
        ours.append(papers / means[-1])
    assert sequences == 1 or max(means) > 1.5 * min(means)
    assert routing.aux["load_balance"].item() == pytest.approx(sum(ours) / sequences, rel=1e-5)


def test_permuting_experts_permutes_routes() -> None:
    router, other = make_router(), make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        other.weight.copy_(router.weight[order])
    ours, theirs = (by_token(r(hidden, make_context()), TOKENS) for r in (router, other))
    for token, permuted in zip(ours, theirs, strict=True):
        assert {int(order[expert]): weight for expert, weight in permuted.items()} == pytest.approx(token)


def test_shifting_all_logits_changes_nothing() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    before = router(hidden, make_context())
    with torch.no_grad():
        router.weight.add_(torch.randn(HIDDEN))
    after = router(hidden, make_context())
    assert torch.equal(before.expert_index, after.expert_index)
    torch.testing.assert_close(before.weight, after.weight, rtol=1e-4, atol=1e-6)


def test_tokens_do_not_see_each_other() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    together = by_token(router(hidden, make_context()), TOKENS)
    for token in range(TOKENS):
        (alone,) = by_token(router(hidden[token : token + 1], make_context(1)), 1)
        assert alone == pytest.approx(together[token], rel=1e-5)


class _Multiples:
    """Expert ``e`` returns ``e + 1`` times its input, so a route that reaches a wrong expert shows."""

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        factor = (torch.arange(len(order.rows_per_expert)) + 1).repeat_interleave(order.rows_per_expert)
        rows = sources[order.source_of_row] * (weight * factor)[:, None]
        return torch.zeros_like(sources).index_add(0, order.source_of_row, rows)


class _Ones:
    """Every expert returns 1."""

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        assert len(weight) == int(order.rows_per_expert.sum())
        return torch.zeros_like(sources).index_add(0, order.source_of_row, weight[:, None].expand(-1, HIDDEN))


def test_ragged_routes_are_conserved() -> None:
    router = make_router(threshold=0.9)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    found = by_token(routing, TOKENS)
    assert len({len(token) for token in found}) > 2
    output, _ = run_experts(hidden, routing, EXPERTS, _Multiples(), None)
    factor = torch.tensor([sum((expert + 1) * weight for expert, weight in token.items()) for token in found])
    torch.testing.assert_close(output, hidden * factor[:, None])
    routes_to = [sum(expert in token for token in found) for expert in range(EXPERTS)]
    assert routing.use.tokens_per_expert.tolist() == routes_to
    assert routing.use.dropped_routes.item() == 0


def test_constant_experts_return_the_mass_and_not_one() -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    router = make_router()
    routing = router(hidden, make_context())
    output, _ = run_experts(hidden, routing, EXPERTS, _Ones(), None)
    mass = torch.tensor([sum(token.values()) for token in by_token(routing, TOKENS)])
    assert (mass > 0.6).all() and mass.min() < 0.95
    torch.testing.assert_close(output, mass[:, None].expand(-1, HIDDEN))


def test_threshold_one_is_the_dense_mixture() -> None:
    """Output and gradients of the whole layer equal those of the probability-weighted sum of all experts."""
    shape = MoEConfig(
        num_experts=EXPERTS,
        expert_hidden_size=6,
        num_shared_experts=0,
        shared_expert_hidden_size=1,
        every_k_layers=1,
        num_leading_dense_layers=0,
        gate_rank=None,
        expert_width_multiple=8,
    )
    layer = build_moe_layer(shape, replace(CONFIG, threshold=1.0), HIDDEN, 3, ExpertShard())
    assert isinstance(layer, MoELayer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    inputs = [hidden, layer.router.weight, layer.experts.in_weight, layer.experts.out_weight]
    output = layer(hidden, make_context(), False).hidden
    probs = (hidden @ layer.router.weight.t()).softmax(1)
    expected = torch.zeros(TOKENS, HIDDEN)
    for expert in range(EXPERTS):
        gate, up = (hidden @ layer.experts.in_weight[expert].t()).split(6, dim=1)
        inner = gate * torch.sigmoid(gate) * up
        expected = expected + probs[:, expert, None] * (inner @ layer.experts.out_weight[expert].t())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    factor = torch.randn(TOKENS, HIDDEN)
    for value, reference in zip(
        torch.autograd.grad((output * factor).sum(), inputs),
        torch.autograd.grad((expected * factor).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("level", ["micro_batch", "sequence"])
def test_padding_counts_nowhere(level: str) -> None:
    """Statistics, losses and their gradients are those of the text alone."""
    router = make_router(load_balance_level=level)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    mask = torch.arange(TOKENS) % 6 < 4
    routing = router(hidden, make_context(sequences=2, token_mask=mask))
    text = router(hidden[mask], make_context(8, sequences=2))
    assert len(counts(routing, TOKENS)) == TOKENS and (counts(routing, TOKENS) > 0).all()  # it is routed
    for name, value in text.aux.items():
        ours = torch.autograd.grad(routing.aux[name], [hidden, router.weight], retain_graph=True)
        theirs = torch.autograd.grad(value, [hidden, router.weight], retain_graph=True)
        torch.testing.assert_close(routing.aux[name], value, msg=name)
        torch.testing.assert_close(ours, theirs)
        assert (ours[0][~mask] == 0).all()
    assert torch.equal(routing.use.tokens_per_expert, text.use.tokens_per_expert)
    assert routing.use.tokens == text.use.tokens == 8
    torch.testing.assert_close(routing.use.router_entropy, text.use.router_entropy)


def test_all_padding_gives_zero_losses() -> None:
    routing = make_router()(torch.randn(TOKENS, HIDDEN), make_context(token_mask=torch.zeros(TOKENS, dtype=torch.bool)))
    assert {name: value.item() for name, value in routing.aux.items()} == {
        "load_balance": 0.0,
        "router_z": 0.0,
        "dynamic": 0.0,
    }


def taken_by(router: TopPRouter, probs: Tensor) -> Tensor:
    return top_p_mask(probs, router.threshold, router.config.max_experts, probs)


def after(router: TopPRouter, routes: list[int], tokens: int) -> float:
    router.after_step(step_use(routes, tokens))
    return router.threshold.item()


def test_controller_moves_the_threshold_by_hand() -> None:
    router = make_router(target_experts=2.5, controller_rate=0.1)
    assert router.threshold.item() == pytest.approx(0.6)
    assert after(router, [4, 4, 4, 4, 8], 12) == pytest.approx(0.7)  # 24 / 12 is too few
    assert after(router, [6, 6, 6, 6, 6], 12) == pytest.approx(0.7)  # 30 / 12 is the target
    assert after(router, [9, 9, 9, 9, 0], 12) == pytest.approx(0.6)  # 36 / 12 is too many
    for _ in range(9):
        after(router, [5, 0, 0, 0, 0], 12)
    assert router.threshold.item() == 1.0
    for _ in range(12):
        after(router, [12, 12, 12, 12, 12], 12)
    assert router.threshold.item() == 0.0
    assert not router.threshold.requires_grad and "threshold" in router.state_dict()


def test_threshold_moves_after_steps_only_and_only_with_a_target() -> None:
    controlled, fixed = make_router(target_experts=2.5, controller_rate=0.1), make_router()
    start = controlled.threshold.clone()
    for router in (controlled.train(), controlled.eval(), fixed):
        router(torch.randn(TOKENS, HIDDEN), make_context())
    assert torch.equal(controlled.threshold, start)
    assert after(fixed, [12, 0, 0, 0, 0], 12) == start.item()


@pytest.mark.parametrize("start", [0.05, 0.98])
def test_controller_reaches_its_target(start: float) -> None:
    router = make_router(threshold=start, target_experts=2.5, controller_rate=0.01)
    means = []
    for _ in range(150):
        use = router(torch.randn(200, HIDDEN), make_context(200)).use
        means.append(float(use.tokens_per_expert.sum() / use.tokens))
        router.after_step(step_use(use.tokens_per_expert, int(use.tokens)))
    assert abs(means[0] - 2.5) > 0.8
    assert sum(means[-20:]) / 20 == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, "router.threshold=0.0 must be positive"),
        ({"threshold": 1.1}, "router.threshold=1.1 must be at most 1"),
        ({"threshold": math.nan}, "router.threshold=nan must be finite"),
        ({"dynamic_weight": -1.0}, "router.dynamic_weight=-1.0 must not be negative"),
        ({"controller_rate": -0.1}, "router.controller_rate=-0.1 must not be negative"),
        ({"max_experts": 0}, "router.max_experts=0 must be at least 1"),
        ({"target_experts": 0.5}, "router.target_experts=0.5 must be at least 1"),
        ({"expected_experts": 0.5}, "router.expected_experts=0.5 must be at least 1"),
        ({"max_experts": 6}, "router.max_experts=6 must be at most model.moe.num_experts=5"),
        ({"target_experts": 5.5, "controller_rate": 0.1}, "router.target_experts=5.5 must be at most"),
        ({"expected_experts": 5.5}, "router.expected_experts=5.5 must be at most model.moe.num_experts=5"),
        ({"target_experts": 2.0}, "router.controller_rate=0.0 must be positive when router.target_experts=2.0"),
        ({"controller_rate": 0.1}, "router.controller_rate=0.1 must be 0 when router.target_experts is not set"),
        (
            {"target_experts": 3.0, "max_experts": 2, "controller_rate": 0.1},
            "router.target_experts=3.0 must be at most router.max_experts=2",
        ),
        ({"jitter": 1.0}, "router.jitter=1.0 must be below 1"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


@pytest.mark.parametrize("training", [False, True])
def test_suffix_does_not_reach_the_prefix(training: bool) -> None:
    """Known defect C28 for this scheme: logits before a changed token stay, those after it do not."""
    config = tiny("router=top_p", "router.threshold=0.7", "router.jitter=0.1", "packing.isolate_documents=false")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    model.train(training)
    batch = random_batches(config, 1)[0][0]
    documents, positions = torch.zeros_like(batch.document_ids), torch.arange(12).expand(2, -1)
    context = context_of(replace(batch, document_ids=documents))

    def logits(ids: Tensor) -> tuple[Tensor, Tensor]:
        found = model.routes(ids, documents, positions, context)
        return model.logits(ids, documents, positions, context), torch.stack([use.tokens_per_expert for use in found])

    before, routes_before = logits(batch.input_ids)
    for cut in (1, 6, 11):
        changed = batch.input_ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % 64
        after_change, routes = logits(changed)
        torch.testing.assert_close(after_change[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-5)
        assert ((after_change - before)[:, cut:].abs().amax(dim=2) > 1e-2).all()
        assert not torch.equal(routes, routes_before) or cut == 11  # the number of routes did change
    router = model.moe_layers()[0].router
    assert router.causal_in_training and router.causal_in_evaluation
