"""What wandb is given: everything in ``metrics.jsonl`` once, whatever was killed, resumed or refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from helpers.wandb_files import configuration, history, offline_folders, records, run_record

from moe_pretrain.cli import main
from moe_pretrain.metrics import wandb_sink, wandb_start
from moe_pretrain.metrics.wandb_sink import reduce_layers
from moe_pretrain.metrics.wandb_start import run_id
from moe_pretrain.metrics.writer import MetricsConfig, MetricsWriter
from moe_pretrain.run_folder.metrics_file import read_rows

CONFIG = {"seed": 1, "router": {"name": "top_k", "top_k": 2}, "evaluation": {"sets": {}}}


def writer(run_dir: Path, resolved: dict | None = None, **changes) -> MetricsWriter:
    values = {
        "log_every_steps": 1,
        "router_health_steps": 100,
        "collapse_ratio": 1.25,
        "progress": True,
        "wandb_project": "tests",
    }
    config = MetricsConfig(**{**values, "wandb": "off", "wandb_group": None, **changes})
    run_dir.mkdir(parents=True, exist_ok=True)
    return MetricsWriter(config, run_dir, 100, "a-run", resolved or CONFIG, True)


def train_row(step: int, layers: int = 3) -> dict:
    row = {"step": step, "tokens": step * 100, "train/loss": 2.0 + 1 / step, "train/tokens_per_second": 12_345.0}
    for layer in range(layers):
        row |= {f"moe/layer_{layer:02d}/dead_experts": float(layer), f"moe/layer_{layer:02d}/expert_share": [0.5, 0.5]}
    return row


class FakeRun:
    """A run on a server that keeps what it was sent, over restarts."""

    url = "the-url"

    def __init__(self, server: "FakeWandb"):
        self.server = server
        self.starting_step = max(server.rows, default=-1) + 1
        self.finished = False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row, step):
        if self.server.broken:
            raise ConnectionError("the pipe\nbroke")
        assert step >= max(self.server.rows, default=0), "wandb leaves out steps that go back"
        self.server.rows.setdefault(step, {}).update(row)
        self.server.logged.append(step)

    def finish(self):
        self.finished = True


class FakeWandb(types.ModuleType):
    """Records how runs are started; online starts fail when ``server_down``."""

    def __init__(self, api_key=None, broken=False, server_down=False):
        super().__init__("wandb")
        self.api_key, self.broken, self.server_down = api_key, broken, server_down
        self.starts, self.runs, self.torn_down = [], [], False
        self.rows: dict[int, dict] = {}
        self.logged: list[int] = []

    def Settings(self, **options):  # noqa: N802
        return options

    def Table(self, columns, data):  # noqa: N802
        return {"columns": columns, "data": data}

    def setup(self, settings):
        values = {"api_key": self.api_key, "base_url": "http://127.0.0.1:9", "identity_token_file": None}
        return types.SimpleNamespace(settings=types.SimpleNamespace(**values))

    def init(self, **options):
        self.starts.append(options)
        if self.server_down and options["mode"] == "online":
            raise TimeoutError("no answer")
        self.runs.append(FakeRun(self))
        if options["mode"] == "offline":
            folder = Path(options["dir"]) / f"wandb/offline-run-{len(self.runs)}-{options['id']}"
            folder.mkdir(parents=True)
            self.runs[-1].settings = types.SimpleNamespace(sync_dir=str(folder))
        return self.runs[-1]

    def teardown(self):
        self.torn_down = True


@pytest.fixture
def wandb(monkeypatch):
    """Put a fake wandb in place, with a server that can be reached and no netrc."""

    def place(reachable=True, **options):
        fake = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setattr(wandb_start, "reachable", lambda url: reachable)
        monkeypatch.setattr(wandb_sink, "netrc_key", lambda url: None)
        return fake

    def no_prompt(*args):
        raise AssertionError("prompted")

    monkeypatch.setattr("builtins.input", no_prompt)
    return place


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """The real wandb, where nobody is logged in."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


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
def test_mode(tmp_path, wandb, capsys, mode, api_key, reachable, started):
    fake = wandb(reachable, api_key=api_key)
    metrics = writer(tmp_path / "sweep" / "run", wandb=mode)
    assert len(fake.starts) == (started == "online"), "offline files are written at the end"
    metrics.close()
    (start,) = fake.starts
    assert (start["mode"], start["dir"], start["project"]) == (started, str(tmp_path / "sweep" / "run"), "tests")
    assert start["config"] == {"seed": 1, "router/name": "top_k", "router/top_k": 2, "evaluation/sets": {}}
    assert (start["group"], start["name"]) == ("sweep", "a-run")
    if started == "online":
        assert start["settings"]["api_key"] == "key", "without the key wandb may ask for one"
    assert fake.runs[0].finished
    assert started in capsys.readouterr().err


def test_a_group_can_be_named(tmp_path, wandb):
    fake = wandb(api_key="key")
    writer(tmp_path, wandb="auto", wandb_group="mine").close()
    assert fake.starts[0]["group"] == "mine"


def test_online_without_a_login_is_one_clear_line(tmp_path, wandb):
    fake = wandb(api_key=None)
    with pytest.raises(ValueError, match=r"metrics\.wandb=online needs a wandb login"):
        writer(tmp_path, wandb="online")
    assert fake.starts == []


def test_failed_online_start_falls_back_to_offline(tmp_path, wandb, capsys):
    fake = wandb(api_key="key", server_down=True)
    metrics = writer(tmp_path, wandb="auto")
    metrics.write(train_row(1))
    metrics.close()
    assert [start["mode"] for start in fake.starts] == ["online", "offline"]
    assert fake.torn_down
    assert list(fake.rows) == [1]
    assert "wandb: offline (no answer)" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [0, 3, 6])
def test_a_resumed_run_has_every_step_once(tmp_path, wandb, lost):
    """Killed at step 8 with a checkpoint of step 5; the last ``lost`` rows never reached the server."""
    fake = wandb(api_key="key")
    first = writer(tmp_path, wandb="auto")
    first.resume(0)
    for step in range(1, 9):
        first.write(train_row(step))
    fake.rows = {step: row for step, row in fake.rows.items() if step <= 8 - lost}
    fake.logged.clear()
    second = writer(tmp_path, wandb="auto")
    second.resume(5)
    for step in range(6, 11):
        second.write(train_row(step))
    second.write({"step": 10, "tokens": 1000, "validation/loss": 2.5})
    second.close()
    assert fake.starts[0]["id"] == fake.starts[1]["id"] == (tmp_path / "wandb_id.txt").read_text().splitlines()[0]
    assert fake.starts[1]["resume"] == "allow"
    assert list(fake.rows) == list(range(1, 11))
    assert fake.rows[10]["validation/loss"] == 2.5 and fake.rows[10]["train/loss"] == 2.1
    trained = fake.logged[:-2]  # then the validation of step 10, and the table of layers
    assert trained == list(range(9 - lost, 11)), "sent again what was lost, and nothing that was not"


def test_a_rewind_does_not_send_steps_that_go_back(tmp_path, wandb):
    fake = wandb(api_key="key")
    metrics = writer(tmp_path, wandb="auto")
    for step in range(1, 9):
        metrics.write(train_row(step))
    metrics.resume(5)
    for step in range(6, 11):
        metrics.write(train_row(step))
    metrics.close()
    assert list(fake.rows) == list(range(1, 11)) and fake.logged == sorted(fake.logged)


def test_rows_are_reduced_and_layers_are_one_table(tmp_path, wandb):
    fake = wandb(api_key="key")
    metrics = writer(tmp_path, wandb="auto")
    for step in (1, 2):
        metrics.write(train_row(step))
    metrics.event(2, 200, "checkpoint", "saved")
    metrics.close()
    assert (fake.rows[1]["moe/mean/dead_experts"], fake.rows[1]["moe/max/dead_experts"]) == (1.0, 2)
    assert not any("layer_" in key for row in fake.rows.values() for key in row)
    assert not any("event" in row for row in fake.rows.values())
    table = fake.rows[2]["moe/layers"]
    assert table["columns"] == ["step", "layer", "dead_experts"]
    assert table["data"] == [[step, layer, float(layer)] for step in (1, 2) for layer in range(3)]


def test_wandb_that_breaks_is_reported_once_and_training_goes_on(tmp_path, wandb, capsys):
    fake = wandb(api_key="key", broken=True)
    metrics = writer(tmp_path, wandb="auto")
    for step in range(1, 4):
        metrics.write(train_row(step))
    metrics.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    reports = [line for line in capsys.readouterr().err.splitlines() if "wandb: off for" in line]
    assert reports == ["wandb: off for the rest of this run (the pipe broke)"]
    assert not fake.runs[0].finished


def test_wandb_that_is_not_installed_is_reported_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = writer(tmp_path, wandb="auto")
    metrics.write(train_row(1))
    metrics.close()
    assert "wandb: off for the rest of this run" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from unit.metrics.test_wandb_sink import train_row, writer
metrics = writer(Path({folder!r}), wandb="offline")
metrics.resume({kept})
for step in range({kept} + 1, {last} + 1):
    metrics.write(train_row(step))
if {is_killed}:
    os.kill(os.getpid(), signal.SIGKILL)
metrics.close()
"""


def attempt(folder: Path, kept: int, last: int, is_killed: bool) -> None:
    tests = Path(__file__).parents[2]
    code = KILLED.format(
        paths=[str(tests), str(tests.parent)], folder=str(folder), kept=kept, last=last, is_killed=is_killed
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == (-signal.SIGKILL if is_killed else 0), done.stderr


def assert_holds_every_step_once(run_dir: Path, last: int) -> None:
    (folder,) = offline_folders(run_dir)
    rows = history(folder)
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == list(range(1, last + 1))
    written = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    for row, expected in zip(rows, written, strict=True):
        expected = reduce_layers(expected)
        assert {key: row[key] for key in expected} == expected


def test_offline_files_are_whole_after_kills_and_resumes(tmp_path, nobody):
    """SIGKILL at steps 80 and 60, resumed from 70 and 50: one folder, 100 steps, each once."""
    run_dir = tmp_path / "sweep" / "a-run"
    attempt(run_dir, 0, 80, is_killed=True)
    assert offline_folders(run_dir) == []
    attempt(run_dir, 50, 60, is_killed=True)
    attempt(run_dir, 55, 100, is_killed=False)
    assert_holds_every_step_once(run_dir, 100)


def test_the_command_writes_what_a_kill_left_and_again(tmp_path, nobody, capsys):
    """After a SIGKILL there are no files; after the command there are; a longer run takes their place."""
    run_dir = tmp_path / "sweep" / "a-run"
    attempt(run_dir, 0, 30, is_killed=True)
    (run_dir / "config.yaml").write_text(json.dumps({**CONFIG, "run": {"name": "a-run"}, "metrics": PROJECT}))
    assert main(["wandb", str(tmp_path / "sweep")]) == 0
    assert_holds_every_step_once(run_dir, 30)
    (folder,) = offline_folders(run_dir)
    assert capsys.readouterr().out == f"wandb sync {folder}\n"
    run = run_record(folder)
    assert (run.project, run.run_group, run.display_name) == ("tests", "sweep", "a-run")
    assert run.run_id == (run_dir / "wandb_id.txt").read_text().splitlines()[0]
    found = configuration(folder)
    assert (found["router/name"], found["router/top_k"], found["seed"]) == ("top_k", 2, 1)
    assert not any(isinstance(value, dict) for name, value in found.items() if name != "_wandb" and value)
    attempt(run_dir, 20, 40, is_killed=False)
    assert_holds_every_step_once(run_dir, 40)


PROJECT = {"wandb_project": "tests"}


def test_layers_do_not_make_charts_in_the_real_files(tmp_path, nobody):
    """40 layers: a handful of charts, and one table with a line for each."""
    metrics = writer(tmp_path, wandb="offline")
    for step in range(1, 6):
        metrics.write(train_row(step, layers=40))
    metrics.close()
    (folder,) = offline_folders(tmp_path)
    keys = {key for row in history(folder) for key in row if not key.startswith("moe/layers/")}
    assert len(keys) < 15, keys
    (file,) = folder.glob("files/media/table/**/*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["step", "layer", "dead_experts"]
    assert len(table["data"]) == 5 * 40
    assert any(record.WhichOneof("record_type") == "exit" for record in records(folder)), "finished"


def test_a_broken_run_folder_is_said_and_the_others_are_written(tmp_path, nobody, capsys):
    attempt(tmp_path / "good", 0, 3, is_killed=True)
    (tmp_path / "good" / "config.yaml").write_text(json.dumps({**CONFIG, "run": {"name": "x"}, "metrics": PROJECT}))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "overrides.txt").write_text("router=top_k\n")
    assert main(["wandb", str(tmp_path)]) == 0
    assert "left out: bad: config.yaml: missing" in capsys.readouterr().out
    assert_holds_every_step_once(tmp_path / "good", 3)


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


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({"WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_MODE": "offline"}, "online", "offline"),
        ({"WANDB_MODE": "offline"}, "off", None),
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "disabled"}, "auto", None),
        ({"WANDB_MODE": "Disabled"}, "online", None),
        ({"WANDB_MODE": "disabled"}, "offline", None),
        ({"WANDB_DISABLED": "true"}, "auto", None),
        ({"WANDB_MODE": "online"}, "offline", "offline"),
        ({"WANDB_MODE": "online"}, "off", None),
        ({"WANDB_MODE": "online"}, "auto", "online"),
        ({"WANDB_MODE": ""}, "auto", "online"),
    ],
)
def test_the_environment_may_send_less_and_the_run_too(
    tmp_path, wandb, monkeypatch, capsys, environment, asked, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake = wandb(True, api_key="key")
    metrics = writer(tmp_path, wandb=asked)
    metrics.write(train_row(1))
    metrics.close()
    assert [start["mode"] for start in fake.starts] == ([expected] if expected else [])
    if expected != "online" and asked in ("auto", "online"):
        assert f"wandb: {expected or 'off'} (WANDB_" in "".join(capsys.readouterr())


def test_a_word_that_wandb_does_not_know_is_named(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    wandb(True)
    with pytest.raises(ValueError, match="^WANDB_MODE=of in the environment must be one of"):
        writer(tmp_path)


def test_the_mode_in_wandb_settings_is_obeyed(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_start.stricter("auto", "offline") == ("offline", "mode=offline in wandb's settings")
    assert wandb_start.stricter("offline", "disabled")[0] == "off"
    assert wandb_start.stricter("online", "online") == ("online", "")


@pytest.mark.parametrize("home", ["writable", "missing"])
def test_wandb_makes_its_folders_below_the_run(tmp_path, monkeypatch, home):
    for name in ("CACHE", "DATA", "ARTIFACT", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", "")
        monkeypatch.delenv(f"WANDB_{name}_DIR")
    monkeypatch.setenv("HOME", str(tmp_path) if home == "writable" else "/proc/nobody")
    if home == "missing":
        monkeypatch.setattr(wandb_start.os, "access", lambda path, mode: False)  # root may write anywhere
    wandb_start.keep_wandb_inside(tmp_path / "run")
    inside = {name for name in ("CACHE", "DATA", "ARTIFACT", "CONFIG") if f"WANDB_{name}_DIR" in os.environ}
    assert inside == {"CACHE", "DATA", "ARTIFACT"} | ({"CONFIG"} if home == "missing" else set())
    assert all(os.environ[f"WANDB_{name}_DIR"].startswith(str(tmp_path / "run" / "wandb")) for name in inside)
    for name in inside:
        monkeypatch.delenv(f"WANDB_{name}_DIR")


def test_a_copied_folder_gets_an_id_of_its_own_and_a_moved_one_keeps_it(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.mkdir()
    made = run_id(first / "wandb_id.txt")
    shutil.copytree(first, second)
    copied = run_id(second / "wandb_id.txt")
    assert copied not in ("", made) and run_id(second / "wandb_id.txt") == copied
    assert run_id(first / "wandb_id.txt") == made
    first.rename(third)
    shutil.copytree(third, first)
    assert run_id(third / "wandb_id.txt") != run_id(first / "wandb_id.txt"), "one of the two must be new"


def test_an_id_of_an_earlier_release_is_kept(tmp_path):
    (tmp_path / "wandb_id.txt").write_text("abcd1234\n")
    assert run_id(tmp_path / "wandb_id.txt") == run_id(tmp_path / "wandb_id.txt") == "abcd1234"
