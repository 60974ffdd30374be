"""Losses by document and routes of a validation: those of plain loops over tokens, on one rank and on two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.builders import SEQUENCE, context_of, tiny
from helpers.corpora import write_shards
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from torch.nn import functional

from moe_pretrain.data import ShardReader, validation_batches
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.metrics import probe_collector as probes
from moe_pretrain.model.decoder import recorded_routings
from moe_pretrain.run_folder.probe import Probe, put_together, routing_drift

ROWS = 7  # with micro-batches of 2, ranks have padding rows
LENGTHS = (5, 30, 2, 17, 1, 40, 9)
SHARES = {"a": 0.25, "b": 0.75}
Found = dict[str, Any]


def shards(folder: Path, name: str, shift: int) -> None:
    """Documents of ``LENGTHS`` tokens; 9 ends each."""
    random = np.random.default_rng(shift)
    write_shards(folder / name, [[*random.integers(10, 64, length).tolist(), 9] for length in LENGTHS], vocab_size=64)


def _probe(engine: TrainEngine, folder: str, step: int, isolate: bool) -> tuple[Probe, dict[str, list[float]]]:
    """The probe, and by set the experts per token of each layer."""
    parts, experts = {}, {}
    for name in SHARES:
        reader = ShardReader(Path(folder) / name)
        collector = probes.Collector(reader.document_ends, SEQUENCE, ROWS, 4)
        mesh = engine.mesh
        evaluation = engine.evaluate(
            validation_batches(reader, SEQUENCE, 2, mesh.rank, mesh.world_size, ROWS, isolate), collector.add
        )
        parts[name], experts[name] = collector.gather(), evaluation.experts_per_token
    return put_together(step, parts, SHARES, [0, 1]), experts


def _change_layer_1(engine: TrainEngine) -> None:
    with torch.no_grad():
        engine.model.moe_layers()[1].router.weight[:2] *= -1


def _by_loops(engine: TrainEngine, folder: str, name: str, isolate: bool) -> Found:
    """Every row by itself: nats and tokens of each (row, document), and each layer's set of experts of each token."""
    reader = ShardReader(Path(folder) / name)
    pieces: dict[tuple[int, int], list[float]] = {}
    sets: list[list[frozenset[int]]] = [[], []]
    engine.model.eval()
    for batch in validation_batches(reader, SEQUENCE, 1, 0, 1, ROWS, isolate):
        row = int(batch.row_positions[0])
        logits = engine.model.logits(batch.input_ids, batch.document_ids, batch.position_ids, context_of(batch))[0]
        for position, label in enumerate(batch.labels[0].tolist()):
            if label < 0:
                continue
            offset = row * SEQUENCE + position + 1
            document = 0
            while offset >= reader.document_ends[document]:
                document += 1
            loss = functional.cross_entropy(logits[position].double(), torch.tensor(label))
            pieces.setdefault((row, document), []).append(float(loss))
        with recorded_routings(engine.model) as routings, torch.no_grad():
            engine.model.routes(batch.input_ids, batch.document_ids, batch.position_ids, context_of(batch))
        for layer, routing in enumerate(routings):
            for token in range(SEQUENCE):
                sets[layer].append(frozenset(routing.expert_index[routing.token_index == token].tolist()))
    return {"pieces": pieces, "sets": sets}


def _examine(folder: str, isolate: bool) -> Found:
    ranks = torch.distributed.get_world_size()
    topology = (f"parallel.processes={ranks}", f"parallel.expert_parallel_size={ranks}")
    engine = build_engine(tiny("router=top_p", "router.threshold=0.5", *topology, rows=4, micro_batch_size=2))
    before, experts = _probe(engine, folder, 1, isolate)
    loops = [_by_loops(engine, folder, name, isolate) for name in SHARES] if ranks == 1 else []
    _change_layer_1(engine)
    after, _ = _probe(engine, folder, 2, isolate)
    moved = [_by_loops(engine, folder, name, isolate) for name in SHARES] if ranks == 1 else []
    return {"before": vars(before), "after": vars(after), "experts": experts, "loops": loops, "moved": moved}


@pytest.fixture(scope="module", params=[True, False], ids=["isolated", "not isolated"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    folder = tmp_path_factory.mktemp("shards")
    for shift, name in enumerate(SHARES):
        shards(folder, name, shift)
    return {ranks: run_on_ranks(_examine, ranks, str(folder), request.param)[0] for ranks in (1, 2)}


def test_losses_and_tokens_are_those_of_the_loops(found: dict[int, Found]):
    probe, loops = Probe(**found[1]["before"]), found[1]["loops"]
    keys = [(index, row, document) for index, one in enumerate(loops) for row, document in sorted(one["pieces"])]
    pieces = [loops[index]["pieces"][row, document] for index, row, document in keys]
    assert list(zip(probe.set_index.tolist(), probe.document.tolist(), strict=True)) == [(i, d) for i, _, d in keys]
    assert probe.tokens.tolist() == [len(piece) for piece in pieces]
    assert probe.loss == pytest.approx([sum(piece) for piece in pieces], rel=1e-5)
    means = [np.mean([loss for piece in one["pieces"].values() for loss in piece]) for one in loops]
    assert probe.mean_loss == pytest.approx(0.25 * means[0] + 0.75 * means[1], rel=1e-6)
    assert len(set(probe.document.tolist())) > 4 and max(np.bincount(probe.document)) > 2, "documents span rows"


def test_equal_sets_have_equal_hashes_and_unequal_ones_do_not(found: dict[int, Found]):
    probe, loops = Probe(**found[1]["before"]), found[1]["loops"]
    for layer in range(2):
        sets = [one for part in loops for one in part["sets"][layer]]
        assert len(sets) == probe.routes.shape[1]
        number = {one: hashed for one, hashed in zip(sets, probe.routes[layer].tolist(), strict=True)}
        assert [number[one] for one in sets] == probe.routes[layer].tolist()
        assert len(set(number.values())) == len(number) > 3
        assert len({len(one) for one in sets}) > 1, "tokens have one expert, or more"


def test_experts_per_token_are_those_of_the_loops_on_any_ranks(found: dict[int, Found]):
    for index, name in enumerate(SHARES):
        loops = [np.mean([len(one) for one in sets]) for sets in found[1]["loops"][index]["sets"]]
        assert min(loops) > 1.0 and loops[0] != loops[1]
        for ranks in (1, 2):
            assert found[ranks]["experts"][name] == pytest.approx(loops, rel=1e-9)


def test_drift_is_the_share_of_tokens_whose_set_changed(found: dict[int, Found]):
    before, after = Probe(**found[1]["before"]), Probe(**found[1]["after"])
    drift = routing_drift(before, after)
    for layer in range(2):
        sets = [[one for part in found[1][time] for one in part["sets"][layer]] for time in ("loops", "moved")]
        changed = [one != other for one, other in zip(*sets, strict=True)]
        assert drift[layer] == pytest.approx(sum(changed) / len(changed))
    assert drift[0] == 0 and 0 < drift[1] < 1


def test_ranks_change_nothing(found: dict[int, Found]):
    for time in ("before", "after"):
        one, two = (Probe(**found[ranks][time]) for ranks in (1, 2))
        assert one.fingerprint == two.fingerprint
        assert np.array_equal(one.routes, two.routes)
        assert np.array_equal(one.document, two.document) and np.array_equal(one.tokens, two.tokens)
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert Probe(**found[1]["before"]).fingerprint == Probe(**found[1]["after"]).fingerprint
