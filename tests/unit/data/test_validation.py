"""Validation rows: drawn over the whole set, the same for every run and on any ranks."""

import itertools

import numpy as np
import pytest
import torch
from helpers.corpora import write_shards

from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX
from moe_pretrain.data.validation import examine_validation, validation_batches, validation_rows

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


@pytest.mark.parametrize("max_rows", [1, 2, 10, 30])
def test_one_row_is_drawn_from_each_stretch_of_the_whole_text(reader, max_rows):
    num_rows = (reader.num_tokens - 1) // SEQUENCE
    rows = validation_rows(reader, SEQUENCE, max_rows)
    assert len(rows) == max_rows and num_rows > 40
    for index, row in enumerate(rows.tolist()):
        assert num_rows * index // max_rows <= row < num_rows * (index + 1) // max_rows
    offsets = {row - num_rows * index // max_rows for index, row in enumerate(rows.tolist())}
    assert max_rows == 1 or max_rows == 30 or len(offsets) > 1, "a comb would see what has its period"


def test_all_rows_are_read_where_there_are_no_more(reader):
    num_rows = (reader.num_tokens - 1) // SEQUENCE
    for max_rows in (None, num_rows, 10**6):
        assert validation_rows(reader, SEQUENCE, max_rows).tolist() == list(range(num_rows))


def test_rows_are_a_function_of_the_text(tmp_path):
    texts = [[index % 5 + 1] * 30 for index in range(40)]
    one = write_shards(tmp_path / "one", texts, end=END)
    again = write_shards(tmp_path / "again", texts, end=END)
    other = write_shards(tmp_path / "other", [*texts[:-1], [9] * 30], end=END)
    drawn = [validation_rows(each, SEQUENCE, 20).tolist() for each in (one, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("world_size, micro_batch_rows", [(1, 1), (1, 5), (2, 3), (4, 8), (3, 100)])
@pytest.mark.parametrize("max_rows", [None, 1, 10, 10**6])
def test_each_row_is_read_once_and_all_ranks_read_as_often(reader, world_size, micro_batch_rows, max_rows):
    ranks = [
        list(validation_batches(reader, SEQUENCE, micro_batch_rows, rank, world_size, max_rows, False))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    fields = ("labels", "document_ids", "row_positions")
    everything = {name: torch.cat([getattr(batch, name) for own in ranks for batch in own]) for name in fields}
    real = everything["row_positions"] >= 0
    rows = validation_rows(reader, SEQUENCE, max_rows).tolist()
    assert sorted(everything["row_positions"][real].tolist()) == rows
    padding = everything["document_ids"] == -1
    assert torch.equal(padding.all(dim=1), ~real) and torch.equal(padding.any(dim=1), ~real)
    assert torch.equal(everything["labels"] == IGNORE_INDEX, padding)
    for row, labels in zip(everything["row_positions"][real].tolist(), everything["labels"][real], strict=True):
        assert labels.tolist() == reader.read(row * SEQUENCE + 1, (row + 1) * SEQUENCE + 1).tolist()
    assert len(ranks[0]) == -(-len(rows) // (world_size * micro_batch_rows))  # no batch too many


def test_bad_sizes_are_refused(reader):
    with pytest.raises(ValueError, match=rf"^sequence_length={reader.num_tokens} must be below the [^\n]*$"):
        validation_batches(reader, reader.num_tokens, 1, 0, 1, None, True)
    with pytest.raises(ValueError, match="max_rows=0"):
        validation_batches(reader, SEQUENCE, 1, 0, 1, 0, True)
    with pytest.raises(ValueError, match="rank=2"):
        validation_batches(reader, SEQUENCE, 1, 2, 2, 1, True)


def test_the_baseline_is_of_the_tokens_that_are_read_under_the_training_text(tmp_path):
    """Numbers of documents, tokens and nats by a plain loop over the drawn rows."""
    generator = np.random.default_rng(1)
    held_out = write_shards(
        tmp_path / "validation", generator.integers(1, 9, (40, 12)).tolist(), vocab_size=12, end=END
    )
    # Token 1 is common in training and as rare as others here; 8 never occurs there, 11 nowhere.
    train = write_shards(tmp_path / "train", [[1, 1, 1, 2, 3, 4, 5, 6, 7]] * 3, vocab_size=12, end=END)
    counts = train.token_counts()
    assert counts.tolist() == [3, 9, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0]
    for isolate in (True, False):
        found = examine_validation(held_out, counts, SEQUENCE, 10, isolate)
        nats, documents = [], set()
        for row in validation_rows(held_out, SEQUENCE, 10).tolist():
            for offset in range(row * SEQUENCE + 1, (row + 1) * SEQUENCE + 1):
                if isolate and offset in held_out.document_ends.tolist():
                    continue  # the first token of a document
                token = int(held_out.read(offset, offset + 1)[0])
                nats.append(-np.log((counts[token] + 1) / (30 + 12)))
                documents.add(sum(end <= offset for end in held_out.document_ends.tolist()))
        assert (found.rows, found.held_out_rows) == (10, (held_out.num_tokens - 1) // SEQUENCE)
        assert (found.tokens, found.documents) == (len(nats), len(documents))
        assert found.unigram_cross_entropy == pytest.approx(np.mean(nats), rel=1e-12)
        assert abs(found.unigram_cross_entropy - train.manifest.unigram_entropy_nats) > 0.1


def test_a_set_that_is_shorter_than_asked_for_says_so(reader):
    counts, num_rows = np.ones(1000, dtype=np.int64), (reader.num_tokens - 1) // SEQUENCE
    few, whole, short = (examine_validation(reader, counts, SEQUENCE, n, True) for n in (5, num_rows, 1000))
    assert few.describe(5, SEQUENCE).startswith(f"5 of {num_rows} rows, drawn over the whole held-out text: ")
    assert whole.describe(num_rows, SEQUENCE).startswith(f"all {num_rows} rows of 7 tokens that are held out: ")
    assert "that are held out, fewer than evaluation.max_rows=1,000: " in short.describe(1000, SEQUENCE)
    assert short == whole and short.documents == reader.num_documents


@pytest.mark.parametrize("damage", [None, b"", b"x" * 8000, b"\0" * 8000])
def test_token_counts_of_an_older_folder_or_a_damaged_file_are_counted(tmp_path, damage):
    made = write_shards(tmp_path, [[1, 2, 2], [3] * 5, [1, 1]], end=END, tokens_per_shard=4)
    expected = np.bincount(made.read(0, made.num_tokens), minlength=1000).tolist()
    assert made.token_counts().tolist() == expected
    path = tmp_path / "token-counts.bin"
    assert np.fromfile(path, "<u8").tolist() == expected
    path.unlink() if damage is None else path.write_bytes(damage)
    assert made.token_counts().tolist() == expected
