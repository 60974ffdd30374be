"""Groups of parameters, and what ``model.init=mup`` makes of their rates and of how they start."""

import math

import pytest
import torch
from helpers.builders import SCHEME_WORDS

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.parameter_groups import GROUP_NAMES, meta_model, parameter_roles, rate_scale
from moe_pretrain.moe.types import ExpertShard

ALL_PARTS = ("model.moe.num_leading_dense_layers=1", "model.moe.num_shared_experts=2", "model.tie_embeddings=false")


def scales(config: Config) -> dict[str, float]:
    model = meta_model(config.model, config.router)
    roles = parameter_roles(model)
    return {name: rate_scale(roles[name], parameter, config.model) for name, parameter in model.named_parameters()}


def started(config: Config) -> DecoderLM:
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=3)
    return model


@pytest.mark.parametrize("scheme", SCHEME_WORDS)
def test_every_parameter_has_one_role_and_routers_are_told_by_their_name(scheme: str):
    config = load([f"router={scheme}", *ALL_PARTS])
    model = meta_model(config.model, config.router)
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert {name for name, role in roles.items() if role.group == "router"} == {n for n in roles if ".router." in n}
    assert {role.group for role in roles.values()} <= set(GROUP_NAMES)


def test_which_parameter_is_in_which_group():
    config = load(["router=autonomy", *ALL_PARTS, "model.num_layers=2"])
    found: dict[str, set[str]] = {}
    for name, role in parameter_roles(meta_model(config.model, config.router)).items():
        found.setdefault(role.group, set()).add(name)
    experts = "blocks.1.feed_forward.experts"
    assert found == {
        "embedding": {"embedding.weight"},
        "head": {"head.weight"},
        "norms": {"norm.weight"}
        | {f"blocks.{i}.{name}_norm.weight" for i in (0, 1) for name in ("attention", "feed_forward")},
        "attention": {f"blocks.{i}.attention.{name}_weight" for i in (0, 1) for name in ("qkv", "out")},
        "router": {"blocks.1.feed_forward.router.down_weight"},
        "experts": {f"{experts}.{name}_weight" for name in ("up", "in", "out")},
        "ffn": {f"blocks.{place}.{name}_weight" for name in ("in", "out")
                for place in ("0.feed_forward", "1.feed_forward.shared_experts")},
    }  # fmt: skip


@pytest.mark.parametrize("init", ["normal", "width_aware"])
def test_other_initialisations_scale_no_rate(init: str):
    assert set(scales(load(["model=small", f"model.init={init}", *ALL_PARTS])).values()) == {1.0}


@pytest.mark.parametrize("scheme", ["top_k", "attentive", "random", "relu"])
def test_at_the_base_shape_mup_is_width_aware(scheme: str):
    plain, mup = (load(["model=tiny", f"router={scheme}", f"model.init={init}"]) for init in ("width_aware", "mup"))
    assert set(scales(mup).values()) == {1.0}
    ours, theirs = started(mup).state_dict(), started(plain).state_dict()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


def test_rates_of_a_large_model():
    """Eight times as wide, six times as deep, experts 2.5 times as wide as the base's would be, rank twice."""
    config = load(["model=4b", "model.hidden_size=1024", "model.num_heads=16", "model.moe.expert_hidden_size=5120",
                   "model.moe.gate_rank=512", "router.projection_size=64", "model.moe.num_shared_experts=2",
                   "model.moe.num_leading_dense_layers=1", "model.ffn_hidden_size=2048", "model.init=mup"])  # fmt: skip
    found = {name.replace("feed_forward.", ""): scale for name, scale in scales(config).items()}
    width = meta_model(config.model, config.router).moe_layers()[0].experts.out_weight.shape[-1]
    assert found.items() >= {
        "embedding.weight": 1, "head.weight": 1, "norm.weight": 1 / 8, "blocks.3.attention_norm.weight": 1,
        "blocks.3.attention.qkv_weight": 1 / 8, "blocks.3.attention.out_weight": 1 / 8 / 6,
        "blocks.0.in_weight": 1 / 8, "blocks.0.out_weight": 1 / 8 / 6,
        "blocks.3.shared_experts.in_weight": 1 / 8, "blocks.3.shared_experts.out_weight": 256 / (2 * 5120) / 6,
        "blocks.3.router.projection": 1 / 8, "blocks.3.router.weight": 32 / 64,
        "blocks.3.experts.down_weight": 1 / 8, "blocks.3.experts.in_weight": 1 / 8,
        "blocks.3.experts.up_weight": 32 / 512, "blocks.3.experts.out_weight": 256 / width / 6,
    }.items()  # fmt: skip


@pytest.mark.parametrize("what", [("model.moe.num_experts=32",), ("router.top_k=7",)], ids=str)
def test_number_of_experts_and_of_active_ones_change_no_rate_and_no_start(what: tuple[str, ...]):
    few, many = (load(["model=small", "model.init=mup", *words]) for words in ((), what))
    assert set(scales(few).values()) == set(scales(many).values())
    for (name, ours), theirs in zip(started(few).named_parameters(), started(many).parameters(), strict=True):
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1), name


def test_what_a_router_of_the_users_own_does_not_share_with_the_stream_has_no_scale():
    config = load(["model=small", "model.init=mup", "router=attentive_low_rank"])
    model = meta_model(config.model, config.router)
    gate = model.moe_layers()[0].router
    gate.own = torch.nn.Parameter(torch.empty(8, 5, device="meta"))
    roles = parameter_roles(model)
    role = roles["blocks.0.feed_forward.router.own"]
    assert role.group == "router" and rate_scale(role, gate.own, config.model) == 1


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("router", ["top_k", "autonomy"])
def test_spreads(times: int, router: str):
    """Against the laws of the table, at the base width and at four times it; experts and rank grow with the width."""
    width, rank = 128 * times, 32 * times
    gate = "router.gate_rank" if router == "autonomy" else "model.moe.gate_rank"
    config = load(["model=tiny", "model.init=mup", f"model.hidden_size={width}", f"router={router}", f"{gate}={rank}",
                   f"model.moe.expert_hidden_size={2 * width}", "model.moe.num_experts=4", "model.tie_embeddings=false",
                   "model.vocab_size=4096", "model.num_layers=8"])  # fmt: skip
    model = started(config)
    spreads = {name: weight.std().item() for name, weight in model.named_parameters() if weight.ndim > 1}
    block, unit = "blocks.5.feed_forward", 0.02 * math.sqrt(768)
    inner = model.moe_layers()[0].experts.out_weight.shape[-1]
    factor = math.sqrt(unit / math.sqrt(128) / math.sqrt(32))
    expected = {
        "embedding.weight": unit / math.sqrt(128),
        "head.weight": unit / math.sqrt(128),
        "blocks.5.attention.qkv_weight": unit / math.sqrt(width),
        f"{block}.experts.in_weight": unit / math.sqrt(width),
        f"{block}.experts.up_weight": factor / math.sqrt(times),
        # Half of the base's depth, whose own factor is 1 / sqrt(2 * 4).
        "blocks.5.attention.out_weight": unit / math.sqrt(width) / math.sqrt(8) / 2,
        f"{block}.experts.out_weight": unit / math.sqrt(128) * math.sqrt(256 / inner) / math.sqrt(8) / 2,
    }
    if router == "autonomy":
        expected[f"{block}.router.down_weight"] = factor / math.sqrt(times)
    else:
        expected[f"{block}.router.weight"] = unit / math.sqrt(128) / times
    assert {name: spreads[name] for name in expected} == pytest.approx(expected, rel=0.06)
    assert model.norm.weight.unique().tolist() == [1 / times] and model.blocks[0].attention_norm.weight.unique() == 1


def test_one_law_for_gates_at_a_time():
    with pytest.raises(ConfigError, match=r"^model.gate_init=paper must be variance_preserving with model.init=mup"):
        load(["model.init=mup", "model.gate_init=paper"])
