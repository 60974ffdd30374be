"""A loss or gradient that is not finite changes nothing, is named, and stops the run when it goes on."""

from dataclasses import replace

import pytest
import torch
from helpers.builders import WITH_ALL_PARTS, tiny
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.engine.engine import NonFiniteError, TrainEngine
from moe_pretrain.engine.intervals import WEIGHT, pieces
from moe_pretrain.system.faults import FaultConfig, Faults

EXPERT = "blocks.2.feed_forward.experts.out_weight"
SICK_STEP = 1


def sick_engine(overrides: tuple[str, ...], point: str, action: str, rank: int, num_steps: int = 1) -> TrainEngine:
    engine = build_engine(tiny(*WITH_ALL_PARTS, *overrides, micro_batch_size=4))
    config = FaultConfig(point=point, action=action, step=SICK_STEP, num_steps=num_steps, rank=rank, parameter=EXPERT)
    engine._faults = Faults(config, engine.mesh.rank)
    return engine


def state_of(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change on this rank."""
    state = {f"parameter {name}": p.detach().clone() for name, p in engine.model.named_parameters()}
    state |= {f"buffer {name}": buffer.clone() for name, buffer in engine.model.named_buffers()}
    for piece in pieces(engine):
        state[f"master {piece.name}"] = piece.master.clone()
        state[f"step {piece.name}"] = piece.state["step"].clone()
        state |= {f"{kind} {piece.name}": value.clone() for kind, value in piece.arrays().items() if kind != WEIGHT}
    return state


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


def skip_one(overrides: tuple[str, ...], point: str) -> tuple[str, list[str], list[str]]:
    """A sick step between two good ones: its sickness, what it changed, and what differs from never having it."""
    engine = sick_engine(overrides, point, "not_finite", rank=0)
    engine.step(0, random_batches(engine, 0))
    before = state_of(engine)
    result = engine.step(SICK_STEP, random_batches(engine, SICK_STEP))
    changed = differing(before, state_of(engine))
    healthy = engine.step(2, random_batches(engine, 2))
    assert healthy.sickness is None and healthy.loss > 0
    after = state_of(engine)
    twin = sick_engine(overrides, "train.loss", "not_finite", rank=99)
    for step in (0, 2):
        twin.step(step, random_batches(twin, step))
    return result.sickness, changed, differing(state_of(twin), after)


CASES = [
    (2, ("parallel.expert_parallel_size=2", "engine.zero_stage=1")),
    (2, ("parallel.expert_parallel_size=1", "engine.zero_stage=0", "router=loss_free")),
    (2, ("parallel.expert_parallel_size=2", "engine.zero_stage=2", "engine.dtype=bfloat16")),
    (1, ("engine.zero_stage=2", "engine.gradient_clipping=0.0")),
    (2, ("parallel.expert_parallel_size=2", "engine.zero_stage=0", "engine.determinism=elastic")),
]


@pytest.mark.parametrize("point", ["train.loss", "train.gradient"])
@pytest.mark.parametrize("ranks,overrides", CASES, ids=lambda value: str(value)[:60])
@pytest.mark.fast("engine.zero_stage=1", "engine.zero_stage=2', 'e")
def test_a_sick_step_changes_nothing_and_is_named(ranks: int, overrides: tuple[str, ...], point: str):
    for sickness, changed, differs in run_on_ranks(skip_one, ranks, overrides, point):
        assert changed == [], "weights, moments, AdamW's step, router state"
        assert differs == [], "the steps after it are those of a run that never had it"
        assert "on rank 0" in sickness and "must be finite" in sickness
        assert f"gradient of {EXPERT}" in sickness if point == "train.gradient" else "loss=nan" in sickness


def sick_for_ever(max_skipped_steps: int) -> tuple[int, str, list[str]]:
    """Steps until the run stops, the error, and what the sick steps changed."""
    overrides = ("parallel.expert_parallel_size=2", f"engine.max_skipped_steps={max_skipped_steps}")
    engine = sick_engine(overrides, "train.gradient", "not_finite", rank=1, num_steps=100)
    engine.step(0, random_batches(engine, 0))
    before = state_of(engine)
    for step in range(SICK_STEP, 10):
        try:
            engine.step(step, random_batches(engine, step))
        except NonFiniteError as error:
            return step, str(error), differing(before, state_of(engine))
    raise AssertionError("it never stopped")


@pytest.mark.parametrize("max_skipped_steps", [0, 2])
@pytest.mark.fast("2")
def test_sick_steps_in_succession_stop_the_run_on_every_rank(max_skipped_steps: int):
    for step, message, changed in run_on_ranks(sick_for_ever, 2, max_skipped_steps):
        assert step == SICK_STEP + max_skipped_steps
        assert f"step {step}: " in message and f"gradient of {EXPERT} on rank 1" in message
        assert changed == []


def count_to_the_stop(sick_steps: tuple[int, ...]) -> int | None:
    """With sick steps apart from each other: the step that stops the run, or None."""
    engine = sick_engine(("engine.max_skipped_steps=1",), "train.loss", "not_finite", rank=0)
    config = engine._faults._config
    for step in range(6):
        is_sick = step in sick_steps
        engine._faults = Faults(replace(config, step=step if is_sick else 99), 0)
        try:
            engine.step(step, random_batches(engine, step))
        except NonFiniteError:
            return step
    return None


@pytest.mark.parametrize("sick_steps,stops", [((1, 3, 5), None), ((1, 3, 4), 4)])
def test_a_healthy_step_ends_the_count(sick_steps: tuple[int, ...], stops: int | None):
    assert run_on_ranks(count_to_the_stop, 1, sick_steps) == [stops]


def sick_weight() -> str:
    """A weight that is not finite makes the output of its own module the first to be named."""
    engine = build_engine(tiny("engine.max_skipped_steps=1", "engine.check_every_steps=0"))
    with torch.no_grad():
        engine.model.get_parameter("blocks.1.attention.out_weight").fill_(float("inf"))
    return engine.step(0, random_batches(engine, 0)).sickness


def test_the_first_module_whose_output_is_sick_is_named():
    (sickness,) = run_on_ranks(sick_weight, 1)
    assert "first in the output of blocks.1.attention on rank 0" in sickness


def overflowing_norm(overrides: tuple[str, ...], size: float) -> tuple[str | None, list[str]]:
    """Every gradient is finite; with ``size`` 1e19 and more the sum of their squares is not, in float32."""
    engine = build_engine(tiny("engine.check_every_steps=0", *overrides, micro_batch_size=4))
    engine.step(0, random_batches(engine, 0))
    before = state_of(engine)
    parameter = engine.model.get_parameter("blocks.1.attention.out_weight")
    handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, size))
    result = engine.step(1, random_batches(engine, 1))
    handle.remove()
    return result.sickness, differing(before, state_of(engine))


STAGES = [(f"engine.zero_stage={stage}",) for stage in (0, 1, 2)]


@pytest.mark.parametrize("overrides", [*STAGES, ("engine.zero_stage=0", "engine.determinism=elastic")], ids=str)
@pytest.mark.fast("zero_stage=2", "elastic")
def test_a_finite_gradient_whose_norm_overflows_is_treated_alike_at_every_stage(overrides: tuple[str, ...]):
    for sickness, changed in run_on_ranks(overflowing_norm, 2, overrides, 1e25):
        assert changed == []
        assert (
            sickness is not None and "gradient_norm=inf must be finite; every gradient is finite, but not" in sickness
        )
        assert "of blocks.1.attention.out_weight on rank" in sickness
    for sickness, changed in run_on_ranks(overflowing_norm, 2, overrides, 1e10):
        assert sickness is None and changed


def collapsed_routes() -> list[list[int]]:
    engine = sick_engine(("engine.check_every_steps=0",), "train.router", "collapse", rank=0)
    results = [engine.step(step, random_batches(engine, step)) for step in range(3)]
    return [(result.tokens_per_expert > 0).sum(dim=1).tolist() for result in results]


def test_a_collapsed_router_uses_only_the_experts_of_one_token():
    (used,) = run_on_ranks(collapsed_routes, 1)
    assert min(used[0]) > 2 and used[1] == [2, 2] and min(used[2]) > 2
