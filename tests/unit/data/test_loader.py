"""The loader: a step's rows do not depend on ranks, micro-batches, threads or where a run began."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.corpora import write_shards

from moe_pretrain.data.loader import TrainLoader
from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, wrap_to_int64

END = 0
SEQUENCE = 7


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """About 500 tokens in documents of 1 to 20, over several shards; all tokens but END differ."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    fresh = itertools.count(1)
    texts = [[next(fresh) for _ in range(length)] for length in generator.integers(1, 20, size=50)]
    return write_shards(folder, texts, end=END, tokens_per_shard=90)


def loader(reader, rank=0, world_size=1, micro_batch_rows=1, **changes):
    options = {"sequence_length": SEQUENCE, "global_batch_rows": 12, "seed": 5, "isolate_documents": True}
    options |= changes
    return TrainLoader(reader, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows, **options)


FIELDS = ("input_ids", "labels", "document_ids", "position_ids", "row_positions")


def joined(micro_batches):
    return {field: torch.cat([getattr(batch, field) for batch in micro_batches]) for field in FIELDS}


def assert_same(one, other):
    for field in FIELDS:
        assert torch.equal(one[field], other[field]), field


@pytest.mark.parametrize("world_size, micro_batch_rows", [(1, 12), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)])
@pytest.mark.parametrize("isolate_documents", [True, False])
def test_every_cut_gives_the_same_step(reader, world_size, micro_batch_rows, isolate_documents):
    whole = loader(reader, isolate_documents=isolate_documents)
    ranks = [
        loader(reader, rank, world_size, micro_batch_rows, isolate_documents=isolate_documents)
        for rank in range(world_size)
    ]
    for step in (0, 1, 6, 13):  # some within the first epoch, some across its end
        expected = whole.micro_batches(step)
        found = [batch for rank in ranks for batch in rank.micro_batches(step)]
        assert len(found) == 12 // micro_batch_rows
        assert all(batch.input_ids.shape == (micro_batch_rows, SEQUENCE) for batch in found)
        assert_same(joined(found), joined(expected))
        assert joined(found)["row_positions"].tolist() == list(range(step * 12, step * 12 + 12))
        hashes = [wrap_to_int64(sum(b.token_hash for b in batches)) for batches in (found, expected)]
        assert hashes[0] == hashes[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_is_a_target_once_per_epoch(reader, shuffle):
    stream = reader.read(0, reader.num_tokens).tolist()
    source = loader(reader, global_batch_rows=1, shuffle=shuffle, isolate_documents=False)
    covered = stream[1 : source.num_rows * SEQUENCE + 1]
    for epoch in range(3):
        steps = range(epoch * source.num_rows, (epoch + 1) * source.num_rows)
        labels = joined([batch for step in steps for batch in source.micro_batches(step)])["labels"]
        assert Counter(labels.flatten().tolist()) == Counter(covered)


def test_isolated_documents_lose_their_first_token_as_target_and_nothing_else(reader):
    stream = reader.read(0, reader.num_tokens).tolist()
    source = loader(reader, global_batch_rows=1)
    last = source.num_rows * SEQUENCE + 1
    begins = set(reader.document_ends.tolist())
    expected = Counter(stream[offset] for offset in range(1, last) if offset not in begins)
    batches = [batch for step in range(source.num_rows) for batch in source.micro_batches(step)]
    found = Counter(joined(batches)["labels"].flatten().tolist())
    num_ignored = found.pop(IGNORE_INDEX)
    assert found == expected
    assert num_ignored == sum(1 <= begin < last for begin in begins)


def test_seed_and_epoch_change_the_order(reader):
    num_rows = loader(reader).num_rows
    first = joined(loader(reader, global_batch_rows=num_rows).micro_batches(0))["input_ids"]
    second_epoch = joined(loader(reader, global_batch_rows=num_rows).micro_batches(1))["input_ids"]
    other_seed = joined(loader(reader, global_batch_rows=num_rows, seed=6).micro_batches(0))["input_ids"]
    assert not torch.equal(first, second_epoch)
    assert not torch.equal(first, other_seed)
    assert sorted(first.tolist()) == sorted(second_epoch.tolist()) == sorted(other_seed.tolist())


def test_unshuffled_rows_follow_the_stream(reader):
    rows = joined(loader(reader, shuffle=False).micro_batches(0))["input_ids"]
    assert rows.flatten().tolist() == reader.read(0, 12 * SEQUENCE).tolist()


def take(iterator, count):
    with_steps = list(itertools.islice(iterator, count))
    iterator.close()
    return with_steps


@pytest.mark.parametrize("first_step", [0, 1, 5, 10**9])
def test_iterate_gives_the_steps_in_order(reader, first_step):
    source = loader(reader, micro_batch_rows=4)
    for place, (step, batches) in enumerate(take(source.iterate(first_step), 4)):
        assert step == first_step + place
        assert_same(joined(batches), joined(source.micro_batches(step)))


def test_resuming_twice_equals_not_stopping(reader):
    unbroken = take(loader(reader, micro_batch_rows=3).iterate(0), 9)
    pieces = [take(loader(reader, micro_batch_rows=3).iterate(first), 3) for first in (0, 3, 6)]
    for (step, batches), (other_step, other_batches) in zip(unbroken, sum(pieces, []), strict=True):
        assert step == other_step
        assert [b.token_hash for b in batches] == [b.token_hash for b in other_batches]


def test_an_error_in_the_thread_is_raised_at_its_step(reader, monkeypatch):
    source = loader(reader)
    good = source.micro_batches

    def failing(step):
        if step == 3:
            raise OSError("the disk is gone")
        return good(step)

    monkeypatch.setattr(source, "micro_batches", failing)
    steps = source.iterate(1)
    assert [next(steps)[0], next(steps)[0]] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def num_prefetch_threads():
    return sum("prefetch" in thread.name for thread in threading.enumerate())


def test_closing_ends_the_thread(reader):
    for num_read in (0, 1, 5):
        steps = loader(reader).iterate(0)
        for _ in range(num_read):
            next(steps)
        steps.close()
        assert num_prefetch_threads() == 0


def test_sequence_longer_than_the_corpus_names_its_tokens(reader):
    line = rf"^sequence_length={reader.num_tokens} must be below the {reader.num_tokens} tokens in [^\n]*$"
    with pytest.raises(ValueError, match=line):
        loader(reader, sequence_length=reader.num_tokens)
    loader(reader, sequence_length=reader.num_tokens - 1).micro_batches(0)


def test_batch_that_does_not_divide_is_refused(reader):
    with pytest.raises(ValueError, match=r"^global_batch_rows=12 must [^\n]*world_size\*micro_batch_rows=2\*5=10$"):
        loader(reader, world_size=2, micro_batch_rows=5)


def test_steps_of_many_rows_are_read_in_parts(reader):
    """More rows than are read at once: the same as one by one."""
    (whole,) = loader(reader, global_batch_rows=150, micro_batch_rows=150).micro_batches(1)
    parts = loader(reader, global_batch_rows=150, micro_batch_rows=10).micro_batches(1)
    assert_same(joined(parts), joined([whole]))
    assert wrap_to_int64(sum(part.token_hash for part in parts)) == whole.token_hash
