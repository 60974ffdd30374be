"""What a trained model's experts specialise in: the newest checkpoint of a run over its validation rows."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moe_pretrain.analysis.specialisation_parts import Specialisation, Tally, gate_of, most_frequent_classes
from moe_pretrain.checkpoint import store
from moe_pretrain.config.compose import validate
from moe_pretrain.config.load import load_router_file
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.data import IGNORE_INDEX, MicroBatch, ShardReader, validation_batches
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.schedule.batch_plan import plan_batches

NUM_CLASSES = 64
"""Classes of next tokens: the most frequent ones, and one of all others."""
RESULT = "specialisation.json"
Tables = dict[str, list[Specialisation]]
"""Kind of class -> one row per MoE layer, bottom up."""


def read_run(folder: Path) -> Config:
    """The configuration that the run in ``folder`` was last started with.

    Raises:
        ConfigError: There is none, or its model routes nothing.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    file = values["router_file"]
    config = validate(values, None if file is None else load_router_file(file))
    if config.router.name == "dense" or not config.model.moe_layers:
        raise ConfigError(f"router={config.router.name} in {folder}: a model without routing has nothing to specialise")
    return config


def specialise(
    config: Config, folder: Path, readers: dict[str, ShardReader], device: str, say: Callable[[str], None]
) -> int:
    """Print and write ``specialisation.json`` for the newest checkpoint in ``folder``; the exit code.

    Classes are the next token and, if there is more than one validation set, the set that a token is from.

    Args:
        config: Of the run.
        folder: Of the run.
        readers: The validation sets by name; ``evaluation.max_rows`` of each are read.
        device: ``cpu`` or ``cuda``; the model runs in float32 in this one process.
        say: Prints a line.

    Raises:
        CheckpointError: There is no good checkpoint.
    """
    found = store.newest(folder / store.CHECKPOINTS, say)
    if found is None:
        raise store.CheckpointError(f"{folder / 'checkpoints'} has no good checkpoint")
    path, manifest = found
    model = DecoderLM(config.model, config.router, ExpertShard())
    store.load_model(model, path, manifest)
    tables = examine(model.to(device).eval(), config, readers)
    for kind, layers in tables.items():
        say(f"{path.name} of {config.run.name}, {layers[0].tokens:,} tokens by {kind}, bits")
        for line in _table(config.model.moe_layers, layers):
            say(f"  {line}")
    values = {kind: [asdict(layer) for layer in layers] for kind, layers in tables.items()}
    record = {"checkpoint": path.name, "moe_layers": config.model.moe_layers, "classes": values}
    (folder / RESULT).write_text(json.dumps(record, indent=2) + "\n")
    say(f"written: {folder / RESULT}")
    return 0


@torch.no_grad()
def examine(model: DecoderLM, config: Config, readers: dict[str, ShardReader]) -> Tables:
    """Run ``model``, in evaluation, over the validation rows of all ``readers``."""
    labels = [batch.labels.flatten() for _, batch in _batches(config, readers)]
    sets = [torch.full_like(own, index) for (index, batch), own in zip(_batches(config, readers), labels, strict=True)]
    sizes = [len(own) for own in labels]
    every_label = torch.cat(labels)
    counted = every_label != IGNORE_INDEX
    kinds = {"next token": (most_frequent_classes(every_label[counted], NUM_CLASSES), NUM_CLASSES)}
    if len(readers) > 1:
        kinds["validation set"] = (torch.cat(sets)[counted], len(readers))
    generator = torch.Generator().manual_seed(config.seed)
    # Dealt out over all tokens at once, so that the baseline keeps nothing of where a class occurs.
    shuffled = {kind: own[torch.randperm(len(own), generator=generator)] for kind, (own, _) in kinds.items()}
    layers = model.moe_layers()
    tallies = {kind: [Tally(num, layer.num_experts) for layer in layers] for kind, (_, num) in kinds.items()}
    device = model.embedding.weight.device
    first = 0
    for (_, batch), part in zip(_batches(config, readers), counted.split(sizes), strict=True):
        of_part = slice(first, first + int(part.sum()))
        first = of_part.stop
        gates = [gate[part] for gate in _gates(model, batch.to(device), config.seed)]
        for kind, (classes, _) in kinds.items():
            for tally, gate in zip(tallies[kind], gates, strict=True):
                tally.add(gate, classes[of_part], shuffled[kind][of_part])
    return {kind: [tally.result() for tally in own] for kind, own in tallies.items()}


def _batches(config: Config, readers: dict[str, ShardReader]) -> Iterator[tuple[int, MicroBatch]]:
    """Every validation micro-batch, with the index of its set."""
    micro_batch_size = plan_batches(config.batch, config.model.sequence_length, 1, config.num_steps).micro_batch_size
    for index, reader in enumerate(readers.values()):
        for batch in validation_batches(
            reader,
            config.model.sequence_length,
            micro_batch_size,
            0,
            1,
            config.evaluation.max_rows,
            config.packing.isolate_documents,
            config.packing.reset_positions,
        ):
            yield index, batch


def _gates(model: DecoderLM, batch: MicroBatch, seed: int) -> list[Tensor]:
    """``[tokens, experts]`` of every MoE layer, on the CPU."""
    with recorded_routings(model) as routings:
        model.routes(batch.input_ids, batch.document_ids, batch.position_ids, routing_context(batch, seed, 0))
    return [gate_of(routing, batch.labels.numel(), model.config.moe.num_experts).cpu() for routing in routings]


def _table(layers: list[int], rows: list[Specialisation]) -> Iterator[str]:
    names = ["layer", "I hard", "shuffled", "H(E|Y)", "H(E)", "I soft", "shuffled", "H(E|Y)", "H_u", "H_s", "H(Y)"]
    yield " ".join(f"{name:>8}" for name in names)
    for layer, row in zip(layers, rows, strict=True):
        hard, soft = row.hard, row.soft
        values = [hard.mutual, row.hard_shuffled, hard.experts_given_class, hard.experts]
        values += [soft.mutual, row.soft_shuffled, soft.experts_given_class, soft.experts, row.gate_entropy]
        yield " ".join([f"{layer:>8}", *(f"{value:8.3f}" for value in [*values, hard.classes])])
