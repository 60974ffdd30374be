"""The loss that couples experts and router, against plain Python from the paper's equations."""

from dataclasses import replace

import pytest
import torch
from helpers.routing import make_context, moe_layer_of
from reference.papers import coupling as paper
from torch.utils.flop_counter import FlopCounterMode

from moe_pretrain.config.load import load
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.losses import expert_router_coupling_loss
from moe_pretrain.moe.routers.base import perturbed_rows
from moe_pretrain.moe.types import RoutingContext

HIDDEN, WIDTH, EXPERTS, TOKENS = 16, 7, 5, 12
WORDS = [
    *("model.num_layers=1", f"model.hidden_size={HIDDEN}", "model.num_heads=2", "model.ffn_hidden_size=20"),
    *(f"model.moe.num_experts={EXPERTS}", f"model.moe.expert_hidden_size={WIDTH}", "model.init=normal"),
    *("model.init_std=0.3", "router.expert_router_coupling_weight=1"),
]


def layer_of(*words: str) -> MoELayer:
    return moe_layer_of(*WORDS, *words)


def context(tokens: int = TOKENS, step: int = 3) -> RoutingContext:
    return make_context(tokens, step=step)


def test_by_hand():
    norms = torch.tensor([[2.0, 3.0], [1.0, 2.5]])
    # Row 0: 3 - 2 and 1 - 2; row 1: 1 - 2.5 and 3 - 2.5.
    assert expert_router_coupling_loss(norms, 1.0).item() == (1 + 0 + 0 + 0.5) / 4
    assert expert_router_coupling_loss(norms, 0.4).item() == pytest.approx((2.2 + 0.2 + 0 + 2) / 4)
    assert expert_router_coupling_loss(torch.eye(3), 1.0).item() == 0


@pytest.mark.parametrize("alpha", ["1", "0.6"])
def test_loss_and_gradients_are_the_papers(alpha: str):
    layer = layer_of(f"router.expert_router_coupling_alpha={alpha}")
    rows, stacked = layer.router.weight, layer.experts.in_weight
    proxies = perturbed_rows(rows, context(), layer.router.layer)
    factor = (proxies / rows).detach().double()

    def value(rows: torch.Tensor, stacked: torch.Tensor) -> float:
        norms = paper.activation_norms((factor * rows).tolist(), stacked[:, :WIDTH].tolist())
        return paper.loss(norms, float(alpha))

    found = layer(torch.randn(TOKENS, HIDDEN), context(), False).aux["expert_router_coupling"]
    exact = [parameter.detach().double() for parameter in (rows, stacked)]
    assert found.item() == pytest.approx(value(*exact), rel=1e-5) and found.item() > 0.05
    gradients = torch.autograd.grad(found, [rows, stacked])
    generator = torch.Generator().manual_seed(0)
    for index, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        moved = [
            [one + sign * 1e-6 * direction if k == index else one for k, one in enumerate(exact)] for sign in (1, -1)
        ]
        slope = (value(*moved[0]) - value(*moved[1])) / 2e-6
        assert (gradient.double() * direction).sum().item() == pytest.approx(slope, rel=1e-4)
    assert not gradients[1][:, WIDTH:].any()  # of the gates alone


def test_noise_fills_its_bound_and_is_new_in_every_step():
    torch.manual_seed(0)
    rows = torch.randn(6, 400) + 2 * torch.randn(400)
    bounds = torch.tensor([paper.noise_bound(rows.tolist(), i) for i in range(6)])
    strength = (perturbed_rows(rows, context(), 0) / rows - 1).abs()
    assert (strength.amax(dim=1) <= bounds * 1.001).all() and (strength.amax(dim=1) > 0.95 * bounds).all()
    first, again, later, other = (
        perturbed_rows(rows, context(size, step), layer)
        for size, step, layer in ((5, 3, 0), (9, 3, 0), (5, 4, 0), (5, 3, 1))
    )
    assert torch.equal(first, again)  # however the batch is cut
    assert not torch.equal(first, later) and not torch.equal(first, other)


def test_proxies_are_mapped_as_tokens_are():
    layer = layer_of("model.moe.latent_size=6")
    found = layer(torch.randn(TOKENS, HIDDEN), context(), False).aux["expert_router_coupling"]
    proxies = perturbed_rows(layer.router.weight, context(), 0) @ layer.latent.in_weight.T
    norms = paper.activation_norms(proxies.tolist(), layer.experts.in_weight[:, :WIDTH].tolist())
    assert found.item() == pytest.approx(paper.loss(norms, 1.0), rel=1e-5)


def test_it_is_of_training_alone_and_routes_stay():
    layer, hidden = layer_of(), torch.randn(TOKENS, HIDDEN)
    trained = layer(hidden, context(), False)
    layer.eval()
    evaluated = layer(hidden, context(), False)
    assert "expert_router_coupling" in trained.aux and "expert_router_coupling" not in evaluated.aux
    assert torch.equal(trained.hidden, evaluated.hidden)
    assert "expert_router_coupling" not in layer_of("router.expert_router_coupling_weight=0").router.aux_weights


@pytest.mark.parametrize("words", [(), ("model.moe.latent_size=6",)])
def test_flops_equal_a_counter_on_the_module(words: tuple[str, ...]):
    counted = {}
    for tokens in (TOKENS, 5 * TOKENS):
        layer = layer_of(*words)
        for weight in (0, 1):
            layer.router.needs_proxy_norms = bool(weight)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                layer(torch.randn(tokens, HIDDEN), context(tokens), False)
            counted[tokens, weight] = counter.get_total_flops()
    config = load([*WORDS, *words])
    size = model_size(config.model, config.router)
    assert counted[TOKENS, 1] - counted[TOKENS, 0] == size.coupling_flops > 0
    assert counted[5 * TOKENS, 1] - counted[5 * TOKENS, 0] == size.coupling_flops  # whatever the batch
    per_token = size.in_micro_batches(TOKENS, 1)
    without = replace(size, coupling_flops=0.0)
    more = per_token.forward_flops_per_token - without.in_micro_batches(TOKENS, 1).forward_flops_per_token
    assert more * TOKENS == pytest.approx(size.coupling_flops)
