"""``checkpoint.warm_start`` as a user runs it."""

from pathlib import Path

import pytest
from helpers.runs import rows_of, run, train_words


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """A run to start from."""
    code, _, err = run(home, *train_words("first"))
    assert code == 0, err
    return home


def test_another_router_starts_from_a_runs_weights(trained: Path) -> None:
    words = train_words("second", "router=attentive", "router.num_candidates=3", "checkpoint.warm_start=outputs/first")
    code, out, err = run(trained, *words, "budget.tokens=4096", "schedule.warmup_steps=0", "model.rope_base=9000")
    assert code == 0, err
    (event,) = [row for row in rows_of(trained, "second", "event") if row["event"] == "warm_start"]
    assert "weights of outputs/first/checkpoints/step_00000012; start anew: blocks.0" in event["message"]
    assert ".router.gate.query_weight" in event["message"] and "16 weights of" in out + err
    assert event["message"].endswith("; another function of them: model.rope_base=9000.0 (was 10000.0)")
    assert rows_of(trained, "second")[0]["train/loss"] < rows_of(trained, "first")[0]["train/loss"] - 0.3
    code, _, err = run(trained, "train", "run.name=second", "checkpoint.warm_start=null")
    assert code == 2 and "checkpoint.warm_start=null must stay outputs/first" in err


@pytest.mark.parametrize(
    "word,fragment",
    [
        ("tokenizer.vocab_size=400", "must be of this run's tokenizer"),
        ("model.num_heads=2", "model.num_heads=2 must be 4, as checkpoint.warm_start=outputs/first/"),
    ],
)
def test_other_tokens_or_heads_are_refused(word: str, fragment: str, trained: Path) -> None:
    code, _, err = run(trained, *train_words(word[:9], word, "checkpoint.warm_start=outputs/first"))
    assert code == 2 and fragment in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["checkpoint.warm_start=nowhere"], "nowhere must be a checkpoint or the folder of a run that has one"),
        (["router=hash", "optimizer.trainable=routers"], "optimizer.trainable=routers must be all with router=hash"),
    ],
)
def test_what_cannot_be_is_one_line(home: Path, words: list[str], fragment: str) -> None:
    code, _, err = run(home, *train_words("never", *words))
    assert code == 2 and fragment in err and len(err.splitlines()) == 1
    assert not (home / "outputs" / "never").exists()
