"""The writer: attempts, wall time, the console, and a wandb that can fail without harm."""

import io
import math
import sys
import time
import types

import pytest

from moe_pretrain.metrics import console, sinks, wandb_start
from moe_pretrain.metrics.rows import read_rows
from moe_pretrain.metrics.sinks import MetricsConfig, MetricsWriter


def config(**changes):
    values = {
        "log_every_steps": 1,
        "router_health_steps": 100,
        "progress": True,
        "wandb": "off",
        "wandb_project": "tests",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"log_every_steps": 0}, "log_every_steps must be >= 1, got 0")],
)
def test_bad_settings_name_the_field_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


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


# wandb


class FakeRun:
    url = "the-url"
    settings = types.SimpleNamespace(sync_dir="the-folder")

    def __init__(self, broken):
        self.broken, self.rows, self.finished = broken, [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        if self.broken:
            raise ConnectionError("the pipe\nbroke")
        self.rows.append(row)

    def finish(self):
        self.finished = True


class FakeWandb(types.ModuleType):
    """Records how runs are started; online starts fail when ``server_down``."""

    def __init__(self, api_key=None, broken=False, server_down=False):
        super().__init__("wandb")
        self.api_key, self.server_down = api_key, server_down
        self.starts, self.run, self.torn_down = [], FakeRun(broken), False

    def Settings(self, **options):  # noqa: N802
        return options

    def setup(self, settings):
        values = {"api_key": self.api_key, "base_url": "http://127.0.0.1:9", "identity_token_file": None}
        return types.SimpleNamespace(settings=types.SimpleNamespace(**values))

    def init(self, **options):
        self.starts.append(options)
        if self.server_down and options["mode"] == "online":
            raise TimeoutError("no answer")
        return self.run

    def teardown(self):
        self.torn_down = True


@pytest.fixture
def wandb(monkeypatch):
    """Put a fake wandb in place, with a server that can be reached and no netrc."""

    def place(reachable=True, **options):
        fake = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setattr(wandb_start, "reachable", lambda url: reachable)
        monkeypatch.setattr(sinks, "netrc_key", lambda url: None)
        return fake

    def no_prompt(*args):
        raise AssertionError("prompted")

    monkeypatch.setattr("builtins.input", no_prompt)
    return place


def test_off_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    metrics = writer(tmp_path)
    metrics.write(train_row(1))
    metrics.close()
    assert not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.parametrize(
    ("mode", "api_key", "reachable", "started"),
    [
        ("auto", None, True, "offline"),
        ("auto", "key", False, "offline"),
        ("auto", "key", True, "online"),
        ("offline", "key", True, "offline"),
        ("online", "key", True, "online"),
        ("online", "key", False, "offline"),
    ],
)
def test_wandb_mode(tmp_path, wandb, capsys, mode, api_key, reachable, started):
    fake = wandb(reachable, api_key=api_key)
    writer(tmp_path, wandb=mode).close()
    (start,) = fake.starts
    assert (start["mode"], start["dir"], start["project"]) == (started, str(tmp_path), "tests")
    assert start["config"] == {"seed": 1}
    if started == "online":
        assert start["settings"]["api_key"] == "key", "without the key wandb may ask for one"
    assert fake.run.finished
    assert capsys.readouterr().err.count("\n") == 1


def test_online_without_a_login_is_one_clear_line(tmp_path, wandb):
    fake = wandb(api_key=None)
    with pytest.raises(ValueError, match=r"metrics\.wandb=online needs a wandb login"):
        writer(tmp_path, wandb="online")
    assert fake.starts == []


def test_failed_online_start_falls_back_to_offline(tmp_path, wandb, capsys):
    fake = wandb(api_key="key", server_down=True)
    writer(tmp_path, wandb="auto").write(train_row(1))
    assert [start["mode"] for start in fake.starts] == ["online", "offline"]
    assert fake.torn_down
    assert len(fake.run.rows) == 1
    assert "wandb: offline (no answer)" in capsys.readouterr().err


def test_resume_keeps_the_wandb_run(tmp_path, wandb):
    fake = wandb(api_key="key")
    writer(tmp_path, wandb="auto").close()
    writer(tmp_path, wandb="auto").close()
    assert fake.starts[0]["id"] == fake.starts[1]["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert fake.starts[1]["resume"] == "allow"


def test_wandb_gets_reduced_rows_and_no_events(tmp_path, wandb):
    fake = wandb()
    metrics = writer(tmp_path, wandb="offline")
    layers = {"moe/layer_00/dead_experts": 0, "moe/layer_01/dead_experts": 2}
    metrics.write(train_row(1, **layers, **{"moe/layer_00/expert_share": [0.5, 0.5]}))
    metrics.event(1, 100, "checkpoint", "saved")
    (sent,) = fake.run.rows
    assert (sent["moe/mean/dead_experts"], sent["moe/max/dead_experts"]) == (1.0, 2)
    assert not any("layer_" in key for key in sent)


def test_wandb_that_breaks_is_reported_once_and_training_goes_on(tmp_path, wandb, capsys):
    fake = wandb(broken=True)
    metrics = writer(tmp_path, wandb="offline")
    for step in range(1, 4):
        metrics.write(train_row(step))
    metrics.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    reports = [line for line in capsys.readouterr().err.splitlines() if "wandb: off for" in line]
    assert reports == ["wandb: off for the rest of this run (the pipe broke)"]
    assert not fake.run.finished


def test_wandb_that_is_not_installed_is_reported_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = writer(tmp_path, wandb="auto")
    metrics.write(train_row(1))
    metrics.close()
    assert "wandb: off for the rest of this run" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_real_wandb_offline_writes_under_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = writer(run_dir, wandb="auto")
    metrics.write(train_row(1))
    metrics.close()
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 1


def test_netrc_key_is_read_for_the_right_server(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_start.netrc_key("https://api.example.com") is None
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.example.com\n  login user\n  password secret\n")
    netrc.chmod(0o600)
    assert wandb_start.netrc_key("https://api.example.com") == "secret"
    assert wandb_start.netrc_key("https://other.example.com") is None


def test_unreachable_server_is_found_out_quickly():
    start = time.monotonic()
    assert not wandb_start.reachable("http://127.0.0.1:9")
    assert time.monotonic() - start < 6
