"""Mixtures: rows of several corpora against a plain loop, one tokenizer, and every mistake in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import files, write_shards
from helpers.turns import plain_loop

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data import (
    BuiltinCorpusConfig,
    MixedShards,
    MixtureConfig,
    RunLength,
    TokenizerConfig,
    check_mixture,
    prepare_mixture,
)
from moe_pretrain.data.documents.work_units import documents
from moe_pretrain.data.loader import TrainLoader
from moe_pretrain.data.prepare import mixture as mixture_preparation
from moe_pretrain.data.prepare.mixture import TokenizedMixture
from moe_pretrain.data.rows.micro_batch import wrap_to_int64
from moe_pretrain.data.rows.mixture import PhaseConfig
from moe_pretrain.data.rows.packing import count_rows
from moe_pretrain.data.rows.permutation import RowPermutation
from moe_pretrain.data.rows.positions import seed_of
from moe_pretrain.train.corpora import steps_until_exhausted

SEQUENCE = 7
NAMES = ("code", "math", "web")


def config_of(sources, weights, phases=(), when_exhausted="repeat"):
    phases = tuple(PhaseConfig(step, dict(zip(sorted(sources), w, strict=True))) for step, w in phases)
    return MixtureConfig("mixture", sources, dict(zip(sorted(sources), weights, strict=True)), phases, when_exhausted)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    generator = np.random.default_rng(0)

    def texts(documents):
        return [generator.integers(10, 1000, size=generator.integers(0, 30)).tolist() for _ in range(documents)]

    return {name: write_shards(tmp_path_factory.mktemp(name), texts(10 * n + 5)) for n, name in enumerate(NAMES)}


def mixed(readers, weights, phases=(), when_exhausted="repeat"):
    builtin = BuiltinCorpusConfig("builtin", 0.5, "ignore")
    return MixedShards(readers, config_of(dict.fromkeys(readers, builtin), weights, phases, when_exhausted))


def expected_rows(readers, phases, num_positions, seed):
    """Rows of tokens from position 0 on, one after the other."""
    rows, served = [], dict.fromkeys(NAMES, 0)
    orders = {name: RowPermutation(count_rows(readers[name], SEQUENCE), seed_of(seed, name), True) for name in NAMES}
    for number in plain_loop(phases, num_positions):
        name = NAMES[number]
        _, row = orders[name].row(served[name])
        rows.append(readers[name].read(row * SEQUENCE, (row + 1) * SEQUENCE + 1).tolist())
        served[name] += 1
    return rows, served


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def test_a_hundred_schedules_of_mixtures_read_the_rows_of_the_plain_loop(readers):
    """Any ranks, micro-batches, resume points and annealing, several epochs of the small sources."""
    generator = np.random.default_rng(1)
    for _ in range(100):
        rows = int(generator.choice([4, 6, 12]))
        parts = [generator.integers(1, 6, size=3).tolist() for _ in range(int(generator.integers(1, 4)))]
        steps = [0, *np.cumsum(generator.integers(1, 4, size=len(parts) - 1)).tolist()]
        seed = int(generator.integers(0, 100))
        reader = mixed(readers, parts[0], list(zip(steps[1:], parts[1:], strict=True)))
        last = steps[-1] + int(generator.integers(1, 6))
        phases = [(step * rows, part) for step, part in zip(steps, parts, strict=True)]
        expected, served = expected_rows(readers, phases, last * rows, seed)
        whole = TrainLoader(reader, SEQUENCE, rows, rows, 0, 1, seed, False)
        tokens, total = [], 0
        for step in range(last):
            world = int(generator.choice(divisors(rows)))
            size = int(generator.choice(divisors(rows // world)))
            for rank in range(world):
                loader = TrainLoader(reader, SEQUENCE, rows, size, rank, world, seed, False)
                for batch in loader.micro_batches(step):
                    tokens += [
                        [*a, b[-1]] for a, b in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
                    ]
                    total = wrap_to_int64(total + batch.token_hash)
        assert tokens == expected
        assert total == wrap_to_int64(sum(whole.micro_batches(step)[0].token_hash for step in range(last)))
        use = whole.source_use(last)
        assert {name: one.rows for name, one in use.items()} == served
        for name, one in use.items():
            assert one.epochs == served[name] / count_rows(readers[name], SEQUENCE)


def test_every_epoch_of_a_source_is_a_new_order_of_all_its_rows(readers):
    loader = TrainLoader(mixed(readers, [1, 1, 2]), SEQUENCE, 4, 4, 0, 1, 0, True)
    rows = count_rows(readers["code"], SEQUENCE)
    seen = []
    for step in range(3 * rows):
        (batch,) = loader.micro_batches(step)
        number = plain_loop([(0, [1, 1, 2])], 4 * step + 4)[-4:].tolist().index(0)
        seen.append(tuple(batch.input_ids[number].tolist()))
    epochs = [seen[:rows], seen[rows : 2 * rows], seen[2 * rows :]]
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


@pytest.mark.parametrize("method", ["concatenate", "best_fit"])
def test_running_out_is_foretold(readers, method):
    """``exhaustion_steps`` is the step in which the plain count passes the source's rows, also over a phase."""
    reader = mixed(readers, [3, 1, 0], [(2, [1, 1, 2])])
    loader = TrainLoader(reader, SEQUENCE, 6, 6, 0, 1, 0, True, method=method)
    sources = {name: TrainLoader(one, SEQUENCE, 1, 1, 0, 1, 0, True, method=method) for name, one in readers.items()}
    found = loader.exhaustion_steps()
    assert found.keys() == set(NAMES) and found["code"] < 30
    for name, step in found.items():
        rows = sources[name].num_rows
        assert loader.source_use(step)[name].rows <= rows < loader.source_use(step + 1)[name].rows
    forever = TrainLoader(mixed(readers, [1, 1, 1], [(1, [0, 1, 1])]), SEQUENCE, 6, 6, 0, 1, 0, True)
    assert forever.exhaustion_steps().keys() == {"math", "web"}


def test_position_a_trillion_is_as_quick_as_the_first(readers):
    loader = TrainLoader(mixed(readers, [0.5, 0.3, 0.2], [(10**6, [0.1, 0.1, 0.8])]), SEQUENCE, 12, 12, 0, 1, 0, True)
    (batch,) = loader.micro_batches(10**12 // 12)
    assert batch.row_positions.tolist() == list(range(10**12 // 12 * 12, 10**12 // 12 * 12 + 12))
    use = loader.source_use(10**12 // 12)
    assert sum(one.rows for one in use.values()) == 10**12 // 12 * 12


def test_a_mixture_that_stops_ends_before_the_first_repeated_row(readers):
    """By the plain count; and a mixture that repeats, or does not come that far, keeps its plan."""
    rows, parts = 6, [3, 1, 1]
    order = plain_loop([(0, parts)], 300 * rows)
    sizes = [count_rows(readers[name], SEQUENCE) for name in NAMES]
    first = min(np.flatnonzero(order == n)[size] for n, size in enumerate(sizes))

    def steps_of(reader, rows):
        corpus = TokenizedMixture({}, reader.config, {}, Path("tokenizer.json"), {})
        if not corpus.stops_when_exhausted:
            return None
        return steps_until_exhausted(TrainLoader(reader, SEQUENCE, rows, 1, 0, 1, 0, True))

    def steps(when_exhausted):
        return steps_of(mixed(readers, parts, when_exhausted=when_exhausted), rows)

    assert steps("stop") == first // rows < 300
    assert steps("repeat") is None
    with pytest.raises(ValueError, match="data.when_exhausted=stop: data.sources.code has not even enough rows"):
        steps_of(mixed(readers, parts, when_exhausted="stop"), 600)


# ---------------------------------------------------------------- preparation


TOKENIZER = TokenizerConfig("train", 300, None)
RUN = RunLength(num_steps=10, rows_per_step=4, sequence_length=8)


@pytest.fixture
def sources(tmp_path):
    made = {}
    for number, name in enumerate(NAMES):
        path = tmp_path / f"{name}.jsonl"
        letter = "xyz"[number]
        path.write_text("".join(json.dumps({"text": f"{letter * 9} {n * n}"}) + "\n" for n in range(100)))
        made[name] = files(path, fraction=0.2)
    return made


def test_one_tokenizer_is_learnt_from_all_sources(sources, tmp_path):
    config = config_of(sources, [1, 1, 2])
    made = prepare_mixture(config, TOKENIZER, tmp_path / "cache", RUN, 1, None)
    assert len({one.tokenizer.fingerprint for one in made.sources.values()}) == 1
    for letter in "xyz":  # learnt from each: its nine letters are few tokens
        assert len(made.tokenizer.encode_batch([letter * 9])[0]) <= 3
    assert made.shares == {"code": 0.25, "math": 0.25, "web": 0.5}
    for name, counts in made.train_token_counts().items():
        assert counts.sum() == made.sources[name].train.num_tokens
    assert set(made.train_token_counts()) == set(made.validation_sets())
    for name, one in made.sources.items():
        assert one.counts.read == len(list(documents(sources[name]))) == one.counts.train + one.counts.validation
    again = prepare_mixture(config, TOKENIZER, tmp_path / "cache", RUN, 1, None)
    assert again.fingerprint == made.fingerprint
    kinds = [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()]
    assert sorted(kinds) == ["across", *["files"] * 3, "tokenizer"]


def test_the_fingerprint_is_that_of_names_and_sources(sources, tmp_path):
    def fingerprint(named, weights):
        return prepare_mixture(config_of(named, weights), TOKENIZER, tmp_path / "cache", RUN, 1, None).fingerprint

    first = fingerprint(sources, [1, 1, 2])
    assert fingerprint(dict(reversed(sources.items())), [1, 1, 2]) == first
    assert fingerprint(sources, [1, 2, 2]) == first  # weights are in the configuration
    swapped = {**sources, "code": sources["math"], "math": sources["code"]}
    assert fingerprint(swapped, [1, 1, 2]) != first


def test_check_goes_through_every_source(sources, tmp_path):
    config, cache = config_of(sources, [1, 1, 2]), tmp_path / "cache"
    with pytest.raises(ValueError, match="this mixture is not prepared"):
        check_mixture(config, TOKENIZER, cache, RUN)
    made = prepare_mixture(config, TOKENIZER, cache, RUN, 1, None)
    assert check_mixture(config, TOKENIZER, cache, RUN).fingerprint == made.fingerprint
    shard = made.sources["web"].validation.folder / "shard-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"^data\.sources\.web: {shard}: damaged: xxh3 is "):
        check_mixture(config, TOKENIZER, cache, RUN)


def test_errors_name_the_source(sources, tmp_path):
    broken = {**sources, "math": files(tmp_path / "none.txt")}
    for tokenizer in (TOKENIZER, TokenizerConfig("pretrained", 0, str(tmp_path))):
        with pytest.raises(ValueError, match=r"^data\.sources\.\w+: ") as caught:
            prepare_mixture(config_of(broken, [1, 1, 2]), tokenizer, tmp_path / "cache", RUN, 1, None)
        assert "\n" not in str(caught.value)


def test_each_source_is_asked_for_its_share(sources, tmp_path, monkeypatch):
    asked = {}
    original = mixture_preparation.prepare_corpus

    def spy(corpus, tokenizer, cache, tokens_needed, workers, progress):
        asked[corpus.paths[0].rsplit("/")[-1]] = tokens_needed
        return original(corpus, tokenizer, cache, tokens_needed, workers, progress)

    monkeypatch.setattr(mixture_preparation, "prepare_corpus", spy)
    config = config_of(sources, [1, 1, 2], [(5, [0, 1, 0])])
    prepare_mixture(config, TOKENIZER, tmp_path / "cache", RUN, 1, None)
    # 20 rows at 1:1:2, then 20 of math alone; each row of 8 tokens shares one with the next.
    assert asked == {"code.jsonl": 5 * 8 + 1, "math.jsonl": 25 * 8 + 1, "web.jsonl": 10 * 8 + 1}


TWO = ["data=mixture", "+data@data.sources.a=builtin", "+data@data.sources.b=builtin"]


def test_a_mixture_is_composed_from_the_data_group():
    config = load(
        [*TWO, "+data@data.sources.c=files", "data.sources.c.paths=[a.txt]", "+data.weights={a: 1, b: 2, c: 3}"]
    )
    assert [config.data.sources[name].source for name in "abc"] == ["builtin", "builtin", "files"]
    words = [*TWO, "+data.weights.a=0.3", "+data.weights.b=0.7", "data.phases=[{step: 9, weights: {a: 1, b: 0}}]"]
    turns = load(words).data.turns(rows_per_step=10)
    assert turns.counts(90) == [27, 63] and turns.counts(100) == [37, 63]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data=mixture"], "data.sources must name at least one corpus"),
        (["+data.weights.a=0.3"], "data.weights has a: must be one weight for each of data.sources a, b"),
        (["+data.weights={a: 1, b: 1, c: 1}"], "data.weights has a, b, c: must be"),
        (["+data.weights={a: 0.3, b: -0.7}"], "'b': -0.7} must be at least 0"),
        (["+data.weights={a: 0, b: 0}"], "one of them above 0"),
        (["+data.weights={a: 1, b: 0}"], "data.weights.b=0 must be above 0, here or in one of data.phases"),
        (["+data.weights={a: 1, b: x}"], "data.weights.b='x'"),
        (["+data.weights={a: 0.1234567, b: 1}"], "at most 1,000,000: give fewer digits"),
        (["+data.weights={a: 1, b: 1}", "data.phases=[{step: 1, weights: {a: 1}}]"], "data.phases[0].weights has a"),
        (
            ["+data.weights={a: 1, b: 1}", "data.phases=[{step: 0, weights: {a: 1, b: 1}}]"],
            "data.phases: steps [0] must be at least 1 and rise",
        ),
        (
            ["+data.weights={a: 1, b: 1}", "data.phases=[{step: 300, weights: {a: 1, b: 1}}]"],
            "data.phases: step=300 must be below the run's 300 steps",
        ),
        (["+data.weights={a: 1, b: 1}", "data.phases=[{step: 1, weights: {a: 1, b: 1}, x: 1}]"], "data.phases.0.x=1"),
        (["+data.weights={a: 1, b: 1}", "data.when_exhausted=never"], "data.when_exhausted='never'"),
        (["+data.weights={a: 1, b: 1}", "+data.sources.b.x=4"], "data.sources.b.x=4"),
        (
            ["+data.weights={a: 1, b: 1}", "data.sources.b.validation_fraction=2"],
            "data.sources.b.validation_fraction=2 must be below 1",
        ),
        (["+data.weights={a: 1, b: 1}", "+data@evaluation.sets.b=builtin"], "evaluation.sets.b must have another name"),
        (["+data@data.sources.c=mixture"], "data.sources.c.source=mixture must be one of"),
    ],
)
def test_wrong_mixtures_are_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(overrides if overrides == ["data=mixture"] else [*TWO, *overrides])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_in_a_mixture_need_their_tokenizer():
    words = [*TWO, "+data@data.sources.c=tokens", "data.sources.c.paths=[a.npy]", "+data.weights={a: 1, b: 1, c: 1}"]
    with pytest.raises(ConfigError, match="tokenizer.kind=train must be pretrained with data=tokens"):
        load(words)


def test_a_name_must_do_for_metrics():
    with pytest.raises(ValueError, match="data.sources: name 'a/b' must be of letters, digits, - and _"):
        config_of({"a/b": BuiltinCorpusConfig("builtin", 0.5, "ignore")}, [1])
