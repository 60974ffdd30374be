"""Kills and other numbers of ranks, as a user has them: every row once, in the order of an uninterrupted run.

The run logs a hash over all tokens consumed, each row keyed by its position. It is compared with one that is worked
out here from the shards, row by row: a row that is missing, repeated or in another place changes it (defects C36 to
C39).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import xxhash
from helpers.turns import plain_loop

from moe_pretrain.config import load
from moe_pretrain.data import RowOrder
from moe_pretrain.data.positions import seed_of
from moe_pretrain.data.rows import count_rows
from moe_pretrain.run_data import prepare_corpora

STEPS, ROWS, SEQUENCE, SEED = 40, 12, 32, 5
TINY = [
    "model.vocab_size=512", f"model.sequence_length={SEQUENCE}", "model.num_layers=1", "model.hidden_size=32",
    "model.moe.num_experts=4", "model.moe.expert_hidden_size=16", f"batch.global_batch_tokens={ROWS * SEQUENCE}",
    "batch.micro_batch_size=1", f"batch.total_tokens={STEPS * ROWS * SEQUENCE}", "schedule.warmup_steps=2",
    "checkpoint.every_steps=2", "evaluation.every_steps=1000", "evaluation.max_rows=4", "metrics.log_every_steps=1",
    "metrics.wandb=off", "tokenizer.vocab_size=400", f"seed={SEED}",
]  # fmt: skip
PLAIN = ["data=files", "data.paths=[a.jsonl]", "data.validation_fraction=0.2"]
# The small source is read several times, and the weights change on the way.
MIXED = [
    "data=mixture", "+data@data.sources.a=files", "data.sources.a.paths=[a.jsonl]", "+data.weights.a=0.7",
    "+data@data.sources.b=files", "data.sources.b.paths=[b.jsonl]", "+data.weights.b=0.3",
    "data.sources.a.validation_fraction=0.2", "data.sources.b.validation_fraction=0.2",
    "data.phases=[{step: 11, weights: {a: 1, b: 2}}]",
]  # fmt: skip
PHASES = {"plain": [(0, [1])], "mixed": [(0, [7, 3]), (11 * ROWS, [1, 2])]}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = sorted(topics)
    for file, chosen in (("a.jsonl", names[::4]), ("b.jsonl", names[1:13])):
        rows = "".join(json.dumps({"text": topics[name][:1500]}) + "\n" for name in chosen)
        (tmp_path / file).write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_pretrain", "train", "run.name=run", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def train_rows() -> list[dict]:
    path = Path("outputs/run/metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["kind"] == "train"]


def kill_after_some_steps(attempt: int, process: subprocess.Popen[str]) -> None:
    """Enough of them that a checkpoint lies between: later ones are done again by the next launch."""
    deadline = time.monotonic() + 150
    while sum(row["attempt"] == attempt for row in train_rows()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def expected_hashes(words: list[str], phases: list[tuple[int, list[int]]]) -> list[str]:
    """After every step, the sum over all positions so far of the hash of the row that belongs there."""
    corpus, _ = prepare_corpora(load([*TINY, *words]), lambda line: None)
    if len(phases[0][1]) == 1:
        sources = [(corpus.train, SEED)]
    else:
        sources = [(corpus.sources[name].train, seed_of(SEED, name)) for name in sorted(corpus.sources)]
    orders = [RowOrder(count_rows(reader, SEQUENCE), seed, True) for reader, seed in sources]
    served, total, hashes = [0] * len(sources), 0, []
    for position, number in enumerate(plain_loop(phases, STEPS * ROWS).tolist()):
        _, row = orders[number].row(served[number])
        tokens = sources[number][0].read(row * SEQUENCE, (row + 1) * SEQUENCE + 1)
        total += xxhash.xxh64_intdigest(tokens.tobytes(), seed=position)
        served[number] += 1
        if (position + 1) % ROWS == 0:
            hashes.append(f"{total % 2**64:016x}")
    if len(sources) == 2:
        assert served[1] > 1.5 * orders[1].num_rows, "the small source must be read more than once"
    return hashes


@pytest.mark.parametrize(
    "name, words, ranks", [("plain", PLAIN, (1, 2, 4, 3)), ("mixed", MIXED, (2, 3, 1))], ids=["plain", "mixed"]
)
def test_kills_and_other_ranks_consume_the_rows_of_an_uninterrupted_run(
    home: Path, name: str, words: list[str], ranks: tuple[int, ...]
):
    """A kill in the middle of each launch but the last, some steps after its last checkpoint."""
    for number, processes in enumerate(ranks):
        process = start(*(TINY + words if number == 0 else []), f"parallel.processes={processes}")
        if number < len(ranks) - 1:
            kill_after_some_steps(number, process)
        else:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output
    rows = train_rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "no step is missing or twice"
    assert sorted({row["attempt"] for row in rows}) == list(range(len(ranks))), "every launch has trained"
    assert [row["data/token_hash"] for row in rows] == expected_hashes(words, PHASES[name])
    if name == "mixed":
        last = rows[-1]
        assert last["data/a/tokens"] + last["data/b/tokens"] == last["tokens"] == STEPS * ROWS * SEQUENCE
        assert last["data/b/epochs"] > 1.5
        # To a row in each phase.
        assert abs(last["data/b/tokens"] / SEQUENCE - (0.3 * 11 + 2 / 3 * (STEPS - 11)) * ROWS) < 2
        assert "source b: " in output and "begins again in a new order" in output
        assert "[repeats]" in output and "source b has been read once" in output
        _refuses_another_corpus("b.jsonl")


def _refuses_another_corpus(file: str) -> None:
    """One line that says what is different, and where: the tokenizer is learnt from all sources, the rest is b's."""
    with open(file, "a") as corpus:
        corpus.writelines(json.dumps({"text": text}) + "\n" for text in ("one more", "two more", "three more"))
    process = start("parallel.processes=1")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "the corpus has changed" in line]
    about_a, _, about_b = line.partition("source b: ")
    assert "source a: tokenizer" in about_a and "documents" not in about_a
    assert "training documents" in about_b and f"{file} had" in about_b
