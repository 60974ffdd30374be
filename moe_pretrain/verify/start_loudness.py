"""Start loudness of a scheme: how much its MoE layers add at step 0, and how much gradient reaches their experts."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers import RouterConfig
from moe_pretrain.moe.types import ExpertShard, MoEOutput, Routing, RoutingContext

ROWS, SEQUENCE, VOCAB = 8, 128, 512
"""Tokens on which it is measured: enough that a figure moves by a few percent from seed to seed."""


@dataclass(frozen=True)
class StartLoudness:
    """Means over the MoE layers of a model as initialised, in training mode.

    Attributes:
        output: Root mean square of what the routed experts add to the residual stream.
        expert_gradient: Root mean square of the gradient of the experts' ``in_weight`` and ``out_weight``.
        weight_sum: Mean sum of a token's route weights: 1 where weights are normalised.
        experts_per_token: Mean routes of a token.
    """

    output: float
    expert_gradient: float
    weight_sum: float
    experts_per_token: float


def start_loudness(model: ModelConfig, router: RouterConfig, seed: int) -> StartLoudness:
    """Measure a scheme at step 0 of a model of ``model``'s widths, with two layers and a small vocabulary."""
    small = dataclasses.replace(
        model,
        num_layers=2,
        vocab_size=VOCAB,
        sequence_length=SEQUENCE,
        moe=dataclasses.replace(model.moe, num_leading_dense_layers=0, every_k_layers=1, num_shared_experts=0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(0, VOCAB, (ROWS, SEQUENCE))
        labels = torch.randint(0, VOCAB, (ROWS, SEQUENCE))
    net = DecoderLM(small, router.for_sequence_length(SEQUENCE), ExpertShard())
    initialise(net, seed)
    for layer in net.moe_layers():
        layer.router.use_token_counts(torch.bincount(ids.flatten(), minlength=VOCAB))
    net.train()
    outputs: list[Tensor] = []
    routings: list[Routing] = []

    def note_output(module: nn.Module, inputs: object, output: MoEOutput) -> None:
        outputs.append(output.hidden.detach())

    def note_routing(module: nn.Module, inputs: object, routing: Routing) -> None:
        routings.append(routing.exact())

    layers: list[MoELayer] = net.moe_layers()
    for layer in layers:
        layer.register_forward_hook(note_output)
        layer.router.register_forward_hook(note_routing)
    context = RoutingContext.of_rows(ids, seed)
    positions = torch.arange(SEQUENCE).expand(ROWS, -1)
    rebuilt = {
        id(layer): _watched(layer.experts) for layer in layers if isinstance(layer.experts, MatrixProductExperts)
    }
    result = net(ids, labels, torch.zeros_like(ids), positions, context)
    (result.loss_sum / labels.numel()).backward()
    squares = [
        _rms(
            torch.cat(
                [weight.grad.flatten() for weight in rebuilt.get(id(layer), _weights(layer)) if weight.grad is not None]
            )
        )
        for layer in layers
    ]
    tokens = ROWS * SEQUENCE
    return StartLoudness(
        output=_mean([_rms(output) for output in outputs]),
        expert_gradient=_mean(squares),
        weight_sum=_mean([float(routing.weight.detach().sum()) / tokens for routing in routings]),
        experts_per_token=_mean([len(routing.token_index) / tokens for routing in routings]),
    )


def _watched(experts: MatrixProductExperts) -> list[Tensor]:
    """The matrices that the next forward pass rebuilds, which are what experts of other kinds have as parameters."""
    found: list[Tensor] = []
    rebuild = experts.weights

    def watched(keep_shared: bool = True) -> tuple[Tensor, Tensor]:
        matrices = rebuild(keep_shared)
        for matrix in matrices:
            matrix.retain_grad()
            found.append(matrix)
        return matrices

    experts.weights = watched  # type: ignore[method-assign]  # of this model alone, which is thrown away
    return found


def _weights(layer: MoELayer) -> list[Tensor]:
    return [weight for stack in layer.stacks for weight in (stack.in_weight, stack.out_weight)]


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
