"""What ``parallel/deepspeed_moe.py`` and ``checkpoint/layout.py`` assume of DeepSpeed, held to by running it.

A new release that breaks a test here breaks training or checkpoints without a word.
"""

import traceback
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import get_gradient_clipping
from helpers.builders import tiny
from helpers.processes import run_on_ranks
from packaging.version import Version

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.engine.deepspeed_config import deepspeed_config
from moe_pretrain.engine.intervals import pieces
from moe_pretrain.parallel import deepspeed_moe
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.verify.oracle import Oracle
from moe_pretrain.verify.small_twin import random_batches
from moe_pretrain.verify.verify import build_engine, own_micro_batches, record

RANKS = 2
Result = dict[str, Any]
ENGINES = [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]


def test_release_is_one_that_was_checked() -> None:
    assert Version("0.19.8") <= Version(deepspeed.__version__) < Version("0.20")


def test_clipping_is_always_explicit() -> None:
    assert get_gradient_clipping({}) != 0, "without the key DeepSpeed clips by itself"
    for stage in (0, 1, 2):
        engine = tiny(f"engine.zero_stage={stage}", "engine.gradient_clipping=0").engine
        assert deepspeed_config(engine, "float32", 1, 1, 1)["gradient_clipping"] == 0.0


def _facts(dtype: str, stage: int) -> Result:
    """One engine with accumulation 4, and everything the tests ask about it."""
    overrides = ("engine.gradient_clipping=0", "parallel.expert_parallel_size=2", f"parallel.processes={RANKS}")
    config = tiny(*overrides, f"engine.dtype={dtype}", f"engine.zero_stage={stage}", rows=16, micro_batch_size=2)
    mesh = build_mesh(config.parallel, "cpu")
    run_plan = plan_run(config, mesh.world_size)
    plan = run_plan.batches
    assert plan.accumulation == 4
    called: list[dict[str, Any]] = []
    original = deepspeed_moe.ExpertMarker.set_deepspeed_parallelism

    def spy(marker: Any, *args: Any) -> None:
        held = {id(parameter) for group in spied["optimizer"].param_groups for parameter in group["params"]}
        model = spied["model"]
        called.append(
            {
                "dense dtype": str(model.embedding.weight.dtype),
                "router dtype": str(model.moe_layers()[0].router.weight.dtype),
                "optimizer still has the model's parameters": held == {id(p) for p in model.parameters()},
            }
        )
        original(marker, *args)

    spied: dict[str, Any] = {}
    initialize = deepspeed.initialize

    def remember(**arguments: Any) -> Any:
        spied.update(model=arguments["model"], optimizer=arguments["optimizer"])
        return initialize(**arguments)

    deepspeed_moe.ExpertMarker.set_deepspeed_parallelism = spy  # type: ignore[method-assign]
    deepspeed.initialize = remember
    try:
        engine = build_engine(config, run_plan, mesh)
    finally:
        deepspeed_moe.ExpertMarker.set_deepspeed_parallelism = original  # type: ignore[method-assign]
        deepspeed.initialize = initialize

    prepared: list[int] = []
    prologue = engine.deepspeed._backward_prologue
    engine.deepspeed._backward_prologue = lambda: (prepared.append(1), prologue())[1]
    batches = random_batches(config, plan)[0]
    step = record(engine, 0, own_micro_batches(batches, plan, mesh.rank))
    oracle = Oracle(config, plan.num_steps, config.engine.dtype)
    expected = oracle.step(0, batches)

    coverage = {name: torch.zeros(weight.numel()) for name, weight in oracle.weights.items()}
    moments = {name: torch.zeros(weight.numel()) for name, weight in oracle.weights.items()}
    shares_memory = []
    for piece in pieces(engine):
        part = slice(piece.start, piece.start + piece.master.numel())
        coverage[piece.name][part] += 1
        moments[piece.name][part] += piece.arrays()["exp_avg"]
        parameter = dict(engine.model.named_parameters())[piece.name]
        mapping = parameter._hp_mapping
        partition = engine.client_optimizer.param_groups[mapping.param_group_index]["params"][0]
        assert mapping.lp_fragment_address.numel == mapping.hp_fragment_address.numel == piece.master.numel()
        start = mapping.hp_fragment_address.start
        view = partition.data.view(-1)[start : start + piece.master.numel()]
        shares_memory.append(view.data_ptr() == piece.master.data_ptr() and torch.equal(view, piece.master))
    for name in coverage:
        dist.all_reduce(coverage[name])
        dist.all_reduce(moments[name])
    waits, num_prepared = list[str](), len(prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(traceback.format_stack()[-2]))
        for number in range(1, 4):  # DeepSpeed's timer begins with the third step
            engine.step(number, own_micro_batches(batches, plan, mesh.rank))
    return {
        "waits": waits,
        "has_moe_layers": engine.deepspeed.has_moe_layers,
        "gradient_clipping": engine.deepspeed.gradient_clipping(),
        "called": called,
        "prepared": num_prepared,
        "scale": {
            name: float((step.gradients[name] * theirs).sum() / theirs.square().sum())
            for name, theirs in expected.gradients.items()
            if "router" in name or "embedding" in name or "experts" in name
        },
        "coverage": {name: covered.unique().tolist() for name, covered in coverage.items()},
        "moments": {
            name: float((moments[name].view_as(first) - first).norm() / first.norm())
            for name, kept in oracle.moments.items()
            for first in [kept["exp_avg"]]
        },
        "shares_memory": all(shares_memory),
    }


def _without_marker() -> Result:
    """The same model when DeepSpeed is told nothing of experts."""
    config = tiny(f"parallel.processes={RANKS}", "parallel.expert_parallel_size=2", "engine.check_every_steps=0")
    mesh = build_mesh(config.parallel, "cpu")
    run_plan = plan_run(config, mesh.world_size)
    plan = run_plan.batches
    marker, deepspeed_moe.ExpertMarker = deepspeed_moe.ExpertMarker, lambda *_: torch.nn.Identity()  # type: ignore
    try:
        engine = build_engine(config, run_plan, mesh)
        error = ""
        try:
            engine.step(0, own_micro_batches(random_batches(config, plan)[0], plan, mesh.rank))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    finally:
        deepspeed_moe.ExpertMarker = marker  # type: ignore[misc]
    return {"has_moe_layers": engine.deepspeed.has_moe_layers, "error": error}


def _all_facts() -> dict[Any, Any]:
    facts: dict[Any, Any] = {}
    for dtype, stage in ENGINES:
        try:
            facts[dtype, stage] = _facts(dtype, stage)
        except Exception:
            facts[dtype, stage] = traceback.format_exc()
    facts["without marker"] = _without_marker()
    return facts


@pytest.fixture(scope="module")
def facts() -> Callable[[Any], Result]:
    collected = run_on_ranks(_all_facts, RANKS)[0]

    def of(key: Any) -> Result:
        assert not isinstance(collected[key], str), collected[key]
        return collected[key]

    return of


every_engine = pytest.mark.parametrize("engine", ENGINES, ids=str)


@every_engine
def test_deepspeed_never_waits_for_the_device(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    assert facts(engine)["waits"] == []


@every_engine
def test_the_marker_makes_deepspeed_see_experts(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    assert facts(engine)["has_moe_layers"]


def test_without_the_marker_experts_are_not_seen_or_refused(facts: Callable[[Any], Result]) -> None:
    assert not facts("without marker")["has_moe_layers"]
    assert facts("without marker")["error"]


@every_engine
def test_parallelism_is_set_after_the_cast_and_before_the_optimizer(
    facts: Callable[[Any], Result], engine: tuple[str, int]
) -> None:
    dtype = f"torch.{engine[0]}"
    expected = {
        "dense dtype": dtype,
        "router dtype": dtype,
        "optimizer still has the model's parameters": True,
    }
    assert facts(engine)["called"] == [expected]


@every_engine
def test_every_backward_pass_is_prepared(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    """Through hooks on the model's output: without them bfloat16 gradients of earlier micro-batches count again."""
    assert facts(engine)["prepared"] == 4


@every_engine
def test_gradients_have_scale_one_under_accumulation(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    tolerance = 1e-3 if engine[0] == "float32" else 0.1
    for name, scale in facts(engine)["scale"].items():
        assert scale == pytest.approx(1.0, abs=tolerance), name


@every_engine
def test_clipping_is_what_was_asked(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    assert facts(engine)["gradient_clipping"] == 0.0


@every_engine
def test_intervals_cover_every_element_once(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    assert facts(engine)["shares_memory"]
    assert all(times == [1.0] for times in facts(engine)["coverage"].values()), facts(engine)["coverage"]


@every_engine
def test_moments_lie_beside_their_weights(facts: Callable[[Any], Result], engine: tuple[str, int]) -> None:
    tolerance = 1e-5 if engine[0] == "float32" else 0.5
    assert all(error < tolerance for error in facts(engine)["moments"].values()), facts(engine)["moments"]
