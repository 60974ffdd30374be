"""Which checkpoints stay, against a plain restatement of the rule; deletion that can be cut off anywhere."""

import itertools
import random
from pathlib import Path

import pytest
from helpers.checkpoints import no_fault, rewrite_manifest, write_checkpoint

from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.manifest import complete_names, newest, step_of
from moe_pretrain.checkpoint.write import Retention


def policy(keep_last: int, keep_every_steps: int | None = None, keep_best: int = 0) -> CheckpointConfig:
    return CheckpointConfig(
        every_steps=1,
        keep_last=keep_last,
        keep_every_steps=keep_every_steps,
        keep_best=keep_best,
        asynchronous=False,
        resume="auto",
        warm_start=None,
    )


def steps_in(folder: Path) -> list[int]:
    assert not list(folder.glob("*.tmp"))
    return sorted(step_of(path) for path in complete_names(folder))


@pytest.mark.parametrize("keep_last,every,best", itertools.product([1, 2], [None, 3], [0, 1, 2]))
def test_last_and_every_and_best_stay(tmp_path: Path, keep_last: int, every: int | None, best: int):
    generator = random.Random(keep_last * 10 + best)
    losses = {step: generator.choice([None, generator.random()]) for step in range(10)}
    retention = Retention(tmp_path, policy(keep_last, every, best))
    kept: set[int] = set()
    for step, loss in losses.items():
        write_checkpoint(tmp_path, step, validation_loss=loss)
        retention.apply(step, no_fault)
        kept.add(step)
        validated = sorted((losses[s], -s) for s in kept if losses[s] is not None)
        kept = {
            s
            for s in kept
            if s in sorted(kept)[-keep_last:]
            or (every is not None and s > 0 and s % every == 0)
            or s in [-found for _, found in validated[:best]]
        }
        assert steps_in(tmp_path) == sorted(kept)


def test_the_best_is_known_to_a_process_that_did_not_save_it(tmp_path: Path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        write_checkpoint(tmp_path, step, validation_loss=loss)
    Retention(tmp_path, policy(1, None, 1)).apply(4, no_fault)
    assert steps_in(tmp_path) == [2, 4]


def test_later_steps_that_did_not_verify_never_push_out_the_new_one(tmp_path: Path):
    """After a fallback to step 1 the damaged steps 3 and 4 lie in the future; only step 2 is good and new."""
    for step in (1, 3, 4):
        path = write_checkpoint(tmp_path, step)
        if step > 1:
            (path / "rank_00000.safetensors").write_bytes(b"damaged")
    write_checkpoint(tmp_path, 2)
    Retention(tmp_path, policy(1)).apply(2, no_fault)
    assert steps_in(tmp_path) == [2]
    assert newest(tmp_path, pytest.fail)[0].name == "step_00000002"


def test_leftovers_of_killed_saves_and_deletions_are_swept(tmp_path: Path):
    for name in ("step_00000001.tmp", "step_00000001.0.tmp", "step_00000009.tmp"):
        (tmp_path / name / "inner").mkdir(parents=True)
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 7)
    (tmp_path / "step_00000005.tmp").symlink_to(elsewhere)
    write_checkpoint(tmp_path, 2)
    Retention(tmp_path, policy(1)).apply(2, no_fault)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "step_00000002"]
    assert len(list(elsewhere.iterdir())) == 2, "links are removed, not followed"


def test_an_unreadable_manifest_is_no_best(tmp_path: Path):
    rewrite_manifest(write_checkpoint(tmp_path, 1), lambda m: m["state"].update(validation_loss="0.1"))
    write_checkpoint(tmp_path, 2, validation_loss=1.0)
    write_checkpoint(tmp_path, 3)
    Retention(tmp_path, policy(1, None, 1)).apply(3, no_fault)
    assert steps_in(tmp_path) == [2, 3]


def test_a_good_checkpoint_of_the_same_step_is_never_replaced(tmp_path: Path):
    path = write_checkpoint(tmp_path, 3, mark="first")
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    write_checkpoint(tmp_path, 3, mark="second")
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == before
    assert steps_in(tmp_path) == [3]
