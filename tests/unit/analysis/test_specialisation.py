"""Information between experts and classes, where it is known exactly, and the command that measures it on a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.corpora import write_shards
from torch import Tensor

from moe_pretrain import cli
from moe_pretrain.analysis import specialisation as command
from moe_pretrain.analysis.specialisation import (
    NUM_CLASSES,
    Tally,
    _batches,
    entropy,
    examine,
    gate_of,
    information,
    most_frequent_classes,
)
from moe_pretrain.config.load import load, read_run
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.data import IGNORE_INDEX, MicroBatch, ShardReader
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, RouterUse, Routing

TOLERANCE = 1e-12


def small(*overrides: str) -> Config:
    """Two MoE layers of eight experts."""
    shape = ["model.vocab_size=64", "model.sequence_length=12", "model.num_layers=2", "model.hidden_size=16"]
    shape += ["model.num_heads=2", "model.moe.expert_hidden_size=20", "model.init_std=0.2"]
    batch = ["batch.global_batch_tokens=48", "budget.tokens=96", "batch.micro_batch_size=2"]
    return load([*shape, *batch, "tokenizer=pretrained", "tokenizer.path=unused", *overrides])


def loop(joint: list[list[float]]) -> dict[str, float]:
    """From the definitions, pair by pair."""
    total = sum(map(sum, joint))
    p = [[value / total for value in row] for row in joint]
    of_class, of_expert = [sum(row) for row in p], [sum(column) for column in zip(*p, strict=True)]
    mutual = conditional = 0.0
    for row, py in zip(p, of_class, strict=True):
        for value, pe in zip(row, of_expert, strict=True):
            if value:
                mutual += value * math.log2(value / (py * pe))
                conditional -= value * math.log2(value / py)
    return {"mutual": mutual, "experts_given_class": conditional}


def test_10_independent_is_zero_and_a_bijection_is_everything() -> None:
    independent = information(torch.tensor([0.5, 0.25, 0.25]).double()[:, None] * torch.tensor([3.0, 1.0]).double())
    assert independent.mutual == pytest.approx(0, abs=TOLERANCE)
    assert independent.experts_given_class == pytest.approx(independent.experts)
    bijection = information(torch.eye(8, dtype=torch.float64)[torch.randperm(8)] * 5)
    assert bijection.mutual == pytest.approx(3, abs=TOLERANCE)
    assert bijection.experts_given_class == pytest.approx(0, abs=TOLERANCE)
    one = information(torch.tensor([[2.0, 0.0], [5.0, 0.0]]).double())
    assert (one.mutual, one.experts) == (pytest.approx(0, abs=TOLERANCE), 0)


@pytest.mark.parametrize("shape", [(2, 5), (7, 3), (4, 4)])
def test_10_equals_the_definition_within_its_bounds(shape: tuple[int, int]) -> None:
    joint = torch.randint(0, 4, shape).double()
    joint[0, 0] += 1
    found = information(joint)
    for name, value in loop(joint.tolist()).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9)
    assert -TOLERANCE <= found.mutual <= min(found.experts, found.classes) + TOLERANCE
    assert found.mutual == pytest.approx(found.experts - found.experts_given_class, abs=TOLERANCE)
    assert found.experts <= math.log2(shape[1])


def test_entropy_is_in_bits_and_of_shares() -> None:
    mass = torch.tensor([[1.0, 1, 0, 0], [3, 3, 3, 3], [7, 0, 0, 0], [0, 0, 0, 0]]).double()
    assert entropy(mass).tolist() == pytest.approx([1, 2, 0, 0], abs=TOLERANCE)


def make_routing(pairs: list[tuple[int, int, float]]) -> Routing:
    zero = torch.zeros((), dtype=torch.float64)
    token, expert, weight = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return Routing(token, expert, weight, None, RouterUse(torch.zeros(3, dtype=torch.float64), zero, zero, zero))


def test_gate_shares_the_weights_of_each_token() -> None:
    gate = gate_of(make_routing([(0, 2, 0.3), (0, 0, 0.1), (2, 1, 5.0), (3, 1, 0.0)]), 4, 3)
    expected = torch.tensor([[0.25, 0, 0.75], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(gate, expected, atol=1e-7, rtol=0)


def test_classes_are_the_most_frequent_ids_and_the_rest() -> None:
    ids = torch.tensor([9, 9, 9, 4, 4, 7, 100, 4, 9, 50, 7])
    assert most_frequent_classes(ids, 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 1, 0, 2, 2]
    assert most_frequent_classes(ids, 20).tolist()[3] == 1


def test_tally_adds_up_hard_soft_and_shuffled() -> None:
    tokens, experts, classes = 40, 3, 4
    gate = torch.rand(tokens, experts, dtype=torch.float64)
    gate /= gate.sum(1, keepdim=True)
    gate[5] = 0  # a token that no expert served
    own, dealt = torch.randint(0, classes, (tokens,)), torch.randint(0, classes, (tokens,))
    tally = Tally(classes, experts)
    for part in (slice(0, 13), slice(13, 14), slice(14, tokens)):
        tally.add(gate[part], own[part], dealt[part])
    found = tally.result()
    hard, soft = [[0.0] * experts for _ in range(classes)], [[0.0] * experts for _ in range(classes)]
    shuffled, entropies = [[0.0] * experts for _ in range(classes)], []
    for token, row in enumerate(gate.tolist()):
        if token == 5:
            continue
        hard[own[token]][row.index(max(row))] += 1
        shuffled[dealt[token]][row.index(max(row))] += 1
        for expert, share in enumerate(row):
            soft[own[token]][expert] += share
        entropies.append(-sum(share * math.log2(share) for share in row))
    assert found.tokens == tokens - 1
    assert found.gate_entropy == pytest.approx(sum(entropies) / len(entropies))
    for name in ("mutual", "experts_given_class"):
        assert getattr(found.hard, name) == pytest.approx(loop(hard)[name])
        assert getattr(found.soft, name) == pytest.approx(loop(soft)[name])
    assert found.hard_shuffled == pytest.approx(loop(shuffled)["mutual"])
    assert found.soft.mutual < found.hard.mutual


def test_the_shuffled_baseline_is_the_bias_of_a_finite_sample() -> None:
    tokens, experts, classes = 4000, 8, 16
    gate = torch.nn.functional.one_hot(torch.randint(0, experts, (tokens,)), experts).double()
    own = torch.randint(0, classes, (tokens,))
    tally = Tally(classes, experts)
    tally.add(gate, own, own[torch.randperm(tokens)])
    found = tally.result()
    bias = (experts - 1) * (classes - 1) / (2 * tokens * math.log(2))
    assert found.hard_shuffled == pytest.approx(bias, rel=0.35) and found.hard.mutual == pytest.approx(bias, rel=0.35)


@pytest.fixture
def readers(tmp_path: Path) -> dict[str, ShardReader]:
    """Two validation sets of a few documents."""
    generator = torch.Generator().manual_seed(0)
    sets = {}
    for name, lengths in {"first": [40, 9, 70, 33], "second": [25, 61]}.items():
        texts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]
        sets[name] = write_shards(tmp_path / name, texts, vocab_size=64)
    return sets


@pytest.mark.parametrize("router", ["top_k", "attentive", "attentive_low_rank", "top_p", "hash"])
def test_examines_every_router_by_next_token_and_by_set(router: str, readers: dict[str, ShardReader]) -> None:
    config = small(f"router={router}", *({"attentive_low_rank": ["router.gate_rank=4"]}.get(router, [])))
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    for layer in model.moe_layers():
        layer.router.use_token_counts(torch.ones(config.model.vocab_size, dtype=torch.int64))
    tables = examine(model.eval(), config, plan_run(config, 1), readers)
    assert list(tables) == ["next token", "validation set"]
    tokens = sum(
        int((batch.labels != IGNORE_INDEX).sum()) for _, batch in _batches(config, plan_run(config, 1), readers)
    )
    assert tokens > 150
    for kind, classes in (("next token", NUM_CLASSES), ("validation set", 2)):
        assert len(tables[kind]) == 2
        for row in tables[kind]:
            assert row.tokens == tokens
            assert 0 < row.hard.mutual <= min(row.hard.experts, row.hard.classes) <= math.log2(classes)
            assert 0 < row.gate_entropy <= row.soft.experts


def test_a_router_that_follows_the_class_is_seen(
    readers: dict[str, ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expert is the token's label modulo 4: all of H(E) is information; the shuffled baseline stays below."""
    config = small()
    model = DecoderLM(config.model, config.router, ExpertShard())

    def gates(model: DecoderLM, batch: MicroBatch, seed: int) -> list[Tensor]:
        return [torch.nn.functional.one_hot(batch.labels.flatten().clamp(min=0) % 8, 8).double()] * 2

    monkeypatch.setattr(command, "_gates", gates)
    monkeypatch.setattr(command, "NUM_CLASSES", config.model.vocab_size)
    for row in examine(model, config, plan_run(config, 1), readers)["next token"]:
        assert row.hard.mutual == pytest.approx(row.hard.experts) and row.hard.experts > 2.5
        assert row.hard_shuffled < 0.7 * row.hard.mutual
        assert row.gate_entropy == 0


def test_wrong_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["specialise", str(tmp_path)]) == 2
    assert cli.main(["specialise"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert f"FOLDER={tmp_path} must have runs below it" in errors[0] and "required: FOLDER" in errors[1]
    (tmp_path / "metrics.jsonl").touch()
    assert cli.main(["specialise", str(tmp_path)]) == 2
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_values(config)))))


def test_a_run_is_read_as_it_was_started_and_a_dense_one_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_config(tmp_path, small("seed=3"))
    found, wanted = read_run(tmp_path, lambda file: file), small("seed=3")
    assert replace(found, run=wanted.run) == wanted and found.run.output_dir == str(tmp_path.parent), "where it lies"
    write_config(tmp_path, small("router=dense"))
    assert cli.main(["specialise", str(tmp_path)]) == 2
    assert "has nothing to specialise" in capsys.readouterr().err
