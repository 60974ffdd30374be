"""Kills and other numbers of ranks: every row once, in the order of an uninterrupted run (defects C36 to C39).

Each launch is the training route on real ranks; all but the last are killed in the middle of a step, some steps after
their last checkpoint. What the ranks were given is compared, row by row, with what is worked out here from the
shards, and so is the run's own hash over all tokens consumed.
"""

import json
import os
import signal
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import xxhash
from helpers.processes import RanksFailed, run_on_ranks
from helpers.turns import plain_loop

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.data.rows.packing import count_rows
from moe_pretrain.data.rows.permutation import RowPermutation
from moe_pretrain.data.rows.positions import seed_of
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.train import build as pretrain
from moe_pretrain.train.corpora import prepare_corpora

STEPS, ROWS, SEQUENCE, SEED = 13, 12, 32, 5
TINY = [
    "model.vocab_size=512", f"model.sequence_length={SEQUENCE}", "model.num_layers=1", "model.hidden_size=32",
    "model.moe.num_experts=4", "model.moe.expert_hidden_size=16", f"batch.global_batch_tokens={ROWS * SEQUENCE}",
    "batch.micro_batch_size=1", f"budget.tokens={STEPS * ROWS * SEQUENCE}", "schedule.warmup_steps=2",
    "checkpoint.every_steps=2", "evaluation.every_steps=1000", "evaluation.max_rows=4", "metrics.log_every_steps=1",
    "metrics.wandb=off", "tokenizer.vocab_size=400", f"seed={SEED}", "run.name=run", "run.prepare_workers=1",
    "engine.device=cpu", "checkpoint.asynchronous=false",
]  # fmt: skip
PLAIN = ["data=files", "data.paths=[a.jsonl]", "data.validation_fraction=0.2"]
# The small source is read several times, and the weights change on the way.
MIXED = [
    "data=mixture", "+data@data.sources.a=files", "data.sources.a.paths=[a.jsonl]", "+data.weights.a=0.7",
    "+data@data.sources.b=files", "data.sources.b.paths=[b.jsonl]", "+data.weights.b=0.3",
    "data.sources.a.validation_fraction=0.2", "data.sources.b.validation_fraction=0.2",
    "data.phases=[{step: 5, weights: {a: 1, b: 2}}]",
]  # fmt: skip
PHASES = {"plain": [(0, [1])], "mixed": [(0, [7, 3]), (5 * ROWS, [1, 2])]}
DIES_IN_STEP = (3, 5, 9)  # of the first launch, the second, the third: after the checkpoints of steps 2, 4 and 8


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = sorted(topics)
    for file, chosen in (("a.jsonl", names[::4]), ("b.jsonl", names[1:13])):
        rows = "".join(json.dumps({"text": topics[name][:400]}) + "\n" for name in chosen)
        (tmp_path / file).write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _launch(home: str, words: list[str], dies_in_step: int | None) -> None:
    """One rank of one launch; writes down (position, tokens) of every row it is given, by step."""
    os.chdir(home)
    path, given = Path(f"given-{os.environ['RANK']}.json"), {}
    original = TrainEngine.step

    def step(self, number, micro_batches):
        if number == dies_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        given[number] = [
            (position, row)
            for batch in micro_batches
            for position, row in zip(batch.row_positions.tolist(), batch.input_ids.tolist(), strict=True)
        ]
        path.write_text(json.dumps(given), encoding="utf-8")
        return original(self, number, micro_batches)

    TrainEngine.step = step
    config = load(words)
    assert pretrain.train(config, preflight(config, config.parallel.processes)) == 0


def launch(
    home: Path, words: list[str], ranks: int, dies_in_step: int | None
) -> dict[int, list[tuple[int, list[int]]]]:
    """The rows that each step of this launch was given, in rank order."""
    for path in home.glob("given-*.json"):
        path.unlink()
    arguments = (str(home), [*words, f"parallel.processes={ranks}"], dies_in_step)
    if dies_in_step is None:
        run_on_ranks(_launch, ranks, *arguments)
    else:
        with pytest.raises(RanksFailed, match="exit code -9"):
            run_on_ranks(_launch, ranks, *arguments)
    by_rank = [json.loads((home / f"given-{rank}.json").read_text()) for rank in range(ranks)]
    return {int(step): [row for given in by_rank for row in given[step]] for step in by_rank[0]}


def expected_rows(
    words: list[str], phases: list[tuple[int, list[int]]]
) -> tuple[list[list[int]], list[str], list[float]]:
    """Tokens of the row at every position, the run's hash after every step, and the epochs of each source."""
    corpus, _ = prepare_corpora(load(words), lambda line: None)
    sources = [(corpus.train, SEED)]
    if len(phases[0][1]) > 1:
        sources = [(corpus.sources[name].train, seed_of(SEED, name)) for name in sorted(corpus.sources)]
    orders = [RowPermutation(count_rows(reader, SEQUENCE), seed, True) for reader, seed in sources]
    served, total, rows, hashes = [0] * len(sources), 0, [], []
    for position, number in enumerate(plain_loop(phases, STEPS * ROWS).tolist()):
        _, row = orders[number].row(served[number])
        tokens = sources[number][0].read(row * SEQUENCE, (row + 1) * SEQUENCE + 1)
        total += xxhash.xxh64_intdigest(tokens.tobytes(), seed=position)
        rows.append(tokens[:-1].tolist())
        served[number] += 1
        if (position + 1) % ROWS == 0:
            hashes.append(f"{total % 2**64:016x}")
    return rows, hashes, [count / order.num_rows for count, order in zip(served, orders, strict=True)]


@pytest.mark.parametrize(
    "name, source, ranks", [("plain", PLAIN, (1, 2, 4, 3)), ("mixed", MIXED, (2, 3, 1))], ids=["plain", "mixed"]
)
@pytest.mark.slow
def test_kills_and_other_ranks_consume_the_rows_of_an_uninterrupted_run(
    home: Path, name: str, source: list[str], ranks: tuple[int, ...]
):
    words = [*TINY, *source]
    expected, hashes, epochs = expected_rows(words, PHASES[name])
    consumed: dict[int, list[tuple[int, list[int]]]] = {}
    for number, processes in enumerate(ranks):
        dies_in_step = DIES_IN_STEP[number] if number < len(ranks) - 1 else None
        given = launch(home, words, processes, dies_in_step)
        resumed_at = 0 if number == 0 else DIES_IN_STEP[number - 1] // 2 * 2
        assert list(given) == list(range(resumed_at, dies_in_step or STEPS))
        for step, rows in given.items():
            assert consumed.get(step, rows) == rows, "a step that is done again is given the same rows"
        consumed |= given
    positions = [position for step in range(STEPS) for position, _ in consumed[step]]
    assert positions == list(range(STEPS * ROWS)), "none missing, none repeated, in order"
    assert [row for step in range(STEPS) for _, row in consumed[step]] == expected
    logged = [json.loads(line) for line in (home / "outputs/run/metrics.jsonl").read_text().splitlines()]
    train = [row for row in logged if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["data/token_hash"] for row in train] == hashes
    if name == "mixed":
        last = train[-1]
        assert last["data/a/tokens"] + last["data/b/tokens"] == last["tokens"] == STEPS * ROWS * SEQUENCE
        assert [last["data/a/epochs"], last["data/b/epochs"]] == epochs and epochs[1] > 1.5
        (event,) = [row for row in logged if row.get("event") == "repeats"]
        before, at = train[event["step"] - 2], train[event["step"] - 1]
        assert before["data/b/epochs"] <= 1 < at["data/b/epochs"] and "source b" in event["message"]
        validation = next(row for row in logged if row["kind"] == "validation")
        shares = np.bincount(plain_loop(PHASES[name], STEPS * ROWS)) / (STEPS * ROWS)
        losses = [validation[f"validation/{source}/loss"] for source in "ab"]
        assert validation["validation/loss"] == pytest.approx(np.dot(shares, losses)) and losses[0] != losses[1]
        _refuses_another_corpus(home, words)


def _refuses_another_corpus(home: Path, words: list[str]) -> None:
    """One line that says what is different, and where: the tokenizer is learnt from all sources, the rest is b's."""
    with open("b.jsonl", "a", encoding="utf-8") as corpus:
        corpus.writelines(json.dumps({"text": text}) + "\n" for text in ("one more", "two more", "three more"))
    with pytest.raises(RanksFailed) as caught:
        run_on_ranks(_launch, 1, str(home), words, None)
    (line,) = [line for line in str(caught.value).splitlines() if "the corpus has changed" in line]
    about_a, _, about_b = line.partition("source b: ")
    assert "source a: tokenizer" in about_a and "documents" not in about_a
    assert "training documents" in about_b and "b.jsonl had" in about_b
