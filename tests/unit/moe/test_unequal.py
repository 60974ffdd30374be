"""Experts of several widths beside plain loops in float64, and balance by what they cost."""

import pytest
import torch
from helpers.routing import make_context
from reference.papers import unequal as paper
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.micro_batch import GlobalCounts
from moe_pretrain.engine.step_result import StepSums
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import build_moe_layer, sharded, width_problems
from moe_pretrain.moe.experts.unequal import UnequalExperts, class_widths
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import ExpertShard, step_uses
from moe_pretrain.plan.plan import problems

TOKENS, HIDDEN, MEAN, EXPERTS = 40, 10, 8, 8
WIDTHS = [4, 4, 8, 16] * 2
SMALL = (
    *(f"model.hidden_size={HIDDEN}", "model.num_heads=1", f"model.moe.num_experts={EXPERTS}"),
    *(f"model.moe.expert_hidden_size={MEAN}", "router.router_z_weight=0", "model.num_layers=2"),
)


def config(*overrides: str) -> Config:
    return load(["experts=unequal", *SMALL, *overrides])


def make_layer(setting: Config, shard: ExpertShard | None = None) -> MoELayer:
    layer = build_moe_layer(setting.model.moe, setting.router, HIDDEN, 0, shard or ExpertShard())
    assert isinstance(layer, MoELayer)
    drawn = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.5)
    return layer


def hidden_states(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("top_k", [2, 3])
def test_outputs_losses_and_all_gradients_are_those_of_the_equations(top_k: int, recompute: bool) -> None:
    layer, hidden = make_layer(config(f"router.top_k={top_k}")), hidden_states()
    upstream = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(7))
    output = layer(hidden, make_context(TOKENS), recompute)
    ((output.hidden * upstream).sum() + 3 * output.aux["load_balance"]).backward()

    assert isinstance(layer.experts, UnequalExperts)
    own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = hidden.detach().double().requires_grad_()
    experts = []
    for expert, width in enumerate(WIDTHS):
        stack, index = layer.experts.locate(expert)
        prefix = f"experts.classes.{list(layer.experts.classes).index(stack)}"
        gate, up = own[f"{prefix}.in_weight"][index].chunk(2)
        assert gate.shape == (width, HIDDEN)
        experts.append((gate, up, own[f"{prefix}.out_weight"][index]))
    routing = paper.route(x @ own["router.weight"].T, top_k=top_k)
    y = paper.mixture(x, routing.mask, routing.weights, experts)
    loss = paper.p_penalty(routing.probs, routing.mask, WIDTHS, normalise=True) / top_k
    ((y * upstream.double()).sum() + 3 * loss).backward()
    torch.testing.assert_close(output.hidden.double(), y, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output.aux["load_balance"].double(), loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), x.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in layer.named_parameters():
        assert own[name].grad.any(), name
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, atol=1e-4, rtol=1e-4, msg=name)
    cost = torch.tensor(layer.kinds.costs, dtype=torch.float64)
    run = float((output.use.tokens_per_expert * cost).sum()) / TOKENS
    size = 3 * HIDDEN * MEAN
    assert run * size == pytest.approx(paper.mean_active_parameters(routing.mask, experts))


@pytest.mark.parametrize("balance", ["cost", "routes"])
def test_experts_of_one_width_are_the_plain_ones(balance: str) -> None:
    ours = make_layer(config("model.moe.experts.pattern=[3]", f"model.moe.experts.balance={balance}"))
    plain = make_layer(load(["experts=swiglu", *SMALL]))
    plain.load_state_dict({name.replace("classes.0.", ""): value for name, value in ours.state_dict().items()})
    hidden = hidden_states()
    left, right = (layer(hidden, make_context(TOKENS), False) for layer in (ours, plain))
    assert torch.equal(left.hidden, right.hidden)
    assert torch.equal(left.aux["load_balance"], right.aux["load_balance"])


def test_the_loss_alone_gives_experts_routes_as_they_are_cheap() -> None:
    """``sum_e cost_e f_e P_e`` is least where ``cost_e f_e`` is the same for all."""
    layer = make_layer(config())
    layer.router.weight.data.mul_(0.5)
    hidden = hidden_states(3000).detach()
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.01)
    mean = torch.zeros(EXPERTS, dtype=torch.float64)
    for step in range(300):
        routing = layer.router(hidden, make_context(len(hidden)))
        optimizer.zero_grad()
        routing.aux["load_balance"].backward()
        optimizer.step()
        if step >= 200:
            mean += routing.use.tokens_per_expert / 100
    charged = mean * torch.tensor(layer.kinds.costs, dtype=torch.float64)
    assert charged.max() / charged.min() < 1.15
    assert mean[0] > 2 * mean[3], "four times as wide"


@pytest.mark.parametrize("router", ["loss_free", "quantile"])
@pytest.mark.parametrize("balance", ["cost", "routes"])
def test_a_bias_alone_gives_experts_routes_as_they_are_cheap(router: str, balance: str) -> None:
    """By the bias that is moved after steps, without any loss, on the batch of the step before."""
    rate = ["router.bias_update_rate=0.002"] if router == "loss_free" else []
    layer = make_layer(config(f"router={router}", f"model.moe.experts.balance={balance}", *rate))
    hidden = hidden_states(3000).detach()
    with torch.no_grad():
        for _ in range(400 if router == "loss_free" else 30):
            use = layer.router(hidden, make_context(len(hidden))).use
            layer.router.after_step(step_uses([use])[0])
    costs = torch.tensor(layer.kinds.costs, dtype=torch.float64)
    charged = use.tokens_per_expert * (costs if balance == "cost" else 1)
    assert charged.max() / charged.min() < 1.1, use.tokens_per_expert


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_holds_the_same_widths(ranks: int) -> None:
    layers = [make_layer(config(), ExpertShard(rank, ranks)) for rank in range(ranks)]
    sizes = [sorted(p.numel() for p in layer.experts.parameters()) for layer in layers]
    assert all(size == sizes[0] for size in sizes)
    assert sum(sizes[0]) * ranks == sum(3 * HIDDEN * width for width in WIDTHS)


def test_a_run_is_charged_for_the_widths_it_uses() -> None:
    setting = config("model.vocab_size=300", "tokenizer.vocab_size=300")
    model = DecoderLM(setting.model, setting.router, ExpertShard())
    size = model_size(setting.model, setting.router)
    assert size.total_parameters == sum(p.numel() for p in model.parameters())
    sums = StepSums([], model.moe_layers()[0].kinds, [0, 0], torch.device("cpu"))
    sums.layers[:, :EXPERTS] = torch.tensor([30.0, 0, 10, 20, 20, 10, 5, 5])
    result = sums.result(GlobalCounts(labels=50, tokens=50), {}, 0.0, {}, 0, None)
    by_hand = sum(3 * HIDDEN * w * n for w, n in zip(WIDTHS, [30, 0, 10, 20, 20, 10, 5, 5], strict=True)) / 50
    assert size.with_experts_per_token(result.mean_experts_run).active_experts == pytest.approx(2 * by_hand)
    assert result.experts_per_token == 2


def test_wrong_values_are_refused_in_one_line() -> None:
    assert class_widths([1, 1, 2, 4], 8) == [4, 4, 8, 16]
    with pytest.raises(ConfigError, match=r"expert_hidden_size=9 must be a multiple of 2 with .*pattern=\[1, 1, 2"):
        config("model.moe.expert_hidden_size=9")
    with pytest.raises(ConfigError, match=r"num_experts=6 must be a multiple of the 4 numbers of .*pattern=\[1, 1, 2"):
        config("model.moe.num_experts=6")
    with pytest.raises(ConfigError, match="must be at least 1|must be above 0|positive"):
        config("model.moe.experts.pattern=[1,0]")
    with pytest.raises(ConfigError, match=r"pattern=\[\] must name a width"):
        config("model.moe.experts.pattern=[]")
    with pytest.raises(ConfigError, match="gate_rank=4 must be null with experts=unequal"):
        config("model.moe.gate_rank=4")
    for router in ("dense", "autonomy", "attentive", "dynmoe", "smear"):
        with pytest.raises(ConfigError, match=f"experts=unequal must be another with router={router}, "):
            load([f"router={router}", "experts=unequal"])
    for router in ("loss_free", "quantile"):  # shares of 0.4, 0.4, 0.13 and 0.07, three times
        words = [f"router={router}", "router.top_k=3", "model.moe.num_experts=4", "model.moe.experts.pattern=[1,1,3,6]"]
        with pytest.raises(
            ConfigError, match=f"balance=cost must be routes with .*=3, .* and router={router}: .* 1.20 "
        ):
            config(*words, "model.moe.expert_hidden_size=11")
    four = load(["experts=unequal", "parallel.processes=4", "parallel.expert_parallel_size=4"])
    narrow = width_problems(config().model.moe, four.router, 8)
    assert len(narrow) == 1 and "makes widths 4, 8, 16, which must be multiples of 8 on a GPU" in narrow[0]
    assert not width_problems(four.model.moe, four.router, 128)
    assert sharded(four.model.moe, four.router)[1] == 2
    assert any(
        "must divide model.moe.num_experts / len(model.moe.experts.pattern)=2" in problem for problem in problems(four)
    )
