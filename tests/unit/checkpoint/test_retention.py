"""Which checkpoints stay, against a plain restatement of the rule; deletion that can be cut off anywhere."""

import errno
import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import no_fault, policy, rewrite_manifest, write_checkpoint

from moe_pretrain.checkpoint.manifest import SET_ASIDE, complete_names, newest, step_of
from moe_pretrain.checkpoint.write import Retention


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


def damage(path: Path) -> Path:
    (path / "rank_00000.safetensors").write_bytes(b"damaged")
    return path


def test_what_is_newer_than_the_start_neither_goes_nor_pushes_out_the_new_one(tmp_path: Path):
    """After a fallback to step 1 the steps 3 and 5 lie in the future, and stay there when the run has passed them."""
    for step in (1, 3, 5):
        path = write_checkpoint(tmp_path, step)
        if step == 3:
            damage(path)
    retention = Retention(tmp_path, policy(1))
    retention.went_on_from(1)
    for step, left in ((2, [2, 3, 5]), (4, [3, 4, 5]), (6, [3, 5, 6])):
        write_checkpoint(tmp_path, step)
        assert retention.apply(step, no_fault) is None
        assert steps_in(tmp_path) == left


def test_a_damaged_one_of_the_same_step_is_set_aside(tmp_path: Path):
    for number in range(2):
        damage(write_checkpoint(tmp_path, 3))
        write_checkpoint(tmp_path, 3)
        Retention(tmp_path, policy(1)).apply(3, no_fault)
        assert steps_in(tmp_path) == [3] and newest(tmp_path, pytest.fail) is not None
        assert (tmp_path / SET_ASIDE / f"step_00000003{'.1' * number}" / "rank_00000.safetensors").exists()


def test_what_was_not_read_is_read_before_it_goes(tmp_path: Path):
    for step in (1, 2, 3):
        path = write_checkpoint(tmp_path, step)
        if step == 2:
            damage(path)
    retention = Retention(tmp_path, policy(1))
    retention.went_on_from(3)
    write_checkpoint(tmp_path, 4)
    said = retention.apply(4, no_fault)
    assert steps_in(tmp_path) == [2, 4]
    assert said is not None and "step_00000002" in said and "damaged" in said
    write_checkpoint(tmp_path, 5)
    assert retention.apply(5, no_fault) is None, "said once"
    assert steps_in(tmp_path) == [2, 5]


@pytest.mark.parametrize("name,left", [("rename", [1, 4]), ("rmdir", [4])])
def test_one_path_that_cannot_be_removed_keeps_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: list[int]
):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    retention = Retention(tmp_path, policy(1))
    write_checkpoint(tmp_path, 4)
    act = getattr(os, name)

    def refuse(path: Any, *rest: Any, **more: Any) -> Any:
        if "step_00000001" in str(path):
            raise PermissionError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return act(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        said = retention.apply(4, no_fault)
        assert said is not None and "step_00000001" in said and os.strerror(errno.EBUSY) in said
        assert sorted(step_of(path) for path in complete_names(tmp_path)) == left
        assert retention.apply(4, no_fault) is None, "said once"
    assert retention.apply(4, no_fault) is None
    assert steps_in(tmp_path) == [4]


def test_a_best_one_that_cannot_be_read_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, 1, validation_loss=1.0)
    retention = Retention(tmp_path, policy(1, None, 1))
    open_file = os.open

    def fail(path: Any, *rest: Any, **more: Any) -> int:
        if "step_00000001" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_file(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        for step in (2, 3):
            write_checkpoint(tmp_path, step, validation_loss=2.0)
            retention.apply(step, no_fault)
        assert steps_in(tmp_path) == [1, 3]
    write_checkpoint(tmp_path, 4, validation_loss=0.5)
    retention.apply(4, no_fault)
    assert steps_in(tmp_path) == [4]


def test_a_course_that_was_left_goes_but_what_was_not_read_is_set_aside(tmp_path: Path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    retention = Retention(tmp_path, policy(9))
    retention.went_on_from(2)
    write_checkpoint(tmp_path, 4)
    retention.leave(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(SET_ASIDE, "step_00000001", "step_00000002.0.tmp", "step_00000004.0.tmp")
    ]
    assert [path.name for path in (tmp_path / SET_ASIDE).iterdir()] == ["step_00000003"]


def test_leftovers_of_killed_saves_and_deletions_are_swept(tmp_path: Path):
    for name in ("step_00000001.tmp", "step_00000001.0.tmp", "step_00000009.tmp"):
        (tmp_path / name / "inner").mkdir(parents=True)
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 7)
    (tmp_path / "step_00000005.tmp").symlink_to(elsewhere)
    write_checkpoint(tmp_path, 2)
    Retention(tmp_path, policy(1)).apply(2, no_fault)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "step_00000002"]
    assert len(list(elsewhere.iterdir())) == 2, "links are removed, not followed"


def test_a_hostile_manifest_is_no_best_and_stays(tmp_path: Path):
    rewrite_manifest(write_checkpoint(tmp_path, 1), lambda m: m["state"].update(validation_loss="0.1"))
    write_checkpoint(tmp_path, 2, validation_loss=1.0)
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 4)
    said = Retention(tmp_path, policy(1, None, 1)).apply(4, no_fault)
    assert said is not None and "step_00000001" in said
    assert steps_in(tmp_path) == [1, 2, 4]


def test_a_good_checkpoint_of_the_same_step_is_never_replaced(tmp_path: Path):
    path = write_checkpoint(tmp_path, 3, mark="first")
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    write_checkpoint(tmp_path, 3, mark="second")
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == before
    assert steps_in(tmp_path) == [3]
