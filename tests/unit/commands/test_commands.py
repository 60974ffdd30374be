"""Commands as a user types them: help, options, folders of their own, completion, first mistakes."""

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_pretrain.cli import main
from moe_pretrain.commands import COMMANDS, completion
from moe_pretrain.commands.train import with_earlier_overrides
from moe_pretrain.config.compose import config_folder, folder_override
from moe_pretrain.config.load import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for group in ("model", "budget"):
        (tmp_path / "my own" / group).mkdir(parents=True)
        text = (config_folder() / group / "tiny.yaml").read_text()
        (tmp_path / "my own" / group / "mine.yaml").write_text(text.replace("name: tiny", "name: mine"))
    return tmp_path / "my own"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: moe-pretrain {command} " in out and f"examples:\n  moe-pretrain {command} " in out
    assert ("expert_choice" in out) == ("OVERRIDE" in out)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[1] == importlib.metadata.version("moe_pretrain")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["completion", "bash"], ["report"]], ids=" ".join)
@pytest.mark.fast("--version", "report")
def test_a_reader_that_has_gone_ends_a_command_without_a_word(words: list[str], tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "moe_pretrain", *words]
    done = subprocess.run(
        program, stdout=writer, stderr=writer if words == ["report"] else subprocess.PIPE, cwd=tmp_path, timeout=100
    )
    os.close(writer)
    assert (done.returncode, done.stderr or b"") == (128 + signal.SIGPIPE, b"")


def test_a_broken_pipe_that_is_not_our_output_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def run(options: argparse.Namespace) -> int:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(completion, "run", run)
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        main(["completion", "bash"])


@pytest.mark.parametrize("command", ["train", "plan"])
def test_configuration_with_a_folder_of_ones_own(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    words = [command, "model=mine", "--config-dir", str(folder)]
    assert main([*words, "--cfg", "job", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["name"].startswith("mine-")
    assert main([*words, "--cfg", "job"]) == 0
    assert "${model.name}-${hydra:runtime.choices.router}" in capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert "mine" in capsys.readouterr().out
    assert main([*words, "--info", "searchpath"]) == 0


def test_a_resumed_run_keeps_its_folder(folder: Path, tmp_path: Path):
    run = tmp_path / "old"
    run.mkdir()
    word = folder_override(folder)
    (run / "overrides.txt").write_text(f"{word}\nmodel=mine\nrun.name=old\n")
    words = with_earlier_overrides(["run.name=old", f"run.output_dir={tmp_path}"])
    assert word in words and load(words).model.name == "mine"


def test_words_of_a_start_that_never_began_are_said(tmp_path: Path):
    run, given = tmp_path / "new", ["run.name=new", f"run.output_dir={tmp_path}", "seed=2"]
    run.mkdir()
    (run / "overrides.txt").write_text("run.name=new\nseed=1\nmodel=small\ncheckpoint.warm_start=nowhere\n")
    said: list[str] = []
    words = with_earlier_overrides(given, said.append)
    assert "model=small" in words and "seed=1" not in words
    assert said == [
        f"{run} was started before and has not begun; what it was started with holds too: model=small "
        "checkpoint.warm_start=nowhere"
    ]
    assert with_earlier_overrides(words, said.append) == words and len(said) == 1


@pytest.mark.parametrize(
    "more,is_said",
    [
        (["run.name=frist"], True),
        (["run.name=frist", "parallel.processes=2", "metrics.wandb=off"], True),
        (["run.name=frist", "router=top_p"], False),
        (["run.name=frist", "+seed=2"], False),
        (["run.name=other"], False),
        (["run.name=first"], False),
        (["run.name=firsts"], False),
    ],
    ids=str,
)
def test_a_misspelt_name_of_a_run_is_asked_about(more: list[str], is_said: bool, tmp_path: Path):
    """Not where anything says that another run than a resumed one is meant."""
    for name in ("first", "other-than-that"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "overrides.txt").write_text(f"run.name={name}\nseed=1\n")
    for name in ("firsts", "fristt"):  # no runs: folders in which something else lies
        (tmp_path / name).mkdir()
    said: list[str] = []
    given = [f"run.output_dir={tmp_path}", *more]
    words = with_earlier_overrides(given, said.append)
    assert ("seed=1" in words) == ("run.name=first" in more) and (words == given or "run.name=first" in more)
    if is_said:
        assert said == [
            f"{tmp_path}/frist is a new run with the default configuration; did you mean run.name=first, which exists?"
        ]
    else:
        assert not any("did you mean" in line for line in said)


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["train", "--modle=tiny"], "unrecognized arguments: --modle=tiny"),
        (["plan", "--mfu=much"], "'much' must be a number"),
        (["train", "--config-dir", "nowhere"], "must be a folder that exists"),
        (["plan", "--resolve"], "--resolve needs --cfg"),
        (["train", "-m", "seed=1,2", "--cfg", "job"], "leave out --multirun"),
        (["report"], "required: RUN_FOLDER"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["trian", "model=tiny"], "'trian' is no command; did you mean train?"),
        (["model=tiny"], "'model=tiny' is no command; known: average, "),
    ],
)
def test_mistakes_are_one_line(words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fragment in line


@pytest.mark.parametrize("command", ["export", "evaluate", "generate"])
def test_only_what_is_required_is_called_so(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command]) == 2
    wanted = {"export": "RUN, FOLDER", "evaluate": "RUN", "generate": "RUN, TEXT"}[command]
    err = capsys.readouterr().err
    assert err.endswith(f"the following arguments are required: {wanted}; see moe-pretrain {command} --help\n")


def test_a_broken_file_of_ones_own_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "model" / "mine.yaml").write_text("name: [")
    assert main(["plan", "--config-dir", str(folder), "model=mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not YAML: " in line and f"{folder}/model/mine.yaml" in line


@pytest.mark.parametrize("command", [["report"], ["export", "--no-check"]])
def test_what_is_no_run_is_said_with_the_runs_beside_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "outputs" / "first"
    step = run / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()
    behind = [str(tmp_path / "exported")] if command[0] == "export" else []
    for given, hint in (
        (step, f"did you mean {run}?"),
        (tmp_path / "outputs", f"did you mean {run}?"),
        (tmp_path / "outputs" / "frist", f"there is no such folder; did you mean {run}?"),
        (tmp_path / "frist", "there is no such folder"),
    ):
        assert main([command[0], str(given), *behind, *command[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"moe-pretrain {command[0]}: {given} ") and line.endswith(hint), line


def test_a_file_that_a_shipped_one_would_hide_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "model" / "mine.yaml").rename(folder / "model" / "tiny.yaml")
    assert main(["train", "--config-dir", str(folder)]) == 2
    assert "model/tiny.yaml has the name of a shipped file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line,expected",
    [
        ("moe-pretrain tr", ["train"]),
        ("moe-pretrain train router=expert_c", ["expert_choice"]),
        ("moe-pretrain train --multi", ["--multirun"]),
        ("moe-pretrain completion z", ["zsh"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + f"\nCOMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; _moe_pretrain\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", "shopt -s extglob\n" + script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == expected, done.stderr
