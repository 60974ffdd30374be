"""The ``verify`` command: a user's configuration against the oracle, and what it says when something is wrong."""

from pathlib import Path

import pytest
import torch
from helpers.builders import tiny
from helpers.processes import run_on_ranks
from helpers.runs import run

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.engine import engine as engine_module
from moe_pretrain.engine.micro_batch import micro_batch_loss
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.verify.small_twin import random_batches, shrink
from moe_pretrain.verify.verify import verify


def test_command_agrees_with_the_oracle(tmp_path: Path) -> None:
    overrides = ("parallel.processes=2", "parallel.expert_parallel_size=2", "engine.device=cpu", "engine.dtype=float32")
    code, out, err = run(tmp_path, "verify", *overrides, "model.recompute=full")
    assert code == 0, out + err
    lines = out.strip().splitlines()
    assert lines[0].startswith("2 ranks, expert parallel 2, ZeRO 1, float32") and "recompute full" in lines[0]
    assert len(lines) == 13 and all("same" in line for line in lines[1:])


def _verify_with_broken_factor() -> tuple[int, list[str]]:
    """The balance loss added at twice its weight."""
    config = tiny("parallel.processes=2", "parallel.expert_parallel_size=2")

    def doubled(output, aux_weights, tokens, counts):
        return micro_batch_loss(output, {n: 2 * w for n, w in aux_weights.items()}, tokens, counts)

    engine_module.micro_batch_loss = doubled
    said: list[str] = []
    return verify(config, plan_run(config, 2), said.append), said


def test_a_wrong_factor_is_named() -> None:
    for code, said in run_on_ranks(_verify_with_broken_factor, 2):
        assert code == 1
        differing = [line for line in said if "DIFFERS" in line]
        assert any("gradient scale" in line and "router.weight" in line for line in differing), said
        assert said[-1].endswith("quantities differ")


@pytest.mark.parametrize("model", ["tiny", "700m", "4b"])
def test_shrinking_keeps_what_is_verified(model: str) -> None:
    config = tiny(
        f"model={model}",
        "model.num_heads=8",
        "model.num_key_value_heads=2",
        "model.moe.num_leading_dense_layers=3",
        "model.moe.every_k_layers=2",
        "model.moe.num_shared_experts=2",
        "model.num_layers=8",
        "model.recompute=selective",
        "engine.gradient_clipping=0.7",
        "engine.zero_stage=2",
        rows=16,
        micro_batch_size=1,
    )
    small = shrink(config, plan_run(config, 2, ("cpu", "float32")))
    assert small.router == config.router and small.parallel == config.parallel
    assert small.engine.zero_stage == 2 and small.engine.gradient_clipping == 0.7
    for kept in ("num_experts", "num_shared_experts", "every_k_layers"):
        assert getattr(small.model.moe, kept) == getattr(config.model.moe, kept)
    assert small.model.moe_layers == [1, 3]  # a dense layer below, one between, two with experts
    assert small.model.num_heads // small.model.num_key_value_heads == 4
    assert small.batch.global_batch_tokens == 16 * small.model.sequence_length
    assert sum(p.numel() for p in DecoderLM(small.model, small.router, ExpertShard()).parameters()) < 200_000


PACKINGS = [(False, True), (True, False), (True, True), (False, False)]


def _verify_packed(isolate: bool, reset: bool, broken: bool) -> tuple[int, list[str]]:
    """``broken`` gives the run other positions than the oracle."""
    words = (f"packing.isolate_documents={str(isolate).lower()}", f"packing.reset_positions={str(reset).lower()}")
    config = tiny(*words, rows=4)
    if broken:
        forward = DecoderLM.forward

        def counted_through(self, input_ids, labels, document_ids, position_ids, context):
            through = torch.arange(position_ids.shape[1]).expand_as(position_ids)
            return forward(self, input_ids, labels, document_ids, through, context)

        DecoderLM.forward = counted_through
    said: list[str] = []
    return verify(config, plan_run(config, 1), said.append), said


@pytest.mark.parametrize("isolate, reset", PACKINGS)
def test_every_packing_agrees_with_the_oracle(isolate: bool, reset: bool) -> None:
    ((code, said),) = run_on_ranks(_verify_packed, 1, isolate, reset, False)
    assert code == 0, said


@pytest.mark.parametrize("isolate, reset", PACKINGS[:1])
def test_positions_that_are_not_reset_are_seen(isolate: bool, reset: bool) -> None:
    ((code, said),) = run_on_ranks(_verify_packed, 1, isolate, reset, True)
    assert code == 1 and any("DIFFERS" in line for line in said)


@pytest.mark.parametrize("isolate, reset", PACKINGS)
def test_verified_batches_are_packed_as_configured(isolate: bool, reset: bool) -> None:
    words = (f"packing.isolate_documents={str(isolate).lower()}", f"packing.reset_positions={str(reset).lower()}")
    config = tiny(*words)
    batches = [batch for step in random_batches(config, plan_run(config, 1).batches) for batch in step]
    starts_again = any(
        bool((batch.position_ids[:, 1:] == 0).logical_and(batch.document_ids[:, 1:] >= 0).any()) for batch in batches
    )
    several_documents = any(int(batch.document_ids.max()) > 0 for batch in batches)
    assert (several_documents, starts_again) == (isolate, reset)
