"""The CUDA branches of every scheme on a CPU: the numbers of the CPU's, and where the host waits for the device."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import cuda_branches
from helpers.cuda_branches import Waits, says_cuda
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.load import load
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model import norms
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.experts import swiglu
from moe_pretrain.moe.types import ExpertShard, float32_parameters
from moe_pretrain.parallel.exchange import AllToAll

LAYERS, ROWS, SEQUENCE, VOCAB = 2, 4, 64, 256
SMALL = [
    *("model=tiny", f"model.num_layers={LAYERS}", f"model.sequence_length={SEQUENCE}", f"model.vocab_size={VOCAB}"),
    *("model.hidden_size=64", "model.num_heads=2", "model.ffn_hidden_size=96", "model.moe.expert_hidden_size=80"),
    *("model.init=normal", "model.init_std=0.2", "tokenizer=pretrained", "tokenizer.path=unused", "metrics.wandb=off"),
]
ROUTERS = sorted({path.stem for path in (config_folder() / "router").glob("*.yaml")} - {"by_layer"})
"""Every scheme; ``by_layer`` is none of its own, but others in their layers."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A world of one, so that the exchange runs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(router: str, *words: str) -> tuple[DecoderLM, MicroBatch]:
    """A model in bfloat16, routers aside, and rows of one document each."""
    config = load([*SMALL, f"router={router}", *(["router.segment_tokens=32"] if router == "lory" else []), *words])
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    kept = {id(parameter) for parameter in float32_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.bfloat16()
    ids = torch.randint(0, VOCAB, (ROWS, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(ROWS, -1)
    documents = torch.zeros_like(ids)
    documents[-1] = -1  # padding
    return model, MicroBatch(ids, ids.roll(-1, 1), documents, positions, torch.arange(ROWS), 0).to("cpu")


def numbers(model: DecoderLM, batch: MicroBatch) -> dict[str, Tensor]:
    """Losses, uses and all gradients of a pass."""
    context = routing_context(batch, 0, 0, lambda layer, counts: counts.clone(), ROWS * SEQUENCE)
    output = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
    loss = output.loss_sum / (ROWS * SEQUENCE) + sum(output.aux.values(), torch.zeros(()))
    model.zero_grad()
    loss.backward()
    found = {"loss": output.loss_sum.detach(), **{name: value.detach() for name, value in output.aux.items()}}
    for index, use in enumerate(output.uses):
        found |= {f"{index} {name}": value for name, value in vars(use).items() if value is not None}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def numbers_of_joined_operations(model: DecoderLM, batch: MicroBatch) -> dict[str, Tensor]:
    """``numbers`` of the CPU, but for operations that CUDA joins or puts on another side of a product, and so rounds
    elsewhere; in gradients alone, and close by."""
    plain = numbers(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_is_one_kernel", lambda rows: True)
        patch.setattr(swiglu, "_weighs_in_activation", lambda rows: True)
        joined = numbers(model, batch)
    for name, value in plain.items():
        if name in dict(model.named_parameters()):
            assert (joined[name] - value).double().norm() <= 2**-6 * value.double().norm() + 1e-12, name
        else:
            assert torch.equal(joined[name], value), name
    return joined


EXCHANGE = {"tolist moe/dispatch.py _exchange_sizes": 1}
"""The one wait that a dropless exchange needs: the sizes of its blocks."""
ONE_READ = {"__int__ moe/types.py exact": 1}
"""Routes are counted where padding would be more than a quarter of them, as with eight experts for two."""
ROWS_OF_WIDTHS = {"tolist moe/experts/unequal.py forward": 1}
"""Where experts have several widths; of each half of the tokens that is exchanged by itself."""
WAITS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("attention_importance", "attention_importance_renormalised", "autonomy_top_p"), ONE_READ),
    **dict.fromkeys(("dynmoe", "expert_threshold", "moe_plus_plus", "relu"), ONE_READ),
    **dict.fromkeys(("top_p", "top_p_renormalised"), ONE_READ),
    "moce_ir": ROWS_OF_WIDTHS,
}
"""Waits for the device in a layer and micro-batch, forward and backward, where a scheme has any: no more than these."""
MORE_EXCHANGES: dict[str, dict[str, int]] = {
    # Experts are asked before they are chosen, or every token passes twice.
    **dict.fromkeys(("attentive", "attentive_dense", "thor"), {"tolist moe/dispatch.py _exchange_sizes": 2}),
    "dense": {},
    **dict.fromkeys(("lory", "smear"), {"cpu moe/merged_layer.py _gather": 1}),
}


@pytest.mark.parametrize("way", ["alone", "exchange", "halves"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_branch_of_cuda_has_the_numbers_of_the_cpus_and_waits_no_more_than_stated(router: str, way: str):
    """Bit for bit, but for the embedding's gradient, which CUDA's own kernel sums in float32 as ours does on a CPU."""
    model, batch = build(router)
    expected_waits = WAITS.get(router, {})
    if way != "alone":
        alone = {} if expected_waits is ONE_READ else expected_waits
        expected_waits = alone | MORE_EXCHANGES.get(router, EXCHANGE)
        for layer in model.moe_layers():
            layer.exchange, layer.overlaps_exchange = AllToAll(dist.group.WORLD), way == "halves"
        if way == "halves" and alone is ROWS_OF_WIDTHS:
            expected_waits |= {name: 2 * number for name, number in alone.items()}
    expected = numbers_of_joined_operations(model, batch)
    with says_cuda(), Waits() as waits:
        found = numbers(model, batch)
    assert found.keys() == expected.keys() and found["blocks.0.attention.qkv_weight"].any()
    for name, value in expected.items():
        if name == "embedding.weight":
            torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.05 * float(value.abs().max()))
        elif router == "dynmoe" and (name == "diversity" or name.endswith("router.weight")):  # a sum with zeros in it
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
        else:
            assert torch.equal(found[name], value), name
    assert {" ".join(key): count / LAYERS for key, count in waits.found.items()} == expected_waits


OTHERS = [
    *("combine=orthogonal", "experts=zero_computation", "experts=matrix_product", "model.recompute=full"),
    "experts=unequal model.moe.expert_hidden_size=64",
]
"""What reads lists of routes beside plain experts."""


@pytest.mark.parametrize("exchanges", [False, True], ids=["alone", "exchange"])
@pytest.mark.parametrize("words", OTHERS)
def test_padding_reaches_no_number_whatever_the_experts(words: str, exchanges: bool):
    model, batch = build("expert_choice", *words.split())
    for layer in model.moe_layers():
        layer.exchange = AllToAll(dist.group.WORLD) if exchanges else None
    expected = numbers_of_joined_operations(model, batch)
    with says_cuda():
        found = numbers(model, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "embedding.weight")


SHAPES = [
    "model.recompute=selective model.moe.num_leading_dense_layers=1 model.qk_norm=head",
    "model.recompute=full model.moe.num_leading_dense_layers=1",
    "model.moe.latent_size=32 model.moe.latent_norm=true model.qk_norm=whole",
]


@pytest.mark.parametrize("words", SHAPES)
def test_joined_operations_have_the_same_numbers_in_every_kind_of_block(words: str):
    model, batch = build("top_k", *words.split())
    expected = numbers_of_joined_operations(model, batch)
    with says_cuda():
        found = numbers(model, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "embedding.weight")


def test_waits_are_seen(monkeypatch: pytest.MonkeyPatch):
    """What the counter takes for one, and what it does not."""
    monkeypatch.setattr(cuda_branches, "call_site", lambda: "here")
    counts = torch.tensor([2, 0, 1])
    with Waits() as waits:
        counts.tolist(), int(counts.max()), counts.max().item(), bool(counts.any())
        counts.nonzero(), counts[counts > 0], counts.repeat_interleave(counts)
        counts.repeat_interleave(counts, output_size=3), counts[counts], counts.sum(), counts.argsort()
        counts.new_tensor([1]), torch.tensor([1], device=counts.device), torch.tensor([1]), counts.new_full((1,), 1)
    names = ["__bool__", "__int__", "index", "item", "new_tensor", "nonzero", "repeat_interleave", "tensor", "tolist"]
    assert sorted(name for name, _ in waits.found) == names
    assert set(waits.found.values()) == {1}


def waits_of_a_step(rows: int) -> dict[str, int]:
    """Waits of a step with micro-batches of four rows, outside of the model."""
    words = [f"batch.global_batch_tokens={rows * SEQUENCE}", "batch.micro_batch_size=4", "engine.dtype=bfloat16"]
    words += ["engine.device=cpu", "engine.zero_stage=1", "engine.check_every_steps=0"]
    engine = build_engine(load([*SMALL, *words, "engine.reduce_bucket_elements=2000"]))
    engine.step(0, random_batches(engine, 0))  # makes the moments, and counts ahead
    batches = random_batches(engine, 1)
    with Waits() as waits:
        engine.step(1, batches)
    found = {" ".join(key): count for key, count in waits.found.items()}
    # Batches have not been copied to the device where they are counted.
    before_copy = ("engine/engine.py <listcomp>", "data/")
    return {key: n for key, n in found.items() if not key.split(" ", 1)[1].startswith(("moe/", "model/", *before_copy))}


def test_a_step_waits_a_stated_number_of_times_whatever_its_micro_batches():
    found = [run_on_ranks(waits_of_a_step, 1, rows)[0] for rows in (4, 12)]
    assert found[0] == found[1], "a micro-batch waits for nothing"
    assert sum(found[0].values()) <= 15, found[0]  # two are copies of the host's numbers, DeepSpeed's
