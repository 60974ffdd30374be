"""Routing schemes by layer: ``router=by_layer`` names which layers have which."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from moe_pretrain.moe.routers import RouterConfig, ShippedRouterConfig

REST = "rest"
"""Key of all layers that no other key names."""


@dataclass(frozen=True, kw_only=True)
class ByLayerConfig(RouterConfig):
    """Schemes by decoder layer, as DeepSeek-V4 (arXiv:2606.19348) routes its first layers by a table.

    It is no scheme of its own: whatever depends on the scheme asks ``of_layer``. A layer's aux losses weigh what they
    would if every layer had its scheme, so that one layer's scheme does not change the pressure on another's.

    Attributes:
        name: ``by_layer``.
        layers: Layers, from 0, to their scheme: ``3``, ``0-1`` (both ends included), ``rest``. In YAML and overrides a
            scheme is a choice of the group ``router``, or a choice and what differs from it:
            ``{router: top_k, top_k: 4}``.
    """

    name: Literal["by_layer"]
    layers: dict[str, Annotated[ShippedRouterConfig, Field(discriminator="name")]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ValueError("router.layers={} must name layers: 'router.layers={0-1:hash,rest:loss_free}'")
        taken: dict[int, str] = {}
        for key in self.layers:
            for layer in _span(key):
                if layer in taken:
                    raise ValueError(
                        f"router.layers: {taken[layer]} and {key} both name layer {layer}: one scheme each"
                    )
                taken[layer] = key
        for place, scheme in self.parts().items():
            if (reason := scheme.whole_model_reason) is not None:
                raise ValueError(f"{place}={scheme.name} must be another scheme: {scheme.name} {reason}")
        first, of_first = next(iter(self.parts().items()))
        for place, scheme in self.parts().items():
            if scheme.expert_gate_rank != of_first.expert_gate_rank:
                raise ValueError(
                    f"{place}={scheme.name}: experts have gate_rank={_null(scheme.expert_gate_rank)}, with {first} "
                    f"{_null(of_first.expert_gate_rank)}; it must be the same, since experts have one shape in all "
                    "layers"
                )

    def of_layer(self, layer: int) -> RouterConfig:
        """The scheme of the key that names ``layer``, else that of ``rest``."""
        key = next((key for key in self.layers if layer in _span(key)), REST)
        return self.layers[key]

    def parts(self) -> Mapping[str, RouterConfig]:
        """Every key's scheme."""
        return {f"router.layers.{key}": scheme for key, scheme in self.layers.items()}

    def with_parts(self, change: Callable[[RouterConfig], RouterConfig]) -> "ByLayerConfig":
        """Every key's scheme changed."""
        return replace(self, layers={key: change(scheme) for key, scheme in self.layers.items()})

    def check_layers(self, moe_layers: Sequence[int], num_layers: int) -> None:
        """Every MoE layer must have a scheme, and every key name one at least."""
        named = {layer for key in self.layers for layer in _span(key)}
        if named and max(named) >= num_layers:
            key = next(key for key in self.layers if max(_span(key), default=-1) >= num_layers)
            raise ValueError(f"router.layers: {key} must be within 0-{num_layers - 1}, model.num_layers={num_layers}")
        left = [layer for layer in moe_layers if layer not in named]
        if left and REST not in self.layers:
            raise ValueError(f"router.layers must name layer {_joined(left)} too, or {REST}")
        for key in self.layers:
            if not (left if key == REST else set(_span(key)) & set(moe_layers)):
                raise ValueError(
                    f"router.layers: {key} must name a layer with experts, which are {_joined(moe_layers)}"
                )

    def twin_layers(self, moe_layers: Sequence[int]) -> list[int]:
        """Two layers of every key, where it names two."""
        by_key: dict[int, list[int]] = {}
        for layer in moe_layers:
            by_key.setdefault(id(self.of_layer(layer)), []).append(layer)
        return sorted(layer for layers in by_key.values() for layer in layers[:2])

    def renumbered(self, layers: Mapping[int, int]) -> "ByLayerConfig":
        """A key for each layer."""
        return replace(self, layers={str(new): self.of_layer(old) for new, old in layers.items()})

    @property
    def description(self) -> str:
        """Keys and names, as an override has them."""
        return f"{self.name}{{{','.join(f'{key}:{scheme.name}' for key, scheme in self.layers.items())}}}"

    def check_num_experts(self, num_experts: int) -> None:
        """Every scheme must serve so many."""
        for scheme in self.layers.values():
            scheme.check_num_experts(num_experts)

    def check_sequence_length(self, sequence_length: int) -> None:
        """Every scheme must serve such rows."""
        for scheme in self.layers.values():
            scheme.check_sequence_length(sequence_length)

    def for_sequence_length(self, sequence_length: int) -> RouterConfig:
        """Every scheme for such rows."""
        return self.with_parts(lambda scheme: scheme.for_sequence_length(sequence_length))

    @property
    def mean_experts_per_token(self) -> float:
        """Not known without the number of layers; see ``model.size.mean_over_layers``."""
        raise TypeError("experts per token are those of a layer: ask of_layer")

    @property
    def expert_gate_rank(self) -> int | None:
        """That of all schemes."""
        return next(iter(self.layers.values())).expert_gate_rank


if TYPE_CHECKING:
    AnyRouterConfig = RouterConfig
else:
    AnyRouterConfig = ShippedRouterConfig | ByLayerConfig


def in_place(complaint: str, place: str) -> str:
    """A complaint of a scheme, which calls itself ``router``, about the one at ``place``."""
    return re.sub(r"\brouter(?=[.=])", place, complaint)


def _span(key: str) -> range:
    """Layers that a key names; none for ``rest``."""
    if key == REST:
        return range(0)
    first, dash, last = key.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)) or (dash and int(last) < int(first)):
        raise ValueError(f"router.layers: {key!r} must be a layer (3), layers from and to (0-1), or {REST}")
    return range(int(first), int(last if dash else first) + 1)


def _joined(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
