"""Damage anywhere is found and named; a hostile manifest is refused before anything of it is used."""

import errno
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import rewrite_manifest, write_checkpoint

from moe_pretrain.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpoint,
    UnreadableCheckpoint,
    complete_names,
    newest,
    read_manifest,
    share,
    step_of,
)
from moe_pretrain.checkpoint.store import train_state

FILE = "rank_00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    return tmp_path


def test_a_flipped_bit_at_any_offset_of_any_file_is_found(folder: Path):
    """1,000 random single-bit flips over all files: each names its file, and the checkpoint before is taken."""
    generator = random.Random(0)
    path = folder / "step_00000002"
    contents = {file: file.read_bytes() for file in path.iterdir()}
    assert len(contents) == 2
    for _ in range(1000):
        file = generator.choice(sorted(contents))
        damaged = bytearray(contents[file])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        heard: list[str] = []
        found = newest(folder, heard.append)
        assert found is not None and train_state(found[1]).step == 1
        assert len(heard) == 1 and str(file) in heard[0] and "falling back" in heard[0]
        file.write_bytes(contents[file])
    assert train_state(newest(folder, pytest.fail)[1]).step == 2


@pytest.mark.parametrize("size", [0, 1, 7, 100, -1])
def test_a_file_of_another_length_is_found(folder: Path, size: int):
    path = folder / "step_00000002" / FILE
    content = path.read_bytes()
    path.write_bytes(content[:size] if size >= 0 else content + b"\0")
    with pytest.raises(CheckpointError, match=FILE):
        read_manifest(path.parent)


def set_file(name: str) -> Callable[[dict], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(FILE)
        for interval in manifest["intervals"]:
            interval["file"] = name

    return change


def set_interval(**fields: Any) -> Callable[[dict], None]:
    return lambda manifest: manifest["intervals"][0].update(fields)


HOSTILE = {
    "parent": (set_file("../step_00000001/rank_00000.safetensors"), "outside its folder"),
    "absolute": (set_file("/etc/passwd"), "outside its folder"),
    "other name": (set_file("manifest.json"), "not of a rank"),
    "huge length": (set_interval(length=2**62), "cover"),
    "longer than an integer": (set_interval(length=10**40), "cover"),
    "negative length": (set_interval(length=-1), "gap or an overlap"),
    "negative start": (set_interval(start=-4), "gap or an overlap"),
    "gap": (set_interval(start=1), "gap or an overlap"),
    "file of nobody": (set_interval(file="rank_00009.safetensors"), "not among its files"),
    "unknown array": (set_interval(tensor="other"), "cover"),
    "huge shape": (lambda m: m["shapes"].update({"norm.weight": [2**31, 2**31]}), "cover 5 of"),
    "negative shape": (lambda m: m["shapes"].update({"norm.weight": [-1]}), "negative size"),
    "shape of text": (lambda m: m["shapes"].update({"norm.weight": "5"}), "shapes.norm.weight"),
    "negative bytes": (lambda m: m["files"][FILE].update(bytes=-1), "must not be negative"),
    "no step": (lambda m: m["state"].pop("step"), "state.step"),
    "step of text": (lambda m: m["state"].update(step="2"), "state.step"),
    "no intervals": (lambda m: m.update(intervals=[]), "cover 0 of 6"),
    "later format": (lambda m: m.update(format_version=99), "format_version=99"),
    "files of text": (lambda m: m.update(files="x"), "files"),
    **{
        f"updates {value}": (lambda m, value=value: m.update(adam_step=value), "adam_step")
        for value in (-1.0, math.nan, math.inf, 0.5, 3.0, "1", True, [1.0])
    },
    "tokens of another length": (lambda m: m["state"].update(tokens=10**400), "state.tokens"),
    "seconds longer than a float": (lambda m: m["state"].update(train_seconds=10**400), "state.train_seconds"),
    "FLOPs longer than a float": (lambda m: m["state"].update(flops=10**400), "state.flops"),
    "a spike's loss longer than a float": (
        lambda m: m["state"].update(spikes={"losses": [10**400], "is_high": False}),
        "state.spikes",
    ),
    "a rewind without end": (
        lambda m: m["state"].update(rewinds=[{"step": 0, "first": 1, "stop": 2**60}]),
        "leaves out more than",
    ),
    "a rewind to later": (lambda m: m["state"].update(rewinds=[{"step": 9, "first": 1, "stop": 2}]), "at most first=1"),
    "twice the same": (lambda m: m["intervals"].append(dict(m["intervals"][0])), "gap or an overlap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(folder: Path, name: str):
    change, fragment = HOSTILE[name]
    path = folder / "step_00000002"
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(path)
    assert fragment in str(refused.value) and "\n" not in str(refused.value)
    assert not isinstance(refused.value, DamagedCheckpoint)
    with pytest.raises(CheckpointError, match="step_00000002"):  # its hash is right: to pass it over would lose a step
        newest(folder, pytest.fail)


def test_links_and_pipes_are_refused_without_being_followed(folder: Path, tmp_path: Path):
    good, path = folder / "step_00000001", folder / "step_00000002"
    shutil.copytree(path, folder / "elsewhere")
    for name in (FILE, "manifest.json"):
        (path / name).unlink()
        (path / name).symlink_to(folder / "elsewhere" / name)
        with pytest.raises(CheckpointError, match=name):
            read_manifest(path)
        (path / name).unlink()
        os.mkfifo(path / name)  # opening it to read would wait for ever
        with pytest.raises(CheckpointError, match=name):
            read_manifest(path)
        (path / name).unlink()
        shutil.copy(folder / "elsewhere" / name, path / name)
    read_manifest(path)
    shutil.rmtree(path)
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="link"):
        newest(folder, pytest.fail)
    path.unlink()
    assert newest(folder, pytest.fail)[0] == good


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EDQUOT])
@pytest.mark.parametrize("name", [FILE, "manifest.json"])
def test_an_error_of_the_system_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int):
    broken = str(folder / "step_00000002" / name)
    open_file = os.open

    def fail(path: Any, *rest: Any, **more: Any) -> int:
        if str(path) == broken:
            raise OSError(number, os.strerror(number), broken)
        return open_file(path, *rest, **more)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UnreadableCheckpoint) as refused:
        newest(folder, pytest.fail)
    assert broken in str(refused.value) and os.strerror(number) in str(refused.value)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Any) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        newest(folder, pytest.fail)


def test_a_file_in_the_place_of_the_folder_is_not_an_empty_one(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints must be the folder of the run's checkpoints") as caught:
        complete_names(tmp_path / "checkpoints")
    assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("name", [FILE, "manifest.json"])
def test_a_missing_file_is_damage(folder: Path, name: str):
    (folder / "step_00000002" / name).unlink()
    heard: list[str] = []
    assert train_state(newest(folder, heard.append)[1]).step == 1
    assert len(heard) == 1 and "is missing" in heard[0]


@pytest.mark.parametrize("hashed", [True, False])
def test_one_of_a_later_release_stops_the_run_though_it_may_hash_otherwise(folder: Path, hashed: bool):
    path = folder / "step_00000002"
    rewrite_manifest(path, lambda manifest: manifest.update(format_version=2))
    if not hashed:
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text[: text.index('"self"')] + '"self": "sha256:0"}')
    with pytest.raises(CheckpointError, match="format_version=2.*release that wrote it"):
        newest(folder, pytest.fail)


def test_a_renamed_checkpoint_is_passed_over(folder: Path):
    (folder / "step_00000002").rename(folder / "step_00000009")
    heard: list[str] = []
    assert train_state(newest(folder, heard.append)[1]).step == 1
    assert len(heard) == 1 and "holds step 2 and was renamed: its name must be step_00000002" in heard[0]


@pytest.mark.parametrize("name", ["step_000000002", "step_٠٠٠٠٠٠٠٢", "step_2", "step_00000002.0"])
def test_a_step_has_one_name(name: str):
    assert step_of(Path(name)) is None and step_of(Path("step_00000002")) == 2


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"self": 1}', "\udcff", "1" * 10_000])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, text: str):
    path = folder / "step_00000002"
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_manifest(path)


def test_fields_of_a_later_release_are_left_alone(folder: Path):
    path = folder / "step_00000002"
    rewrite_manifest(path, lambda manifest: manifest.update(signature="abc"))
    assert read_manifest(path)["signature"] == "abc"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_together_verify_each_file_once(world_size: int):
    files = {f"rank_{rank:05d}.safetensors" for rank in range(5)}
    shares = [share(files, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in shares for name in part) == sorted(files)
