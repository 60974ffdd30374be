"""Two hosts with a cable between them, as network namespaces; the script says what is tried."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "durability" / "two_hosts.py"
SKIPPED = 77


@pytest.mark.slow
def test_a_cut_cable_ends_the_run_on_both_sides_and_a_restart_goes_on():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
    command = [sys.executable, str(SCRIPT), "--launch", "torchrun", "--ranks-per-host", "1"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "host-a: moe-pretrain: stuck or gone" in done.stdout and "rank 1 on host-b" in done.stdout
    assert "host-b: moe-pretrain: no answer" in done.stdout and "rank 0 on host-a" in done.stdout
    assert "token hash of every step equal" in done.stdout
