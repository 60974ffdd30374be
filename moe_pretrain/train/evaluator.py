"""Validation during training, which a signal may cut short."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.data import ShardReader, validation_batches, validation_rows
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.step_result import Evaluation
from moe_pretrain.metrics.probe_collector import Collector
from moe_pretrain.metrics.step_rows import evaluation_row, mixed_evaluation_row, part_time_row
from moe_pretrain.moe.part_timer import PartClock, time_source
from moe_pretrain.moe.types import Routing
from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.run_folder.probe import Probe, ValidationPart, put_together
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.corpora import RunData


class Validation(NamedTuple):
    """Result of one validation.

    Attributes:
        row: Metrics row, with the time of the parts of the MoE layers, measured on the corpus's own documents.
        probe: Losses and routes of the corpus's own documents, piece by piece.
    """

    row: MetricsRow
    probe: Probe


class Evaluator:
    """Validates one engine on the held-out part of its corpus and on further sets."""

    def __init__(self, config: Config, plan: RunPlan, data: RunData, engine: TrainEngine, context: RunContext):
        self._config, self._engine, self._context = config, engine, context
        self._micro_batch_size = plan.batches.micro_batch_size
        self._logged_sets, self._shares = data.evaluation_sets, data.corpus.shares
        # A mixture's sources are logged by name as well.
        self._readers = {**data.corpus.validation_sets(), **data.evaluation_sets}

    def evaluate(self, step: int) -> Validation | None:
        """Losses on every set; None if a signal was agreed on in between. Every rank must call it.

        Args:
            step: Finished steps, for the heartbeat.
        """
        losses: dict[str, float] = {}
        parts: dict[str, ValidationPart] = {}
        layers = [layer.router.layer for layer in self._engine.model.moe_layers()]
        experts = np.zeros(len(layers))  # routed experts per token, by layer
        clock = PartClock(time_source(self._engine.mesh.device.type))
        for name, reader in self._readers.items():
            collector = self._collector(reader)
            found = self._evaluate_on(reader, step, (collector, clock) if name in self._shares else None)
            if found is None:
                return None
            losses[name] = found.loss
            if name in self._shares:
                experts += self._shares[name] * np.array(found.experts_per_token)
                parts[name] = collector.gather()
        sizes = {name: _bytes_per_token(reader) for name, reader in self._readers.items()}
        row = mixed_evaluation_row(losses, sizes, self._shares)
        for name in self._logged_sets:
            own = evaluation_row(losses[name], sizes[name])
            row |= {key.replace("validation/", f"validation/{name}/"): value for key, value in own.items()}
        row |= {
            f"moe/layer_{k:02d}/validation_experts_per_token": e for k, e in zip(layers, experts.tolist(), strict=True)
        }
        return Validation(row | part_time_row(clock.batches), put_together(step, parts, self._shares, layers))

    def _collector(self, reader: ShardReader) -> Collector:
        length, layers = self._config.model.sequence_length, self._engine.model.moe_layers()
        num_rows = len(validation_rows(reader, length, self._config.evaluation.max_rows))
        return Collector(reader.document_ends, length, num_rows, layers[0].kinds.total if layers else 0)

    def _evaluate_on(
        self, reader: ShardReader, step: int, observers: tuple[Collector, PartClock] | None
    ) -> Evaluation | None:
        """Result of one set, whose batches the ``observers`` see."""
        mesh, packing = self._engine.mesh, self._config.packing
        batches = validation_batches(
            reader,
            self._config.model.sequence_length,
            self._micro_batch_size,
            mesh.rank,
            mesh.world_size,
            self._config.evaluation.max_rows,
            packing.isolate_documents,
            packing.reset_positions,
        )
        was_stopped: list[int] = []
        watched = self._until_stopped(batches, step, was_stopped)
        if observers is None:
            evaluation = self._engine.evaluate(watched)
        else:
            collector, clock = observers
            num_layers = len(self._engine.model.moe_layers())

            def note(batch: MicroBatch, losses: Tensor, routings: list[Routing]) -> None:
                collector.add(batch, losses, routings)  # copies to the host, so that the clock has nothing to wait for
                clock.end_batch(batch.labels.numel() * num_layers)

            with clock:
                evaluation = self._engine.evaluate(watched, note)
        return None if was_stopped else evaluation

    def _until_stopped(self, batches: Iterable[MicroBatch], step: int, was_stopped: list[int]) -> Iterator[MicroBatch]:
        """The batches up to an agreed signal, which is noted; every rank has equally many."""
        for batch in batches:
            self._context.enter("evaluate.batch", step)
            if self._context.agree_to_stop():
                was_stopped.append(self._context.stop.received)
                return
            yield batch


def _bytes_per_token(reader: ShardReader) -> float | None:
    """None for a corpus that came as tokens."""
    return reader.text_bytes / reader.num_tokens if reader.text_bytes else None
