"""Rows to micro-batches, against a loop that looks at one token at a time."""

import numpy as np
import pytest
import torch
import xxhash

from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, build_micro_batch, mark_document_starts, wrap_to_int64


def oracle(stream, document_ends, first_tokens, sequence, isolate_documents):
    """Labels, document ids and positions of each row, by walking its tokens."""
    begins = set(document_ends)
    labels, document_ids, position_ids = [], [], []
    for first in first_tokens:
        row_labels, row_documents, row_positions = [], [], []
        document = position = 0
        for offset in range(first, first + sequence):
            if isolate_documents and offset != first and offset in begins:
                document, position = document + 1, 0
            crosses = isolate_documents and offset + 1 in begins
            row_labels.append(IGNORE_INDEX if crosses else stream[offset + 1])
            row_documents.append(document)
            row_positions.append(position)
            position += 1
        labels.append(row_labels)
        document_ids.append(row_documents)
        position_ids.append(row_positions)
    return labels, document_ids, position_ids


@pytest.mark.parametrize("isolate_documents", [True, False])
@pytest.mark.parametrize("sequence", [1, 2, 5, 16])
def test_micro_batch_equals_the_token_loop(sequence, isolate_documents):
    generator = np.random.default_rng(sequence)
    for _ in range(20):
        lengths = generator.integers(1, 12, size=30)
        document_ends = np.cumsum(lengths)
        stream = generator.integers(0, 1000, size=document_ends[-1])
        num_rows = (len(stream) - 1) // sequence
        first_tokens = generator.integers(0, num_rows, size=4) * sequence
        tokens = np.stack([stream[first : first + sequence + 1] for first in first_tokens])

        starts = mark_document_starts(document_ends, first_tokens, sequence)
        batch = build_micro_batch(tokens, starts, np.arange(4), isolate_documents)

        labels, document_ids, position_ids = oracle(
            stream.tolist(), document_ends.tolist(), first_tokens.tolist(), sequence, isolate_documents
        )
        assert batch.input_ids.tolist() == tokens[:, :-1].tolist()
        assert batch.labels.tolist() == labels
        assert batch.document_ids.tolist() == document_ids
        assert batch.position_ids.tolist() == position_ids


def test_the_host_keeps_the_lengths_of_documents_when_rows_leave_it():
    """Those that go on in the next row, of one row alone and of padding end with their row."""
    tokens = np.arange(3 * 6).reshape(3, 6)
    starts = np.zeros((3, 6), dtype=bool)
    starts[0, 2] = starts[1, 4] = starts[1, 5] = True
    batch = build_micro_batch(tokens, starts, np.array([0, 1, -1]), isolate_documents=True)
    assert batch.document_lengths is None
    moved = batch.to("cpu")
    assert moved.document_lengths == [2, 3, 4, 1, 5]
    assert moved.to("meta").document_lengths == [2, 3, 4, 1, 5]


def test_worked_example():
    # Three documents, "1 2 0", "3 0" and "4 5 6 0", seen through one row of six input tokens.
    tokens = np.array([[2, 0, 3, 0, 4, 5, 6]])
    starts = mark_document_starts(np.array([3, 5, 9]), np.array([1]), 6)
    batch = build_micro_batch(tokens, starts, np.array([7]), isolate_documents=True)
    assert batch.labels.tolist() == [[0, -100, 0, -100, 5, 6]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 0, 1]]
    assert batch.row_positions.tolist() == [7]
    assert batch.num_valid_labels() == 4


def test_padding_rows_count_for_nothing():
    tokens = np.arange(10).reshape(2, 5)
    starts = mark_document_starts(np.array([2, 100]), np.array([0, 4]), 4)
    batch = build_micro_batch(tokens, starts, np.array([3, -1]), isolate_documents=True)
    assert batch.labels[1].tolist() == [IGNORE_INDEX] * 4
    assert batch.document_ids[1].tolist() == [-1] * 4
    assert batch.num_valid_labels() == 3
    alone = build_micro_batch(tokens[:1], starts[:1], np.array([3]), isolate_documents=True)
    assert batch.token_hash == alone.token_hash


def test_token_hash_is_the_stated_sum():
    tokens = np.arange(30).reshape(5, 6)
    no_starts = np.zeros((5, 6), dtype=bool)
    positions = np.array([0, 1, 2**40, 5, 6])
    batch = build_micro_batch(tokens, no_starts, positions, isolate_documents=False)
    expected = sum(
        xxhash.xxh64_intdigest(np.array(row, dtype="<i8").tobytes(), seed=int(position))
        for row, position in zip(tokens, positions, strict=True)
    )
    assert batch.token_hash == wrap_to_int64(expected)
    assert -(2**63) <= batch.token_hash < 2**63


def test_token_hash_adds_up_over_any_cut_and_sees_every_change():
    tokens = np.arange(42).reshape(6, 7)
    no_starts = np.zeros((6, 7), dtype=bool)
    positions = np.arange(6)

    def total(tokens, positions, cuts):
        parts = np.split(np.arange(6), cuts)
        hashes = (build_micro_batch(tokens[p], no_starts[p], positions[p], True).token_hash for p in parts)
        return wrap_to_int64(sum(hashes))

    whole = total(tokens, positions, [])
    assert total(tokens, positions, [2, 4]) == total(tokens, positions, [1, 2, 3, 4, 5]) == whole
    swapped = tokens[[1, 0, 2, 3, 4, 5]]
    assert total(swapped, positions, []) != whole  # same rows at other positions
    last_target_changed = tokens.copy()
    last_target_changed[5, 6] += 1
    assert total(last_target_changed, positions, []) != whole


def test_wrap_to_int64():
    assert wrap_to_int64(2**63) == -(2**63)
    assert wrap_to_int64(2**64 + 5) == 5
    assert wrap_to_int64(-(2**63) - 1) == 2**63 - 1


def test_to_moves_every_tensor():
    tokens = np.arange(8).reshape(1, 8)
    batch = build_micro_batch(tokens, np.zeros((1, 8), dtype=bool), np.array([0]), True)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert all(tensor.is_meta and tensor.dtype == torch.int64 for tensor in tensors)
    assert moved.token_hash == batch.token_hash
