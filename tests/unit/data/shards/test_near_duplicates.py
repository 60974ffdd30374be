"""Sketches find what is nearly the same, and nothing else."""

import numpy as np
import pytest

from moe_pretrain.data.shards.near_duplicates import HeldOutDocuments, Sketcher, find_duplicates


def sketches(*documents):
    sketcher = Sketcher()
    for tokens in documents:
        sketcher.add(np.array(tokens, dtype=np.int64), 0)
    return sketcher.sketches()


def changed(tokens, every):
    tokens = tokens.copy()
    tokens[::every] += 1
    return tokens


@pytest.fixture
def documents():
    return [np.random.default_rng(seed).integers(0, 500, 800) for seed in range(40)]


def test_exact_near_and_unrelated_documents_are_told_apart(documents):
    held_out = [documents[3], changed(documents[5], 50), changed(documents[7], 6), np.array([1, 2, 3])]
    batches = [sketches(*documents[:20]), sketches(*documents[20:])]
    exact, near = find_duplicates(sketches(*held_out), batches)
    assert exact.tolist() == [True, False, False, False]
    assert near.tolist() == [True, True, False, False]  # every 6th token changed: few runs of five are left


def test_most_of_the_true_near_duplicates_are_found(documents):
    """A similarity of about 0.8 is found in nearly every document, one of about 0.3 in none."""
    similar = [changed(tokens, 45) for tokens in documents]
    other = [changed(tokens, 10) for tokens in documents]
    assert find_duplicates(sketches(*similar), [sketches(*documents)])[1].mean() > 0.9
    assert not find_duplicates(sketches(*other), [sketches(*documents)])[1].any()


def test_a_long_document_is_compared_by_a_sample():
    tokens = np.random.default_rng(0).integers(0, 500, 50_000)
    exact, near = find_duplicates(sketches(changed(tokens, 100)), [sketches(tokens)])
    assert not exact.any() and near.all()


def test_a_long_document_in_blocks_has_the_sketch_of_the_whole(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 500, 5000)
    monkeypatch.setattr("moe_pretrain.data.shards.near_duplicates._MOST_RUNS", 100)
    found = []
    for runs in (10_000, 333):
        monkeypatch.setattr("moe_pretrain.data.shards.near_duplicates._RUNS_AT_ONCE", runs)
        sketcher = Sketcher()
        sketcher.add(tokens, 0)
        found.append(sketcher.sketches()["minima"])
    assert np.array_equal(*found)


def test_documents_shorter_than_a_run_and_empty_ones():
    held_out = sketches([], [1], [1, 2, 3, 4], [4, 3, 2, 1])
    exact, near = find_duplicates(held_out, [sketches([1, 2, 3, 4], [1])])
    assert exact.tolist() == near.tolist() == [False, True, True, False]
    assert not find_duplicates(sketches(), [sketches([1])])[1].size


@pytest.mark.parametrize("near", [True, False])
def test_one_document_at_a_time_gives_what_the_sketches_give(documents, near):
    """Among many: those of similarity 0.9 down to 0.2, cuts, doubles and empty ones."""
    held_out = [changed(tokens, every) for tokens, every in zip(documents, range(4, 164, 4), strict=False)]
    held_out += [documents[3], documents[3], documents[4][:600], documents[5][400:], np.array([], dtype=int)]
    looked_up = HeldOutDocuments(held_out, near)
    exact, found = np.zeros(len(held_out), bool), np.zeros(len(held_out), bool)
    for tokens in [*documents, np.array([1, 2]), np.array([], dtype=int)]:
        exactly, nearly = looked_up.find(tokens)
        exact[exactly] = found[nearly] = True
    batches = [sketches(*documents, [1, 2], [])]
    expected = find_duplicates(sketches(*held_out), batches, near)
    assert exact.tolist() == expected[0].tolist() and found.tolist() == expected[1].tolist()
    assert exact.sum() == 3 and near == (10 < found.sum() < 43)
