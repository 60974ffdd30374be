"""The time of the parts of MoE layers in a validation's row, on two ranks, by a clock that ticks when it is read."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist
from helpers.builders import SEQUENCE, tiny
from helpers.corpora import write_shards
from helpers.engines import build_engine
from helpers.processes import run_on_ranks

from moe_pretrain import data
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.data.prepare.tokenized_corpus import TokenizedCorpus
from moe_pretrain.metrics.step_rows import read_part_times
from moe_pretrain.moe.part_timer import HostTime
from moe_pretrain.system.faults import Faults
from moe_pretrain.system.stop_signals import StopRequest
from moe_pretrain.train import evaluator as evaluation
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.corpora import RunData

ROWS, MICRO_BATCH, LAYERS = 14, 2, 2
BATCHES = 4  # of a rank, the last one with padding
# Regions of a layer that are entered: of each part, and those of the experts' inside which there are others.
TICKS = {"router": 1, "permute": 4 + 2, "exchange": 5, "experts": 1 + 4, "shared_experts": 0, "combine": 2 + 1}
READINGS = LAYERS * 2 * (1 + 6 + 5 + 1 + 3)


class Ticks(HostTime):
    """Every reading is ``seconds`` after the one before; in the first batch a thousand times as much."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._now = 0.0
        self.readings = 0

    def now(self) -> float:
        self._now += self._seconds * (1000.0 if self.readings < READINGS else 1.0)
        self.readings += 1
        return self._now


def _evaluate(folder: str) -> tuple[dict[str, Any], int]:
    """The row and how often the clock was read; rank 1 is three times as slow as rank 0."""
    config = tiny(
        *("router=top_k", "parallel.processes=2", "parallel.expert_parallel_size=2"),
        *("packing.isolate_documents=false", f"evaluation.max_rows={ROWS}"),
        micro_batch_size=MICRO_BATCH,
    )
    engine = build_engine(config)
    source = Ticks(1.0 + 2 * dist.get_rank())
    evaluation.time_source = lambda device_type: source
    stop = Mock(spec=StopRequest)
    stop.agreed.return_value = False
    reader = data.ShardReader(Path(folder))
    corpus = Mock(spec=TokenizedCorpus, shares={"": 1.0})
    corpus.validation_sets.return_value = {"": reader}
    run_data = Mock(spec=RunData, corpus=corpus, evaluation_sets={"other": reader})
    context = RunContext(engine.mesh, stop, Faults(config.fault, engine.mesh.rank), lambda phase, step: None, print)
    found = evaluation.Evaluator(config, plan_run(config, 2), run_data, engine, context).evaluate(3)
    assert found is not None
    return found.row, source.readings


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [np.random.default_rng(0).integers(10, 64, 1 + ROWS * SEQUENCE).tolist()], vocab_size=64)
    return str(folder)


def test_a_row_has_the_mean_over_ranks_and_layers_of_the_median_batch(shards: str):
    """For one token; further validation sets are not timed."""
    for row, readings in run_on_ranks(_evaluate, 2, shards):
        microseconds = {name: 1e6 * ticks * 2 / (MICRO_BATCH * SEQUENCE) for name, ticks in TICKS.items()}
        assert read_part_times(row) == pytest.approx(microseconds)
        assert readings == READINGS * BATCHES
        assert {key for key in row if key.startswith("moe/") and "layer_" not in key} == {
            f"moe/{name}_microseconds_per_token" for name in TICKS
        }
