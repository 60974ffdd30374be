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
from moe_pretrain.metrics.step_rows import train_row
from moe_pretrain.metrics.throughput import Window
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import build_moe_layer, sharded, width_problems
from moe_pretrain.moe.experts.unequal import UnequalExperts, class_widths
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers.expert_choice import choose_tokens, most_taken
from moe_pretrain.moe.types import ExpertShard, step_uses
from moe_pretrain.plan.plan import problems

TOKENS, HIDDEN, MEAN, EXPERTS = 40, 10, 8, 8
WIDTHS = [4, 4, 8, 16] * 2
SIZES = (
    *(f"model.hidden_size={HIDDEN}", "model.num_heads=1", f"model.moe.num_experts={EXPERTS}"),
    *(f"model.moe.expert_hidden_size={MEAN}", "model.num_layers=2"),
)
SMALL = (*SIZES, "router.router_z_weight=0")


def config(*overrides: str) -> Config:
    return load(["experts=unequal", *SMALL, *overrides])


def make_layer(setting: Config, shard: ExpertShard | None = None) -> MoELayer:
    layer = build_moe_layer(setting.model.moe, setting.router, HIDDEN, 0, shard or ExpertShard())
    assert isinstance(layer, MoELayer)
    drawn = torch.Generator().manual_seed(5)
    for parameter in [*layer.parameters(), *map(layer.router.get_buffer, layer.router.frozen_weights)]:
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


QUOTAS: dict[str, tuple[int, float, list[str]]] = {
    "loss_free": (400, 1.1, ["router.bias_update_rate=0.002"]),
    "quantile": (30, 1.1, []),
    "k_means": (300, 1.1, ["router.num_features=8", "router.bias_update_rate=0.02"]),
    "expert_threshold": (30, 1.1, []),
    "expert_choice": (1, 1.01, []),
    "hash": (1, 1.05, []),  # ids of ten tokens each
}
"""Scheme -> steps until its experts have what they are to have, within which factor, with which words."""


@pytest.mark.parametrize("router", QUOTAS)
@pytest.mark.parametrize("balance", ["cost", "routes"])
def test_quotas_alone_give_experts_routes_as_they_are_cheap(router: str, balance: str) -> None:
    """Without any loss: by what is moved after steps, by the experts' own choice, or by the table."""
    steps, factor, words = QUOTAS[router]
    setting = load([f"router={router}", "experts=unequal", *SIZES, f"model.moe.experts.balance={balance}", *words])
    assert setting.router.evens_load == "quotas"
    layer = make_layer(setting)
    hidden, vocabulary = hidden_states(3000).detach(), torch.arange(3000) % 300
    layer.router.use_token_counts(torch.full((300,), 10))
    with torch.no_grad():
        for _ in range(steps):
            use = layer.router(hidden, make_context(len(hidden), token_ids=vocabulary)).use
            layer.router.after_step(step_uses([use])[0])
    costs = torch.tensor(layer.kinds.costs, dtype=torch.float64)
    charged = use.tokens_per_expert * (costs if balance == "cost" else 1)
    assert charged.max() / charged.min() < factor, use.tokens_per_expert
    assert float(use.tokens_per_expert.sum()) == pytest.approx(2 * len(hidden), rel=0.01), "as many on average"


def test_experts_that_choose_first_choose_as_they_are_cheap() -> None:
    """``expert_threshold`` in its steps of warm-up."""
    layer = make_layer(load(["router=expert_threshold", "experts=unequal", *SIZES, "router.warmup_steps=9"]))
    use = layer.router(hidden_states(420).detach(), make_context(420)).use  # at step 4
    assert use.tokens_per_expert.tolist() == [153, 153, 76, 38] * 2, "840 of 11 shares: 4, 4, 2, 1, twice"


def test_the_cutoffs_of_unequal_choices_are_the_best_tokens_that_are_left() -> None:
    scores = torch.rand(30, 3, generator=torch.Generator().manual_seed(4))
    text = torch.arange(30) % 5 != 0
    taken, cutoffs = choose_tokens(scores, text, 1.5, None, [0.5, 1.0, 4.0])
    for expert, capacity in enumerate([22, 11, 3]):  # 36 in shares of 8, 4 and 1 of 13, rounded
        ranked = sorted((token for token in range(30) if text[token]), key=lambda t: -scores[t, expert])  # noqa: B023
        assert taken[:, expert].nonzero()[:, 0].tolist() == sorted(ranked[:capacity])
        assert cutoffs[expert] == scores[ranked[capacity], expert]
    for tokens in (0, 1, 7, 24):
        most = most_taken(torch.zeros(24, 3, dtype=torch.bool), 1.5, [0.5, 1.0, 4.0])
        chosen, _ = choose_tokens(scores[:24], torch.arange(24) < tokens, 1.5, None, [0.5, 1.0, 4.0])
        assert chosen.sum() <= most == 36
    few = torch.zeros(7, 3, dtype=torch.bool)
    assert most_taken(few, 1.5, [0.5, 1.0, 4.0]) == 10, "6.5, 3.2 and 0.8"


def test_gates_of_wide_experts_weigh_as_they_cost() -> None:
    """``relu``: the norm that makes gates sparse, by a loop over tokens and experts."""
    words = ["router=relu", "router.load_balance_level=micro_batch"]
    layer = make_layer(load(["experts=unequal", *SIZES, *words]))
    hidden = hidden_states()
    loss = layer.router(hidden, make_context(TOKENS)).aux["sparsity"]
    gates = (hidden.detach().double() @ layer.router.weight.detach().double().T).clamp(min=0)
    expected = 0.0
    for expert, width in enumerate(WIDTHS):
        busy = int((gates[:, expert] > 0).sum()) * EXPERTS / (2 * TOKENS)
        expected += width / MEAN * busy * float(gates[:, expert].mean())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_row_of_metrics_says_how_even_the_load_is_by_what_is_balanced() -> None:
    setting = config("model.vocab_size=300", "tokenizer.vocab_size=300")
    model = DecoderLM(setting.model, setting.router, ExpertShard())
    routes = torch.tensor([[44.0, 40, 20, 10, 36, 40, 20, 10], [10.0] * 8], dtype=torch.float64)
    sums = StepSums([], model.moe_layers()[0].kinds, [0, 0], torch.device("cpu"))
    sums.layers[:, :EXPERTS] = routes
    sums.set(sums.stacked())
    result = sums.result(GlobalCounts(labels=110, tokens=110), {}, 0.0, {}, 0, None)
    row = train_row(result, model, Window(1.0, 1.0, 0.0), 0.1, 1.0, 1, None)
    assert row["moe/layer_00/load_max_over_even_cost"] == pytest.approx(1.1)
    assert row["moe/layer_00/load_max_over_mean"] == pytest.approx(44 / 27.5)
    assert row["moe/layer_01/load_max_over_even_cost"] == pytest.approx(2.2 / 0.8), "10 of 80 is due to 1 in 22"
    plain = config("model.vocab_size=300", "tokenizer.vocab_size=300", "model.moe.experts.balance=routes")
    other = train_row(
        result, DecoderLM(plain.model, plain.router, ExpertShard()), Window(1.0, 1.0, 0.0), 0.1, 1.0, 1, None
    )
    assert not any("even_cost" in name for name in other)


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
    sums.set(sums.stacked())
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
    numbers = {"expert_choice": "capacity_factor", "expert_threshold": "target_experts"}
    for router in QUOTAS:  # shares of 0.4, 0.4, 0.13 and 0.07, three times
        words = [f"router={router}", f"router.{numbers.get(router, 'top_k')}=3", "model.moe.num_experts=4"]
        words += ["model.moe.experts.pattern=[1,1,3,6]", "model.moe.expert_hidden_size=11"]
        with pytest.raises(ConfigError, match=f"balance=cost must be routes with router={router}, 3 exp.* 1.20 times"):
            load(["experts=unequal", *words])
        assert load(["experts=unequal", *words, "model.moe.experts.balance=routes"])
    for words in (
        *(["router=sinkhorn"], ["router=thor"], ["router=random"], ["router=uniform"]),
        *(["router=hash", "router.table=random"], ["router=k_means", "router.bias_update_rate=0"]),
        *(["router=top_k", "router.load_balance_weight=0"], ["router=loss_free", "router.bias_update_rate=0"]),
        ["router=moe_plus_plus", "router.load_balance_weight=0"],
    ):
        with pytest.raises(ConfigError, match=f"balance=cost must be routes with {words[0]} as it is configured: noth"):
            load([*words, "experts=unequal"])
        assert load([*words, "experts=unequal", "model.moe.experts.balance=routes"])
    assert load(["router=loss_free", "experts=unequal", "router.bias_update_rate=0", "router.load_balance_weight=1"])
    four = load(["experts=unequal", "parallel.processes=4", "parallel.expert_parallel_size=4"])
    narrow = width_problems(config().model.moe, four.router, 8)
    assert len(narrow) == 1 and "makes widths 4, 8, 16, which must be multiples of 8 on a GPU" in narrow[0]
    assert not width_problems(four.model.moe, four.router, 128)
    assert sharded(four.model.moe, four.router)[1] == 2
    assert any(
        "must divide model.moe.num_experts / len(model.moe.experts.pattern)=2" in problem for problem in problems(four)
    )
