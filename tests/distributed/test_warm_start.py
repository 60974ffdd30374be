"""Weights of one run start another, whose router may differ; and routers alone learn on frozen experts."""

from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.builders import WITH_ALL_PARTS, tiny
from helpers.checkpoints import assert_same, contents
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.engine.intervals import WEIGHT

COMMON = (*WITH_ALL_PARTS, "engine.check_every_steps=1", "model.moe.num_experts=4")
GATE = ".router.gate."


def train(target: str, overrides: tuple[str, ...], steps: int, source: str | None = None) -> None:
    """``steps`` steps from the newest weights in ``source``, and a checkpoint; says what the warm start did."""
    engine = build_engine(tiny(*COMMON, *overrides, micro_batch_size=4))
    if source is not None:
        found = store.newest(Path(source), pytest.fail)
        assert found is not None
        became = store.warm_start(engine, *found)
        lines = [f"{kind} {name}" for kind, names in vars(became).items() for name in names]
        (Path(target).with_suffix(".txt")).write_text("\n".join(lines))
    for step in range(steps):
        engine.step(step, random_batches(engine, step))
    checkpoints.save(engine, Path(target), TrainState(step=steps), keep_last=1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{WEIGHT}/"): v for name, v in contents(folder).items() if name.startswith(WEIGHT)}


@pytest.fixture(scope="module")
def dense_gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the attentive gate that mixes all experts, on two ranks with split experts."""
    folder = tmp_path_factory.mktemp("warm") / "attentive_dense"
    run_on_ranks(train, 2, str(folder), ("router=attentive_dense", "parallel.expert_parallel_size=2"), 2)
    return folder


@pytest.mark.parametrize(
    "router,world,more",
    [
        ("top_k", 1, ("engine.zero_stage=0",)),
        ("attentive", 2, ("router.num_candidates=3", "parallel.expert_parallel_size=2")),
        ("loss_free", 2, ("engine.zero_stage=2", "engine.dtype=bfloat16")),
    ],
)
@pytest.mark.fast("attentive-2")
def test_every_weight_but_the_routers_is_the_others(
    dense_gate: Path, tmp_path: Path, router: str, world: int, more: tuple[str, ...]
) -> None:
    """Over topologies and dtypes: master weights equal bit for bit, what does not fit is as initialised and named."""
    overrides = (f"router={router}", "router.top_k=2", *more)
    warm, fresh = tmp_path / "warm", tmp_path / "fresh"
    run_on_ranks(train, world, str(warm), overrides, 0, str(dense_gate))
    run_on_ranks(train, world, str(fresh), overrides, 0)
    source, ours, initial = weights(dense_gate), weights(warm), weights(fresh)
    shared = source.keys() & ours.keys()
    assert_same({name: source[name] for name in shared}, {name: ours[name] for name in shared})
    assert any(not torch.equal(source[name], initial[name]) for name in shared)
    own = ours.keys() - shared
    assert own and all(".router." in name for name in own)
    assert_same({name: initial[name] for name in own}, {name: ours[name] for name in own})
    assert all((GATE in name) == (name in shared) for name in ours if ".router." in name)
    left = source.keys() - shared
    expected = {*(f"loaded {n}" for n in shared), *(f"fresh {n}" for n in own), *(f"left {n}" for n in left)}
    assert set(warm.with_suffix(".txt").read_text().splitlines()) == expected
    moments = [value for name, value in contents(warm).items() if "exp_avg" in name]
    assert all(not value.any() for value in moments), "the optimizer starts anew"


def refuse(source: str, overrides: tuple[str, ...], fragment: str) -> None:
    engine = build_engine(tiny(*COMMON, *overrides, micro_batch_size=4))
    found = store.newest(Path(source), pytest.fail)
    assert found is not None
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    with pytest.raises(store.CheckpointError, match=fragment):
        store.warm_start(engine, *found)
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())


@pytest.mark.parametrize(
    "overrides,fragment",
    [
        (("router=autonomy", "router.gate_rank=8"), "experts.*only the weights of routers may differ"),
        (("router=top_k", "model.hidden_size=64"), "only the weights of routers may differ"),
    ],
)
def test_other_experts_and_widths_are_refused(dense_gate: Path, overrides: tuple[str, ...], fragment: str) -> None:
    run_on_ranks(refuse, 1, str(dense_gate), overrides, fragment)


@pytest.mark.parametrize("world,ep,stage,dtype", [(1, 1, 0, "float32"), (2, 2, 1, "float32"), (2, 1, 2, "bfloat16")])
@pytest.mark.fast("2-1-2-bfloat16")
def test_12_distillation_freezes_experts_bit_exactly(
    dense_gate: Path, tmp_path: Path, world: int, ep: int, stage: int, dtype: str
) -> None:
    """2302.14703: a linear router learns on the frozen experts of an attentive gate. Test 4g.12."""
    overrides = (
        "router=top_k", "router.top_k=2", "optimizer.trainable=routers", f"parallel.expert_parallel_size={ep}",
        f"engine.zero_stage={stage}", f"engine.dtype={dtype}", "schedule.warmup_steps=0",
    )  # fmt: skip
    for name, steps in (("start", 0), ("end", 3)):
        run_on_ranks(train, world, str(tmp_path / name), overrides, steps, str(dense_gate))
    start, end = weights(tmp_path / "start"), weights(tmp_path / "end")
    for name, value in end.items():
        assert torch.equal(value, start[name]) == (".router." not in name), name
