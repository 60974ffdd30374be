"""``engine.determinism=elastic``: the same bits on any ranks, expert parallel size, ZeRO stage, and over a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import checkpoints
from helpers.builders import WITH_ALL_PARTS, tiny
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.engine.elastic import TreeSum, exact_sum
from moe_pretrain.engine.intervals import WEIGHT

Topology = tuple[int, int, int]
"""Ranks, expert parallel size, ZeRO stage."""

CASES = (
    # Clipping is at work, the balance loss needs the global batch, activations are made twice.
    ("router=top_k", *WITH_ALL_PARTS, "model.recompute=full", "engine.gradient_clipping=0.5"),
    (
        "router=top_p",
        "router.load_balance_level=micro_batch",
        "model.init=mup",
        "optimizer.groups.experts.lr_scale=0.7",
    ),
    # Matrices are cut between ranks at other places on other topologies, and put together for the update.
    ("router=loss_free", "engine.gradient_clipping=0.0", "optimizer=muon"),
    # An expert's gradient from each of two passes.
    ("router=thor",),
    ("router=top_k", "router.top_k=3", "combine=orthogonal"),
    # Odd sizes and few rows per expert: rows of the travelling gate begin at other alignments on other topologies.
    ("router=autonomy", *WITH_ALL_PARTS, "router.gate_rank=7", "model.moe.expert_width_multiple=1"),
)
TOPOLOGIES: list[Topology] = [(1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 2, 0), (4, 4, 1)]
STEPS = 3


def train(folder: str, topology: Topology, mode: str, first: int, last: int, source: str = "") -> list[Any]:
    """Every case from step ``first`` to ``last``: what a run would log, and a checkpoint in ``folder``."""
    _, expert_parallel_size, zero_stage = topology
    spread = (f"parallel.expert_parallel_size={expert_parallel_size}", f"engine.zero_stage={zero_stage}")
    results = []
    for index, case in enumerate(CASES):
        engine = build_engine(tiny(*case, *spread, f"engine.determinism={mode}", "engine.check_every_steps=1"))
        if source:
            path, manifest = store.newest(Path(source) / str(index), pytest.fail)
            store.restore(engine, path, manifest)
        for step in range(first, last):
            result = engine.step(step, random_batches(engine, step))
            statistics = result.tokens_per_expert.tolist(), result.router_entropy, [own.tolist() for own in result.sums]
            results.append((result.loss, result.aux, (result.gradient_norm, result.gradient_norms), statistics))
        evaluation = engine.evaluate(random_batches(engine, last))
        results.append((evaluation.loss, evaluation.labels))
        checkpoints.save(engine, Path(folder) / str(index), TrainState(step=last), keep_last=3)
    return results


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical array of every case's newest checkpoint, put together; router state too."""
    found = {}
    for index in range(len(CASES)):
        path, manifest = store.newest(folder / str(index), pytest.fail)
        reader = Reader(path, manifest)
        for (name, kind), intervals in reader.arrays().items():
            parts = [reader.part(own, 0, own.length) for own in sorted(intervals, key=lambda own: own.start)]
            found[f"{CASES[index][0]} {kind} {name}"] = torch.cat(parts)
    return found


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The first topology, uninterrupted."""
    folder = tmp_path_factory.mktemp("straight")
    (logged,) = run_on_ranks(train, 1, str(folder), TOPOLOGIES[0], "elastic", 0, STEPS)
    return logged, contents(folder)


@pytest.mark.parametrize("topology", TOPOLOGIES[1:], ids=str)
@pytest.mark.slow  # the resumed run takes others
def test_bits_do_not_depend_on_the_topology(topology: Topology, straight: Any, tmp_path: Path):
    for logged in run_on_ranks(train, topology[0], str(tmp_path), topology, "elastic", 0, STEPS):
        assert logged == straight[0]
    assert differing(contents(tmp_path), straight[1]) == []


def test_resumed_elsewhere_ends_with_the_bits_of_the_uninterrupted_run(straight: Any, tmp_path: Path):
    logged, source = [], ""
    for step, topology in enumerate([(4, 2, 2), (1, 1, 1), (2, 2, 0)]):
        folder = tmp_path / str(step)
        logged.append(run_on_ranks(train, topology[0], str(folder), topology, "elastic", step, step + 1, source)[0])
        source = str(folder)
    per_case = [part[2 * case] for case in range(len(CASES)) for part in logged]
    assert per_case == [row for row in straight[0] if len(row) == 4]
    assert differing(contents(Path(source)), straight[1]) == []


@pytest.mark.slow
def test_it_is_the_same_run_as_in_the_default_mode_up_to_rounding(straight: Any, tmp_path: Path):
    """That all topologies agree would also hold for a gradient that is wrong on all."""
    (logged,) = run_on_ranks(train, 1, str(tmp_path), (1, 1, 1), "topology", 0, STEPS)
    for ours, theirs in zip(straight[0], logged, strict=True):
        # Rounding grows over the steps, by the processor up to 2e-5; a wrong gradient moves the norm by far more.
        assert ours[0] == pytest.approx(theirs[0], rel=5e-5)
    default = contents(tmp_path)
    assert differing(default, straight[1]), "the two modes round differently, or the mode is not switched on"
    for name, value in straight[1].items():
        if WEIGHT in name:  # as a whole: where a gradient is nearly zero, rounding decides how AdamW moves a number
            apart = float((value - default[name]).norm() / default[name].norm())
            print(f"{name}: {apart:.1e}")
            assert apart < 5e-3, name


def tree_by_recursion(leaves: list[torch.Tensor]) -> torch.Tensor:
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    return tree_by_recursion(leaves[:middle]) + tree_by_recursion(leaves[middle:])


def test_tree_of_subtrees_is_the_tree():
    leaves = list(torch.randn(16, 100, generator=torch.Generator().manual_seed(0)).unbind())
    expected = tree_by_recursion(leaves)
    assert not torch.equal(sum(leaves), expected), "otherwise the order would not matter here"
    for size in (1, 2, 4, 8, 16):
        whole = TreeSum()
        for start in range(0, 16, size):
            block = TreeSum()
            for leaf in leaves[start : start + size]:
                block.add([leaf])
            whole.add(block.take())
        assert torch.equal(whole.take()[0], expected)


def sum_awkwardly() -> list[float]:
    """Terms whose sum depends on the order unless it is exact; this rank's two of them."""
    rank = dist.get_rank()
    return exact_sum(
        torch.tensor([[1e16, 1.0], [1.0, 2.0]] if rank == 0 else [[1.0, 3.0], [-1e16, 4.0]]).double()
    ).tolist()


def test_sums_of_validation_have_no_order():
    for total in run_on_ranks(sum_awkwardly, 2):
        assert total == [2.0, 10.0]
