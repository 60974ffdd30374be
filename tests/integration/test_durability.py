"""Short versions of the scripts that kill and signal runs at random moments."""

import re
from pathlib import Path

import pytest
from helpers.runs import run_script

SCRIPTS = Path(__file__).parents[2] / "scripts" / "durability"


def run_short(name: str, folder: Path, *words: str) -> str:
    code, out, err = run_script(folder, SCRIPTS / name, *words, "--folder", str(folder))
    assert code == 0, out + err
    return out


@pytest.mark.parametrize("mode", [["--fixed"], ["--seed", "3"], ["--elastic"]], ids=str)
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nobody_had(tmp_path: Path, mode: list[str]):
    out = run_short("chaos.py", tmp_path, "--kills", "3", *mode)
    kills = re.search(r"^(\d+) kills with -9", out, re.MULTILINE)
    assert kills and int(kills[1]) >= 2, "a fast machine may finish the run before the last"
    assert "token hash of every step equal" in out
    assert ("bit-identical" in out) == (mode in (["--fixed"], ["--elastic"]))


@pytest.mark.slow
def test_signals_at_random_moments_leave_a_complete_checkpoint(tmp_path: Path):
    out = run_short("signal_storm.py", tmp_path, "--moments", "6")
    assert "every one heeded" in out and "a second SIGINT ends a rank" in out
