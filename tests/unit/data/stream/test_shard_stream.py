"""Streams: the order of rows follows from the shards, whoever writes them, whenever, and how often."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers.corpora import files, hub
from helpers.streams import TOKENIZER, open_inline, streaming, write_lines

from moe_pretrain.data import prepare_corpus
from moe_pretrain.data.documents import hub as hub_module
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.documents.document import is_validation
from moe_pretrain.data.documents.hub import START
from moe_pretrain.data.documents.work_units import documents
from moe_pretrain.data.loader import TrainLoader
from moe_pretrain.data.rows.permutation import RowPermutation
from moe_pretrain.data.shards.unit_shards import NOTHING
from moe_pretrain.data.stream import shard_stream as streaming_module
from moe_pretrain.data.stream.rows import StreamedRows, Windows
from moe_pretrain.data.stream.shard_stream import Cancelled, ShardStream
from moe_pretrain.data.stream.writer import Demand

SEQUENCE = 16
SEED = 3


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """These writers work when they are waited for, and no power fails."""
    monkeypatch.setattr(streaming_module, "_POLL_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def corpus(tmp_path):
    """Some 30 shards in three files."""
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", 200, first=200 * number)
    return files(tmp_path / "*.jsonl", fraction=0.1)


@pytest.fixture
def hub_corpus(corpus, tmp_path):
    return hub(name="json", files=tuple(f"file://{tmp_path}/{n}.jsonl" for n in range(3)), validation_fraction=0.1)


def never():
    return False


def shard_tokens(corpus, stream, config):
    """Training tokens of each shard, from the source."""
    if corpus.source == "files":
        units = [list(sources.unit_rows(corpus, unit)) for unit in sources.plan_units(corpus, config.shard_bytes)]
    else:
        units = [list(unit.rows) for unit in sources.stream_units(corpus, START, 0, config.shard_bytes)]
    found = []
    for rows in units:
        texts = [row.text for row in rows if hasattr(row, "text") and not is_validation(row.text, 0.1)]
        lists = stream.tokenizer.encode_batch(texts)
        found.append([token for tokens in lists for token in [*tokens, stream.tokenizer.end_of_document]])
    return found


def expected_rows(shards, config, epoch):
    """Plain loops: all rows of an epoch in their order."""
    tokens = [token for shard in shards for token in shard]
    window_of_token = [i // config.window_shards for i, shard in enumerate(shards) for _ in shard]
    rows = [tokens[first : first + SEQUENCE + 1] for first in range(0, len(tokens) - SEQUENCE, SEQUENCE)]
    found = []
    for window in range(max(window_of_token) + 1):
        own = [row for r, row in enumerate(rows) if window_of_token[r * SEQUENCE + SEQUENCE] == window]
        if own:
            order = RowPermutation(len(own), SEED + window * 2**31, True)
            found += [own[row] for row in order.rows(epoch * len(own) + np.arange(len(own)))]
    assert sorted(found) == sorted(rows)
    return found


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize("window_shards, cache_shards, batch", [(1, None, 5), (2, 6, 7), (5, 11, 16), (100, None, 16)])
def test_positions_name_the_rows_that_plain_loops_find(request, tmp_path, source, window_shards, cache_shards, batch):
    corpus = request.getfixturevalue({"files": "corpus", "hub": "hub_corpus"}[source])
    config = streaming(window_shards=window_shards, cache_shards=cache_shards)
    stream, writer = open_inline(tmp_path / "cache", corpus, config)
    rows = StreamedRows(stream, SEQUENCE, SEED, True)
    shards = shard_tokens(corpus, stream, config)
    assert len(shards) > 20 and len({tuple(shard) for shard in shards}) == len(shards)
    epochs = [expected_rows(shards, config, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1]
    expected = [row for epoch in epochs for row in epoch]
    found = []
    for first in range(0, len(expected) - batch, batch):
        assert rows.reach(first, first + batch, never)
        rows.release(first)
        positions = np.arange(first, first + batch)
        tokens, starts, used = rows.read(positions[::-1].copy())
        found += tokens[::-1].tolist()
        assert used is None
        after_end = np.zeros_like(starts)
        after_end[:, 1:] = tokens[:, :-1] == stream.tokenizer.end_of_document
        assert (starts == after_end).all()
    assert found == expected[: len(found)]
    if cache_shards:
        assert writer.most_cached <= cache_shards
        assert any(kind == "done" for kind, _ in writer.lines)


def loaders(folder, corpus, config, world_size, cursor):
    """One loader for each rank; the first has the writer."""
    made = []
    for rank in range(world_size):
        stream, _ = open_inline(folder, corpus, config, is_first=rank == 0)
        made.append(TrainLoader(stream, SEQUENCE, 24, 1, rank, world_size, SEED, True))
        if cursor is not None:
            made[-1].restore(json.loads(json.dumps(cursor)))
    return made


def run_steps(ranks, first, steps):
    """Hash of the tokens of each step over all ranks, the order of the ranks drawn anew in every step."""
    generator = np.random.default_rng(first)
    hashes = []
    for step in range(first, first + steps):
        assert ranks[0].rows.reach(step * 24, (step + 1) * 24, never)
        total = 0
        for rank in generator.permutation(len(ranks)):
            assert ranks[rank].rows.reach(step * 24, (step + 1) * 24, never)
            total += sum(batch.token_hash for batch in ranks[rank].micro_batches(step))
        ranks[0].rows.release(step * 24)
        hashes.append(total % 2**64)
    return hashes


@pytest.mark.parametrize("schedule", range(6))
def test_any_kills_ranks_and_caches_give_the_same_tokens(request, tmp_path, schedule):
    """Stops at random steps, over two epochs, with the cache whole, bounded, damaged or gone."""
    generator = np.random.default_rng(schedule)
    corpus = request.getfixturevalue(["corpus", "hub_corpus"][schedule % 2])
    plain = streaming(window_shards=3)
    reference = run_steps(loaders(tmp_path / "straight", corpus, plain, 1, None), 0, 40)
    assert len(set(reference)) == 40
    found, cursor = [], None
    while len(found) < 40:
        config = streaming(
            window_shards=3,
            shards_ahead=int(generator.integers(1, 5)),
            cache_shards=[None, 7, 9][generator.integers(3)],
        )
        world_size = int(generator.choice([1, 2, 3, 4]))
        folder = tmp_path / "cache"
        ranks = loaders(folder, corpus, config, world_size, cursor)
        steps = min(int(generator.integers(1, 14)), 40 - len(found))
        found += run_steps(ranks, len(found), steps)
        cursor = ranks[generator.integers(world_size)].state(len(found))
        assert len(json.dumps(cursor)) < 2000
        # Work after the checkpoint, which the kill loses.
        run_steps(ranks, len(found), int(generator.integers(0, 6)))
        what = generator.integers(4)
        if what == 0:
            shutil.rmtree(folder)
        elif what == 1:
            shards = sorted((folder / "train").glob("*.bin"))
            for path in generator.choice(shards, size=min(3, len(shards)), replace=False):
                path.unlink()
    assert found == reference


def test_a_lost_cache_costs_no_second_reading_of_what_lies_before(hub_corpus, tmp_path, monkeypatch):
    ranks = loaders(tmp_path / "cache", hub_corpus, streaming(), 1, None)
    reference = run_steps(ranks, 0, 20)
    cursor = ranks[0].state(16)
    opened, open_stream = [], hub_module.open_stream
    monkeypatch.setattr(
        hub_module, "open_stream", lambda config, start: opened.append(start.rows) or open_stream(config, start)
    )
    again = loaders(tmp_path / "other", hub_corpus, streaming(), 1, cursor)
    assert reference[16:] == run_steps(again, 16, 4)
    written = {int(path.stem.split("-")[1]) for path in (tmp_path / "other" / "train").glob("*.bin")}
    assert cursor["shard"] > 10 and opened[-1] == cursor["rows"]
    assert not written & set(range(2, cursor["shard"])), (
        "only the first shards, for validation, and those that are read"
    )


def test_the_writer_pauses_so_many_shards_ahead(corpus, tmp_path):
    stream, writer = open_inline(tmp_path / "cache", corpus, streaming(shards_ahead=4))
    rows = StreamedRows(stream, SEQUENCE, SEED, True)
    rows.reach(0, 1, never)
    while writer.shards.step():
        pass
    last = writer.shards.demand.last
    assert last in (1, 2)
    assert len(list((tmp_path / "cache" / "train").glob("*.bin"))) == last + 1 + 4
    assert "pauses" in writer.lines[-1][1]


def test_a_shard_that_is_written_again_is_waited_for_until_its_last_file_is_there(corpus, tmp_path):
    stream, _ = open_inline(tmp_path / "cache", corpus, streaming())
    assert StreamedRows(stream, SEQUENCE, SEED, True).reach(0, 1, never)
    index = tmp_path / "cache" / "train" / "shard-00001.idx"
    content = index.read_bytes()
    for state in (None, content[:-1]):
        index.unlink() if state is None else index.write_bytes(state)
        with pytest.raises(Cancelled):
            stream.wait_for_tokens(1, 1, lambda: True)
    index.write_bytes(content)
    stream.wait_for_tokens(1, 1, lambda: True)


def test_the_next_window_stays_while_its_demand_is_on_its_way(corpus, tmp_path):
    """At the end of an epoch the first shards lie there, and are read as soon as they are asked for."""
    stream, writer = open_inline(tmp_path / "cache", corpus, streaming(cache_shards=5))
    writer.demand(0, 3)
    while writer.shards.step():
        pass
    num_shards = stream.num_shards()
    assert num_shards > 20
    writer.demand(num_shards - 2, num_shards - 1)
    while writer.shards.step():
        pass
    there = {int(path.stem.removeprefix("shard-")) for path in (tmp_path / "cache" / "train").glob("*.bin")}
    assert there == {0, 1, 4, num_shards - 2, num_shards - 1}


def test_a_run_that_goes_on_keeps_its_window_before_it_has_asked_for_it(corpus, tmp_path):
    """Its writer first writes a shard of the validation set that was lost."""
    _, writer = open_inline(tmp_path / "cache", corpus, streaming(cache_shards=5))
    writer.demand(0, 3)
    while writer.shards.step():
        pass
    for shard in (0, 1):
        (tmp_path / "cache" / "validation" / f"shard-{shard:05d}.bin").unlink()
        writer.shards.demand = Demand(base_shard=0)
        stream = ShardStream(tmp_path / "cache", corpus, streaming(cache_shards=5), writer, lambda line: None)
        stream.load_tokenizer(TOKENIZER)
        reader, _, _ = stream.validation(never)
        reader.verify()
    there = {path.name for path in (tmp_path / "cache" / "train").glob("*.bin")}
    assert {"shard-00000.bin", "shard-00001.bin"} <= there


def test_shards_are_those_of_prepare(corpus, tmp_path, monkeypatch):
    stream, writer = open_inline(tmp_path / "stream", corpus, streaming(shards_ahead=1000))
    StreamedRows(stream, SEQUENCE, SEED, True).reach(0, 1, never)
    while writer.shards.step():
        pass
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 1500)
    prepared = prepare_corpus(corpus, TOKENIZER, tmp_path / "cache", None, 1, None).folders[0]
    for side in ("train", "validation"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (folder / side).glob("shard-*")}
            for folder in (tmp_path / "stream", prepared)
        )
        assert ours == theirs and len(ours) > 40


def test_validation_is_held_out_of_the_first_shards_and_never_trained_on(corpus, tmp_path):
    config = streaming(validation_shards=5)
    stream, _ = open_inline(tmp_path / "cache", corpus, config)
    reader, _, counts = stream.validation(never)
    ends = [0, *reader.document_ends.tolist()]
    found = [stream.tokenizer.decode(reader.read(a, b - 1).tolist()) for a, b in zip(ends, ends[1:], strict=False)]
    units = sources.plan_units(corpus, config.shard_bytes)[:5]
    texts = [row.text for unit in units for row in sources.unit_rows(corpus, unit) if hasattr(row, "text")]
    assert found == [text for text in texts if is_validation(text, 0.1)] and found
    assert counts.train == sum(not is_validation(text, 0.1) for text in texts)
    every_text = [document.text for document in documents(corpus)]
    assert sum(is_validation(text, 0.1) for text in every_text) > len(found), "later ones are held out, too"


@pytest.mark.parametrize("at_end", ["repeat", "stop"])
def test_the_end_of_the_source_is_said_and_what_follows_is_an_option(corpus, tmp_path, at_end):
    lines = []
    stream, _ = open_inline(tmp_path / "cache", corpus, streaming(at_end=at_end), lines)
    loader = TrainLoader(stream, SEQUENCE, 24, 1, 0, 1, SEED, True)
    steps = [step for step, _ in zip(range(300), loader.iterate(0), strict=False)]
    num_rows = len(expected_rows(shard_tokens(corpus, stream, stream.config), stream.config, 0))
    assert len(steps) == (num_rows // 24 if at_end == "stop" else 300)
    then = "its next epoch follows" if at_end == "repeat" else "the run ends with it"
    (told,) = [line for line in lines if "left out" not in line]
    assert "ends after" in told and f"{num_rows:,} rows" in told and then in told


def test_what_is_waited_for_is_said(corpus, tmp_path):
    lines = []
    stream, writer = open_inline(tmp_path / "cache", corpus, streaming(stall_seconds=0.0), lines)
    writer.check = lambda: None  # it does nothing any more
    asked = iter([False] * 5 + [True] * 5)
    with pytest.raises(Exception, match="^$"):
        StreamedRows(stream, SEQUENCE, SEED, True).reach(0, 10**6, lambda: next(asked))
    assert lines and "waiting for shard" in lines[0] and "0 s so far; the writer of a test" in lines[0]


@pytest.mark.parametrize("keep_cache", [True, False])
def test_a_source_that_changed_is_refused(hub_corpus, tmp_path, keep_cache):
    ranks = loaders(tmp_path / "cache", hub_corpus, streaming(cache_shards=7), 1, None)
    run_steps(ranks, 0, 25)
    cursor = ranks[0].state(25)
    for path in tmp_path.glob("*.jsonl"):
        path.write_text(path.read_text().replace("word", "work"))
    shutil.rmtree(tmp_path / "cache" / "train")
    if not keep_cache:
        shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="has changed; choose another run") as caught:
        run_steps(loaders(tmp_path / "cache", hub_corpus, streaming(cache_shards=7), 1, cursor), 25, 3)
    assert "\n" not in str(caught.value)


def test_settings_that_decide_the_order_must_stay(corpus, tmp_path):
    ranks = loaders(tmp_path / "cache", corpus, streaming(), 1, None)
    run_steps(ranks, 0, 2)
    cursor = ranks[0].state(2)
    with pytest.raises(ValueError, match="streaming.window_shards=3 must stay 2"):
        loaders(tmp_path / "cache", corpus, streaming(window_shards=3), 1, cursor)
    with pytest.raises(ValueError, match="streaming.mode"):
        loaders(tmp_path / "cache", corpus, streaming(), 1, None)[0].restore(None)


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"cache_shards": 4}, "cache_shards=4 must be at least 5"),
    ],
)
def test_mistakes_in_the_settings(changes, fragment):
    with pytest.raises(ValueError, match=fragment):
        streaming(**changes)


def test_a_corpus_that_is_too_small_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no document with text in the first 1 shards of files: .* \(1 rows read\)"):
        open_inline(tmp_path / "cache", files(tmp_path / "a.jsonl"), streaming())


def test_ranks_that_see_another_folder_are_refused(corpus, tmp_path):
    first, _ = open_inline(tmp_path / "one", corpus, streaming())
    first.agree(17)
    same = ShardStream(tmp_path / "one", corpus, streaming(), None, print)
    same.agree(17)
    for folder, number in ((tmp_path / "two", 17), (tmp_path / "one", 18)):
        with pytest.raises(ValueError, match="must be one folder for all ranks"):
            ShardStream(folder, corpus, streaming(), None, print).agree(number)


def test_windows_by_hand():
    """Shards of 10 tokens, sequences of 4, two shards to a window: rows end at tokens 5, 9, 13, 17, 21, ..."""
    windows = Windows(2, 4)
    for _ in range(5):
        windows.add(10)
    assert [windows.rows(window) for window in range(2)] == [range(0, 4), range(4, 9)]
    assert windows.find(8) == 1 and windows.find(9) is None
    assert windows.shards(1) == range(1, 4), "row 4 begins at token 16"
    windows.end()
    assert windows.num_rows == 12 and windows.rows(2) == range(9, 12)
    assert windows.shards(2) == range(3, 5)


def test_rows_that_are_left_out_are_counted_and_said(tmp_path):
    rows = [{"text": f"word {number} " * 30} for number in range(400)]
    for number in (3, *range(150, 170)):
        rows[number] = {"text": None}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    corpus = files(tmp_path / "a.jsonl", invalid_text="skip")
    stream, _ = open_inline(tmp_path / "cache", corpus, streaming(), lines)
    StreamedRows(stream, SEQUENCE, SEED, True).reach(0, 10**4, never)
    told = [line for line in lines if "left out" in line]
    assert len(told) == 2 and told[0].endswith(" left out: 1 without a text")
    read, without = re.search(r"of the (\d+) rows .* left out: (\d+) without a text$", told[1]).groups()
    assert 10 <= int(without) <= 21 and int(without) == sum(row["text"] is None for row in rows[: int(read)])


@pytest.mark.parametrize("policy", ["count", "drop", "ignore"])
@pytest.mark.parametrize("kind", ["files", "hub"])
def test_documents_of_the_validation_set_are_looked_for_in_the_whole_stream(tmp_path, policy, kind):
    """Twins of held-out documents stand before them, behind them, and long after the first shards."""
    words = [f"{n} {' '.join(str(n * k % 997) for k in range(60))}" for n in range(1, 61)]
    held_out = [text for text in words[:20] if is_validation(text, 0.1)]
    twins = [f"{text} end{n}" for text in held_out for n in range(12) if not is_validation(f"{text} end{n}", 0.1)]
    assert len(held_out) > 1
    texts = [twins[0], *words[:20], *twins[1:8], *words[20:], *twins[8:]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = files(path, fraction=0.1, near_duplicates=policy)
    if kind == "hub":
        corpus = hub(name="json", files=(f"file://{path}",), validation_fraction=0.1, near_duplicates=policy)
    config = streaming(shard_bytes=6000, validation_shards=1)
    lines: list[str] = []
    stream, writer = open_inline(tmp_path / "cache", corpus, config, lines)
    validation, _, _ = stream.validation(never)
    in_set = {text for text in words[:20] if is_validation(text, 0.1)}
    assert validation.num_documents == len(in_set)
    records, shard = [], 0
    while record := stream.wait_for_record(shard, shard, never):
        records.append(record)
        shard += 1
    total = sum((record.counts for record in records), NOTHING)
    found = 0 if policy == "ignore" else len(twins)
    assert total.near_duplicates == found and total.duplicate == (found if policy == "drop" else 0)
    assert total.read == len(texts) == total.train + total.validation + total.duplicate
    said = [line for line in lines if "are near duplicates of documents of the validation set (0 exact), kept" in line]
    assert bool(said) == (policy == "count")
    assert any("on both sides, exactly or nearly" in line for line in lines) == (policy == "drop")
    # The writer that goes on after these shards writes what comes then as one that wrote them all.
    shutil.rmtree(tmp_path / "cache" / "units")
    again, _ = open_inline(tmp_path / "cache", corpus, config)
    assert [again.wait_for_record(n, n, never) for n in range(shard)] == records
