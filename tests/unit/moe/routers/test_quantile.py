"""Quantile balancing against sorts in plain Python; related.md 11.13 lists what must hold.

That ranks and micro-batches pool their histograms is shown on ranks, in ``tests/distributed/test_pooled_quantiles.py``.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from helpers.builders import step_use, tiny
from helpers.routing import PLAIN_TOP_K, refusal
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.moe.routers.quantile import QuantileRouter, QuantileRouterConfig, balancing_bias
from moe_pretrain.moe.types import Routing, RoutingContext

TOKENS, HIDDEN, EXPERTS = 60, 8, 5
CONFIG = QuantileRouterConfig(
    **{
        **asdict(PLAIN_TOP_K),
        "name": "quantile",
        "score": "sigmoid",
        "load_balance_weight": 0.0,
        "router_z_weight": 0.0,
    },
    num_bins=1000,
    ema_decay=0.0,
)
BIAS = [0.31, -0.23, 0.01, 0.17, -0.26]


def make_router(num_experts: int = EXPERTS, hidden_size: int = HIDDEN, **changes: Any) -> QuantileRouter:
    router = QuantileRouter(replace(CONFIG, **changes), hidden_size, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def biased_router(**changes: Any) -> QuantileRouter:
    router = make_router(**changes)
    router.expert_bias.copy_(torch.tensor(BIAS))
    return router


def make_context(tokens: int = TOKENS, mask: Tensor | None = None) -> RoutingContext:
    mask = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    return RoutingContext(mask, torch.arange(tokens), 1, seed=11, step=4)


def move(router: QuantileRouter, routing: Routing) -> None:
    use = routing.use
    router.after_step(step_use(use.tokens_per_expert, int(use.tokens), use.sums))


def violation(routing: Routing) -> float:
    """MaxVio: most over mean load, less 1."""
    load = routing.use.tokens_per_expert
    return float(load.max() / load.mean()) - 1


def scores_by_hand(router: QuantileRouter, hidden: Tensor) -> list[list[float]]:
    logits = (hidden.double() @ router.weight.detach().double().t()).tolist()
    if router.config.score == "sigmoid":
        return [[1 / (1 + math.exp(-logit)) for logit in row] for row in logits]
    return [[math.exp(logit) / sum(math.exp(other) for other in row) for logit in row] for row in logits]


def bias_by_hand(scores: list[list[float]], bias: list[float], top_k: int) -> list[float]:
    """Minus the (quota + 1)-th largest of ``score - alpha``, with ``alpha`` the (top_k + 1)-th largest biased score."""
    num_experts = len(bias)
    alphas = [sorted((s + b for s, b in zip(row, bias, strict=True)), reverse=True)[top_k] for row in scores]
    quota = top_k * len(scores) // num_experts
    wanted = [
        -sorted((row[expert] - alpha for row, alpha in zip(scores, alphas, strict=True)), reverse=True)[quota]
        for expert in range(num_experts)
    ]
    return [value - sum(wanted) / num_experts for value in wanted]


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_selects_and_scores_weigh(score: str, weights: str) -> None:
    router = biased_router(score=score, weights=weights)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    expected_experts, expected_weights = [], []
    for scores in scores_by_hand(router, hidden):
        best = sorted(range(EXPERTS), key=lambda e: -(scores[e] + BIAS[e]))[:2]
        divisor = sum(scores[e] for e in best) if weights == "renormalised" else 1.0
        expected_experts += best
        expected_weights += [scores[e] / divisor for e in best]
    assert routing.expert_index.tolist() == expected_experts
    torch.testing.assert_close(routing.weight, torch.tensor(expected_weights))
    router.expert_bias.zero_()
    assert router(hidden, make_context()).expert_index.tolist() != expected_experts  # the bias did something


def test_worked_example() -> None:
    """Four tokens, two experts: cutoffs (.5, .7, .2, .45), quantiles (.15, 0), loads 4 and 0 become 2 and 2."""
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.7], [0.7, 0.2], [0.6, 0.45]])
    router = make_router(2, hidden_size=4, top_k=1, weights="raw")
    with torch.no_grad():
        router.weight.copy_(scores.logit().t())  # token t is the t-th unit vector
    routing = router(torch.eye(4), make_context(4))
    assert routing.use.tokens_per_expert.tolist() == [4, 0]
    # Margins alpha - s in bins of 0.002 from -1: -.4 -.1 -.5 -.15, and 0 four times.
    first, second = routing.use.sums.view(2, 1000)
    places = [round((margin + 1) / 0.002) for margin in (-0.5, -0.4, -0.15, -0.1)]
    found = first.nonzero()[:, 0].tolist()
    assert all(place - bin in (0, 1) for place, bin in zip(places, found, strict=True)) and first.sum() == 4
    assert second[500] == 4
    move(router, routing)
    bias = router.expert_bias.tolist()
    assert bias[0] + bias[1] == pytest.approx(0, abs=1e-7) and bias[0] - bias[1] == pytest.approx(-0.15, abs=0.004)
    assert router(torch.eye(4), make_context(4)).use.tokens_per_expert.tolist() == [2, 2]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("bins", [1000, 1_000_000])
def test_histogram_is_within_one_bin_of_the_sort(bins: int, top_k: int, score: str) -> None:
    router = biased_router(num_bins=bins, top_k=top_k, score=score, weights="raw")
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    assert routing.use.sums.shape == (router.num_sums,) == (EXPERTS * bins,)
    move(router, routing)
    width = (max(BIAS) - min(BIAS) + 2) / bins
    expected = bias_by_hand(scores_by_hand(router, hidden), BIAS, top_k)
    # One bin for the expert's own value, and at most one for the mean that is taken off.
    assert router.expert_bias.tolist() == pytest.approx(expected, abs=2 * width + 1e-6)
    assert float(router.expert_bias.mean()) == pytest.approx(0, abs=1e-7)


def test_every_margin_is_in_the_histogram() -> None:
    """Scores of 0 and 1 and any bias: none falls outside, whose bins would be the first and the last."""
    router = biased_router()
    with torch.no_grad():
        router.weight.mul_(100)
    routing = router(torch.randn(TOKENS, HIDDEN) * 10, make_context())
    counts = routing.use.sums.view(EXPERTS, 1000)
    assert counts.sum(dim=1).tolist() == [TOKENS] * EXPERTS
    low, width = min(BIAS) - 1, (max(BIAS) - min(BIAS) + 2) / 1000
    for expert, row in enumerate(counts):
        centres = low + (row.nonzero()[:, 0] + 0.5) * width
        # Between every bias less 1 and every bias plus 1 there are only -1, 0 and 1, less or plus a bias.
        allowed = torch.tensor([bias + whole for bias in BIAS for whole in (-1, 0, 1)])
        assert ((centres[:, None] - allowed).abs().min(dim=1).values < width).all(), expert


def test_balances_fresh_batches_in_a_few_steps() -> None:
    """64 experts, 4 per token, strongly preferred: MaxVio falls from 5 at once, and stays at the noise of a batch."""
    num_experts, tokens, hidden_size = 64, 8192, 32
    router = make_router(num_experts, hidden_size, top_k=4)
    torch.nn.init.normal_(router.weight, std=hidden_size**-0.5)
    with torch.no_grad():
        router.weight[:, 0] = torch.randn(num_experts) * 0.7
    violations = []
    for _ in range(6):
        hidden = torch.randn(tokens, hidden_size)
        hidden[:, 0] = 1.0
        routing = router(hidden, make_context(tokens))
        violations.append(violation(routing))
        move(router, routing)
    assert violations[0] > 4 and violations[1] < 0.5 and max(violations[3:]) < 0.25


def test_unequal_quotas_are_reached() -> None:
    tokens = 2000
    router = make_router()
    hidden = torch.randn(tokens, HIDDEN)
    quota = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9], dtype=torch.float64) * tokens  # 2 per token in all
    for _ in range(30):
        use = router(hidden, make_context(tokens)).use
        router.expert_bias.copy_(balancing_bias(use.sums.view(EXPERTS, -1), router.expert_bias, quota))
    assert use.tokens_per_expert.tolist() == pytest.approx(quota.tolist(), abs=0.01 * tokens)


def test_pooled_not_averaged() -> None:
    """Two ranks with texts of their own: the pooled quantile balances their union, the mean of their quantiles fails.

    On the first rank everybody wants expert 0 a little; on the second, which has few tokens near the border, a lot.
    """
    first, second = torch.randn(1000, HIDDEN) * 0.3, torch.randn(1000, HIDDEN)
    first[:, 0], second[:, 0] = 0.2, 3.0

    def balance(pool: bool) -> float:
        router = make_router(top_k=1, weights="raw")
        torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            router.weight[:, 0] = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
        for _ in range(40):
            uses = [router(part, make_context(1000)).use for part in (first, second)]
            counts = [use.sums.view(EXPERTS, -1) for use in uses]
            quota = torch.full((EXPERTS,), 200.0, dtype=torch.float64)
            if pool:
                bias = balancing_bias(counts[0] + counts[1], router.expert_bias, 2 * quota)
            else:
                bias = (
                    balancing_bias(counts[0], router.expert_bias, quota)
                    + balancing_bias(counts[1], router.expert_bias, quota)
                ) / 2
            router.expert_bias.copy_(bias)
        return violation(router(torch.cat([first, second]), make_context(2000)))

    assert balance(pool=True) < 0.1 and balance(pool=False) > 0.3


def test_cut_of_the_global_batch_does_not_matter() -> None:
    hidden, mask = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS) < 0.7
    router = biased_router()
    whole = router(hidden, make_context(mask=mask)).use.sums
    biases = []
    for cuts in ([60], [30, 30], [1, 9, 50], [20, 20, 20]):
        parts = zip(hidden.split(cuts), mask.split(cuts), strict=True)
        sums = sum(router(part, make_context(len(part), own)).use.sums for part, own in parts)
        assert torch.equal(sums, whole)
        copy = biased_router()
        copy.after_step(step_use([0.0] * EXPERTS, int(mask.sum()), sums))
        biases.append(copy.expert_bias)
    assert all(torch.equal(bias, biases[0]) for bias in biases) and biases[0].tolist() != pytest.approx(BIAS)


def test_padding_is_left_out() -> None:
    mask = torch.arange(TOKENS) % 3 != 0
    hidden = torch.randn(TOKENS, HIDDEN)
    hidden[~mask] *= 50
    router = biased_router()
    padded, alone = router(hidden, make_context(mask=mask)), router(hidden[mask], make_context(int(mask.sum())))
    assert torch.equal(padded.use.sums, alone.use.sums) and padded.use.sums.sum() == EXPERTS * 40


def test_equal_biases_change_nothing() -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    router, shifted = biased_router(), biased_router()
    shifted.weight = router.weight
    shifted.expert_bias.add_(0.7)
    ours, theirs = router(hidden, make_context()), shifted(hidden, make_context())
    assert torch.equal(ours.expert_index, theirs.expert_index) and torch.equal(ours.weight, theirs.weight)
    move(router, ours)
    move(shifted, theirs)
    torch.testing.assert_close(router.expert_bias, shifted.expert_bias, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_scores_and_the_bias_has_none() -> None:
    router = biased_router()
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context())
    factor = torch.randn(TOKENS * 2)
    grads = torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden])
    weight = (hidden @ router.weight.t()).sigmoid().gather(1, routing.expert_index.view(TOKENS, 2))
    weight = (weight / weight.sum(dim=1, keepdim=True)).flatten()
    expected = torch.autograd.grad((weight * factor).sum(), [router.weight, hidden])
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not (router.expert_bias.requires_grad or routing.use.sums.requires_grad)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize("decay", [0.25, 0.9])
def test_average_over_steps_by_name(decay: float) -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    router, slow = biased_router(), biased_router(ema_decay=decay)
    slow.weight = router.weight
    for one in (router, slow):
        move(one, one(hidden, make_context()))
    start = torch.tensor(BIAS)  # its mean is zero
    torch.testing.assert_close(slow.expert_bias, decay * start + (1 - decay) * router.expert_bias)


def test_only_after_step_moves_and_evaluation_counts_nothing() -> None:
    router = biased_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    trained = router(hidden, make_context())
    evaluated = router.eval()(hidden, make_context())
    assert evaluated.use.sums is None and torch.equal(trained.expert_index, evaluated.expert_index)
    assert router.expert_bias.tolist() == torch.tensor(BIAS).tolist()


def test_a_step_without_text_moves_nothing() -> None:
    router = biased_router()
    move(router, router(torch.randn(TOKENS, HIDDEN), make_context(mask=torch.zeros(TOKENS, dtype=torch.bool))))
    assert router.expert_bias.tolist() == torch.tensor(BIAS).tolist()


def test_state_survives_and_metrics_name_its_range() -> None:
    router, loaded = biased_router(), make_router()
    move(router, router(torch.randn(TOKENS, HIDDEN), make_context()))
    loaded.load_state_dict(router.state_dict())
    assert torch.equal(loaded.expert_bias, router.expert_bias) and loaded.expert_bias.dtype == torch.float32
    spread = max(router.expert_bias.tolist()) - min(router.expert_bias.tolist())
    assert router.metrics(step_use([0.0] * EXPERTS, 1)) == pytest.approx({"expert_bias_range": spread})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bins": 1}, "router.num_bins=1 must be at least 2"),
        ({"ema_decay": 1.0}, "router.ema_decay=1.0 must be below 1"),
        ({"ema_decay": -0.1}, "router.ema_decay=-0.1 must not be negative"),
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"top_k": 5}, "router.top_k=5 must be below model.moe.num_experts=5"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


@pytest.mark.parametrize("override", ["router.num_bins=0", "router.score=relu", "router.top_k=8"])
def test_wrong_override_gets_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("router=quantile", "model.moe.num_experts=8", override)
    assert override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)
