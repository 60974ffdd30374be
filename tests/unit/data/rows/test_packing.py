"""Best-fit packing: whole documents, no target lost, as few rows as one piece at a time, and the same loss."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers.builders import context_of, tiny
from helpers.corpora import write_shards

from moe_pretrain.data.loader import TrainLoader
from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, build_micro_batch
from moe_pretrain.data.rows.packing import BestFit, Concatenated
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard

END = 9


def slow_best_fit(lengths, capacity):
    """Room left in each row, one piece at a time, longest first, always where it leaves the least room."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(capacity - length)
    return Counter(room)


def random_reader(folder, seed, longest, count=60):
    generator = np.random.default_rng(seed)
    fresh = iter(generator.permutation(np.arange(10, 60_000)).tolist())
    texts = [[next(fresh) for _ in range(generator.integers(0, longest))] for _ in range(count)]
    return write_shards(folder, texts, vocab_size=60_000, tokens_per_shard=150), texts


@pytest.mark.parametrize("sequence", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("longest", [5, 20, 90])
def test_documents_stay_whole_and_no_target_is_lost(tmp_path, sequence, longest):
    reader, texts = random_reader(tmp_path, sequence, longest)
    rows = BestFit(reader, sequence)
    tokens, starts, used = rows.read(np.arange(rows.num_rows))
    found, targets = [], Counter()
    for row, marks, size in zip(tokens.tolist(), starts, used.tolist(), strict=True):
        begins = [0, *np.flatnonzero(marks).tolist(), size]
        pieces = [row[first:stop] for first, stop in zip(begins, begins[1:], strict=False)]
        found += pieces
        targets.update(token for piece in pieces for token in piece[1:])
        assert not any(row[size:]) and 0 < size <= sequence + 1
    documents = [[*text, END] for text in texts]
    assert targets == Counter(token for document in documents for token in document[1:])
    whole = Counter(tuple(document) for document in documents if len(document) <= sequence + 1)
    assert whole <= Counter(map(tuple, found))
    left = Counter((sequence + 1 - used).tolist())
    assert left == slow_best_fit(map(len, found), sequence + 1)
    assert rows.waste == pytest.approx(1 - used.sum() / tokens.size)


def test_micro_batches_have_padding_only_at_the_end_of_rows(tmp_path):
    reader, texts = random_reader(tmp_path, 0, 12)
    loader = TrainLoader(reader, 10, 6, 3, 0, 1, 0, True, method="best_fit")
    assert loader.waste > 0
    labels = Counter()
    for step in range(-(-loader.num_rows // 6)):
        for batch in loader.micro_batches(step):
            empty = batch.document_ids < 0
            assert torch.equal(empty, empty.cummax(dim=1).values)
            assert (batch.labels[empty] == IGNORE_INDEX).all()
            for row, position in zip(batch.labels.tolist(), batch.row_positions.tolist(), strict=True):
                if position < loader.num_rows:
                    labels.update(label for label in row if label != IGNORE_INDEX)
    assert labels == Counter(token for text in texts for token in [*text, END][1:])


def test_a_packed_batch_has_the_documents_separate_losses(tmp_path):
    """C40, with padding: the sum over packed rows is the sum over the documents alone."""
    config = tiny("model.sequence_length=24")
    generator = np.random.default_rng(0)
    texts = [generator.integers(10, 64, size=generator.integers(1, 20)).tolist() for _ in range(9)]
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    model.eval()

    def loss_sum(batch):
        with torch.no_grad():
            context = context_of(batch)
            output = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        return float(output.loss_sum)

    rows = BestFit(write_shards(tmp_path, texts, vocab_size=64), 24)
    assert 1 < rows.num_rows < len(texts)
    loader = TrainLoader(rows._reader, 24, rows.num_rows, rows.num_rows, 0, 1, 0, True, method="best_fit")
    (packed,) = loader.micro_batches(0)
    alone = 0.0
    for text in texts:
        tokens = np.array([[*text, END]])
        alone += loss_sum(build_micro_batch(tokens, np.zeros(tokens.shape, dtype=bool), np.array([0]), True))
    assert loss_sum(packed) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_positions_restart_where_asked(isolate, reset):
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    starts = np.array([[False, False, True, False, True, False]])
    batch = build_micro_batch(tokens, starts, np.array([0]), isolate, reset)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 0] if reset else [0, 1, 2, 3, 4]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 2] if isolate else [0] * 5]
    assert batch.labels.tolist() == [[2, -100, 4, -100, 6] if isolate else [2, 3, 4, 5, 6]]


def test_concatenated_rows_waste_nothing(tmp_path):
    reader, _ = random_reader(tmp_path, 1, 12)
    rows = Concatenated(reader, 8)
    tokens, _, used = rows.read(np.arange(rows.num_rows))
    assert used is None and rows.waste == 0
    assert tokens[:, :-1].ravel().tolist() == reader.read(0, rows.num_rows * 8).tolist()


def test_the_packing_of_many_documents_takes_no_loop_over_them(tmp_path):
    """A million documents: the index is right, whatever the time."""
    from moe_pretrain.data.rows.packing import _pack

    lengths = np.random.default_rng(0).integers(2, 2050, size=1_000_000)
    order, first = _pack(lengths, 2049)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    filled = np.add.reduceat(lengths[order], first[:-1])
    assert filled.max() <= 2049 and filled.mean() > 0.99 * 2049
