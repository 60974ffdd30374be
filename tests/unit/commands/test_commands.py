"""Commands as a user types them: help, options, folders of their own, completion, first mistakes."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest
import yaml

from moe_pretrain.cli import COMMANDS, main
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
    ],
)
def test_mistakes_are_one_line(words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fragment in line


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
