"""The product of topologies and step options whose every point must equal the oracle."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch.distributed as dist

from helpers.builders import NUM_STEPS, WITH_ALL_PARTS, tiny
from helpers.processes import run_on_ranks
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.verify.oracle import Oracle
from moe_pretrain.verify.small_twin import random_batches
from moe_pretrain.verify.verify import QuantityCheck, build_engine, compare, own_micro_batches, record

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""(ranks, expert-parallel size)."""

_AXES = {
    "zero_stage": (0, 1, 2),
    "accumulation": (1, 4),
    "micro_batch_size": (1, 3),
    "recompute": ("none", "selective", "full"),
    "clipping": (0.0, 0.1),
}
_BOUNDED = "model.moe.activation_limit=0.5"
_VARIANTS = {
    "mixtral": ("router.load_balance_level=global_batch",),
    "deepseek": (  # and what newer models have beside it
        *("model.moe.shared_expert_gate=true", "model.moe.activation=gpt_oss", "model.moe.activation_limit=1.0"),
        *("router.bias=true", "router.logit_cap=3.0"),
        *(*WITH_ALL_PARTS, "router.load_balance_level=sequence", "router.score=sigmoid"),
        *("model.qk_norm=head", "model.head_size=10"),
    ),
    "switch": ("router.top_k=1", "router.weights=raw", "router.load_balance_level=micro_batch"),
    "scaled": (
        *WITH_ALL_PARTS,
        *("model.init=mup", "model.init_std=0.04", "model.mup_base_width=8", "model.moe.gate_rank=6"),
        *("model.moe.activation=gpt_oss", _BOUNDED, "model.moe.shared_expert_gate=true", "model.head_size=10"),
        *("optimizer.groups.router.lr_scale=0.3", "optimizer.groups.experts.lr_scale=2", "optimizer.weight_decay=0.5"),
    ),
    "orthogonal": (*WITH_ALL_PARTS, "router.top_k=3", "combine=orthogonal"),
    "lory": (*WITH_ALL_PARTS, "router=lory", "router.segment_tokens=3", "model.moe.activation=gpt_oss"),
    "smear": ("router=smear", "router.evaluation_segment_tokens=4", "model.moe.num_experts=3"),
    "matrix_product": (
        *(*WITH_ALL_PARTS, "experts=matrix_product", "router.top_k=3"),
        "model.moe.experts.shared_gradient_dropout=0.4",
        # A product of five cores amplifies what rounding has made of the weights by then.
        "optimizer.learning_rate=0.003",
    ),
    "thor": (*WITH_ALL_PARTS, "router=thor"),
    "symmetric": (
        *("router=top_p", "router.threshold=0.6", "combine=orthogonal", "model.moe.combine.form=symmetric"),
        "model.recompute=full",
    ),
    "moe_plus_plus": ("router=moe_plus_plus", "model.num_layers=3", "model.moe.num_shared_experts=1"),
    "dynmoe": ("router=dynmoe", "router.initial_experts=2", "router.idle_steps=0", "router.record_steps=1"),
    "unequal": ("experts=unequal", "model.moe.experts.pattern=[1,3]", "model.moe.num_experts=8", _BOUNDED),
    "moce_ir": ("router=moce_ir", "model.moe.experts.pattern=[1,3]", "model.moe.num_experts=8"),
    "latent": (
        *(*WITH_ALL_PARTS, "router.top_k=3", "model.moe.latent_size=10", "model.moe.latent_norm=true"),
        *("model.init=mup", "model.init_std=0.04", "model.mup_base_width=8", "combine=orthogonal"),
    ),
    "coupled": (
        *(*WITH_ALL_PARTS, "router.top_k=3", "router.expert_router_coupling_weight=2.0"),
        *("router.expert_router_coupling_alpha=0.8", "model.moe.latent_size=10", "router.entropy_weight=0.5"),
    ),
    "coupled_top_p": (
        *("router=top_p", "router.threshold=0.6", "router.expert_router_coupling_weight=2.0"),
        "router.load_balance_level=global_batch",
    ),
    "latent_muon": (
        *(*WITH_ALL_PARTS, "optimizer=muon", "optimizer.epsilon=1e-4", "optimizer.learning_rate=0.01"),
        *("model.moe.latent_size=10", "model.init=mup", "model.init_std=0.04", "model.mup_base_width=8"),
    ),
    "muon": (
        *(*WITH_ALL_PARTS, "optimizer=muon", "optimizer.epsilon=1e-4", "optimizer.learning_rate=0.01"),
        *("optimizer.weight_decay=0.5", "model.moe.gate_rank=6", "model.init=mup", "model.init_std=0.04"),
        *("model.mup_base_width=8", "optimizer.groups.experts.lr_scale=2"),
    ),
    "muon_swiglu": (
        *(*WITH_ALL_PARTS, "optimizer=muon", "optimizer.epsilon=1e-4"),
        *("model.moe.shared_expert_gate=true", "model.head_size=10"),
    ),
    "muon_lory": (
        *(*WITH_ALL_PARTS, "router=lory", "router.segment_tokens=3", "optimizer=muon", "optimizer.epsilon=1e-4"),
        *("optimizer.weight_decay=0.5", "optimizer.groups.experts.lr_scale=2"),
    ),
    "muon_matrix_product": (
        *(*WITH_ALL_PARTS, "experts=matrix_product", "optimizer=muon", "optimizer.epsilon=1e-4"),
        "optimizer.learning_rate=0.003",
    ),
    "noisy": (
        *WITH_ALL_PARTS,
        "router.top_k=3",
        "router.jitter=0.1",
        "model.qk_norm=whole",
        "packing.isolate_documents=false",
    ),
}
_ALONE = (
    *("matrix_product", "lory", "smear", "thor", "scaled", "moe_plus_plus", "dynmoe", "moce_ir"),
    *("unequal", "orthogonal", "symmetric", "muon", "muon_swiglu", "latent", "latent_muon", "coupled", "coupled_top_p"),
    *("muon_lory", "muon_matrix_product"),
)
"""What varies the model and not the step; taken in turn, but for those in ``_ALONE``."""


@dataclass(frozen=True)
class Case:
    """One point of the product."""

    ranks: int
    expert_parallel_size: int
    zero_stage: int
    accumulation: int
    micro_batch_size: int
    recompute: str
    clipping: float
    dtype: str
    variant: str

    def config(self) -> Config:
        return tiny(
            *_VARIANTS[self.variant],
            f"parallel.processes={self.ranks}",
            f"parallel.expert_parallel_size={self.expert_parallel_size}",
            f"engine.zero_stage={self.zero_stage}",
            f"engine.dtype={self.dtype}",
            f"engine.gradient_clipping={self.clipping}",
            f"model.recompute={self.recompute}",
            rows=self.ranks * self.accumulation * self.micro_batch_size,
            micro_batch_size=self.micro_batch_size,
        )


_ADDED = [
    Case(2, 2, 1, 4, 3, "none", 0.1, "float32", "scaled"),
    Case(4, 4, 2, 1, 3, "full", 0.0, "bfloat16", "scaled"),
    Case(1, 1, 0, 4, 3, "none", 0.1, "float32", "moe_plus_plus"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "moe_plus_plus"),
    Case(4, 4, 2, 1, 3, "selective", 0.1, "float32", "moe_plus_plus"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "moe_plus_plus"),
    Case(1, 1, 0, 4, 3, "none", 0.1, "float32", "dynmoe"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "dynmoe"),
    Case(4, 4, 2, 1, 3, "selective", 0.1, "float32", "dynmoe"),
    Case(4, 1, 1, 1, 3, "none", 0.1, "float32", "dynmoe"),
    Case(1, 1, 0, 4, 3, "none", 0.1, "float32", "unequal"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "unequal"),
    Case(4, 4, 2, 1, 3, "selective", 0.1, "float32", "unequal"),
    Case(1, 1, 0, 4, 3, "none", 0.1, "float32", "moce_ir"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "moce_ir"),
    Case(4, 4, 2, 1, 3, "selective", 0.1, "float32", "moce_ir"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "moce_ir"),
    Case(1, 1, 0, 1, 3, "none", 0.0, "float32", "orthogonal"),
    Case(1, 1, 0, 4, 1, "selective", 0.1, "float32", "lory"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "lory"),
    Case(4, 4, 2, 1, 1, "none", 0.1, "float32", "lory"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "lory"),
    Case(4, 4, 1, 1, 3, "full", 0.0, "float32", "smear"),
    Case(2, 2, 0, 4, 1, "none", 0.1, "float32", "smear"),
    Case(1, 1, 0, 4, 1, "selective", 0.1, "float32", "matrix_product"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "matrix_product"),
    Case(4, 4, 2, 1, 1, "none", 0.1, "float32", "matrix_product"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "matrix_product"),
    Case(1, 1, 1, 4, 1, "selective", 0.1, "float32", "thor"),
    Case(2, 2, 2, 4, 1, "full", 0.1, "float32", "thor"),
    Case(4, 4, 1, 1, 3, "none", 0.0, "float32", "thor"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "thor"),
    Case(2, 2, 1, 4, 1, "full", 0.1, "float32", "orthogonal"),
    Case(4, 4, 2, 1, 3, "selective", 0.1, "float32", "orthogonal"),
    Case(2, 2, 2, 1, 3, "full", 0.1, "float32", "symmetric"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "orthogonal"),
    Case(1, 1, 0, 1, 3, "none", 0.1, "float32", "muon_swiglu"),
    Case(2, 1, 1, 4, 1, "none", 0.1, "float32", "muon"),
    Case(4, 1, 1, 1, 1, "none", 0.1, "float32", "muon_swiglu"),
    Case(4, 2, 2, 1, 3, "none", 0.0, "float32", "muon_swiglu"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "bfloat16", "muon_swiglu"),
    Case(1, 1, 0, 4, 1, "selective", 0.1, "float32", "latent"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "latent"),
    Case(2, 2, 1, 1, 3, "none", 0.1, "float32", "latent_muon"),
    Case(1, 1, 0, 1, 3, "none", 0.1, "float32", "muon_lory"),
    Case(2, 1, 1, 1, 3, "none", 0.1, "float32", "muon_lory"),
    Case(4, 2, 2, 1, 3, "none", 0.1, "float32", "muon_lory"),
    Case(4, 2, 0, 1, 3, "none", 0.1, "float32", "muon_lory"),
    Case(4, 4, 1, 1, 1, "none", 0.1, "bfloat16", "muon_lory"),
    Case(1, 1, 0, 1, 3, "none", 0.1, "float32", "muon_matrix_product"),
    Case(4, 2, 1, 1, 3, "none", 0.1, "float32", "muon_matrix_product"),
    Case(1, 1, 0, 4, 1, "none", 0.1, "float32", "coupled"),
    Case(2, 2, 1, 4, 3, "full", 0.1, "float32", "coupled"),
    Case(4, 2, 2, 1, 3, "none", 0.1, "float32", "coupled"),
    Case(2, 2, 1, 4, 3, "none", 0.1, "float32", "coupled_top_p"),
]
"""Rates and spreads by group of parameters, and other combinations, which no other option of a step knows of."""


def all_cases() -> list[Case]:
    """Every combination in float32; bfloat16 at ZeRO 1 and 2."""
    return [*_cases_by_turn(), *_ADDED]


def _cases_by_turn() -> list[Case]:
    turn = itertools.cycle(name for name in _VARIANTS if name not in _ALONE)
    cases = []
    for (ranks, size), dtype in itertools.product(TOPOLOGIES, ("float32", "bfloat16")):
        for options in itertools.product(*_AXES.values()):
            if dtype == "float32" or (options[0] > 0 and options[3] != "selective"):
                cases.append(Case(ranks, size, *options, dtype, next(turn)))
    return cases


def covering_cases() -> list[Case]:
    """A small part of the product in which any two values of any two fields meet at least once."""
    return [*_covering(_cases_by_turn(), lambda case: set(itertools.combinations(_values(case), 2))), *_ADDED]


def fast_cases() -> list[Case]:
    """A part of ``covering_cases`` with every topology in both dtypes and every value of every field."""

    def parts(case: Case) -> set[Any]:
        return {*_values(case), (case.ranks, case.expert_parallel_size, case.dtype)}

    return _covering(covering_cases(), parts)


def _covering(cases: Sequence[Case], parts: Callable[[Case], set[Any]]) -> list[Case]:
    """A few of the cases that together have the parts of all."""
    parts_of = {case: parts(case) for case in cases}
    missing = set().union(*parts_of.values())
    chosen = []
    while missing:
        # Parts that one case covers, per second of its running time.
        best = max(parts_of, key=lambda case: len(parts_of[case] & missing) / (1 + case.ranks))
        chosen.append(best)
        missing -= parts_of[best]
    return chosen


def _values(case: Case) -> Iterator[tuple[int, Any]]:
    # The topology is one field: expert parallel 4 exists with 4 ranks only.
    return enumerate(((case.ranks, case.expert_parallel_size), *astuple(case)[2:]))


def run_cases(cases: Sequence[Case], timeout: float = 600.0) -> dict[Case, list[QuantityCheck]]:
    """Run cases, all of one number of ranks in one start of processes."""
    results: dict[Case, list[QuantityCheck]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        results.update(zip(own, run_on_ranks(_compare_on_ranks, ranks, own, timeout=timeout)[0], strict=True))
    return results


def _compare_on_ranks(cases: list[Case]) -> list[list[QuantityCheck]]:
    results = []
    for case in cases:
        config = case.config()
        mesh = build_mesh(config.parallel, "cpu")
        run_plan = plan_run(config, mesh.world_size, ("cpu", case.dtype))
        plan = run_plan.batches
        assert (plan.accumulation, plan.num_steps) == (case.accumulation, NUM_STEPS)
        steps = random_batches(config, plan)
        engine = build_engine(config, run_plan, mesh)
        run = [record(engine, i, own_micro_batches(step, plan, mesh.rank)) for i, step in enumerate(steps)]
        if case.clipping:
            assert all(step.gradient_norm > 2 * case.clipping for step in run), "clipping must bite"
        if mesh.is_main:
            oracle = Oracle(config, plan.num_steps, case.dtype)
            results.append(compare(run, oracle.run(steps), case.dtype))
        dist.barrier()
    return results
