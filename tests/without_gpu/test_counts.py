"""What a step asks of a GPU at the size of real runs: memory as planned, kernels and bytes within their budgets."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from helpers.cuda_branches import Counted, Kernel, count, says_cuda
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import RunPlan, plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.model.attention import _visible
from moe_pretrain.moe import compiled
from moe_pretrain.moe.experts.activation import SWIGLU, _swiglu, _swiglu_gradients, activate, activation_gradients
from moe_pretrain.plan import step_time
from moe_pretrain.plan.cost import ROUTES, traffic
from moe_pretrain.plan.local_parameters import local_parameters
from moe_pretrain.plan.memory import memory_per_rank

WORDS = [
    "engine.dtype=bfloat16",
    "engine.kernels=torch",
    "tokenizer=pretrained",
    "tokenizer.path=unused",
    "metrics.wandb=off",
]
TARGET = ("cuda", "bfloat16")


def config_of(*words: str) -> Config:
    return load([*WORDS, "engine.device=cuda", *words])


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Eight ranks of which this is the first; what the others would send never comes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@functools.cache
def whole(model: str, expert_parallel: int) -> tuple[Config, RunPlan, Counted]:
    """One micro-batch of a run on 8 ranks."""
    words = [f"model={model}", "parallel.processes=8", f"parallel.expert_parallel_size={expert_parallel}"]
    config = config_of(*words)
    run = plan_run(config, 8, TARGET)
    return config, run, count(config, run.batches.micro_batch_size, expert_parallel)


SIZES = [("700m", 1), ("700m", 8), ("4b", 1), ("4b", 8)]


@pytest.mark.parametrize(("model", "expert_parallel"), SIZES)
@pytest.mark.fast("700m")
def test_planned_memory_is_what_a_micro_batch_holds(model: str, expert_parallel: int):
    """Weights to the byte, what is saved within 2%, the most at a time in a micro-batch within 10%."""
    config, run, held = whole(model, expert_parallel)
    planned = memory_per_rank(config, *TARGET, run.batches, 8, worst_load=1.0)
    assert held.weights == pytest.approx(planned.weights, rel=1e-3)
    assert held.saved == pytest.approx(planned.activations, rel=0.02)
    most = planned.activations + max(planned.recomputed + max(planned.working, planned.exchange), planned.logits)
    assert held.peak == pytest.approx(most, rel=0.1)


PADDED = [
    *("expert_choice", "autonomy_expert_choice"),
    "top_p router.max_experts=4 router.expected_experts=3.5",
    "attention_importance router.max_experts=2",
]
"""Schemes whose experts get lists of routes with their padding."""


@pytest.mark.parametrize("router", PADDED)
def test_planned_memory_counts_the_padding_of_routes(router: str):
    config = config_of("model=700m", f"router={router.split()[0]}", "model.num_layers=1", *router.split()[1:])
    run = plan_run(config, 1, TARGET)
    held = count(config, run.batches.micro_batch_size)
    planned = memory_per_rank(config, *TARGET, run.batches, 1, worst_load=1.0)
    assert held.saved == pytest.approx(planned.activations, rel=0.02)


@pytest.mark.parametrize(("model", "expert_parallel"), SIZES)
def test_planned_time_is_a_sum_over_all_kernels(model: str, expert_parallel: int):
    """Each takes as long as its bytes or FLOPs at the rates of the plan, and 3 us at least; without the reduction.

    Of the exchange in halves one half is waited for: experts take longer than the other.
    """
    config, run, held = whole(model, expert_parallel)
    machine = step_time.Machine()
    planned = step_time.step_time(config, run, local_parameters(config), machine)

    def seconds(kernel: Kernel) -> float:
        rate = step_time._ATTENTION_RATE if kernel.name.startswith("flex") else step_time._MATRIX_RATE
        return max(kernel.bytes / machine.memory_bandwidth, kernel.flops / (rate * machine.peak), 3e-6)

    sent = traffic(config, "bfloat16", run.batches)[ROUTES] if expert_parallel > 1 else 0
    total = run.batches.accumulation * sum(map(seconds, held.account.kernels)) + sent / 2 / machine.link
    assert planned.total - planned.accumulation - planned.reduction == pytest.approx(total, rel=0.05)


@functools.cache
def counted(layers: int, expert_parallel: int = 1, overlaps: bool = False) -> Counted:
    return count(config_of("model=700m", f"model.num_layers={layers}"), 8, expert_parallel, overlaps)


def per_layer(kernels: Callable[[Kernel], bool], expert_parallel: int = 1, overlaps: bool = False) -> tuple[int, float]:
    """Kernels that are no products, and their kB per token, that one more layer of 700m makes."""
    (few, less), (many, more) = (counted(n, expert_parallel, overlaps).account.total(kernels) for n in (1, 2))
    return many - few, (more - less) / (8 * 2048) / 1e3


LAYER_BUDGETS = {(1, False): (25, 20, 208.1), (8, False): (40, 27, 257.8), (8, True): (62, 42, 266.6)}
"""Expert parallelism, whether halves are exchanged apart -> kernels of a layer's forward pass, of its backward pass, kB
per token of both."""


@pytest.mark.parametrize(("expert_parallel", "overlaps"), LAYER_BUDGETS)
def test_kernels_and_traffic_of_a_layer_stay_within_their_budget(expert_parallel: int, overlaps: bool):
    forward, _ = per_layer(lambda kernel: kernel.phase == "forward", expert_parallel, overlaps)
    backward, _ = per_layer(lambda kernel: kernel.phase == "backward", expert_parallel, overlaps)
    _, traffic = per_layer(lambda kernel: True, expert_parallel, overlaps)
    budget = LAYER_BUDGETS[expert_parallel, overlaps]
    assert (forward, backward) == budget[:2]
    assert traffic == pytest.approx(budget[2], rel=0.01)


def test_the_plan_charges_the_bytes_that_are_counted():
    """Of a layer alone, under expert parallelism and in halves, forward and backward, without recomputation."""
    model, routes = config_of("model=700m").model, 2
    hidden, width = model.hidden_size, model.moe.expert_hidden_size
    charged = (step_time._BYTES_PER_HIDDEN + step_time._BYTES_PER_ROUTED_HIDDEN * routes) * hidden
    charged += step_time._BYTES_PER_WIDTH * routes * width
    alone, spread, halves = (1e3 * per_layer(lambda kernel: True, *key)[1] for key in LAYER_BUDGETS)
    assert alone == pytest.approx(charged, rel=0.02)
    config = config_of("model=700m", "model.num_layers=1", "parallel.processes=8", "parallel.expert_parallel_size=8")
    sent = traffic(config, "bfloat16", plan_run(config, 8, TARGET).batches)[ROUTES] / (
        config.batch.global_batch_tokens / 8
    )
    assert spread - alone == pytest.approx(step_time._BYTES_PER_SENT_BYTE * sent, rel=0.1)
    added = step_time._BYTES_PER_HALVED_HIDDEN * hidden
    added += step_time._BYTES_PER_HALVED_PARAMETER * 3 * hidden * width / (8 * 2048)
    assert halves - spread == pytest.approx(added, rel=0.05)
    assert LOSS_BYTES_PER_LOGIT == step_time._BYTES_PER_LOGIT


def test_the_plan_charges_ligers_kernels_as_they_are_counted():
    """One layer's norms, and the most that is held at a time, with torch in the loss."""
    taken, rows = {}, 2
    for kernels in ("torch", "liger"):
        one, two = (config_of("model=700m", f"engine.kernels={kernels}", f"model.num_layers={n}") for n in (1, 2))
        few, many = count(one, rows), count(two, rows)
        run = plan_run(one, 1, TARGET)
        taken[kernels] = (
            many.account.total()[1] - few.account.total()[1],
            few.account.total(of_loss)[1],
            few.peak,
            memory_per_rank(one, *TARGET, run.batches, 1, worst_load=1.0).logits,
            step_time.step_time(one, run, local_parameters(one), step_time.Machine()).memory,
        )
    layer, loss, peak, logits, seconds = (taken["torch"][i] - taken["liger"][i] for i in range(5))
    assert layer / (rows * 2048) == pytest.approx(step_time._LESS_PER_HIDDEN * one.model.hidden_size, rel=0.01)
    assert loss == pytest.approx(0, abs=0.01 * taken["torch"][1])
    assert 0.75 * logits < peak <= logits, "without it, experts hold the most"
    assert logits == one.model.cross_entropy_chunk_tokens * one.model.vocab_size * 2
    ranks_tokens = one.batch.global_batch_tokens / one.parallel.processes
    charged = ranks_tokens * step_time._LESS_PER_HIDDEN * one.model.hidden_size
    assert seconds == pytest.approx(charged / step_time.Machine().memory_bandwidth)


@pytest.mark.parametrize(("kernels", "tolerance"), [("torch", 0.01), ("quack", 0.07)])
def test_the_plan_charges_what_recomputation_moves_again(kernels: str, tolerance: float):
    moved = {}
    for mode in step_time._TRAFFIC_WITH_RECOMPUTE:
        words = ["model=700m", f"engine.kernels={kernels}", f"model.recompute={mode}"]
        few, many = (count(config_of(*words, f"model.num_layers={n}"), 2).account.total()[1] for n in (1, 2))
        moved[mode] = many - few
    for mode, times in step_time._TRAFFIC_WITH_RECOMPUTE.items():
        assert moved[mode] / moved["none"] == pytest.approx(times, rel=tolerance), mode


def test_the_plan_charges_quacks_kernels_as_they_are_counted():
    """170 kB is the budget of a layer at this size, which the activation of torch's path alone nearly takes up."""
    counts = [count(config_of("model=700m", "engine.kernels=quack", f"model.num_layers={n}"), 8) for n in (1, 2)]
    moved, flops = (
        (many - few) / (8 * 2048)
        for few, many in zip(
            *((one.account.total()[1], sum(each.flops for each in one.account.kernels)) for one in counts), strict=True
        )
    )
    config = config_of("model=700m", "engine.kernels=quack")
    hidden, width = config.model.hidden_size, config.model.moe.expert_hidden_size
    charged = (step_time._BYTES_PER_HIDDEN + step_time._FUSED_BYTES_PER_ROUTED_HIDDEN * 2) * hidden
    assert moved == pytest.approx(charged + step_time._FUSED_BYTES_PER_WIDTH * 2 * width, rel=0.02)
    assert moved < 170e3
    plain = [counted(n).account.kernels for n in (1, 2)]
    assert flops * 8 * 2048 == sum(each.flops for each in plain[1]) - sum(each.flops for each in plain[0])
    run = plan_run(config, 8, TARGET)
    seconds = [
        step_time.step_time(one, run, local_parameters(one), step_time.Machine()).memory
        for one in (config_of("model=700m"), config)
    ]
    tokens = config.batch.global_batch_tokens / config.parallel.processes
    saved = (step_time._BYTES_PER_WIDTH - step_time._FUSED_BYTES_PER_WIDTH) * 2 * width
    saved += (step_time._BYTES_PER_ROUTED_HIDDEN - step_time._FUSED_BYTES_PER_ROUTED_HIDDEN) * 2 * hidden
    layers = len(config.model.moe_layers)
    assert seconds[0] - seconds[1] == pytest.approx(tokens * layers * saved / step_time.Machine().memory_bandwidth)
    assert counts[1].saved == pytest.approx(counted(2).saved, rel=0.01) and counts[1].peak <= counted(2).peak


LOSS_BYTES_PER_LOGIT = 8.5


def of_loss(kernel: Kernel) -> bool:
    """Whether it is the loss that asks for ``kernel``, where it is made: backward scales gradients, without logits."""
    return kernel.site in ("model/cross_entropy.py forward", "model/cross_entropy.py _cross_entropy")


def test_traffic_of_the_loss_stays_within_its_budget():
    account = counted(1).account
    _, moved = account.total(of_loss)
    per_logit = moved / (8 * 2048) / 32000
    assert per_logit == pytest.approx(LOSS_BYTES_PER_LOGIT, rel=0.02)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """What is compiled is counted, and runs as it is."""
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **words: compile_(function, backend=counter, **words))
    monkeypatch.setattr(compiled, "compiled", functools.cache(compiled.compiled.__wrapped__))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def test_another_number_of_rows_compiles_nothing_again(compilations: CompileCounter):
    """One compilation for all sizes, and at most one each for a single row and for none."""
    with says_cuda(region=compiled.compiled):
        for rows in (50, 65, 128, 1000, 7, 33, 1, 0, 500, 0, 1):
            before, grad_act = torch.randn(rows, 64), torch.randn(rows, 32)
            for found, expected in zip(
                (activate(before, SWIGLU), *activation_gradients(before, grad_act, SWIGLU)),
                (_swiglu.__wrapped__(before), *_swiglu_gradients.__wrapped__(before, grad_act)),
                strict=True,
            ):
                assert torch.equal(found, expected)
    assert 2 <= compilations.frame_count <= 2 * 3


def test_another_micro_batch_compiles_no_attention_again(compilations: CompileCounter):
    """Its mask is a closure over other documents."""
    flex = torch.compile(flex_attention)

    def attend(batch: int) -> None:
        documents = (torch.arange(128) // torch.randint(20, 90, (batch, 1))).contiguous()
        mask = create_block_mask(_visible(documents), batch, None, 128, 128, device="cpu")
        flex(*torch.randn(3, batch, 2, 128, 32).unbind(), block_mask=mask)

    for _ in range(4):
        attend(4)
    assert compilations.frame_count == 1
    for batch in (2, 4, 3, 2):  # a validation's last one
        attend(batch)
    assert compilations.frame_count == 2


def test_what_attention_returns_lies_as_its_queries_do():
    """In order of tokens, as they are rotated, so that no copy joins the heads: what the counter takes for granted."""
    heads = [torch.randn(2, 128, number, 32).transpose(1, 2) for number in (4, 2, 2)]
    mask = create_block_mask(_visible(torch.zeros(2, 128)), 2, None, 128, 128, device="cpu")
    out = torch.compile(flex_attention, backend="eager")(*heads, block_mask=mask, enable_gqa=True)
    assert out.transpose(1, 2).is_contiguous() and not out.is_contiguous()


def engine_of_a_world(world_size: int, rank: int) -> tuple[list[int], list[int], range, int]:
    """Expert groups, experts and optimizer state of one rank of many, none of which is there."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    words = [f"parallel.processes={world_size}", "parallel.expert_parallel_size=8", "engine.device=cpu"]
    words += [f"batch.global_batch_tokens={world_size * 16}", "batch.micro_batch_size=1"]
    engine = build_engine(load([*WORDS, *TINY, *words, "engine.reduce_bucket_elements=2000"]))
    mesh = engine.mesh
    owned = sum(part.numel() for group in engine.client_optimizer.param_groups for part in group["params"])
    experts = mesh.shard.local_experts(8)
    return *map(dist.get_process_group_ranks, (mesh.expert_group, mesh.expert_data_group)), experts, owned


TINY = [
    *("model=tiny", "model.num_layers=2", "model.sequence_length=16", "model.hidden_size=32", "model.num_heads=2"),
    *("model.vocab_size=512", "model.moe.expert_hidden_size=40", "model.moe.num_experts=8"),
]


@pytest.mark.parametrize(("world_size", "rank"), [(64, 21), (512, 511)])
def test_a_rank_of_many_finds_its_place(world_size: int, rank: int):
    """Experts within a node, their copies over nodes, optimizer state over all; DeepSpeed builds its groups."""
    ((own, copies, experts, owned),) = run_on_ranks(engine_of_a_world, 1, world_size, rank)
    assert own == list(range(rank // 8 * 8, rank // 8 * 8 + 8))
    assert copies == list(range(rank % 8, world_size, 8))
    assert experts == range(rank % 8, rank % 8 + 1)
    config = load([*WORDS, *TINY, f"parallel.processes={world_size}", "parallel.expert_parallel_size=8"])
    planned = local_parameters(config).owned(world_size, 8)
    assert planned <= owned <= planned + 64, "padding of groups aside"
