"""Checkpoints load bit for bit on any topology, and damage is found."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import checkpoints
from helpers.builders import WITH_ALL_PARTS, tiny
from helpers.checkpoints import assert_same, contents
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.manifest import self_hash
from moe_pretrain.checkpoint.store import TrainState, train_state

SHAPES = (*WITH_ALL_PARTS, "engine.check_every_steps=0", "model.init=mup", "optimizer.groups.router.lr_scale=0.5")


def overrides_of(ep: int, stage: int, dtype: str = "float32") -> tuple[str, ...]:
    return (
        *SHAPES,
        f"parallel.expert_parallel_size={ep}",
        f"engine.zero_stage={stage}",
        f"engine.dtype={dtype}",
    )


def train_and_save(folder: str, overrides: tuple[str, ...], steps: int) -> None:
    engine = build_engine(tiny(*overrides, micro_batch_size=4))
    for step in range(steps):
        engine.step(step, random_batches(engine, step))
    checkpoints.save(engine, Path(folder), TrainState(step=steps), keep_last=3)


def load_and_save(source: str, target: str, overrides: tuple[str, ...]) -> None:
    """A checkpoint through an engine of another topology, and out again."""
    engine = build_engine(tiny(*overrides, micro_batch_size=4))
    path, manifest = store.newest(Path(source), pytest.fail)
    store.restore(engine, path, manifest)
    checkpoints.save(engine, Path(target), TrainState(step=train_state(manifest).step), keep_last=3)


def load_and_train(source: str, target: str, overrides: tuple[str, ...], first: int, last: int) -> None:
    engine = build_engine(tiny(*overrides, micro_batch_size=4))
    path, manifest = store.newest(Path(source), pytest.fail)
    store.restore(engine, path, manifest)
    for step in range(first, last):
        engine.step(step, random_batches(engine, step))
    checkpoints.save(engine, Path(target), TrainState(step=last), keep_last=3)


@pytest.mark.parametrize("dtype,words", [("float32", ()), ("bfloat16", ()), ("float32", ("optimizer=muon",))])
@pytest.mark.slow
def test_any_topology_loads_the_same_bits(tmp_path: Path, dtype: str, words: tuple[str, ...]):
    """Known defects C31 and C32: every expert and its moments, by global id, over ranks, expert parallel and ZeRO."""
    source = tmp_path / "source"
    run_on_ranks(train_and_save, 4, str(source), (*overrides_of(2, 2, dtype), *words), 2)
    before = contents(source)
    moments = [value for name, value in before.items() if "exp_avg" in name or "momentum" in name]
    assert moments and all(bool(value.abs().sum() > 0) for value in moments)
    stages = (1, 2) if dtype == "bfloat16" else (0, 1, 2)
    topologies = [(1, 1), (2, 2), (2, 1), (4, 4)]
    for index, (world, ep) in enumerate(topologies):
        stage = stages[index % len(stages)]
        target = tmp_path / f"{world}-{ep}-{stage}"
        run_on_ranks(load_and_save, world, str(source), str(target), (*overrides_of(ep, stage, dtype), *words))
        assert_same(before, contents(target))
        source = target  # and onwards from the new one: errors cannot cancel


@pytest.mark.parametrize(
    "words",
    [
        ("router=lory", "router.segment_tokens=4"),
        ("experts=matrix_product",),
        ("optimizer=muon", "router=lory", "router.segment_tokens=4"),
        ("optimizer=muon", "experts=matrix_product"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
@pytest.mark.fast("lory")
def test_experts_of_other_kinds_load_the_same_bits(tmp_path: Path, words: tuple[str, ...]):
    """Slices of the width of merged experts, cores of their own and shared: saved by 2 ranks, loaded by 4, 1 and 2."""

    def overrides(ep: int, stage: int) -> tuple[str, ...]:
        # Without muP, which these experts do not have.
        return (*WITH_ALL_PARTS, *words, f"parallel.expert_parallel_size={ep}", f"engine.zero_stage={stage}")

    source = tmp_path / "source"
    run_on_ranks(train_and_save, 2, str(source), overrides(2, 1), 1)
    before = contents(source)
    assert sum(".experts." in name for name in before) > 1
    moments = [value for name, value in before.items() if "exp_avg" in name or "momentum" in name]
    assert moments and all(bool(value.any()) for value in moments)
    for world, ep, stage in ((4, 4, 2), (1, 1, 0), (2, 1, 1)):
        target = tmp_path / f"{world}-{ep}-{stage}"
        run_on_ranks(load_and_save, world, str(source), str(target), overrides(ep, stage))
        assert_same(before, contents(target))
        source = target


@pytest.mark.parametrize(
    "world,ep,stage,dtype,optimizer",
    [
        (1, 1, 1, "float32", "adamw"),
        (2, 2, 2, "bfloat16", "adamw"),
        (2, 1, 0, "float32", "adamw"),
        (2, 1, 1, "float32", "muon"),
    ],
)
@pytest.mark.fast("2-2-2-bfloat16-adamw", "2-1-1-float32-muon")
def test_resume_is_bitwise_on_the_same_topology(
    tmp_path: Path, world: int, ep: int, stage: int, dtype: str, optimizer: str
):
    overrides = (*overrides_of(ep, stage, dtype), f"optimizer={optimizer}")
    straight, half, resumed = (tmp_path / name for name in ("straight", "half", "resumed"))
    run_on_ranks(train_and_save, world, str(straight), overrides, 3)
    run_on_ranks(train_and_save, world, str(half), overrides, 2)
    run_on_ranks(load_and_train, world, str(half), str(resumed), overrides, 2, 3)
    assert_same(contents(straight), contents(resumed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(train_and_save, 2, str(folder), overrides_of(2, 1), 1)
    run_on_ranks(train_and_save, 2, str(folder), overrides_of(2, 1), 2)
    return folder


def damaged(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    return copy, copy / "step_00000002"


@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.fast("flip-rank_00001", "truncate-manifest", "remove-rank_00000")
def test_damage_is_found_and_the_checkpoint_before_is_taken(saved: Path, tmp_path: Path, file: str, damage: str):
    folder, newest = damaged(saved, tmp_path)
    path = newest / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    warnings: list[str] = []
    found = store.newest(folder, warnings.append)
    assert found is not None and found[0].name == "step_00000001"
    assert len(warnings) == 1 and file in warnings[0] and "\n" not in warnings[0]


def test_a_half_written_checkpoint_is_never_picked(saved: Path, tmp_path: Path):
    folder, newest = damaged(saved, tmp_path)
    newest.rename(newest.with_name(newest.name + ".tmp"))
    assert store.newest(folder, pytest.fail)[0].name == "step_00000001"


def test_a_manifest_that_names_files_elsewhere_is_refused(saved: Path, tmp_path: Path):
    _, newest = damaged(saved, tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["self"]
    manifest["files"]["../step_00000001/rank_00000.safetensors"] = manifest["files"].pop("rank_00000.safetensors")
    manifest["self"] = self_hash(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(store.CheckpointError, match="outside its folder"):
        store.read_manifest(newest)


def save_many(folder: str) -> None:
    engine = build_engine(tiny(*overrides_of(1, 1), micro_batch_size=4))
    for step in range(5):
        checkpoints.save(engine, Path(folder), TrainState(step=step), keep_last=2)


def test_only_the_newest_stay(tmp_path: Path):
    run_on_ranks(save_many, 1, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def load_other_model(folder: str) -> str:
    engine = build_engine(tiny(*overrides_of(1, 1), "model.moe.expert_hidden_size=24", micro_batch_size=4))
    try:
        store.restore(engine, *store.newest(Path(folder), pytest.fail))
    except store.CheckpointError as error:
        return str(error)
    return ""


def test_another_model_is_refused_by_name(saved: Path):
    (message,) = run_on_ranks(load_other_model, 1, str(saved))
    assert "feed_forward.experts.in_weight=[8, 40, 24]" in message and "[8, 48, 24]" in message
