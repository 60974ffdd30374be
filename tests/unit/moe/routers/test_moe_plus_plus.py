"""MoE++ beside an implementation of the paper's equations in float64, and what the paper says of its parts."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.routing import by_token, make_context, refusal
from reference.papers import moe_plus_plus as paper
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.inference.cached_decoder import CachedDecoder
from moe_pretrain.metrics.step_rows import train_row
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.build import build_moe_layer, expected_ffn_experts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers import SHIPPED
from moe_pretrain.moe.routers.moe_plus_plus import MoEPlusPlusRouter
from moe_pretrain.moe.types import ExpertShard, MoEOutput

TOKENS, HIDDEN, WIDTH, NETWORKS = 24, 10, 6, 4
KINDS: list[paper.Kind] = ["ffn"] * NETWORKS + ["constant"] * 2 + ["copy", "zero"]
SMALL = (
    *(f"model.hidden_size={HIDDEN}", "model.num_heads=1", f"model.moe.num_experts={NETWORKS}"),
    f"model.moe.expert_hidden_size={WIDTH}",
)
SHALLOW = ("model.num_layers=2", "model.vocab_size=300", "tokenizer.vocab_size=300")
RULES = {"zero_dropped": "drop_zero", "mixtral": "keep_zero", "raw": "softmax"}


def config(*overrides: str) -> Config:
    return load(["router=moe_plus_plus", *SMALL, *overrides])


def layers(config: Config, number: int = 2) -> list[MoELayer]:
    """Layers 0 to ``number`` with weights that make every part visible."""
    made = [build_moe_layer(config.model.moe, config.router, HIDDEN, layer, ExpertShard()) for layer in range(number)]
    drawn = torch.Generator().manual_seed(5)
    for layer in made:
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.6)
    return made


def run(stack: list[MoELayer], inputs: list[Tensor], recompute: bool = False) -> list[MoEOutput]:
    """Each layer on its own input, with the logits of the layer below it."""
    outputs: list[MoEOutput] = []
    for layer, hidden in zip(stack, inputs, strict=True):
        carried = outputs[-1].carried if outputs else None
        context = make_context(len(hidden), carried=carried)
        outputs.append(layer(hidden, context, recompute))
    return outputs


def hidden_states(number: int, tokens: int = TOKENS, seed: int = 2) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, HIDDEN, generator=drawn).requires_grad_() for _ in range(number)]


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ((), {}),
        (("router.weights=mixtral",), {"rule": "keep_zero"}),
        (("router.weights=raw", "router.top_k=3"), {"rule": "softmax", "top_k": 3}),
        (("router.projection=two_layer",), {}),
        (("router.logit_std=0.7",), {"logit_std": 0.7}),
        (("model.moe.experts.input_scale=2", "router.tau=0.25"), {"expert_input_scale": 2.0, "tau": 0.25}),
    ],
    ids=["paper", "mixtral", "raw, three experts", "two layers", "normalised", "scaled input"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_losses_and_all_gradients_are_those_of_the_equations(
    options: tuple[str, ...], written: dict[str, Any], recompute: bool
) -> None:
    """Two layers, so that the loss of the second reaches the router of the first through the residual."""
    stack, inputs = layers(config(*options)), hidden_states(2)
    upstream = [torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(7 + n)) for n in range(2)]
    outputs = run(stack, inputs, recompute)
    ours = [
        (output.hidden * up).sum() + 3 * sum(output.aux.values()) for output, up in zip(outputs, upstream, strict=True)
    ]
    sum(ours).backward()

    previous, theirs, doubles = None, [], []
    for layer, hidden, up, output in zip(stack, inputs, upstream, outputs, strict=True):
        own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
        x = hidden.detach().double().requires_grad_()
        doubles.append((own, x))
        maps = [own["router.weight"]] if "router.projection" not in own else []
        maps = maps or [own["router.projection"], own["router.weight"]]
        gate, value = own["experts.in_weight"].chunk(2, dim=1)
        constants = [own[f"zero_computation.constants.{n}.mix_weight"] for n in range(2)]
        values = [own[f"zero_computation.constants.{n}.value"] for n in range(2)]
        result = paper.forward(
            x, KINDS, maps, own.get("router.residual_weight"), previous, gate, value, own["experts.out_weight"],
            torch.stack(constants), torch.stack(values), **{"tau": 0.75} | written,
        )  # fmt: skip
        previous = result.logits
        torch.testing.assert_close(output.hidden.double(), result.y, atol=2e-5, rtol=2e-5)
        loss = output.aux["heterogeneous_balance"].double()
        torch.testing.assert_close(loss, result.balance_loss, atol=1e-6, rtol=1e-6)
        theirs.append((result.y * up.double()).sum() + 3 * result.balance_loss)
    sum(theirs).backward()
    for layer, hidden, (own, x) in zip(stack, inputs, doubles, strict=True):
        torch.testing.assert_close(hidden.grad.double(), x.grad, atol=1e-4, rtol=1e-4)
        for name, parameter in layer.named_parameters():
            assert own[name].grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad.double(), own[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_zero_and_a_network_are_the_network_alone_and_a_copy_beside_zero_is_the_token() -> None:
    (layer,), (hidden,) = layers(config(), 1), hidden_states(1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[[1, 7], 0] = torch.tensor([1.0, 2.0])  # a network, and zero
        hidden[:, 0] = 3.0
        gate, value = layer.experts.in_weight[1].chunk(2)
        alone = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ value.T)) @ layer.experts.out_weight[1].T
        torch.testing.assert_close(layer(hidden, make_context(TOKENS), False).hidden, alone)
        layer.router.weight[[1, 6], 0] = torch.tensor([0.0, 1.0])  # a copy, and zero
        assert torch.equal(layer(hidden, make_context(TOKENS), False).hidden, hidden)


def test_both_of_a_tokens_experts_zero_add_exactly_nothing() -> None:
    (layer,), (hidden,) = layers(config("model.moe.experts.num_zero=2"), 1), hidden_states(1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[[7, 8], 0] = 1.0
        hidden[:, 0] = 3.0
    output = layer(hidden, make_context(TOKENS), False).hidden
    assert not output.any()
    output.sum().backward()
    assert hidden.grad.isfinite().all()


class Counting:
    """An exchange of one rank that writes down how many rows it is given."""

    size = 1

    def __init__(self) -> None:
        self.rows: list[int] = []

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return counts

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "Counting":
        self.rows.append(len(rows[0]))
        self.came = rows
        return self

    def wait(self) -> list[Tensor]:
        return self.came


@pytest.mark.parametrize("router", ["moe_plus_plus", "top_k"])
def test_only_routes_to_networks_enter_the_exchange(router: str) -> None:
    stack = layers(load([f"router={router}", "experts=zero_computation", *SMALL]), 1)
    (layer,), (hidden,) = stack, hidden_states(1)
    without = layer(hidden, make_context(TOKENS), False)
    layer.exchange = Counting()
    output = layer(hidden, make_context(TOKENS), False)
    torch.testing.assert_close(output.hidden, without.hidden)
    networks = int(output.use.tokens_per_expert[:NETWORKS].sum())
    assert 0 < networks < 2 * TOKENS
    assert layer.exchange.rows == [networks, networks], "to the experts and back"


def test_without_the_residual_map_it_is_a_plain_router_and_with_it_the_layer_below_learns() -> None:
    stack, inputs = layers(config()), hidden_states(2)
    with torch.no_grad():
        stack[1].router.residual_weight.zero_()
    plain = layers(config("router.gating_residual=false"))
    plain[1].load_state_dict({n: p for n, p in stack[1].state_dict().items() if "residual" not in n})
    ours, alone = run(stack, inputs)[1], run(plain, inputs)[1]
    assert torch.equal(ours.hidden, alone.hidden) and alone.carried is None
    assert [n for n, _ in layers(config())[0].router.named_parameters()] == ["weight"], "nothing lies below the lowest"

    for loss_reaches, factor in ((False, 0.0), (True, 0.1)):
        with torch.no_grad():
            stack[1].router.residual_weight.fill_(factor)
            stack[1].router.residual_weight.fill_diagonal_(2 * factor)
        run(stack, inputs)[1].hidden.square().sum().backward()
        assert bool(stack[0].router.weight.grad.any()) == loss_reaches
        stack[0].zero_grad()


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_the_balance_loss_alone_gives_a_network_tau_times_the_routes_of_another(tau: float) -> None:
    setting = config(f"router.tau={tau}", "model.moe.num_experts=8")
    place_layer = build_moe_layer(setting.model.moe, setting.router, HIDDEN, 0, ExpertShard())
    router = place_layer.router
    assert isinstance(router, MoEPlusPlusRouter)
    drawn = torch.Generator().manual_seed(1)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=drawn) * 0.3)
    (hidden,) = hidden_states(1, 2000)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    mean = torch.zeros(12, dtype=torch.float64)
    for step in range(300):
        routing = router(hidden.detach(), make_context(2000))
        optimizer.zero_grad()
        routing.aux["heterogeneous_balance"].backward()
        optimizer.step()
        if step >= 200:
            mean += routing.use.tokens_per_expert / 100
    of_network, of_other = float(mean[:8].mean()), float(mean[8:].mean())
    assert of_network / of_other == pytest.approx(tau, rel=0.05)
    wanted = 2 * tau * 8 / (tau * 8 + 4)
    assert float(mean[:8].sum()) / 2000 == pytest.approx(wanted, rel=0.05)
    assert expected_ffn_experts(setting.model.moe, setting.router) == pytest.approx(wanted)


def test_the_loss_is_the_same_however_the_batch_is_cut() -> None:
    (layer,), (hidden,) = layers(config(), 1), hidden_states(1)
    whole = layer.router(hidden, make_context(TOKENS))
    total = partial(lambda counts, layer, own: counts, whole.use.tokens_per_expert)
    halves = [layer.router(part, make_context(TOKENS // 2, sum_over_global_batch=total)) for part in hidden.chunk(2)]
    mean = sum(half.aux["heterogeneous_balance"] for half in halves) / 2
    torch.testing.assert_close(mean, whole.aux["heterogeneous_balance"])


def test_padding_counts_neither_in_the_loss_nor_in_the_routes() -> None:
    (layer,), (hidden,) = layers(config(), 1), hidden_states(1)
    mask = torch.arange(TOKENS) < 20
    padded = layer.router(hidden, make_context(TOKENS, token_mask=mask))
    text = layer.router(hidden[:20], make_context(20))
    torch.testing.assert_close(padded.aux["heterogeneous_balance"], text.aux["heterogeneous_balance"])
    assert torch.equal(padded.use.tokens_per_expert, text.use.tokens_per_expert)


def test_weights_of_a_zero_expert_are_dropped_kept_or_raw() -> None:
    (hidden,) = hidden_states(1)
    found = {}
    for rule in RULES:
        (layer,) = layers(config(f"router.weights={rule}"), 1)
        found[rule] = by_token(layer.router(hidden, make_context(TOKENS)), TOKENS)
    beside_zero = [token for token, routes in enumerate(found["mixtral"]) if 7 in routes]
    assert beside_zero
    for token in beside_zero:
        other = next(iter(found["mixtral"][token].keys() - {7}))
        assert found["zero_dropped"][token] == {other: 1.0, 7: 0.0}
        assert sum(found["mixtral"][token].values()) == pytest.approx(1)
        assert found["mixtral"][token][7] > 0 and sum(found["raw"][token].values()) < 1


def test_a_step_says_the_share_of_cheap_routes_and_charges_networks_alone() -> None:
    from moe_pretrain.engine.micro_batch import GlobalCounts
    from moe_pretrain.engine.step_result import StepSums
    from moe_pretrain.metrics.throughput import Window

    setting = config(*SHALLOW)
    model = DecoderLM(setting.model, setting.router, ExpertShard())
    sums = StepSums([], model.moe_layers()[0].kinds, [0, 0], torch.device("cpu"))
    sums.layers[:, :8] = torch.tensor([30.0, 0, 10, 20, 20, 10, 5, 5])
    initialise(model, 0)
    sums.set(sums.stacked())
    result = sums.result(GlobalCounts(labels=50, tokens=50), {}, 0.0, {}, 0, None)
    assert result.experts_per_token == 60 / 50 and result.layer_uses()[0].experts_per_token == 2
    row = train_row(result, model, Window(1.0, 1.0, 0.0), 0.1, 1.0, 1, None)
    assert row["moe/layer_01/zero_computation_share"] == 0.4
    assert row["moe/layer_01/experts_per_token"] == 60 / 50


@pytest.mark.parametrize("scheme", sorted(SHIPPED))
def test_the_experts_serve_every_router_or_are_refused_in_a_line(scheme: str) -> None:
    words = [f"router={scheme}", "experts=zero_computation", *SMALL, *SHALLOW, "model.sequence_length=8"]
    try:
        setting = load(words)
    except ConfigError as error:
        assert "experts=zero_computation must be another with router=" in str(error) and "\n" not in str(error)
        return
    model = DecoderLM(setting.model, setting.router, ExpertShard())
    initialise(model, 0)
    ids = torch.arange(16).view(2, 8)
    positions = torch.arange(8).expand(2, 8)
    context = replace(make_context(16, 2), token_ids=ids.flatten())
    output = model(ids, ids, torch.zeros_like(ids), positions, context)
    (output.loss_sum + sum(output.aux.values())).backward()
    constants = [p for n, p in model.named_parameters() if "constants" in n]
    assert len(constants) == 8 and all(p.grad is not None and p.grad.isfinite().all() for p in constants)


def test_wrong_values_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"router.top_k=9 must be at most .*=4 and 4 zero-computation experts$"):
        config("router.top_k=9")
    with pytest.raises(ConfigError, match="router.weights=zero_dropped must be raw when router.top_k=1"):
        config("router.top_k=1")
    with pytest.raises(ConfigError, match="num_constant=0, num_copy=0 and num_zero=0: one must be above 0"):
        config(*(f"model.moe.experts.num_{kind}=0" for kind in ("constant", "copy", "zero")))
    with pytest.raises(ConfigError, match="combine=orthogonal must be sum with experts=zero_computation"):
        config("combine=orthogonal")
    assert "router.tau=0" in refusal(config().router, 4, tau=0.0)


def test_generation_carries_logits_from_layer_to_layer_as_the_model_does() -> None:
    setting = config(*SHALLOW, "model.sequence_length=16")
    model = DecoderLM(setting.model, setting.router, ExpertShard()).eval()
    initialise(model, 0)
    with torch.no_grad():
        for layer in model.moe_layers()[1:]:
            layer.router.residual_weight.mul_(10)
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, 16)
    whole = model.logits(ids, torch.zeros_like(ids), positions, replace(make_context(32, 2), token_ids=ids.flatten()))
    decoder = CachedDecoder(model, 2, 16)
    found = torch.cat([decoder.feed(part) for part in ids.split([9, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(found, whole, atol=3e-5, rtol=1e-4)
