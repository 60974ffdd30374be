"""What only a CUDA device can show. Every comparison is with a readable loop in float32 or float64 on the CPU."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from helpers.builders import random_batches, tiny
from helpers.routing import PLAIN_TOP_K
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.model.attention import attend, document_mask
from moe_pretrain.model.attention_statistic import attention_statistic
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.experts.fused_products import check_fused_products
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts, run_swiglu_experts
from moe_pretrain.moe.kernels import resolve_kernels
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.part_timer import PARTS, PartClock, time_source
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.row_layout import order_by
from moe_pretrain.moe.types import AttentionStatistic, ExpertShard, RoutingContext
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.schedule.batch_plan import plan_batches
from moe_pretrain.verify.oracle import Oracle
from moe_pretrain.verify.verify import build_engine, compare, record

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 512, 256, 320, 8, 2
BFLOAT16_TOLERANCE = 0.01
"""Of the norm: every intermediate is rounded to 8 bits once (2**-9 at most); measured on CPUs: 0.003 to 0.006."""


def normal(*shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * std).to(DEVICE, torch.bfloat16)


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in memory that the allocator will hand out again."""
    held = [torch.full(shape, torch.nan, device=DEVICE, dtype=torch.bfloat16) for shape in shapes for _ in range(4)]
    held += [torch.full((2**power,), torch.nan, device=DEVICE) for power in range(7, 24)]
    del held


def assert_near(value: Tensor, expected: Tensor, tolerance: float = BFLOAT16_TOLERANCE) -> None:
    difference = (value.detach().cpu().double() - expected.detach().cpu().double()).norm()
    assert difference <= tolerance * expected.detach().double().norm()


def expert_loop(sources: Tensor, weight: Tensor, in_weight: Tensor, out_weight: Tensor, index: Tensor) -> Tensor:
    """``index [tokens, top_k]`` and ``weight`` of the same shape; one expert after the other."""
    output = torch.zeros_like(sources)
    for expert in range(len(in_weight)):
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = (sources[token] @ in_weight[expert].t()).chunk(2, dim=1)
        result = (functional.silu(gate) * up) @ out_weight[expert].t()
        output = output.index_add(0, token, weight[token, slot, None] * result)
    return output


@pytest.mark.parametrize("used_experts", [EXPERTS, EXPERTS - 3], ids=["all experts", "three experts without rows"])
def test_grouped_experts_equal_the_loop_with_poisoned_memory(used_experts: int) -> None:
    """Output and all gradients, twice: rows that a kernel leaves unwritten show in the second backward (C7, C8)."""
    experts = SwiGLUExperts(EXPERTS, HIDDEN, WIDTH, ExpertShard())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    experts.to(DEVICE, torch.bfloat16)
    index = torch.rand(TOKENS, used_experts).topk(TOP_K).indices
    token = torch.arange(TOKENS, device=DEVICE).repeat_interleave(TOP_K)
    key = index.flatten().to(DEVICE)
    route_of_row, order = order_by(key, token, TOKENS, TOP_K, torch.bincount(key, minlength=EXPERTS))
    sources = normal(TOKENS, HIDDEN).requires_grad_()
    weight = torch.rand(TOKENS, TOP_K, device=DEVICE, requires_grad=True)
    upstream = normal(TOKENS, HIDDEN)
    leaves = [sources, weight, experts.in_weight, experts.out_weight]

    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = expert_loop(*doubles, index)
    expected_grads = torch.autograd.grad(expected, doubles, upstream.cpu().double())
    rows = TOKENS * TOP_K
    for _ in range(2):
        poison((rows, HIDDEN), (rows, WIDTH), (rows, 2 * WIDTH), tuple(experts.in_weight.shape))
        output = experts(sources, weight.flatten()[route_of_row], order)
        poison((rows, HIDDEN), (rows, WIDTH), (rows, 2 * WIDTH), tuple(experts.in_weight.shape))
        grads = torch.autograd.grad(output, leaves, upstream)
        assert_near(output, expected)
        for value, reference in zip(grads, expected_grads, strict=True):
            assert_near(value, reference)
        assert not grads[2][used_experts:].any() and not grads[3][used_experts:].any()


def test_experts_without_any_row_give_zeros() -> None:
    """A rank may receive no rows at all under expert parallelism."""
    experts = SwiGLUExperts(EXPERTS, HIDDEN, WIDTH, ExpertShard()).to(DEVICE, torch.bfloat16)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    route_of_row, order = order_by(none, none, 0, TOP_K, torch.zeros(EXPERTS, dtype=torch.int64, device=DEVICE))
    sources = normal(0, HIDDEN).requires_grad_()
    weight = torch.zeros(0, device=DEVICE, requires_grad=True)
    output = experts(sources, weight[route_of_row], order)
    for grad in torch.autograd.grad(output.sum(), [experts.in_weight, experts.out_weight]):
        assert torch.equal(grad, torch.zeros_like(grad))


def make_layer() -> tuple[MoELayer, RoutingContext]:
    config = replace(PLAIN_TOP_K, top_k=TOP_K, jitter=0.1)
    layer = MoELayer(
        MoEConfig(EXPERTS, WIDTH, 1, WIDTH, 1, 0, None, 8),
        TopKRouter(config, HIDDEN, EXPERTS, 0),
        SwiGLUExperts(EXPERTS, HIDDEN, WIDTH, ExpertShard()),
        HIDDEN,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    layer.to(DEVICE)
    layer.experts.bfloat16()
    layer.shared_experts.bfloat16()
    position = torch.arange(TOKENS, device=DEVICE)
    return layer, RoutingContext(torch.ones_like(position, dtype=torch.bool), position, 4, seed=0, step=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_layer_never_waits_for_the_device(recompute: bool) -> None:
    """Forward and backward without a host synchronisation, as in training: without deterministic algorithms."""
    torch.use_deterministic_algorithms(False)
    layer, context = make_layer()
    hidden, upstream = normal(TOKENS, HIDDEN).requires_grad_(), normal(TOKENS, HIDDEN)

    def step() -> None:
        output = layer(hidden, context, recompute)
        loss = (output.hidden * upstream).sum() + sum(output.aux.values())
        loss.backward()

    step()  # compiles kernels, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_parts_of_a_layer_are_timed_without_waiting_for_the_device() -> None:
    torch.use_deterministic_algorithms(False)
    layer, context = make_layer()
    hidden = normal(TOKENS, HIDDEN)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with PartClock(time_source(DEVICE)) as clock, torch.no_grad():
        layer(hidden, context, False)  # compiles kernels, which may synchronise
        clock.end_batch(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            begin.record()
            layer(hidden, context, False)
            end.record()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        clock.end_batch(1)
    torch.cuda.synchronize()
    times = clock.batches[1]
    assert {name for name, seconds in times.items() if seconds > 0} == {*PARTS} - {"exchange"}
    assert sum(times.values()) <= begin.elapsed_time(end) / 1e3 * 1.001


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_equals_attention_per_document(kv_heads: int) -> None:
    batch, heads, sequence, size = 2, 4, 256, 64
    lengths = [[100, 1, 155], [256]]
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    query, upstream = normal(batch, heads, sequence, size), normal(batch, heads, sequence, size)
    key, value = normal(batch, kv_heads, sequence, size), normal(batch, kv_heads, sequence, size)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = document_mask(ids.to(DEVICE))
    assert mask.block_mask is not None
    output = attend(*leaves, mask)
    grads = torch.autograd.grad(output, leaves, upstream)
    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = attend(*doubles, document_mask(ids))
    expected_grads = torch.autograd.grad(expected, doubles, upstream.cpu().double())
    for found, reference in zip([output, *grads], [expected, *expected_grads], strict=True):
        assert_near(found, reference)


@pytest.mark.parametrize("name", get_args(AttentionStatistic))
def test_attention_statistic_equals_the_cpus_without_waiting(name: AttentionStatistic) -> None:
    """From the mask that FlexAttention gets; bfloat16 products are exact in float32."""
    ids = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([100, 1, 155]))[None].expand(2, -1)
    query, key = normal(2, 4, 256, 64), normal(2, 2, 256, 64)
    mask = document_mask(ids.to(DEVICE))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = attention_statistic(name, query, key, mask.first_key, max_scores=50 * 2 * 4 * 256)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = attention_statistic(name, query.cpu(), key.cpu(), document_mask(ids).first_key)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def mesh() -> Iterator[Any]:
    yield build_mesh(tiny().parallel, DEVICE)
    dist.barrier()


@pytest.mark.parametrize(("hidden", "width"), [(HIDDEN, WIDTH), (768, 3072), (96, 184)])
def test_quacks_kernels_are_torchs(hidden: int, width: int) -> None:
    """As a run with ``engine.kernels=quack`` checks them before it begins."""
    try:
        resolve_kernels("quack", DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
    poison((5, 2 * width, hidden), (5, hidden, width))
    check_fused_products(hidden, width, torch.device(DEVICE), functools.partial(run_swiglu_experts, activation=SWIGLU))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_training_steps_are_close_to_the_float32_oracle(zero_stage: int, mesh: Any) -> None:
    """Loss, aux losses, gradients, norm and updated weights of three bfloat16 steps, by the tolerances of ``verify``.

    Sizes suit the kernels: heads of 32 for FlexAttention, widths that are multiples of 8 for ``grouped_mm``.
    """
    config = tiny(
        *("model.sequence_length=128", "model.hidden_size=64", "model.ffn_hidden_size=96"),
        *("model.moe.expert_hidden_size=80", "batch.global_batch_tokens=1024", "budget.tokens=3072"),
        *(f"engine.zero_stage={zero_stage}", "engine.dtype=bfloat16", "engine.device=auto"),
    )
    plan = plan_batches(config.batch, config.model.sequence_length, 1, config.num_steps)
    steps = random_batches(config, 1)
    engine = build_engine(config, plan_run(config, 1, (DEVICE, "bfloat16")), mesh)
    run = [record(engine, number, batches) for number, batches in enumerate(steps)]
    oracle = Oracle(config, plan.num_steps, "bfloat16")
    for row in compare(run, [oracle.step(number, batches) for number, batches in enumerate(steps)], "bfloat16"):
        assert row.is_same, row
