"""Fewer experts: a checkpoint whose layers keep some of their experts, or merge them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_pretrain.checkpoint.manifest import BUFFER, UPDATES, moments_of
from moe_pretrain.checkpoint.plain import KeptArray, PlainCheckpoint
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.config.trained import TrainedRun
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.moe.build import expert_gate
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.surgery.expert_statistics import LayerStatistics
from moe_pretrain.surgery.pruning_methods import (
    MERGING,
    ExpertGroup,
    agglomerate,
    align_units,
    keep_highest,
    merged,
    router_norm_change,
    spectral_groups,
)


@dataclass(frozen=True)
class PrunedRun:
    """A run with fewer experts, not yet written.

    Attributes:
        config: Its configuration.
        groups: For each layer of the decoder with experts the groups that its experts come from.
    """

    config: Config
    groups: dict[int, list[ExpertGroup]]


def pruned_config(config: Config, experts: int) -> Config:
    """``config`` with so many experts.

    Raises:
        ConfigError: The scheme cannot do with so few, or they are not fewer.
    """
    now = config.model.moe.num_experts
    if config.router.dense_experts or not config.model.moe_layers:
        raise ConfigError(f"router={config.router.name}: a model without routing has no experts to prune")
    if not 1 <= experts <= now:
        raise ConfigError(f"--experts={experts} must be from 1 to {now}, the experts of a layer")
    moe = replace(config.model.moe, num_experts=experts)
    try:
        return replace(config, model=replace(config.model, moe=moe))
    except ValueError as error:
        raise ConfigError(f"--experts={experts}: {error}") from None


def check_method(method: str, config: Config, pruned: Config, has_earlier: bool) -> None:
    """Raise ``ConfigError`` where ``method`` cannot make the run of ``pruned`` out of that of ``config``."""
    layers = meta_model(config.model, config.router).moe_layers()
    if config.model.moe.experts.name != "swiglu":
        raise ConfigError(f"experts={config.model.moe.experts.name} cannot be pruned yet: only networks can")
    if not all(isinstance(layer.experts, SwiGLUExperts | FactorisedExperts) for layer in layers):
        raise ConfigError(f"router={config.router.name} cannot be pruned: it merges experts, and no token goes to one")
    for layer in layers:
        scheme = config.router.of_layer(layer.router.layer)
        if reason := layer.router.numbered_experts:
            raise ConfigError(f"router={scheme.name} cannot be pruned: {reason}, also those that would be gone")
        if (groups := vars(scheme).get("num_groups", 1)) > 1:
            raise ConfigError(
                f"router={scheme.name} with router.num_groups={groups} cannot be pruned: groups are of neighbouring "
                "experts, and those that stay would be in others; a run with router.num_groups=1 and "
                "checkpoint.warm_start of this one can"
            )
    _check_tensors(method, config, pruned)
    if method in MERGING and expert_gate(config.model.moe, config.router) is not None:
        raise ConfigError(
            f"--method={method} needs experts with full gates: the mean of two products is not the product of two means"
        )
    if (method == "router_norm") != has_earlier:
        raise ConfigError(
            "--method=router_norm needs --before=CHECKPOINT: it compares the router with an earlier one"
            if method == "router_norm"
            else f"--before has no meaning with --method={method}: router_norm alone compares two checkpoints"
        )


def _check_tensors(method: str, config: Config, pruned: Config) -> None:
    """Refuse tensors that have more to do with the number of experts than a row for each, or rows without a mean."""
    numbers = [config.model.moe.num_experts, pruned.model.moe.num_experts]
    whole, small = (_tensors(meta_model(one.model, one.router)) for one in (config, pruned))
    for name, tensor in whole.items():
        if (shape := small[name].shape) == tensor.shape:
            continue
        if [tensor.shape[0], shape[0]] != numbers or tensor.shape[1:] != shape[1:]:
            raise ConfigError(f"{name} cannot be pruned: its shape {list(tensor.shape)} is not a row for each expert")
        if method in MERGING and not tensor.is_floating_point():
            raise ConfigError(
                f"--method={method} cannot merge {name}: whole numbers, one for each expert, have no mean"
            )


def _tensors(model: DecoderLM) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def choose_groups(
    method: str,
    layer: MoELayer,
    statistics: LayerStatistics,
    experts: int,
    seed: int,
    earlier: Tensor | None = None,
) -> list[ExpertGroup]:
    """Groups of the layer's experts by one of ``METHODS``.

    Args:
        method: Its name.
        layer: The layer, with its weights.
        statistics: Of the layer on calibration text.
        experts: Groups.
        seed: For ``random``.
        earlier: The router's weight at an earlier checkpoint, for ``router_norm``.

    Raises:
        ConfigError: The scheme has not what the method looks at.
    """
    if method in ("uncurl", "seer", "router_norm") and not statistics.has_logits:
        raise ConfigError(f"--method={method} needs a score of every expert, which {type(layer.router).__name__} lacks")
    if method == "uncurl":
        groups = spectral_groups(statistics.logit_correlation(), experts)
        return merged(groups, statistics.frequency, is_aligned=True)
    if method == "grouping":
        return merged(agglomerate(statistics.output_similarity(layer), experts), None, is_aligned=False)
    scores = _scores(method, layer, statistics, seed, earlier)
    if (free := layer.router.free_slots) is not None:
        scores = scores.masked_fill(free, -torch.inf)  # those in use stay first
    return keep_highest(scores, experts)


def _scores(method: str, layer: MoELayer, statistics: LayerStatistics, seed: int, earlier: Tensor | None) -> Tensor:
    """Scores ``[experts]`` of which the highest stay."""
    if method == "reap":
        return statistics.reap
    if method == "frequency":
        return statistics.frequency
    if method == "seer":
        return statistics.soft
    if method == "random":
        generator = torch.Generator().manual_seed(seed * 1000 + layer.router.layer)
        return torch.rand(layer.kinds.ffn, generator=generator)
    assert method == "router_norm"
    weight = dict(layer.router.named_parameters()).get("weight")
    if weight is None or earlier is None:
        kind = type(layer.router).__name__
        raise ConfigError(f"--method=router_norm needs one row for each expert, which {kind} lacks")
    return router_norm_change(earlier, weight.detach())


def pruned_checkpoint(run: TrainedRun, pruned: PrunedRun, state: TrainState) -> PlainCheckpoint:
    """Checkpoint of the pruned run in ``state``: expert by expert sums of the run's, moments of the optimizer too."""
    small = meta_model(pruned.config.model, pruned.config.router)
    shapes = {name: list(parameter.shape) for name, parameter in small.named_parameters()}
    arrays = _arrays(run, pruned, small, shapes)
    return PlainCheckpoint(arrays, shapes, moments_of(run.manifest), float(run.manifest[UPDATES]), state)


def _arrays(run: TrainedRun, pruned: PrunedRun, small: DecoderLM, shapes: dict[str, list[int]]) -> Iterator[KeptArray]:
    reader, moments = run.reader(), moments_of(run.manifest)
    orders = {layer: _unit_orders(reader, run, layer, groups) for layer, groups in pruned.groups.items()}
    for name, shape in run.shapes().items():
        for kind in (WEIGHT, *moments[name]):
            values = reader.read(name, kind, 0, torch.Size(shape).numel()).view(shape)
            if shapes[name] != shape:
                layer = int(name.split(".")[1])
                values = _combined(values, pruned.groups[layer], name, orders[layer])
            yield KeptArray(name, kind, values)
    whole = dict(run.meta_model().named_buffers())
    for name, buffer in small.named_buffers():
        size = whole[name].numel()
        values = reader.read(name, BUFFER, 0, size, buffer.dtype).view(whole[name].shape)
        if values.shape != buffer.shape:
            values = _combined(values, pruned.groups[int(name.split(".")[1])], name, {})
        yield KeptArray(name, BUFFER, values)


def _combined(values: Tensor, groups: Sequence[ExpertGroup], name: str, orders: dict[int, Tensor]) -> Tensor:
    """``values [experts, ...]`` as ``[groups, ...]``: a single expert as it is, several summed by their shares."""
    rows = []
    for group in groups:
        parts = [_reordered(values[member], name, orders.get(member)) for member in group.members]
        if len(parts) == 1:
            rows.append(parts[0])
            continue
        total = torch.zeros_like(parts[0], dtype=torch.float64)
        for part, share in zip(parts, group.shares, strict=True):
            total += share * part.double()
        rows.append(total.to(values.dtype))
    return torch.stack(rows)


def _reordered(values: Tensor, name: str, order: Tensor | None) -> Tensor:
    """One expert's array with its hidden units in another order."""
    if order is None:
        return values
    if name.endswith("experts.in_weight"):
        return values.unflatten(0, (2, -1))[:, order].flatten(0, 1)
    return values[:, order] if name.endswith("experts.out_weight") else values


def _unit_orders(reader: Reader, run: TrainedRun, layer: int, groups: Sequence[ExpertGroup]) -> dict[int, Tensor]:
    """Order of the hidden units of each expert that is merged into another one and aligned with it."""
    joined = [group for group in groups if group.is_aligned and len(group.members) > 1]
    if not joined:
        return {}
    prefix, shapes = f"blocks.{layer}.feed_forward.experts", run.shapes()
    stacks = []
    for part in ("in_weight", "out_weight"):
        shape = shapes[f"{prefix}.{part}"]
        stacks.append(reader.read(f"{prefix}.{part}", WEIGHT, 0, torch.Size(shape).numel()).view(shape))
    inner, outer = stacks

    def units(expert: int) -> Tensor:
        gate, up = inner[expert].chunk(2)
        return torch.cat([gate, up, outer[expert].T], dim=1).double()

    orders: dict[int, Tensor] = {}
    for group in joined:
        anchor = group.members[max(range(len(group.members)), key=group.shares.__getitem__)]
        orders |= {member: align_units(units(anchor), units(member)) for member in group.members if member != anchor}
    return orders
