"""The oracle tells rates by the names of weights; the optimizer by the modules that hold them: they agree."""

import dataclasses

import pytest
from helpers.builders import SCHEME_WORDS

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.engine.optimizers.base import rate_scales
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.verify.oracle_optimizers import rate_scale
from moe_pretrain.verify.small_twin import shrink

SCALES = {"embedding": 3, "head": 5, "norms": 7, "attention": 0.3, "experts": 1.1, "router": 0.7, "ffn": 1.3}
GROUPS = [f"optimizer.groups.{name}.lr_scale={scale}" for name, scale in SCALES.items()]


@pytest.mark.parametrize("words", [[], ["model.init=mup"]], ids=str)
@pytest.mark.parametrize("scheme", SCHEME_WORDS)
def test_oracle_and_optimizer_have_the_same_rates(scheme: str, words: list[str]):
    parts = ["model.moe.num_leading_dense_layers=1", "model.moe.num_shared_experts=2", "model.tie_embeddings=false"]
    overrides = [f"router={scheme}", "model=small", "engine.device=cpu", *parts, *words, *GROUPS]
    if words and scheme in ("lory", "smear"):
        with pytest.raises(ConfigError, match=f"model.init=mup must be normal or width_aware with router={scheme}"):
            load(overrides)
        return
    config = load(overrides)
    for each in (config, shrink(config, plan_run(config, 1))):
        model = meta_model(each.model, each.router)
        ours = rate_scales(model, each.optimizer)
        theirs = {name: rate_scale(each, name, weight) for name, weight in model.named_parameters()}
        assert ours == pytest.approx(theirs)
        if words and each.model.mup_base_width != each.model.hidden_size:
            plain = dataclasses.replace(each, model=dataclasses.replace(each.model, init="width_aware"))
            assert ours != pytest.approx(rate_scales(meta_model(plain.model, plain.router), plain.optimizer))


@pytest.mark.parametrize("scheme", ["top_k", "autonomy", "attentive_low_rank", "random"])
def test_a_shrunk_twin_keeps_the_parameterisation(scheme: str):
    config = load(["model.init=mup", "engine.device=cpu", f"router={scheme}"])
    small = shrink(config, plan_run(config, 1))
    scales = rate_scales(meta_model(small.model, small.router), small.optimizer)
    assert small.model.init == "mup" and scales["norm.weight"] == 0.5
    assert scales["blocks.1.attention.qkv_weight"] == 0.5 and scales["blocks.1.attention.out_weight"] == 1.0
