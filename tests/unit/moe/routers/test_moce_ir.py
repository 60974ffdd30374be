"""MoCE-IR's gate beside loops in float64: noise, choice, weights, both losses and every gradient."""

import math

import pytest
import torch
from helpers.routing import by_token, make_context
from reference.papers import unequal as paper
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.counter_noise import counter_normal
from moe_pretrain.moe.experts.unequal import UnequalExperts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.losses import load_loss
from moe_pretrain.moe.routers.moce_ir import NOISE_STREAM, MoCEIRRouter
from moe_pretrain.moe.types import ExpertShard, RoutingContext

TOKENS, HIDDEN, EXPERTS = 40, 10, 4
WIDTHS = [4, 8, 16, 32]
SIZES = (
    *(f"model.hidden_size={HIDDEN}", "model.num_heads=1", f"model.moe.num_experts={EXPERTS}"),
    *("model.moe.experts.pattern=[1,2,4,8]", "model.moe.expert_hidden_size=15"),
)


def config(*overrides: str) -> Config:
    return load(["router=moce_ir", *SIZES, *overrides])


def make_layer(*overrides: str) -> MoELayer:
    setting = config(*overrides)
    layer = build_moe_layer(setting.model.moe, setting.router, HIDDEN, 2, ExpertShard())
    assert isinstance(layer, MoELayer) and isinstance(layer.router, MoCEIRRouter)
    drawn = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.3)
    return layer


def hidden_states(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()


def noise_of(context: RoutingContext, layer: int = 2) -> Tensor:
    return counter_normal(context.token_position, EXPERTS, context.seed, NOISE_STREAM, context.step, layer).double()


@pytest.mark.parametrize(("top_k", "balance"), [(1, "cost"), (2, "cost"), (1, "routes")])
@pytest.mark.parametrize("padding", [0, 7])
def test_outputs_losses_and_all_gradients_are_those_of_the_equations(top_k: int, balance: str, padding: int) -> None:
    layer = make_layer(f"router.top_k={top_k}", f"model.moe.experts.balance={balance}")
    hidden, text = hidden_states(), torch.arange(TOKENS) >= padding
    context = make_context(TOKENS, token_mask=text)
    upstream = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(7)) * text[:, None]
    output = layer(hidden, context, False)
    weights = layer.router.aux_weights
    assert weights == {"importance": 0.005, "load": 0.005}
    ours = 100 * sum(weights[name] * value for name, value in output.aux.items())
    ((output.hidden * upstream).sum() + ours).backward()

    assert isinstance(layer.experts, UnequalExperts)
    own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = hidden.detach().double().requires_grad_()
    experts = []
    for expert in range(EXPERTS):
        gate, up = own[f"experts.classes.{expert}.in_weight"][0].chunk(2)
        experts.append((gate, up, own[f"experts.classes.{expert}.out_weight"][0]))
    assert [expert[0].shape[0] for expert in experts] == WIDTHS
    logits = (x @ own["router.weight"].T)[padding:]
    parameters = WIDTHS if balance == "cost" else None
    routing = paper.complexity_route(logits, noise_of(context)[padding:], parameters, top_k=top_k)
    y = paper.mixture(x[padding:], routing.mask, routing.gates, experts)
    ((y * upstream[padding:].double()).sum() + routing.aux_loss).backward()
    torch.testing.assert_close(output.hidden[padding:].double(), y, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.double(), routing.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad[padding:].double(), x.grad[padding:], atol=1e-4, rtol=1e-4)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, atol=1e-4, rtol=1e-4, msg=name)
    assert output.use.tokens_per_expert.tolist() == routing.mask.double().sum(dim=0).tolist()


def test_evaluation_is_without_noise_and_training_draws_anew_in_every_step() -> None:
    router, hidden = make_layer().router, hidden_states().detach()
    context = make_context(TOKENS)
    routes = [router(hidden, make_context(TOKENS, step=step)).expert_index for step in (4, 4, 5)]
    assert torch.equal(routes[0], routes[1]) and not torch.equal(routes[0], routes[2])
    whole = by_token(router(hidden, context), TOKENS)
    later = make_context(15, token_position=torch.arange(25, TOKENS))
    for alone, among in zip(by_token(router(hidden[25:], later), 15), whole[25:], strict=True):
        assert alone == pytest.approx(among), "noise goes by the place in the run"
    router.eval()
    logits = (hidden @ router.weight.T).double()
    found = by_token(router(hidden, context), TOKENS)
    for token in range(TOKENS):
        best = int(logits[token].argmax())
        assert found[token] == {best: pytest.approx(float(logits[token].softmax(dim=0)[best]), rel=1e-5)}


def test_noise_is_normal() -> None:
    noise = counter_normal(torch.arange(20000), 5, 3, 1).double()
    assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.01)
    for quantile, share in ((-1.6449, 0.05), (0.0, 0.5), (1.2816, 0.9), (2.3263, 0.99)):
        assert float((noise < quantile).double().mean()) == pytest.approx(share, abs=0.005)
    assert noise.isfinite().all() and noise.abs().max() < 5.4


def test_a_load_is_the_mean_number_of_tokens_under_new_noise() -> None:
    logits, threshold = torch.randn(6, 3), torch.randn(6)
    drawn = torch.randn(40000, 6, 3, generator=torch.Generator().manual_seed(1)) * 0.3
    load = (logits + drawn >= threshold[:, None]).double().mean(dim=0).sum(dim=0)
    text = torch.ones(6, dtype=torch.bool)
    expected = float(load.var() / load.mean() ** 2)
    assert load_loss(logits, threshold, 0.3, text).item() == pytest.approx(expected, abs=0.01)


def test_importance_alone_ends_as_the_inverse_of_the_cost() -> None:
    router, hidden = make_layer().router, hidden_states(2000).detach()
    hidden[:, 0] = 1
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        routing = router(hidden, make_context(len(hidden)))
        routing.aux["importance"].backward()
        optimizer.step()
    importance = (hidden @ router.weight.T).softmax(dim=1).sum(dim=0).detach()
    charged = importance * torch.tensor(WIDTHS)
    assert charged.max() / charged.min() < 1.1
    assert importance[0] / importance[3] == pytest.approx(8, rel=0.1)


def test_no_text_and_one_expert_have_finite_losses_and_gradients() -> None:
    for words, tokens in (((), 5), (("model.moe.num_experts=1", "model.moe.experts.pattern=[1]"), 5)):
        router = make_layer(*words).router
        context = make_context(tokens, token_mask=torch.full((tokens,), bool(words)))
        aux = router(hidden_states(tokens), context).aux
        assert {name: value.item() for name, value in aux.items()} == {"importance": 0, "load": 0}
        sum(aux.values()).backward()
        assert not router.weight.grad.any()


def test_the_word_brings_its_experts_and_wrong_values_get_a_line() -> None:
    setting = load(["router=moce_ir"])
    assert setting.model.moe.experts.name == "unequal" and setting.router.top_k == 1
    assert setting.model.moe.kinds.balances_cost and math.isclose(sum(setting.model.moe.kinds.costs), 8)
    assert load(["router=moce_ir", "experts=swiglu"]).model.moe.kinds.costs == ()
    with pytest.raises(ConfigError, match=r"router.top_k=5 must be at most model.moe.num_experts=4"):
        config("router.top_k=5")
    with pytest.raises(ConfigError, match=r"load_balance_weight=-1"):
        config("router.load_balance_weight=-1")
    with pytest.raises(ConfigError, match="balance=cost must be routes with router=moce_ir"):
        config("router.load_balance_weight=0")
    with pytest.raises(
        ConfigError, match=r"expert_hidden_size=16 must be a multiple of 15 with .*pattern=\[1, 2, 4, 8"
    ):
        config("model.moe.expert_hidden_size=16")
