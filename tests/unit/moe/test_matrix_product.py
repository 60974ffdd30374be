"""Experts as matrix products: cores and matrices beside the paper's loops, the shared core, its gradient, counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, tiny
from helpers.routing import make_context
from reference.papers import matrix_product as paper
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.experts.config import MatrixProductConfig
from moe_pretrain.moe.experts.matrix_product import (
    MatrixProductExperts,
    core_parameters,
    core_shapes,
    factors,
    rebuild,
)
from moe_pretrain.moe.types import ExpertShard, sharded_parameters

HIDDEN, WIDTH, EXPERTS, TOKENS = 12, 8, 4, 9


def settings(**changes: Any) -> MatrixProductConfig:
    fields: dict[str, Any] = {"num_cores": 5, "truncation": None, "shared_gradient_dropout": 0.0}
    return MatrixProductConfig("matrix_product", **(fields | changes))


def make_layer(**changes: Any) -> Any:
    config = load(["router=top_k", f"model.moe.num_experts={EXPERTS}", f"model.moe.expert_hidden_size={WIDTH}"])
    layer = build_moe_layer(
        replace(config.model.moe, experts=settings(**changes)), config.router, HIDDEN, 0, ExpertShard()
    )
    drawn = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = 0.6 * torch.randn(parameter.shape, generator=drawn)
    return layer


def reference_matrix(experts: MatrixProductExperts, name: str) -> tuple[Tensor, list[list[Tensor]]]:
    """Shared core and each expert's others, as the reference takes them."""
    cores = [core.double() for core in experts.cores(name)]
    others = [core for index, core in enumerate(cores) if index != experts.centre]
    return cores[experts.centre], [[core[expert] for core in others] for expert in range(EXPERTS)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(768, [3, 4, 4, 4, 4]), (3072, [4, 4, 8, 6, 4]), (1024, [4, 4, 4, 4, 4]), (4096, [4, 4, 8, 8, 4])],
)
def test_factors_are_those_of_the_released_code(size: int, expected: list[int]):
    assert factors(size, 5) == expected


@pytest.mark.parametrize("size", [1, 2, 7, 20, 96, 1000])
@pytest.mark.parametrize("count", [3, 5])
def test_factors_make_any_size(size: int, count: int):
    assert math.prod(factors(size, count)) == size and len(factors(size, count)) == count


@pytest.mark.parametrize("truncation", [None, 20])
def test_counts_are_the_papers(truncation: int | None):
    """Of 768 x 3072: the central core is 92.7 % of a matrix's cores, the others of an expert 7.8 % of the matrix."""
    shapes = core_shapes(settings(truncation=truncation), 768, 3072)
    counted = [math.prod(shape) for shape in shapes]
    assert counted == paper.core_parameters(factors(768, 5), factors(3072, 5), truncation)
    if truncation is None:
        assert counted == [144, 36_864, 2_359_296, 147_456, 256]
    shared, own = core_parameters(settings(truncation=truncation), 768, 3072)
    both = [paper.layer_parameters(factors(3072, 5), factors(768, 5), n, None, truncation) for n in (1, 3)]
    rotated = [paper.layer_parameters(factors(768, 5), factors(3072, 5), n, None, truncation) for n in (1, 3)]
    assert [shared + n * own for n in (1, 3)] == [2 * a + b for a, b in zip(both, rotated, strict=True)]


def test_any_matrix_can_be_written_and_is_rebuilt():
    """The reference's chain of SVDs of a random matrix, untruncated: our product of the cores is the matrix."""
    matrix = torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    cores = paper.decompose(matrix, factors(WIDTH, 5), factors(HIDDEN, 5))
    assert [tuple(core.shape) for core in cores] == core_shapes(settings(), WIDTH, HIDDEN)
    ours = [core if index == 2 else core[None] for index, core in enumerate(cores)]
    assert float((rebuild(ours, 2)[0] - matrix).abs().max()) < 1e-12


@pytest.mark.parametrize("changes", [{}, {"truncation": 3}, {"num_cores": 3}, {"num_cores": 7}], ids=str)
def test_output_and_every_gradient_are_the_reference_s(changes: dict[str, Any]):
    """With the shared cores' gradient the sum over all experts."""
    layer = make_layer(**changes)
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    routing = layer.router(hidden, make_context(TOKENS))
    where = routing.token_index, routing.expert_index
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).index_put(where, torch.tensor(True))
    weights = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).index_put(where, routing.weight.double())
    matrices = [reference_matrix(layer.experts, name) for name in ("gate", "up", "out")]
    expected = paper.forward(hidden.double(), mask, weights, *matrices)
    output = layer(hidden, make_context(TOKENS), False).hidden
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    upstream = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))
    wanted = {"input": hidden, **dict(layer.named_parameters())}
    ours = torch.autograd.grad((output * upstream).sum(), list(wanted.values()))
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), list(wanted.values()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * float(other.abs().max()))


def test_the_shared_core_is_one_tensor_on_every_rank():
    whole = MatrixProductExperts(settings(), EXPERTS, HIDDEN, WIDTH, ExpertShard())
    part = MatrixProductExperts(settings(), EXPERTS, HIDDEN, WIDTH, ExpertShard(1, 2))
    sharded = {id(parameter) for parameter in sharded_parameters(part)}
    for name, parameter in part.named_parameters():
        full = whole.get_parameter(name)
        if name.endswith("_shared"):
            assert id(parameter) not in sharded and parameter.shape == full.shape
        else:
            assert id(parameter) in sharded and 2 * len(parameter) == len(full) == EXPERTS


def test_matrices_start_with_the_spread_of_plain_ones():
    config = tiny("experts=matrix_product", "model.hidden_size=48", "model.moe.expert_hidden_size=64")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    experts = model.moe_layers()[0].experts
    assert float(experts.in_weight.std()) == pytest.approx(0.2, rel=0.25)
    assert float(experts.out_weight.std()) == pytest.approx(0.2 / 2, rel=0.25)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1 - 1e-9])
def test_a_step_may_leave_the_shared_cores_alone(probability: float):
    """Drawn by seed, step and layer alone, so alike on every rank; the experts' own cores learn in every step."""
    kept = []
    for step in range(8):
        layer = make_layer(shared_gradient_dropout=probability)
        hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
        output = layer(hidden, make_context(TOKENS, step=step), step % 2 == 0).hidden
        output.square().sum().backward()
        shared = [parameter.grad for name, parameter in layer.named_parameters() if name.endswith("_shared")]
        assert all(gradient is not None for gradient in shared)
        found = {bool(gradient.any()) for gradient in shared}
        assert len(found) == 1
        kept.append(found.pop())
        assert all(p.grad.any() for n, p in layer.named_parameters() if "_core_" in n)
    assert {0.0: all(kept), 0.5: True in kept and False in kept}.get(probability, not any(kept))


def test_evaluation_draws_nothing():
    layer = make_layer(shared_gradient_dropout=0.9).eval()
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    layer(hidden, make_context(TOKENS), False).hidden.sum().backward()
    assert all(parameter.grad.any() for name, parameter in layer.experts.named_parameters() if name.endswith("_shared"))


def test_flops_are_a_counter_s_with_the_rebuilding_of_every_micro_batch():
    config = tiny("experts=matrix_product")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    batch = random_batches(config, 1)[0][0]
    with FlopCounterMode(display=False) as counter:
        model(
            batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch)
        ).loss_sum.backward()
    total = sum(counter.get_flop_counts()["Global"].values())
    size = plan_run(config, 1).size
    plain = tiny()
    reference = DecoderLM(plain.model, plain.router, ExpertShard())
    initialise(reference, 0)
    with FlopCounterMode(display=False) as counter:
        reference(
            batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch)
        ).loss_sum.backward()
    rebuilding = total - sum(counter.get_flop_counts()["Global"].values())
    assert rebuilding == pytest.approx(3 * size.rebuild_flops)
    assert size.rebuilding_flops_per_token == pytest.approx(size.rebuild_flops / batch.input_ids.numel())
    assert size.training_flops_per_token == pytest.approx(
        plan_run(plain, 1).size.training_flops_per_token + rebuilding / batch.input_ids.numel()
    )
    counted = sum(p.numel() for layer in model.moe_layers() for p in layer.experts.parameters())
    assert size.experts == counted
    # Active: the shared cores, and what two experts have of their own.
    own = 2 * 2 * core_parameters(config.model.moe.experts, 16, 20)[1]
    assert size.active_parameters - model_size(plain.model, plain.router).active_parameters == pytest.approx(
        size.shared_cores + own - 2 * 2 * 3 * 16 * 20
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["model.moe.experts.num_cores=4"], "model.moe.experts.num_cores=4 must be odd"),
        (["model.moe.experts.num_cores=1"], "must be odd and at least 3"),
        (["model.moe.experts.truncation=30000"], "model.moe.experts.truncation=30000 must be below"),
        (["model.moe.experts.truncation=0"], "model.moe.experts.truncation=0 must be at least 1"),
        (["model.moe.experts.shared_gradient_dropout=1"], "shared_gradient_dropout=1 must be below 1"),
        (["router=autonomy"], "experts=matrix_product must be swiglu with router=autonomy"),
        (["router=dense"], "experts=matrix_product must be swiglu with router=dense, which has no routed experts"),
        (["router=attentive"], "router=attentive, which scores full experts"),
        (["router=dynmoe"], "router=dynmoe, which starts experts anew"),
        (["router=lory"], "router=lory, which merges full experts"),
        (["model.moe.gate_rank=4"], "whose experts have a factorised gate"),
        (["model.init=mup"], "model.init=mup must be normal or width_aware with experts=matrix_product"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_in_one_line(words: list[str], complaint: str):
    with pytest.raises(ValueError) as refused:
        load(["experts=matrix_product", *words])
    assert complaint in str(refused.value) and "\n" not in str(refused.value)
