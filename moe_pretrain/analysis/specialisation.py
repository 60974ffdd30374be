"""Specialisation of a trained model's experts: the newest checkpoint of a run over its validation rows."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.checkpoint import store
from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.data import IGNORE_INDEX, MicroBatch, ShardReader, validation_batches
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.moe.types import ExpertShard, Routing
from moe_pretrain.run_folder.paths import CHECKPOINTS, SPECIALISATION_FILE
from moe_pretrain.system.files import write_json

NUM_CLASSES = 64
"""Classes of next tokens: the most frequent ones, and one of all others."""


@dataclass(frozen=True)
class Information:
    """Mutual information of experts and classes, bits.

    Attributes:
        mutual: ``I(E;Y)``, from 0 when they are independent to ``min(H(E), H(Y))``.
        experts_given_class: ``H(E|Y)``.
        experts: ``H(E)``, at most log2 of the number of experts; of soft mass it is the paper's ``H_u``.
        classes: ``H(Y)``.
    """

    mutual: float
    experts_given_class: float
    experts: float
    classes: float


@dataclass(frozen=True)
class Specialisation:
    """One layer against one kind of class, bits.

    Attributes:
        hard: Of the expert with the largest weight.
        soft: Of the mass of all weights.
        hard_shuffled: ``I(E;Y)`` of ``hard`` with classes dealt out anew: what a finite sample alone makes, about
            ``(experts - 1) (classes - 1) / (2 tokens ln 2)``.
        soft_shuffled: The same of ``soft``.
        gate_entropy: The paper's ``H_s``: mean over tokens of the entropy of their weights.
        tokens: Tokens counted: those with a class and an expert.
    """

    hard: Information
    soft: Information
    hard_shuffled: float
    soft_shuffled: float
    gate_entropy: float
    tokens: int


Tables = dict[str, list[Specialisation]]
"""Kind of class -> one row per MoE layer, bottom up."""


def specialise(
    config: Config, plan: RunPlan, folder: Path, readers: dict[str, ShardReader], say: Callable[[str], None]
) -> int:
    """Print and write ``specialisation.json`` for the newest checkpoint in ``folder``; the exit code.

    Classes are the next token and, if there is more than one validation set, the set that a token is from.

    Args:
        config: Configuration of the run.
        plan: Plan for this one process; the model runs in float32 whatever its dtype.
        folder: Folder of the run.
        readers: The validation sets by name; ``evaluation.max_rows`` of each are read.
        say: Prints a line.

    Raises:
        CheckpointError: There is no good checkpoint.
    """
    found = store.newest(folder / CHECKPOINTS, say)
    if found is None:
        raise store.CheckpointError(f"{folder / CHECKPOINTS} has no good checkpoint")
    path, manifest = found
    model = DecoderLM(config.model, config.router, ExpertShard())
    store.load_model(model, path, manifest)
    tables = examine(model.to(plan.device).eval(), config, plan, readers)
    for kind, layers in tables.items():
        say(f"{path.name} of {config.run.name}, {layers[0].tokens:,} tokens by {kind}, bits")
        for line in _table(config.model.moe_layers, layers):
            say(f"  {line}")
    values = {kind: [asdict(layer) for layer in layers] for kind, layers in tables.items()}
    record = {"checkpoint": path.name, "moe_layers": config.model.moe_layers, "classes": values}
    write_json(folder / SPECIALISATION_FILE, record)
    say(f"written: {folder / SPECIALISATION_FILE}")
    return 0


@torch.no_grad()
def examine(model: DecoderLM, config: Config, plan: RunPlan, readers: dict[str, ShardReader]) -> Tables:
    """Run ``model``, in evaluation, over the validation rows of all ``readers``."""
    labels = [batch.labels.flatten() for _, batch in _batches(config, plan, readers)]
    sets = [
        torch.full_like(own, index) for (index, batch), own in zip(_batches(config, plan, readers), labels, strict=True)
    ]
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
    tallies = {kind: [Tally(num, layer.kinds.total) for layer in layers] for kind, (_, num) in kinds.items()}
    device = model.embedding.weight.device
    first = 0
    for (_, batch), part in zip(_batches(config, plan, readers), counted.split(sizes), strict=True):
        of_part = slice(first, first + int(part.sum()))
        first = of_part.stop
        gates = [gate[part] for gate in _gates(model, batch.to(device), config.seed)]
        for kind, (classes, _) in kinds.items():
            for tally, gate in zip(tallies[kind], gates, strict=True):
                tally.add(gate, classes[of_part], shuffled[kind][of_part])
    return {kind: [tally.result() for tally in own] for kind, own in tallies.items()}


def _batches(config: Config, plan: RunPlan, readers: dict[str, ShardReader]) -> Iterator[tuple[int, MicroBatch]]:
    """Every validation micro-batch, with the index of its set."""
    for index, reader in enumerate(readers.values()):
        for batch in validation_batches(
            reader,
            config.model.sequence_length,
            plan.batches.micro_batch_size,
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
    return [gate_of(routing, batch.labels.numel(), model.config.moe.kinds.total).cpu() for routing in routings]


def _table(layers: list[int], rows: list[Specialisation]) -> Iterator[str]:
    names = ["layer", "I hard", "shuffled", "H(E|Y)", "H(E)", "I soft", "shuffled", "H(E|Y)", "H_u", "H_s", "H(Y)"]
    yield " ".join(f"{name:>8}" for name in names)
    for layer, row in zip(layers, rows, strict=True):
        hard, soft = row.hard, row.soft
        values = [hard.mutual, row.hard_shuffled, hard.experts_given_class, hard.experts]
        values += [soft.mutual, row.soft_shuffled, soft.experts_given_class, soft.experts, row.gate_entropy]
        yield " ".join([f"{layer:>8}", *(f"{value:8.3f}" for value in [*values, hard.classes])])


def entropy(mass: Float[Tensor, "..."]) -> Tensor:
    """Entropy in bits of each last axis of ``mass``, which need not sum to 1; 0 where there is none."""
    share = mass / mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return -torch.special.xlogy(share, share).sum(dim=-1) / torch.log(torch.tensor(2.0, dtype=mass.dtype))


def information(joint: Float[Tensor, "classes experts"]) -> Information:
    """``Information`` of a joint mass, which need not sum to 1; float64 for exact counts."""
    of_experts, of_classes, of_both = (float(entropy(mass)) for mass in (joint.sum(0), joint.sum(1), joint.flatten()))
    return Information(of_experts + of_classes - of_both, of_both - of_classes, of_experts, of_classes)


def gate_of(routing: Routing, num_tokens: int, num_experts: int) -> Float[Tensor, "tokens experts"]:
    """The weights of each token's routes as shares of their sum, float64; zeros for a token without a positive weight.

    It works for every scheme, and is the distribution over the experts that act, not over all that were considered.
    """
    gate = torch.zeros(num_tokens, num_experts, dtype=torch.float64, device=routing.weight.device)
    weight = routing.weight.detach().double().clamp(min=0)
    gate = gate.index_put((routing.token_index, routing.expert_index), weight)
    total = gate.sum(dim=1, keepdim=True)
    return torch.where(total > 0, gate / total, 0.0)


def most_frequent_classes(token_ids: Int[Tensor, "tokens"], num_classes: int) -> Int[Tensor, "tokens"]:
    """Class of each token by its id: the ``num_classes - 1`` most frequent ids have one each, all others the last."""
    ids, inverse, counts = token_ids.unique(return_inverse=True, return_counts=True)
    kept = counts.sort(descending=True, stable=True).indices[: num_classes - 1]
    class_of_id = torch.full_like(ids, num_classes - 1)
    class_of_id[kept] = torch.arange(len(kept))
    return class_of_id[inverse]


class Tally:
    """Adds up one layer's gates, part by part."""

    def __init__(self, num_classes: int, num_experts: int):
        self._joint = torch.zeros(4, num_classes, num_experts, dtype=torch.float64)  # hard, soft, and both shuffled
        self._gate_entropy = 0.0
        self._tokens = 0

    def add(
        self,
        gate: Float[Tensor, "tokens experts"],
        classes: Int[Tensor, "tokens"],
        shuffled_classes: Int[Tensor, "tokens"],
    ) -> None:
        """Count tokens by ``classes``, and again by the same classes dealt out at random over all parts."""
        routed = gate.sum(dim=1) > 0
        gate = gate[routed]
        hard = torch.nn.functional.one_hot(gate.argmax(dim=1), gate.shape[1]).to(gate.dtype)
        for row, dealt in ((0, classes), (2, shuffled_classes)):
            self._joint[row].index_add_(0, dealt[routed], hard)
            self._joint[row + 1].index_add_(0, dealt[routed], gate)
        self._gate_entropy += float(entropy(gate).sum())
        self._tokens += len(gate)

    def result(self) -> Specialisation:
        """Findings of all parts together."""
        hard, soft, hard_shuffled, soft_shuffled = (information(joint) for joint in self._joint)
        gate_entropy = self._gate_entropy / max(1, self._tokens)
        return Specialisation(hard, soft, hard_shuffled.mutual, soft_shuffled.mutual, gate_entropy, self._tokens)
