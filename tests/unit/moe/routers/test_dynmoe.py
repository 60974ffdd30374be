"""DynMoE beside an implementation of the paper in float64: gates, losses, gradients, and experts that come and go."""

import math
from typing import Any

import pytest
import torch
from helpers.routing import by_token, experts_only, make_context, refusal
from reference.papers import dynmoe as paper
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers.dynmoe import DynMoEConfig, DynMoERouter
from moe_pretrain.moe.types import ExpertShard, ExpertStart, StepUse

TOKENS, HIDDEN, WIDTH, SLOTS = 30, 10, 6, 5
FIELDS: dict[str, Any] = {
    "name": "dynmoe",
    "initial_experts": 3,
    "initial_experts_per_token": None,
    "score_scale": 2.0,
    "unrouted": "none",
    "idle_steps": 0,
    "record_steps": 1,
    "new_expert": "mean",
    "noise": 0.1,
    "diversity_weight": 0.01,
    "simplicity_weight": 0.01,
    "load_balance_weight": 0.0,
    "efficiency_weight": 0.0,
}
OPTIONAL = {"load_balance_weight": 0.01, "efficiency_weight": 0.01}


def make_layer(**changes: Any) -> MoELayer:
    """Thresholds so high that some tokens pass none."""
    layer = build_moe_layer(experts_only(SLOTS, WIDTH), DynMoEConfig(**(FIELDS | changes)), HIDDEN, 1, ExpertShard())
    drawn = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.7)
    layer.router.thresholds.data.copy_(torch.tensor([0.25, 0.1, 0.2, -1.0, -1.0]))
    return layer


def router_of(layer: MoELayer) -> DynMoERouter:
    assert isinstance(layer.router, DynMoERouter)
    return layer.router


def hidden_states(tokens: int = TOKENS, seed: int = 2) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(router: DynMoERouter, *parts: Tensor) -> ExpertStart | None:
    """One optimizer step whose global batch is ``parts``, each a micro-batch of text."""
    uses = [router(part, make_context(len(part))).use for part in parts]
    sums = sum(use.sums for use in uses)
    return router.after_step(StepUse(sum(use.tokens_per_expert for use in uses), sum(map(len, parts)), 1.0, sums))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("changes", "fallback"),
    [({}, "none"), (OPTIONAL, "none"), ({"unrouted": "top_1"} | OPTIONAL, "constant"), ({"score_scale": None}, "none")],
    ids=["paper", "all losses", "top 1", "scaled"],
)
def test_outputs_losses_and_all_gradients_are_those_of_the_paper(
    changes: dict[str, Any], fallback: Any, recompute: bool
) -> None:
    layer, hidden = make_layer(**changes), hidden_states()
    upstream = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(7))
    output = layer(hidden, make_context(TOKENS), recompute)
    ((output.hidden * upstream).sum() + 3 * sum(output.aux.values())).backward()

    own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = hidden.detach().double().requires_grad_()
    scale = changes.get("score_scale", 2.0) or 3 * math.sqrt(HIDDEN)
    used = router_of(layer).in_use > 0
    routing = paper.route(x, own["router.weight"].T, own["router.thresholds"], used, scale, fallback)
    y = paper.forward(x, routing, *own["experts.in_weight"].chunk(2, dim=1), own["experts.out_weight"])
    losses = {"diversity": routing.diversity, "simplicity": routing.simplicity}
    if "load_balance_weight" in changes:
        losses |= {"load_balance": routing.load_balance, "efficiency": routing.efficiency}
    ((y * upstream.double()).sum() + 3 * sum(losses.values())).backward()

    unrouted = int((routing.active_count == 0).sum())
    assert 2 < unrouted < TOKENS / 2, "the case shows nothing"
    assert output.use.tokens_per_expert.tolist() == routing.mask.sum(dim=0).tolist()
    torch.testing.assert_close(output.hidden.double(), y, atol=2e-5, rtol=2e-5)
    assert output.aux.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(output.aux[name].double(), loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), x.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_tokens_experts_weigh_the_same_and_slots_out_of_use_take_and_learn_nothing() -> None:
    layer, hidden = make_layer(simplicity_weight=0.0), hidden_states()
    routing = layer.router(hidden, make_context(TOKENS))
    for routes in by_token(routing, TOKENS):
        assert all(weight == pytest.approx(1 / len(routes)) for weight in routes.values())
        assert routes.keys() <= {0, 1, 2}, "thresholds of the others are the lowest"
    output = layer(hidden, make_context(TOKENS), False)
    (output.hidden.square().sum() + output.aux["diversity"]).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad[:3].any(), name
        assert not parameter.grad[3:].any(), name


def test_a_token_without_an_expert_gets_nothing_in_training_and_its_best_in_evaluation() -> None:
    layer, hidden = make_layer(), hidden_states()
    passed = by_token(layer.router(hidden, make_context(TOKENS)), TOKENS)
    alone = [token for token, routes in enumerate(passed) if not routes]
    assert alone and not layer(hidden, make_context(TOKENS), False).hidden[alone].any()
    layer.eval()
    evaluated = by_token(layer.router(hidden, make_context(TOKENS)), TOKENS)
    keys = torch.nn.functional.normalize(router_of(layer).weight, dim=1)[:3]
    best = (hidden @ keys.T).argmax(dim=1).tolist()
    for token, (trained, now) in enumerate(zip(passed, evaluated, strict=True)):
        assert now == (trained or {best[token]: 1.0})
    assert layer.router.evaluation_rule and not make_layer(unrouted="top_1").router.evaluation_rule


def test_experts_go_and_come_by_the_papers_rule() -> None:
    layer = make_layer()
    router = router_of(layer)
    parts = hidden_states(40).detach().split([24, 16])
    with torch.no_grad():
        router.thresholds[1] = 2.0  # nobody passes
        keys, thresholds, used = router.weight.T.clone().double(), router.thresholds.clone().double(), router.in_use > 0
    window = paper.Window(torch.zeros(SLOTS), torch.zeros(HIDDEN, dtype=torch.float64), 0)
    for part in parts:
        mask = paper.route(part.double(), keys, thresholds, used, 2.0).mask
        window = paper.record(window, part.double(), mask)
    wanted = paper.update(paper.State(keys, thresholds, used), window)
    start = step(router, *parts)
    assert used.tolist() == [True, True, True, False, False]
    assert (router.in_use > 0).tolist() == wanted.active.tolist() == [True, True, True, False, False]
    assert start is not None and start.slot == 1, "the one that was just removed is the first free slot"
    assert start.sources.tolist() == [True, False, True, False, False]
    torch.testing.assert_close(router.weight.T.double(), wanted.keys, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(router.thresholds.double(), wanted.thresholds)
    assert not router.recorded_routes.any() and not router.unrouted_sum.any(), "a new window begins"


def test_nobody_comes_without_an_unrouted_token_and_nobody_goes_who_was_chosen() -> None:
    router = router_of(make_layer())
    with torch.no_grad():
        router.thresholds[:3] = -1.0
    before = {name: value.clone() for name, value in router.state_dict().items()}
    assert step(router, hidden_states().detach()) is None
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"steps"}


def test_a_stale_slot_keeps_what_it_holds_and_a_full_bank_takes_no_more() -> None:
    router = router_of(make_layer(new_expert="stale"))
    start = step(router, hidden_states().detach())
    assert start is not None and start.sources is None and start.slot == 3
    full = router_of(make_layer(initial_experts=5))
    with torch.no_grad():
        full.thresholds.fill_(0.3)
    assert step(full, hidden_states(200).detach()) is None and full.in_use.sum() == 5


def test_windows_are_where_the_published_code_has_them() -> None:
    """Recorded steps 301 to 600 and 1201 to 1500; updates after 600 and 1500."""
    router = router_of(make_layer(idle_steps=600, record_steps=300))
    with torch.no_grad():
        router.thresholds.fill_(0.3)
    use = router(hidden_states().detach(), make_context(TOKENS)).use
    recorded, updates = [], []
    for number in range(1, 1600):
        before = int(router.unrouted_tokens)
        start = router.after_step(StepUse(use.tokens_per_expert, TOKENS, 1.0, use.sums))
        recorded += [number] if int(router.unrouted_tokens) > before or start is not None else []
        updates += [number] if start is not None else []
    assert updates == [600, 1500]
    assert recorded == [*range(301, 601), *range(1201, 1501)]
    ours = [paper.window_action(number - 1) for number in range(1, 1600)]
    assert [n for n, (records, _) in enumerate(ours, 1) if records] == recorded
    assert [n for n, (_, moves) in enumerate(ours, 1) if moves] == updates


def test_padding_is_in_no_record_and_no_loss() -> None:
    layer, hidden = make_layer(**OPTIONAL), hidden_states().detach()
    mask = torch.arange(TOKENS) < 20
    padded = layer.router(hidden, make_context(TOKENS, token_mask=mask))
    text = layer.router(hidden[:20], make_context(20))
    torch.testing.assert_close(padded.use.sums, text.use.sums)
    for name, loss in text.aux.items():
        torch.testing.assert_close(padded.aux[name], loss)


def test_one_expert_alone_has_a_diversity_of_zero_with_a_finite_gradient() -> None:
    layer = make_layer(initial_experts=1)
    loss = layer.router(hidden_states(), make_context(TOKENS)).aux["diversity"]
    loss.backward()
    assert float(loss) < 1e-9 and router_of(layer).weight.grad.isfinite().all()


@pytest.mark.parametrize("wanted", [0.5, 1.5])
def test_thresholds_may_start_at_a_mean_number_of_experts(wanted: float) -> None:
    hidden_size = 400
    config = DynMoEConfig(**(FIELDS | {"initial_experts_per_token": wanted}))
    router = config.build(hidden_size, SLOTS, 0)
    drawn = torch.Generator().manual_seed(3)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=drawn))
    router.thresholds.data.fill_(router.start_values["thresholds"])
    use = router(torch.randn(4000, hidden_size, generator=drawn), make_context(4000)).use
    assert float(use.tokens_per_expert.sum()) / 4000 == pytest.approx(wanted, rel=0.1)
    assert config.mean_experts_per_token == wanted


def test_a_step_says_how_many_experts_are_in_use_and_who_has_none() -> None:
    router = router_of(make_layer())
    hidden = hidden_states().detach()
    use = router(hidden, make_context(TOKENS)).use
    counts = by_token(router(hidden, make_context(TOKENS)), TOKENS)
    whole = StepUse(use.tokens_per_expert, TOKENS, 1.0, use.sums)
    router.after_step(whole)
    share = sum(not routes for routes in counts) / TOKENS
    assert router.metrics(whole) == {"active_experts": 4.0, "unrouted_share": pytest.approx(share)}


def test_wrong_values_are_refused_in_one_line() -> None:
    config = load(["router=dynmoe"]).router
    assert "router.initial_experts=4 must be at most model.moe.num_experts=3" in refusal(config, 3)
    assert "initial_experts_per_token=4 must be below router.initial_experts=4" in refusal(
        config, 8, initial_experts_per_token=4.0
    )
    assert "router.noise" in refusal(config, 8, noise=0.0)
    assert "router.record_steps" in refusal(config, 8, record_steps=0)
