"""The program as a user runs it: a process in a folder, and what it leaves there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS = 12
TINY = [
    "model.vocab_size=512",
    "model.sequence_length=64",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.moe.num_experts=4",
    "model.moe.expert_hidden_size=32",
    "batch.global_batch_tokens=1024",
    "batch.micro_batch_size=4",
    f"budget.tokens={STEPS * 1024}",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=4",
    "evaluation.every_steps=6",
    "evaluation.max_rows=16",
    "metrics.log_every_steps=1",
    "metrics.wandb=off",
    "engine.check_every_steps=5",
    "data.validation_fraction=0.1",
]


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_pretrain", *words],
        cwd=home,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(home: Path, *words: str) -> tuple[int, str, str]:
    process = start(home, *words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def train_words(name: str, *more: str) -> list[str]:
    """The command that trains on the small corpus of ``home``."""
    return ["train", *TINY, "data=files", "data.paths=[corpus.jsonl]", f"run.name={name}", *more]


def rows_of(home: Path, name: str, kind: str = "train") -> list[dict]:
    path = home / "outputs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["kind"] == kind]


def files_of_step(home: Path, name: str, step: int) -> dict:
    """Names, sizes and hashes of the files of a checkpoint."""
    manifest = home / "outputs" / name / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["files"]


def wait_for_step(home: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows_of(home, name)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{name} did not reach step {step}")
