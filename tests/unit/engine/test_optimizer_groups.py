"""Rates of groups of parameters: in the optimizer, in an update, and what is refused."""

import pytest
import torch

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.optimizers import build_optimizer, set_learning_rate
from moe_pretrain.engine.optimizers.base import (
    check_optimizer,
    describe_rates,
    parameter_groups,
    rate_scales,
    rate_scales_by_group,
)
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.train.resume_rules import changes

SHAPE = ("model.num_layers=2", "model.hidden_size=64", "model.vocab_size=96", "tokenizer=pretrained",
         "tokenizer.path=unused",
         "model.moe.expert_hidden_size=24", "model.tie_embeddings=false")  # fmt: skip


def build(*words: str) -> tuple[Config, DecoderLM]:
    config = load([*SHAPE, *words])
    model = DecoderLM(config.model, config.router, ExpertShard())
    prepare_experts(model, 1)
    return config, model


@pytest.mark.parametrize("init", ["width_aware", "mup"])
def test_the_optimizer_has_the_rates_of_the_configuration(init: str):
    words = ["optimizer.groups.router.lr_scale=0.5", "optimizer.groups={experts: {lr_scale: 3}}"]
    config, model = build(f"model.init={init}", *words)
    groups = parameter_groups(model, config.optimizer)
    set_learning_rate(groups, 0.25)
    roles = parameter_roles(model)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(rate_of) == len(roles)
    wide = 2.0 if init == "mup" else 1.0  # half of the base width
    for name, parameter in model.named_parameters():
        own = {"router": 0.5, "experts": 3.0}.get(roles[name].group, 1.0)
        if name == "norm.weight" or (parameter.ndim > 1 and roles[name].group not in ("embedding", "head")):
            own *= wide
        if name.endswith("out_weight") and init == "mup":
            own *= 2.0  # half of the base depth
            if roles[name].group == "experts":
                own *= 256 / 24 / wide
        assert rate_of[id(parameter)] == pytest.approx(0.25 * own), name
        if parameter.ndim > 1:  # rate times decay is the same for all
            assert rate_of[id(parameter)] * decay_of[id(parameter)] == pytest.approx(
                0.25 * config.optimizer.weight_decay
            )


def test_scales_of_one_split_nothing():
    config, model = build()
    assert {group["lr_scale"] for group in parameter_groups(model, config.optimizer)} == {1.0}
    names = [group["name"] for group in parameter_groups(model, config.optimizer)]
    assert (
        not any("_x" in name for name in names)
        and describe_rates(rate_scales_by_group(model, config.optimizer)) is None
    )


def test_a_group_moves_as_fast_as_it_says_and_decays_as_all():
    weights = []
    for scale in (1, 0.25):
        config, model = build(f"optimizer.groups.attention.lr_scale={scale}", "optimizer.weight_decay=0.5")
        initialise(model, seed=0)
        before = model.blocks[0].attention.qkv_weight.detach().clone()
        optimizer = build_optimizer(model, config.optimizer)
        set_learning_rate(optimizer.param_groups, 0.01)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        weights.append(model.blocks[0].attention.qkv_weight.detach() - before * (1 - 0.01 * 0.5))
    torch.testing.assert_close(weights[0], torch.full_like(weights[0], -0.01), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weights[1], 0.25 * weights[0], atol=1e-6, rtol=1e-4)


def test_rates_are_said_in_a_line():
    config, model = build("model.init=mup", "optimizer.groups.norms.lr_scale=2")
    line = describe_rates(rate_scales_by_group(model, config.optimizer))
    assert line == (
        "learning rates, as multiples of optimizer.learning_rate: norms 4 and 2, attention 4 and 2, router 2, "
        "experts 21.33 and 2; else 1"
    )
    assert rate_scales(model, config.optimizer)["norm.weight"] == 4


@pytest.mark.parametrize(
    "words,line",
    [
        (["optimizer.groups.rooter.lr_scale=2"], r"optimizer.groups.rooter.*router"),
        (["+optimizer.groups={rooter: {lr_scale: 2}}"], r"optimizer.groups.rooter=.* is not a field.* router\?"),
        (["optimizer.groups.router.lr_scale=0"], r"optimizer.groups.router.lr_scale=0 must be positive"),
        (["optimizer.groups.router.lr_scale=inf"], r"optimizer.groups.router.lr_scale=inf must be finite"),
        (["optimizer.groups.router.lr_scale=fast"], r"optimizer.groups.router.lr_scale='fast'"),
        (["+optimizer.groups.router.rate=1"], r"optimizer.groups.router.rate=1 is not a field of GroupRate"),
        (["model.mup_base_width=0"], r"model.mup_base_width=0 must be at least 1"),
    ],
)  # fmt: skip
def test_bad_rates_are_one_line(words: list[str], line: str):
    with pytest.raises(ConfigError, match=line) as error:
        load(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words,line",
    [
        (
            ["optimizer.groups.head.lr_scale=2"],
            r"^optimizer.groups.head.lr_scale=2 must be 1: .*model.tie_embeddings=true",
        ),
        (
            ["router=hash", "optimizer.groups.router.lr_scale=2"],
            r"groups.router.lr_scale=2 must be 1: .*router=hash",
        ),
        (["optimizer.groups.ffn.lr_scale=2"], r"it has embedding, norms, attention, router, experts$"),
        (["optimizer.trainable=routers", "optimizer.groups.experts.lr_scale=2"], r"with optimizer.trainable=routers"),
    ],
)
def test_a_rate_by_which_nothing_learns_is_refused_before_a_start(words: list[str], line: str):
    config = load([*words, "engine.device=cpu"])
    with pytest.raises(ValueError, match=line) as error:
        preflight(config, 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=line):
        check_optimizer(config.optimizer, config.model, config.router)


def test_a_run_from_before_the_groups_goes_on_and_is_told_of_a_new_rate():
    def now(router: float = 1.0, init: str = "normal") -> dict:
        model = {"init": init, "mup_base_width": 128, "mup_base_layers": 4}
        return {"model": model, "optimizer": {"groups": {"router": {"lr_scale": router}, "experts": {"lr_scale": 1.0}}}}

    then: dict = {"model": {}, "optimizer": {}}
    assert changes(then, now()).allowed == [] and changes(then, now()).refused == []
    assert "optimizer.groups" in changes(then, now(router=2.0)).allowed[0]
    assert changes(now(), now(router=2.0)).allowed == ["optimizer.groups.router.lr_scale=2.0 (was 1.0)"]
    assert changes(then, now(init="mup")).refused == ["model.init=mup must stay normal or width_aware"]
    assert changes(now(init="mup"), now()).refused == ["model.init=normal must stay mup"]
