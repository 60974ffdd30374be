"""Validation losses to rows, of one text and of a mixture."""

import math

import pytest

from moe_pretrain.metrics.step_rows import evaluation_row, mixed_evaluation_row
from moe_pretrain.metrics.wandb_sink import reduce_layers
from moe_pretrain.moe.part_timer import PARTS


def test_bits_per_byte_by_hand():
    row = evaluation_row(math.log(2) * 3, bytes_per_token=4.0)
    assert row["validation/perplexity"] == pytest.approx(8)
    assert row["validation/bits_per_byte"] == pytest.approx(0.75)
    assert "validation/bits_per_byte" not in evaluation_row(1.0, None)


def test_a_mixture_is_as_one_text_with_the_sources_shares():
    """1,000 tokens: 750 of code at 1 nat and 3 bytes each, 250 of web at 2 nats and 5 bytes each."""
    row = mixed_evaluation_row({"code": 1.0, "web": 2.0, "set": 9.0}, {"code": 3.0, "web": 5.0, "set": 1.0}, SHARES)
    nats, size = 750 * 1.0 + 250 * 2.0, 750 * 3.0 + 250 * 5.0
    assert row["validation/loss"] == pytest.approx(nats / 1000)
    assert row["validation/perplexity"] == pytest.approx(math.exp(nats / 1000))
    assert row["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_a_mixture_with_a_source_without_text_has_no_bits_per_byte():
    row = mixed_evaluation_row({"code": 1.0, "web": 2.0}, {"code": 3.0, "web": None}, SHARES)
    assert row["validation/loss"] == pytest.approx(1.25) and "validation/bits_per_byte" not in row


def test_dashboards_see_the_sources_and_not_the_hash_nor_six_times():
    row = {"step": 1, "tokens": 2, "data/code/epochs": 0.5, "data/token_hash": "00ff"}
    row |= {f"moe/{name}_microseconds_per_token": 1.0 for name in PARTS}
    assert reduce_layers(row) == {"step": 1, "tokens": 2, "data/code/epochs": 0.5}


SHARES = {"code": 0.75, "web": 0.25}
