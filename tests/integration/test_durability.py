"""Short versions of the scripts that kill and signal runs at random moments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "durability"


def run_script(name: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *words], env=environment, text=True, capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", [["--fixed"], ["--seed", "3"], ["--elastic"]], ids=str)
def test_a_run_killed_at_random_moments_ends_as_if_nobody_had(tmp_path: Path, mode: list[str]):
    out = run_script("chaos.py", "--kills", "3", "--folder", str(tmp_path), *mode)
    kills = re.search(r"^(\d+) kills with -9", out, re.MULTILINE)
    assert kills and int(kills[1]) >= 2, "a fast machine may finish the run before the last"
    assert "token hash of every step equal" in out
    assert ("bit-identical" in out) == (mode in (["--fixed"], ["--elastic"]))


def test_signals_at_random_moments_leave_a_complete_checkpoint(tmp_path: Path):
    out = run_script("signal_storm.py", "--moments", "6", "--folder", str(tmp_path))
    assert "every one heeded" in out and "a second SIGINT ends a rank" in out
