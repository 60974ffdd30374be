"""The JSONL file: what survives a crash and a resume, and how rows are cleaned and reduced."""

import errno
import json
import math
import shutil
from pathlib import Path

import pytest

from moe_pretrain.metrics.wandb_sink import reduce_layers
from moe_pretrain.run_folder.metrics_file import JsonlSink, read_rows, replace_non_finite
from moe_pretrain.system.words import short_duration, short_number


def row(step, **more):
    return {"kind": "train", "step": step, "tokens": step * 10, "seconds": step / 2, "train/loss": None, **more}


def test_rows_are_readable_before_the_file_is_closed(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(row(1, text="two\nlines"))
    assert read_rows(sink.path) == [row(1, text="two\nlines")]
    assert sink.path.read_bytes().count(b"\n") == 1


def test_truncate_removes_later_rows_of_every_kind_and_goes_on(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        sink.write(row(step))
        sink.write({**row(step), "kind": "event", "event": "x", "message": ""})
    kept = sink.truncate_after(3)
    assert [(r["step"], r["kind"]) for r in kept] == [(s, k) for s in (1, 2, 3) for k in ("train", "event")]
    sink.write(row(4, again=True))
    sink.sync()
    assert read_rows(sink.path) == [*kept, row(4, again=True)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"kind": "train", "st', b'{"kind": "train", "step": 3}', b"\x00\x00"])
def test_torn_last_line_is_ignored_by_the_reader_and_dropped_by_the_writer(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(row(1))
    sink.close()
    with path.open("ab") as file:
        file.write(tail)
    assert read_rows(path) == [row(1)]
    sink = JsonlSink(path)
    sink.write(row(2))
    assert read_rows(path) == [row(1), row(2)]


def test_truncate_drops_a_torn_last_line(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(row(1))
    with sink.path.open("ab") as file:
        file.write(b'{"step": 1')
    assert sink.truncate_after(1) == [row(1)]
    assert sink.path.read_bytes().endswith(b"}\n")


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n???\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_rows(path)


def test_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_non_finite_values_become_null_and_are_named():
    clean, bad = replace_non_finite(row(1, a=math.nan, b=-math.inf, c=[0.5, math.nan, math.inf], d=1.0))
    assert (clean["a"], clean["b"], clean["c"], clean["d"]) == (None, None, [0.5, None, None], 1.0)
    assert bad == ["a", "b", "c"]


def test_non_finite_value_never_reaches_the_file(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        sink.write(row(1, a=math.nan))
    assert sink.path.read_bytes() == b""


def test_reduction_over_layers():
    reduced = reduce_layers(
        row(
            7,
            **{
                "train/loss": 2.5,
                "train/gradient_norm": None,
                "aux/router_z_loss": 3.0,
                "data/token_hash": "abc",
                "moe/layer_01/dead_experts": 1,
                "moe/layer_02/dead_experts": 4,
                "moe/layer_11/dead_experts": None,
                "moe/layer_01/expert_share": [0.5, 0.5],
            },
        )
    )
    assert reduced == {
        "step": 7,
        "tokens": 70,
        "seconds": 3.5,
        "train/loss": 2.5,
        "aux/router_z_loss": 3.0,
        "moe/mean/dead_experts": 2.5,
        "moe/max/dead_experts": 4,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.00k"), (12_345, "12.3k"), (1.2e6, "1.20M"), (999.9e6, "1.00B")],
)
def test_short_number(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (245, "4:05"), (7445, "2:04:05"), (266_645, "3d 02:04:05")])
def test_short_duration(seconds, text):
    assert short_duration(seconds) == text


class FullDisk:
    """A file on a disk that takes ``room`` more bytes."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken


def test_rows_wait_while_the_disk_is_full_and_none_is_torn_or_lost(tmp_path):
    heard = []
    sink = JsonlSink(tmp_path / "metrics.jsonl", heard.append)
    sink.write(row(1))
    disk = sink._file = FullDisk(sink._file, room=10)
    for step in (2, 3):
        sink.write(row(step))
    sink.sync()
    assert read_rows(sink.path) == [row(1)]
    assert len([line for line in heard if "kept in memory" in line and "No space left" in line]) == 1
    disk.room = 10**6
    sink.write(row(4))
    assert read_rows(sink.path) == [row(1), row(2), row(3), row(4)]
    assert heard[-1].endswith("complete")


def test_a_deleted_file_is_written_anew_with_all_its_rows(tmp_path):
    (tmp_path / "run").mkdir()
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    sink.write(row(1))
    shutil.rmtree(tmp_path / "run")
    sink.write(row(2))
    sink.close()
    assert read_rows(sink.path) == [row(1), row(2)]


@pytest.mark.parametrize(
    "line,problem",
    [
        ("[]", "not a JSON object"),
        ("{}", "kind is missing"),
        ('{"kind": "train", "step": 3, "tokens": 4}', "train/loss is missing"),
        ('{"kind": "train", "step": "3", "tokens": 4, "train/loss": 1.0}', "step='3' is no int"),
        (
            '{"kind": "validation", "step": 3, "tokens": 4, "validation/loss": "low"}',
            "validation/loss='low' is no float",
        ),
        ('{"kind": "event", "step": true, "event": "resumed", "message": ""}', "step=True is no int"),
        ('{"kind": "event", "step": 3, "event": "resumed"}', "message is missing"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_number(tmp_path: Path, line: str, problem: str):
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "train", "step": 1, "tokens": 2, "train/loss": null, "later/field": [1]}'
    path.write_text(f"{good}\n" + '{"kind": "later", "step": 1}\n' + f"{line}\n")
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}, line 3: {problem}; delete that line to go on"
