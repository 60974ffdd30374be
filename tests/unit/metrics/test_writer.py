"""The writer: attempts, wall time, the console, and a wandb that can fail without harm."""

import io
import json
import math
import sys
import types

import pytest

from moe_pretrain.metrics import console
from moe_pretrain.metrics import writer as sinks
from moe_pretrain.metrics.writer import MetricsConfig, MetricsWriter
from moe_pretrain.run_folder.metrics_file import read_rows


def config(**changes):
    values = {
        "log_every_steps": 1,
        "router_health_steps": 100,
        "collapse_ratio": 1.25,
        "progress": True,
        "wandb": "off",
        "wandb_project": "tests",
        "wandb_group": None,
    }
    return MetricsConfig(**{**values, **changes})


def writer(run_dir, total_steps=10, is_main=True, **changes):
    return MetricsWriter(config(**changes), run_dir, total_steps, "a-run", {"seed": 1}, is_main)


def train_row(step, loss=2.0, **more):
    row = {"step": step, "tokens": step * 100, "train/loss": loss, "train/tokens_per_second": 12_345.0}
    return {**row, **more}


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when a test says so."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(sinks, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(console, "monotonic", lambda: now.seconds)
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


# The writer


def test_kind_seconds_and_attempt_are_added(tmp_path, clock):
    metrics = writer(tmp_path)
    clock.seconds += 3
    metrics.write(train_row(1))
    metrics.write({"step": 1, "tokens": 100, "validation/loss": 2.5})
    metrics.event(1, 100, "checkpoint", "saved step 1")
    metrics.sync()
    metrics.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "validation", "event"]
    assert all((row["seconds"], row["attempt"]) == (3.0, 0) for row in rows)
    assert (rows[2]["event"], rows[2]["message"]) == ("checkpoint", "saved step 1")
    assert rows[0]["train/loss"] == 2.0


def test_resume_truncates_and_continues_attempt_and_seconds(tmp_path, clock):
    first = writer(tmp_path)
    for step in range(1, 6):
        clock.seconds += 10
        first.write(train_row(step))
    first.close()
    clock.seconds += 5000
    second = writer(tmp_path)
    second.resume(3)
    clock.seconds += 7
    second.event(3, 300, "resumed", "from step 3")
    second.write(train_row(4))
    second.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["attempt"], row["seconds"]) for row in rows] == [
        (1, 0, 10.0),
        (2, 0, 20.0),
        (3, 0, 30.0),
        (3, 1, 37.0),
        (4, 1, 37.0),
    ]
    third = writer(tmp_path)
    third.resume(0)
    third.write(train_row(1))
    third.close()
    assert [(row["step"], row["attempt"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(1, 2)]


def test_a_row_of_an_earlier_step_at_the_end_does_not_turn_the_time_back(tmp_path, clock):
    """A run that branched off at step 1 has told so after step 3."""
    first = writer(tmp_path)
    for step in range(1, 4):
        clock.seconds += 10
        first.write(train_row(step))
    first.close()
    row = {"kind": "event", "step": 1, "tokens": 100, "seconds": 10.0, "attempt": 0, "event": "branched_off"}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "message": "to x"}) + "\n")
    second = writer(tmp_path)
    second.resume(3)
    clock.seconds += 7
    second.write(train_row(4))
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["seconds"] == 37.0


def test_resume_of_an_empty_folder_is_the_first_attempt(tmp_path):
    metrics = writer(tmp_path)
    metrics.resume(0)
    metrics.write(train_row(1))
    assert read_rows(tmp_path / "metrics.jsonl")[0]["attempt"] == 0


def test_existing_rows_are_never_appended_to_by_accident(tmp_path):
    first = writer(tmp_path)
    first.write(train_row(1))
    first.close()
    with pytest.raises(RuntimeError, match=r"call resume\(step\)"):
        writer(tmp_path).write(train_row(1))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_non_finite_loss_is_null_and_loud(tmp_path, capsys):
    metrics = writer(tmp_path)
    metrics.write(train_row(4, loss=math.nan))
    train, event = read_rows(tmp_path / "metrics.jsonl")
    assert train["train/loss"] is None
    assert (event["event"], event["step"]) == ("non_finite", 4)
    assert "train/loss" in event["message"]
    assert "[non_finite] step 4" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path, capsys):
    metrics = writer(tmp_path, is_main=False, wandb="online")
    metrics.resume(0)
    metrics.write(train_row(1))
    metrics.event(1, 100, "x", "y")
    metrics.sync()
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


# The console


def test_plain_lines_when_stderr_is_no_terminal(tmp_path, clock, capsys):
    metrics = writer(tmp_path, total_steps=100)
    for step in range(1, 101):
        clock.seconds += 0.25
        metrics.write(train_row(step))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/100 | loss 2.0000 | 12.3k tokens/s"
    assert lines[1] == "step 5/100 | loss 2.0000 | 12.3k tokens/s | ETA 0:24"
    assert lines[-1].startswith("step 100/100 |")
    assert len(lines) == 26, "one line a second, the first and the last"


def test_plain_lines_keep_their_distance_in_steps(tmp_path, clock, capsys):
    metrics = writer(tmp_path, total_steps=100, log_every_steps=20)
    for step in range(1, 101):
        clock.seconds += 2
        metrics.write(train_row(step))
    steps = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]


def test_validation_and_events_have_lines_of_their_own(tmp_path, capsys):
    metrics = writer(tmp_path)
    perplexity = {"validation/perplexity": 12.184, "validation/bits_per_byte": 1.5}
    metrics.write({"step": 5, "tokens": 500, "validation/loss": 2.5, **perplexity})
    metrics.event(5, 500, "checkpoint", "saved")
    assert capsys.readouterr().err.splitlines() == [
        "validation at step 5: loss 2.5000 | perplexity 12.18 | bits per byte 1.5000",
        "[checkpoint] step 5: saved",
    ]


def test_bar_on_a_terminal_and_not_when_switched_off(tmp_path, monkeypatch):
    for progress, run_name in ((True, "with"), (False, "without")):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        (tmp_path / run_name).mkdir()
        metrics = writer(tmp_path / run_name, progress=progress)
        metrics.write(train_row(1))
        metrics.write(train_row(2))
        metrics.event(2, 200, "checkpoint", "saved")
        metrics.close()
        assert ("\r" in screen.getvalue()) == progress
        assert "2/10" in screen.getvalue() or not progress
        assert "loss 2.0000" in screen.getvalue()
        assert "[checkpoint] step 2: saved\n" in screen.getvalue()
