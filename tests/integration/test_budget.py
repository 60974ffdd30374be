"""Runs that end by FLOPs or seconds, as processes: what is spent is summed over attempts and topologies."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.runs import rows_of, run, train_words

from moe_pretrain.commands.train import with_earlier_overrides
from moe_pretrain.config.load import load
from moe_pretrain.model.size import model_size
from moe_pretrain.run_folder.paths import OVERRIDES_FILE

TOKENS_PER_STEP = 1024
ADAPTIVE = ["router=top_p", "router.threshold=0.6", "budget.tokens=null"]


def state_of(home: Path, name: str, step: int) -> dict:
    manifest = home / "outputs" / name / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["state"]


@pytest.mark.slow
def test_measured_flops_are_summed_over_attempts_and_topologies(home: Path):
    words = train_words("flops", *ADAPTIVE, "budget.flops=1.2e9")
    config = load([word for word in words[1:] if not word.startswith("data")])
    expected = model_size(config.model, config.router)
    code, out, err = run(home, *words)
    assert code == 0, err
    first = rows_of(home, "flops")[-1]["step"]
    two = ["parallel.processes=2", "parallel.expert_parallel_size=2"]
    code, out, err = run(home, "train", "run.name=flops", "budget.flops=3e9", *two)
    assert code == 0, err
    rows, spent = rows_of(home, "flops"), 0
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        experts = [row[f"moe/layer_{layer:02d}/experts_per_token"] for layer in range(2)]
        by_hand = expected.with_experts_per_token(sum(experts) / 2).training_flops_per_token
        assert row["train/flops_per_token"] == pytest.approx(by_hand, rel=1e-12)
        spent += round(TOKENS_PER_STEP * row["train/flops_per_token"])
        assert row["train/flops_spent"] == spent
        assert (spent >= 1.2e9) == (row["step"] >= first)
    assert spent >= 3e9 > rows[-2]["train/flops_spent"]
    assert spent != len(rows) * round(TOKENS_PER_STEP * expected.training_flops_per_token)
    assert state_of(home, "flops", len(rows))["flops"] == spent
    finished = [row["message"] for row in rows_of(home, "flops", "event") if row["event"] == "finished"]
    assert f"after {len(rows)} steps: {spent:.4g} FLOPs are spent, of budget.flops=3e+09" in finished
    assert f"spent: {spent:.4g} FLOPs" in out and "FLOPs as measured" in out
    floor = config.schedule.floor * config.optimizer.learning_rate
    assert rows[-1]["train/learning_rate"] == pytest.approx(floor, rel=0.5)
    seconds = [row["train/seconds_spent"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_seconds_end_a_run_with_all_that_an_end_has(home: Path):
    two = ["parallel.processes=2", "budget.seconds=0.001"]
    words = train_words("seconds", *two, "router=autonomy", "router.gate_rank=16", "budget.match=active_params")
    code, out, err = run(home, *words)
    assert code == 0, err
    solved = load([word for word in words[1:] if not word.startswith("data")]).model.moe
    saved = yaml.safe_load((home / "outputs" / "seconds" / "config.yaml").read_text())
    assert saved["model"]["moe"]["expert_hidden_size"] == solved.expert_hidden_size != 32
    assert saved["budget"]["matched"]["field"] == "model.moe.expert_hidden_size"
    assert f"model.moe.expert_hidden_size={solved.expert_hidden_size} instead of 32" in out
    assert "measured FLOPs per token against those of the reference of budget.match: " in out
    assert [row["step"] for row in rows_of(home, "seconds")] == [1]
    assert [row["step"] for row in rows_of(home, "seconds", "validation")] == [1]
    (finished,) = [row["message"] for row in rows_of(home, "seconds", "event") if row["event"] == "finished"]
    assert "of budget.seconds=0.001" in finished and "step 1 of 12, NOT AT ITS END" in finished
    spent = state_of(home, "seconds", 1)["train_seconds"]
    assert spent == rows_of(home, "seconds")[0]["train/seconds_spent"] > 0.001

    code, _, err = run(home, "train", "run.name=seconds", "parallel.processes=1")
    assert code == 0, err
    assert [row["step"] for row in rows_of(home, "seconds")] == [1], "what is spent stays spent"

    code, _, err = run(home, "train", "run.name=seconds", "parallel.processes=1", "budget.seconds=1000")
    assert code == 0, err
    rows = rows_of(home, "seconds")
    assert rows[-1]["step"] == 12 and rows[1]["train/seconds_spent"] > spent
    messages = [row["message"] for row in rows_of(home, "seconds", "event") if row["event"] == "finished"]
    assert messages[-1] == "after 12 steps"


def test_an_earlier_releases_overrides_still_resume(tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / OVERRIDES_FILE).write_text("run.name=old\nbatch.total_tokens=2048\nseed=3\n")
    words = with_earlier_overrides(["run.name=old", f"run.output_dir={tmp_path}", "seed=4"])
    config = load(words)
    assert (config.budget.tokens, config.seed) == (2048, 4)
