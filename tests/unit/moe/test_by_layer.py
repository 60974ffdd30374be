"""``router=by_layer``: every layer is what it is where all layers have its scheme, and all else asks by layer."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.builders import context_of, random_batches, tiny
from torch import Tensor

from moe_pretrain.config.compose import folder_override
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.recorded import kept
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.model.size import mean_ffn_experts, model_size
from moe_pretrain.moe.build import is_lowest
from moe_pretrain.moe.types import ExpertShard, MoEOutput
from moe_pretrain.run_folder.identity import deciding
from moe_pretrain.run_folder.record import flatten, show
from moe_pretrain.train.resume_rules import changes
from moe_pretrain.verify.small_twin import shrink

LAYERS = (
    "{0:{router:top_k,top_k:1,weights:raw,load_balance_level:sequence,load_balance_weight:0.3,router_z_weight:0.2},"
    "1:hash,2-3:{router:loss_free,top_k:3,load_balance_weight:0.5}}"
)
WORDS = ("router=by_layer", f"router.layers={LAYERS}", "model.num_layers=5", "model.moe.num_leading_dense_layers=0")
OF_FIVE = (*WORDS[:1], f"router.layers={LAYERS.replace('2-3', 'rest')}", *WORDS[2:])


def built(config: Config) -> DecoderLM:
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    return model.train()


def run(model: DecoderLM, batch: MicroBatch) -> tuple[Tensor, list[MoEOutput]]:
    return model._trunk(batch.input_ids, batch.document_ids, batch.position_ids, context_of(batch))


def test_outputs_losses_and_gradients_are_those_of_blocks_of_plain_models():
    config = tiny(*OF_FIVE)
    ours, batch = built(config), random_batches(config, 1)[0][0]
    plain = built(replace(config, router=config.router.of_layer(0)))
    for layer in range(1, 5):
        plain.blocks[layer] = built(replace(config, router=config.router.of_layer(layer))).blocks[layer]
    hidden, outputs = run(plain, batch)
    assert torch.equal(run(ours, batch)[0], hidden)

    # The loss by hand: the coefficients that the words above give each layer, over all five layers.
    weights = [{"load_balance": 0.3, "router_z": 0.2}, {}, *[{"load_balance": 0.5, "router_z": 0.0}] * 3]
    counts = GlobalCounts(batch.num_valid_labels(), int((batch.document_ids >= 0).sum()))
    logits = (hidden.flatten(0, 1) @ plain.head_weight.T).log_softmax(dim=-1)
    counted = batch.labels.flatten() >= 0
    expected = -logits[counted].gather(1, batch.labels.flatten()[counted, None]).mean()
    for own, output in zip(weights, outputs, strict=True):
        assert own.keys() == output.aux.keys()
        expected = expected + sum(weight * output.aux[name] / 5 for name, weight in own.items())
    expected.backward()

    output = ours(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))
    loss = micro_batch_loss(output, ours.aux_weights, counts.tokens, counts)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name, atol=1e-6, rtol=1e-4)
    # What is reported: the mean over the layers that have the loss, by their coefficients.
    assert ours.aux_weights == pytest.approx({"load_balance": (0.3 + 3 * 0.5) / 5, "router_z": 0.2 / 5})
    balance = [float(each.aux["load_balance"].detach()) for each in outputs if each.aux]
    assert float(output.aux["load_balance"]) == pytest.approx((0.3 * balance[0] + 0.5 * sum(balance[1:])) / 1.8)
    assert float(output.aux["router_z"]) == pytest.approx(float(outputs[0].aux["router_z"].detach()))


def test_a_loss_without_a_coefficient_anywhere_is_a_plain_mean():
    config = tiny("router=by_layer", "router.layers={0:hash,rest:loss_free}", "model.num_layers=3")
    model, batch = built(config), random_batches(config, 1)[0][0]
    _, outputs = run(model, batch)
    aux = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch)).aux
    assert model.aux_weights == {"load_balance": 0.0, "router_z": 0.0}
    for name, value in aux.items():
        torch.testing.assert_close(value, (outputs[1].aux[name] + outputs[2].aux[name]) / 2)


def test_one_scheme_for_the_rest_is_that_scheme_bit_for_bit():
    ours, plain = (
        tiny(*words, "model.num_layers=3")
        for words in (("router=by_layer", "router.layers={rest:{router:top_k,load_balance_level:sequence}}"),
                      ("router=top_k", "router.load_balance_level=sequence", "router.load_balance_weight=0.01",
                       "router.router_z_weight=0.001"))
    )  # fmt: skip
    batch = random_batches(plain, 1)[0][0]
    inputs = (batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))
    first, second = (built(config) for config in (ours, plain))
    assert first.aux_weights == second.aux_weights
    assert all(torch.equal(first(*inputs).aux[name], value) for name, value in second(*inputs).aux.items())
    assert model_size(ours.model, ours.router) == model_size(plain.model, plain.router)


def test_logits_are_carried_between_neighbours_of_one_scheme_alone():
    plus = "{router:moe_plus_plus,load_balance_level:sequence}"
    config = tiny(
        *("router=by_layer", "experts=zero_computation", "model.num_layers=6"),
        f"router.layers={{0-1:{plus},2:hash,3-4:{plus},5:{{router:moe_plus_plus,gating_residual:false}}}}",
    )
    lowest = [is_lowest(config.model.moe, config.router, layer) for layer in range(6)]
    assert lowest == [True, False, True, True, False, False]
    model = built(config)
    residual = [dict(layer.router.named_parameters()).get("residual_weight") for layer in model.moe_layers()]
    assert [weight is not None for weight in residual] == [False, True, False, False, True, False]
    batch = random_batches(config, 1)[0][0]
    model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch)).loss_sum.backward()
    assert all(weight is None or weight.grad.any() for weight in residual)


def test_parameters_and_flops_are_sums_over_layers():
    words = ("model.hidden_size=32", "model.moe.num_shared_experts=1", "model.moe.every_k_layers=2")
    layers = "{0-1:{router:attention_importance,expected_experts:2},4:{router:attentive,num_candidates:3},rest:hash}"
    config = tiny("router=by_layer", f"router.layers={layers}", "model.num_layers=7", *words)
    size = config.size
    model = meta_model(config.model, config.router)
    assert size.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    # Each layer as a quarter of a model in which all four MoE layers have its scheme.
    alone = [model_size(config.model, config.router.of_layer(layer)) for layer in (0, 2, 4, 6)]
    for name in ("training_flops_per_token", "active_parameters"):
        assert getattr(size, name) == pytest.approx(sum(getattr(each, name) for each in alone) / 4), name
    assert mean_ffn_experts(config.model, config.router) == 2


def test_the_twin_has_every_scheme():
    config = load(["router=by_layer", "router.layers={0-2:hash,3:top_k,rest:loss_free}", "model.num_layers=9"])
    twin = shrink(config, plan_run(config, 1))
    names = [twin.router.of_layer(layer).name for layer in twin.model.moe_layers]
    assert names == ["hash", "hash", "top_k", "loss_free", "loss_free"]
    sparse = replace(config.model.moe, num_leading_dense_layers=3, every_k_layers=3)
    layers = {key: config.router.of_layer(layer) for key, layer in (("3", 3), ("6", 0))}
    sparse_config = replace(
        config, model=replace(config.model, moe=sparse), router=replace(config.router, layers=layers)
    )
    twin = shrink(sparse_config, plan_run(sparse_config, 1))
    assert twin.model.moe_layers == [1, 4]
    assert [twin.router.of_layer(layer).name for layer in (1, 4)] == ["top_k", "hash"]


def test_what_a_layer_has_decides_the_run_and_is_its_name():
    one, other = (
        json.loads(json.dumps(to_values(tiny("router=by_layer", f"router.layers={{0:hash,rest:{rest}}}"))))
        for rest in ("top_k", "{router:top_k,top_k:3}")
    )
    assert deciding(flatten(one)) != deciding(flatten(other))
    assert show(flatten(one), "router.name") == show(flatten(other), "router.name") == "by_layer{0:hash,rest:top_k}"
    assert changes(one, other, False).refused == ["router.layers.rest.top_k=3 must stay 2"]
    assert show(flatten(to_values(tiny())), "router.name") == "top_k"


def test_a_choice_of_the_users_own_folder_and_the_defaults_of_its_day(tmp_path):
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults:\n  - top_k\n  - _self_\ntop_k: 3\n")
    (folder / "both.yaml").write_text("name: by_layer\nlayers:\n  0: hash\n  rest: {router: mine, jitter: 0.1}\n")
    place = folder_override(tmp_path)
    config = load(["router=both", place])
    assert config.router.of_layer(3) == replace(load([]).router, top_k=3, jitter=0.1)
    assert load(["router=both", place, "router.layers.rest=loss_free"]).router.of_layer(1).name == "loss_free"

    # A release with another default: the run goes on with what it has recorded.
    words = ["router=both", place]
    then = to_values(config)
    then["router"]["layers"]["rest"]["score"] = "sigmoid"
    (word,) = kept(words, json.loads(json.dumps(then)), words)
    again = load([*words, word])
    assert again.router.of_layer(1).score == "sigmoid" and again.router.of_layer(0) == config.router.of_layer(0)
    assert kept([*words, word], json.loads(json.dumps(then)), [*words, word]) == []


def test_a_folder_of_somebody_elses_evaluates_nothing(tmp_path):
    from moe_pretrain.config.compose import refuse_resolvers

    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "sly.yaml").write_text("name: hash\ntop_k: 2\ntable: ${oc.env:HOME}\nweights: equal\nweight_scale: 1.0\n")
    words = [folder_override(tmp_path), "router=by_layer", "router.layers={0:sly,rest:hash}"]
    with pytest.raises(ConfigError, match=r"router.table=\$\{oc.env:HOME\} is not evaluated for a run's folder"):
        refuse_resolvers(words, [])
