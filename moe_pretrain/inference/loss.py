"""Loss of a model on rows of text, outside of training."""

from collections.abc import Iterable, Mapping

import torch

from moe_pretrain.config.schema import Config
from moe_pretrain.data import IGNORE_INDEX, MicroBatch, ShardReader, validation_batches
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM


@torch.no_grad()
def mean_loss(model: DecoderLM, batches: Iterable[MicroBatch], seed: int) -> float:
    """Cross-entropy per counted position, nats."""
    total, counted = 0.0, 0
    for batch in batches:
        context = routing_context(batch, seed, 0)
        losses = model.token_losses(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        total += float(losses.double().sum())
        counted += int((batch.labels != IGNORE_INDEX).sum())
    return total / max(counted, 1)


def validation_loss(
    model: DecoderLM, config: Config, sets: Mapping[str, ShardReader], shares: Mapping[str, float], rows_at_once: int
) -> float:
    """Validation loss as training measures it, nats per token.

    Args:
        model: In evaluation.
        config: Configuration of the run.
        sets: Held-out documents by name.
        shares: Weight of each set.
        rows_at_once: Rows of a forward pass.
    """
    return sum(
        shares[name] * mean_loss(model, validation_rows_of(config, reader, rows_at_once), config.seed)
        for name, reader in sets.items()
    )


def validation_rows_of(config: Config, reader: ShardReader, rows_at_once: int) -> Iterable[MicroBatch]:
    """The rows of ``reader`` that the run validates on."""
    return validation_batches(
        reader,
        config.model.sequence_length,
        rows_at_once,
        0,
        1,
        config.evaluation.max_rows,
        config.packing.isolate_documents,
        config.packing.reset_positions,
    )
