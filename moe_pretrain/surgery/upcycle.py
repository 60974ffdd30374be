"""Sparse upcycling: a dense model's feed-forward networks become the experts of a mixture of experts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_pretrain.checkpoint.restore import WeightReader
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.build import expert_gate, expert_width
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard, RoutingContext

_STRETCH = 0.3
"""Standard deviation of the logarithm by which directions of a factorised gate are stretched, expert by expert."""
_ROUNDING = 1e-5
"""Renormalised weights sum to 1 but for so much."""


@dataclass(frozen=True)
class Variation:
    """Difference of the experts of a layer from each other at the start.

    Attributes:
        noise: Standard deviation of what is added to every weight, in units of the matrix's own, >= 0.
        reinitialised: Share of each expert's hidden units that are drawn anew, with their matrix's mean and standard
            deviation, in [0, 1].
        seed: Of the draws.

    Source:
        Komatsuzaki et al. 2022 (arXiv:2212.05055) for copies and noise; Nakamura et al. 2025 (arXiv:2502.19261,
        Drop-Upcycling) for units drawn anew.
    """

    noise: float
    reinitialised: float
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"--noise={self.noise} must be at least 0")
        if not 0 <= self.reinitialised <= 1:
            raise ConfigError(f"--reinitialise={self.reinitialised} must be in [0, 1]")

    @property
    def keeps_the_function(self) -> bool:
        """Whether every expert is the dense network."""
        return self.noise == 0 and self.reinitialised == 0


def dense_config(model: ModelConfig, width: int) -> ModelConfig:
    """``model`` without experts: every layer's network is ``width`` wide."""
    moe = replace(model.moe, num_leading_dense_layers=model.num_layers)
    return replace(model, ffn_hidden_size=width, moe=moe)


@torch.no_grad()
def build_dense(
    model: ModelConfig, router: RouterConfig, reader: WeightReader, shapes: Mapping[str, Sequence[int]]
) -> DecoderLM:
    """The dense model, in evaluation; ``model`` is that of ``dense_config``, ``shapes`` are of what is read.

    Raises:
        ConfigError: A weight has another shape than the model's.
    """
    dense = DecoderLM(model, router, ExpertShard())
    for name, parameter in dense.named_parameters():
        if (shape := list(shapes.get(name, ()))) != list(parameter.shape):
            raise ConfigError(
                f"SOURCE has {name} of the shape {shape}, the model that it describes {list(parameter.shape)}"
            )
        parameter.copy_(reader.read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))
    return dense.eval()


def check_upcycling(config: Config, width: int) -> int:
    """Segments into which a dense network of ``width`` is cut: 1 for experts that are copies of it.

    Raises:
        ConfigError: The experts cannot be made of it.
    """
    moe, name = config.model.moe, config.router.name
    if config.router.dense_experts or not config.model.moe_layers:
        raise ConfigError(f"router={name} has no experts: choose a scheme that routes")
    if len(config.model.moe_layers) < config.model.num_layers and config.model.ffn_hidden_size != width:
        raise ConfigError(
            f"model.ffn_hidden_size={config.model.ffn_hidden_size} must be {width}, the dense networks' width"
        )
    if moe.combine.name != "sum" or moe.experts.name != "swiglu":
        raise ConfigError(f"combine={moe.combine.name} experts={moe.experts.name} must be sum and swiglu for upcycle")
    if moe.activation_function != SWIGLU:
        raise ConfigError(f"{moe.activation_name} must be plain swiglu for upcycle, as in the dense network")
    if moe.latent_size is not None:
        raise ConfigError(
            f"model.moe.latent_size={moe.latent_size} must be null for upcycle: a dense network reads the model's width"
        )
    own = expert_width(moe, config.router, config.model.hidden_size)
    if expert_gate(moe, config.router) is not None:
        if own != width:
            raise ConfigError(
                f"experts with a factorised gate must be {width} wide, as the dense network; with "
                f"model.moe.expert_hidden_size={moe.expert_hidden_size} and "
                f"model.moe.expert_width_multiple={moe.expert_width_multiple} they are {own}"
            )
        return 1
    if config.router.merges_experts and own != width:
        raise ConfigError(
            f"model.moe.expert_hidden_size={own} must be the dense network's {width} with router={name}, which merges "
            "experts: segments of a network have no mean that is one"
        )
    if width % own:
        raise ConfigError(f"model.moe.expert_hidden_size={own} must be the dense network's {width}, or divide it")
    segments = width // own
    if segments > 1 and moe.num_experts % segments:
        raise ConfigError(
            f"model.moe.num_experts={moe.num_experts} must be a multiple of {segments}, the segments of a dense network"
        )
    return segments


@torch.no_grad()
def upcycle(
    config: Config, dense: DecoderLM, variation: Variation, ids: Tensor, say: Callable[[str], None]
) -> DecoderLM:
    """A model of ``config`` whose every expert is the dense network of its layer, or a segment of it.

    Experts' outputs are scaled by what a token's weights come to on ``ids``, so that their sum is the dense network's
    output; where weights are renormalised that is exact. With segments the rows of a linear router are alike for the
    segments of one copy, so that a token takes all of them. Shared experts start with an output of 0. A factorised gate
    is the truncated singular value decomposition of the dense one; experts have bases of their own for its columns,
    which leaves what they compute as it is and lets their norms, by which autonomy ranks them, differ. Experts that are
    merged are copies, whose mean is the dense network whatever the router says.

    Args:
        config: Configuration of the mixture; ``check_upcycling`` has passed it.
        dense: The dense model, in evaluation.
        variation: Difference of the experts from each other.
        ids: Tokens of real text ``[rows, tokens]``.
        say: Hears what is not exact.

    Raises:
        ConfigError: The router's rows cannot be alike for segments.

    Source:
        Komatsuzaki et al. 2022 (arXiv:2212.05055); for merged experts the dense warm-up of Lory (Zhong et al. 2024,
        arXiv:2405.03133), there of 5% of the steps.
    """
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    own = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if name in own and own[name].shape == parameter.shape:
            own[name].copy_(parameter)
    model.eval()
    width = dense.config.ffn_hidden_size
    segments = check_upcycling(config, width)
    for index, (block, source) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
        layer, network = block.feed_forward, source.feed_forward
        assert isinstance(network, SwiGLU)
        if not isinstance(layer, MoELayer):
            continue
        if layer.shared_experts is not None:
            layer.shared_experts.out_weight.zero_()
        generator = torch.Generator().manual_seed(variation.seed * 1000 + index)
        if isinstance(layer.experts, FactorisedExperts):
            lost = _fill_factorised(layer, network, generator)
            say(f"layer {index}: the truncated gate leaves out {lost:.1%} of the dense gate's squared weights")
        elif isinstance(layer.experts, MergedExperts):
            gate, up = network.in_weight.chunk(2)
            layer.experts.in_weight.copy_(torch.stack([gate, up], dim=1)[:, :, None])
            layer.experts.out_weight.copy_(network.out_weight.T[:, None])
        else:
            _fill_copies(layer, network, segments, config.router.of_layer(index))
        _vary(layer, variation, generator)
    if not config.router.merges_experts:
        _scale_outputs(model, segments, ids)
    return model


def _fill_copies(layer: MoELayer, network: SwiGLU, segments: int, router: RouterConfig) -> None:
    """Copy the network, or its segments one after the other; rows of the router are alike within a copy."""
    gate, up = network.in_weight.chunk(2)
    experts = layer.experts
    assert isinstance(experts, SwiGLUExperts)
    for expert in range(layer.kinds.ffn):
        segment = slice(*((expert % segments + side) * len(gate) // segments for side in (0, 1)))
        experts.in_weight[expert] = torch.cat([gate[segment], up[segment]])
        experts.out_weight[expert] = network.out_weight[:, segment]
    if segments == 1:
        return
    rows = dict(layer.router.named_parameters()).get("weight")
    slots = vars(router).get("top_k", 0)
    if rows is None or rows.shape[0] != layer.kinds.ffn or slots % segments or not slots:
        raise ConfigError(
            f"model.moe.expert_hidden_size must be the dense network's width with router={router.name}: only a linear "
            f"router with a multiple of {segments} experts per token takes all {segments} segments of a copy"
        )
    rows.copy_(rows[::segments].repeat_interleave(segments, dim=0))


def _fill_factorised(layer: MoELayer, network: SwiGLU, generator: torch.Generator) -> float:
    """Factorise the gate; the share of its squared weights that is left out."""
    experts = layer.experts
    assert isinstance(experts, FactorisedExperts)
    own = experts.down_weight
    down = dict(layer.router.named_parameters())["down_weight"] if own is None else own
    gate, up = network.in_weight.double().chunk(2)
    left, values, right = torch.linalg.svd(gate, full_matrices=False)
    rank = down.shape[1]
    kept = values[:rank].sqrt()
    outer, inner = torch.zeros(len(gate), rank).double(), torch.zeros(rank, gate.shape[1]).double()
    outer[:, : len(kept)], inner[: len(kept)] = left[:, :rank] * kept, kept[:, None] * right[:rank]
    for expert in range(layer.kinds.ffn):
        # An invertible change of basis: the product is the same, the norm of the low activation is another.
        turns = [
            torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0] for _ in range(2)
        ]
        stretch = (_STRETCH * torch.randn(rank, generator=generator, dtype=torch.float64)).exp()
        basis = turns[0] @ (stretch[:, None] * turns[1])
        down[expert] = basis @ inner
        experts.up_weight[expert] = outer @ torch.linalg.inv(basis)
        experts.in_weight[expert], experts.out_weight[expert] = up, network.out_weight
    return 1 - float(values[:rank].square().sum() / values.square().sum())


def _vary(layer: MoELayer, variation: Variation, generator: torch.Generator) -> None:
    """Make experts differ."""
    if variation.keeps_the_function:
        return
    experts = layer.experts
    assert isinstance(experts, SwiGLUExperts | FactorisedExperts | MergedExperts)
    is_merged = isinstance(experts, MergedExperts)
    width = experts.out_weight.shape[0 if is_merged else 2]
    renewed = round(variation.reinitialised * width)
    for expert in range(layer.kinds.ffn):
        units = torch.randperm(width, generator=generator)[:renewed]
        for name, parameter in experts.named_parameters():
            matrix = parameter[..., expert, :] if is_merged else parameter[expert]
            spread, mean = matrix.std(), matrix.mean()
            fresh = mean + spread * torch.randn(matrix.shape, generator=generator)
            if is_merged:
                matrix[units] = fresh[units]
            elif name == "out_weight":
                matrix[:, units] = fresh[:, units]
            elif name == "in_weight" and isinstance(experts, SwiGLUExperts):
                both = torch.cat([units, units + width])
                matrix[both] = fresh[both]
            elif name != "down_weight":
                matrix[units] = fresh[units]
            if variation.noise:
                matrix += variation.noise * spread * torch.randn(matrix.shape, generator=generator)


def _scale_outputs(model: DecoderLM, segments: int, ids: Tensor) -> None:
    """Divide the experts' outputs, layer by layer from the bottom, by what a token's weights come to."""
    rows, length = ids.shape
    context = RoutingContext.of_rows(ids)
    places = torch.arange(length).expand(rows, -1)
    for layer in model.moe_layers():
        totals: list[float] = []

        def note(module, inputs, routing, totals=totals):
            totals.append(float(routing.weight.double().sum()) / ids.numel())

        handle = layer.router.register_forward_hook(note)
        model.routes(ids, torch.zeros_like(ids), places, context)
        handle.remove()
        total = 1.0 if abs(totals[0] - 1) < _ROUNDING else totals[0]
        if total > 0:
            (stack,) = layer.stacks
            stack.out_weight.mul_(segments / total)
