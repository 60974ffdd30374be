"""Attentive gating on ranks: keys, candidates and gradients cross ranks and stay the oracle's (test 13 of its list)."""

import pytest
from helpers.builders import tiny
from helpers.processes import run_on_ranks

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.verify.verify import verify

FORMS = {
    "attentive": ("router.num_candidates=3", "router.distillation_weight=0.5", "model.recompute=full"),
    "attentive_dense": ("router.weights=full", "engine.zero_stage=2"),
    "attentive_low_rank": ("router.gate_rank=4",),
}


def config_of(name: str) -> Config:
    """Two micro-batches on each of two ranks, every loss on, experts on both ranks."""
    return tiny(
        f"router={name}",
        *FORMS[name],
        *("router.key_size=6", "router.similarity_weight=2.0", "router.importance_weight=0.3"),
        *("parallel.processes=2", "parallel.expert_parallel_size=2"),
        rows=8,
        micro_batch_size=2,
    )


def _verify_all() -> list[tuple[int, list[str]]]:
    results = []
    for name in FORMS:
        said: list[str] = []
        config = config_of(name)
        results.append((verify(config, plan_run(config, 2, ("cpu", "float32")), said.append), said))
    return results


@pytest.mark.slow
def test_every_form_equals_the_oracle_with_experts_on_two_ranks() -> None:
    for results in run_on_ranks(_verify_all, 2):
        for code, said in results:
            assert code == 0, said
            assert "2 ranks, expert parallel 2" in said[0] and "2 micro-batches" in said[0]
            assert any("aux similarity" in line for line in said) and any("aux importance" in line for line in said)
