"""``checkpoint.warm_start`` from a Hugging Face folder: the weights, and what is refused before the first step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import contents
from helpers.runs import rows_of, run, train_words
from transformers import AutoModelForCausalLM

EXPORTED = ("router=top_k", "model.norm_epsilon=1e-6")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    """The export of a run of a few steps, whose tokenizer is its own."""
    words = train_words(
        "source", *EXPORTED, "budget.tokens=2048", "schedule.warmup_steps=1", "tokenizer.vocab_size=512"
    )
    code, _, err = run(home, *words)
    assert code == 0, err
    code, _, err = run(home, "export", "outputs/source", "exported")
    assert code == 0, err
    return home / "exported"


def words_of(name: str, folder: str, *more: str) -> list[str]:
    tokenizer = ["tokenizer=pretrained", "tokenizer.path=exported"]
    short = ["budget.tokens=1024", "schedule.warmup_steps=1", "optimizer.learning_rate=1e-12"]
    return train_words(name, *EXPORTED, *tokenizer, *short, f"checkpoint.warm_start={folder}", *more)


def test_a_run_starts_with_its_weights_and_its_loss(home: Path, folder: Path):
    code, _, err = run(home, *words_of("again", "exported"))
    assert code == 0, err
    (said,) = [row["message"] for row in rows_of(home, "again", "event") if row["event"] == "warm_start"]
    assert said.endswith("weights of exported") and "anew" not in said
    weights = contents(home / "outputs" / "again" / "checkpoints")
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = weights["weight/blocks.1.feed_forward.experts.in_weight"].view(4, 64, 32)
    torch.testing.assert_close(ours, theirs["model.layers.1.mlp.experts.gate_up_proj"], atol=1e-9, rtol=1e-6)
    qkv = torch.cat([theirs[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    torch.testing.assert_close(weights["weight/blocks.0.attention.qkv_weight"].view(96, 32), qkv, atol=1e-9, rtol=1e-6)


def test_what_does_not_fit_is_one_line(home: Path, folder: Path):
    def refusal(*words: str) -> str:
        code, _, err = run(home, *words)
        assert code == 2, err
        return err.splitlines()[-1]

    other = home / "other"
    shutil.copytree(folder, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "model_type": "deepseek_v3"}))
    assert "model_type=deepseek_v3 compresses keys and values" in refusal(*words_of("a", "other"))
    (other / "config.json").write_text(json.dumps({**values, "rope_parameters": {"rope_theta": 77.0}}))
    assert "model.rope_base=10000.0 must be 77.0, as checkpoint.warm_start=other has it" in refusal(
        *words_of("b", "other")
    )
    assert "only the weights of routers may differ" in refusal(
        *words_of("c", "exported", "model.moe.expert_hidden_size=64")
    )
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "config.json").write_text(json.dumps(values))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "does not belong to this run" in refusal(*words_of("d", "other"))
