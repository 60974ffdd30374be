"""Validation during training, which a signal may cut short."""

from collections.abc import Callable, Iterable, Iterator

from moe_pretrain import data
from moe_pretrain.batching import BatchPlan
from moe_pretrain.config import Config
from moe_pretrain.data.packing import MicroBatch
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.metrics.rows import Row
from moe_pretrain.metrics.statistics import evaluation_row
from moe_pretrain.signals import StopRequest


class Evaluator:
    """Validates one engine on the held-out part of its corpus and on further sets."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        corpus: data.TokenizedCorpus,
        sets: dict[str, data.ShardReader],
        engine: TrainEngine,
        stop: StopRequest,
        enter: Callable[[str, int], None],
    ):
        self._config, self._plan, self._engine, self._stop, self._enter = config, plan, engine, stop, enter
        self._readers = {"": corpus.validation, **{f"{name}/": reader for name, reader in sets.items()}}

    def evaluate(self, step: int) -> Row | None:
        """Losses on every set; None if a signal was agreed on in between. Every rank must call it.

        Args:
            step: Finished steps, for whoever asks where this rank is.
        """
        row: Row = {}
        for name, reader in self._readers.items():
            found = self._evaluate_on(reader, step)
            if found is None:
                return None
            row |= {key.replace("validation/", f"validation/{name}"): value for key, value in found.items()}
        return row

    def _evaluate_on(self, reader: data.ShardReader, step: int) -> Row | None:
        """Loss, perplexity and, where the text is known, bits per byte."""
        mesh, packing = self._engine.mesh, self._config.packing
        batches = data.validation_batches(
            reader,
            self._config.model.sequence_length,
            self._plan.micro_batch_size,
            mesh.rank,
            mesh.world_size,
            self._config.evaluation.max_rows,
            packing.isolate_documents,
            packing.reset_positions,
        )
        was_stopped: list[int] = []
        evaluation = self._engine.evaluate(self._until_stopped(batches, step, was_stopped))
        if was_stopped:
            return None
        if reader.text_bytes:
            return evaluation_row(evaluation.loss, reader.text_bytes / reader.num_tokens)
        row = evaluation_row(evaluation.loss, 1.0)
        del row["validation/bits_per_byte"]  # the corpus came as tokens
        return row

    def _until_stopped(self, batches: Iterable[MicroBatch], step: int, was_stopped: list[int]) -> Iterator[MicroBatch]:
        """The batches up to an agreed signal, which is noted; every rank has equally many."""
        for batch in batches:
            self._enter("evaluate.batch", step)
            if self._stop.agreed(self._engine.mesh.device):
                was_stopped.append(self._stop.received)
                return
            yield batch
