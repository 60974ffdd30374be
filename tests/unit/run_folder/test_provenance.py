"""What a start writes into a run's folder survives a disk that is full at the next one."""

import errno

import pytest

from moe_pretrain.run_folder.paths import CONFIG_FILE, OVERRIDES_FILE, SUMMARY_FILE
from moe_pretrain.run_folder.provenance import (
    read_config,
    read_overrides,
    read_summary,
    write_config,
    write_overrides,
    write_sick_step,
    write_summary,
)
from moe_pretrain.run_folder.record import find_runs
from moe_pretrain.system.files import WholeFile


def write_all(folder, seed):
    write_overrides(folder, [f"seed={seed}"])
    write_config(folder, {"seed": seed, "run": {"name": "a"}})
    write_summary(folder, {"planned_steps": seed})


@pytest.mark.parametrize("write", [write_config, write_summary, write_overrides])
def test_a_full_disk_at_a_resume_keeps_what_the_first_start_wrote(tmp_path, monkeypatch, write):
    write_all(tmp_path, 7)
    piece = WholeFile.write

    def half(self, data):
        piece(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WholeFile, "write", half)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, {"seed": 8} if write is not write_overrides else ["seed=8"])
    (run,) = find_runs(tmp_path)
    assert run.state == "unfinished" and run.values == {"seed": 7, "run.name": "a"} and run.planned_steps == 7
    assert (tmp_path / OVERRIDES_FILE).read_text() == "seed=7\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG_FILE, SUMMARY_FILE, OVERRIDES_FILE])


def test_words_for_one_start_are_not_those_of_the_run(tmp_path):
    kept = ["model=tiny", "checkpoint.resume_after=1", "+data.note=fault=", "+checkpoint.every_steps=5"]
    once = ["checkpoint.resume=never", "+checkpoint.resume=restart", "fault.point=train.step", "++fault={step: 3}"]
    write_overrides(tmp_path, [*kept[:2], *once, *kept[2:]])
    assert read_overrides(tmp_path) == kept


def test_a_sick_step_has_a_file_of_its_own(tmp_path):
    write_sick_step(tmp_path, 12, {"step": 12})
    assert (tmp_path / "sick_steps" / "step_00000012.json").read_text() == '{\n "step": 12\n}\n'


def test_words_come_back_as_they_were(tmp_path):
    words = ["run.name=a", "data.paths=['a\u2028b\x0c\x85 c.txt']", "seed=1"]
    write_overrides(tmp_path, words)
    assert read_overrides(tmp_path) == words
    with pytest.raises(ValueError, match=r"^override \S+ has a line break"):
        write_overrides(tmp_path, ["data.paths=['a\nb.txt']"])
    assert read_overrides(tmp_path) == words


@pytest.mark.parametrize("content", [b"\0" * 100, b"\xff\xfe"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, content):
    readers = {
        "overrides.txt": read_overrides,
        "config.yaml": read_config,
        "summary.json": read_summary,
    }
    for name, read in readers.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{tmp_path / name}: damaged: [^\n]*; [^\n]*delete it"):
            read(tmp_path)
