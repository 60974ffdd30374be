"""The seam between an optimizer and those who keep, plan and check its state, and the groups of its parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
import torch.distributed as dist
from pydantic_core import core_schema
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.parameter_groups import (
    GROUP_NAMES,
    GroupName,
    ParameterRole,
    meta_model,
    parameter_roles,
    rate_scale,
)
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard, float32_parameters
from moe_pretrain.parallel.deepspeed_moe import split_expert_groups


@dataclass(frozen=True)
class OptimizerState:
    """State that an optimizer keeps for one parameter, under the keys of ``torch.optim.Optimizer.state``.

    Attributes:
        moments: Names of its float32 arrays, each of the parameter's shape and zero before the first step.
        counter: Name of the number of updates made, a float32 scalar; the same for all parameters.
    """

    moments: tuple[str, ...]
    counter: str = "step"

    @property
    def bytes_per_element(self) -> int:
        """Of all moments together."""
        return 4 * len(self.moments)

    def of(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's own entry of ``parameter``, made as the optimizer would make it if there was no step yet."""
        state: dict[str, Tensor] = optimizer.state[parameter]
        if not state:
            state[self.counter] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in self.moments:
                state[moment] = torch.zeros_like(parameter.data)
        return state


@dataclass(frozen=True)
class Fragment:
    """Interval of one of this rank's parameters that its optimizer owns: all of it, or under ZeRO a part or nothing.

    Attributes:
        name: Name of the parameter.
        parameter: The parameter.
        role: Its place in the model.
        start: First element, in the flat parameter.
        length: Number of elements.
        partition: The flat tensor that DeepSpeed gave to the optimizer in place of the parameter and its neighbours.
        partition_start: First element, in that.
        owners: Ranks that own the other parts of the parameter, or replicas of it; None for all ranks.
        is_replica: Whether another rank owns the same.
        shard: Ranks that hold the other slices of the parameter, each of this size, and the place of this one among
            them.
    """

    name: str
    parameter: Tensor
    role: ParameterRole
    start: int
    length: int
    partition: Tensor
    partition_start: int
    owners: dist.ProcessGroup | None
    is_replica: bool
    shard: ExpertShard

    @property
    def place(self) -> slice:
        """Place in ``partition``."""
        return slice(self.partition_start, self.partition_start + self.length)


def whole_fragments(model: DecoderLM) -> list[Fragment]:
    """Fragments of one process without DeepSpeed: every parameter as it is."""
    roles = parameter_roles(model)
    return [
        Fragment(name, parameter, roles[name], 0, parameter.numel(), parameter, 0, None, False, ExpertShard())
        for name, parameter in model.named_parameters()
    ]


class Withholding(torch.optim.Optimizer):
    """Optimizer whose ``step`` does nothing while ``withheld`` is set, so that a sick step changes no state.

    ``watch`` is called with each tensor that an update is about to change, its gradient in ``grad``.
    """

    withheld = False
    watch: Callable[[Tensor], None] | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        """Update, or do nothing."""
        if self.withheld:
            return
        if self.watch is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.watch(parameter)
        super().step()

    def own(self, fragments: Sequence[Fragment]) -> None:
        """Hear once, after DeepSpeed has put partitions in the place of parameters, what lies where in them.

        Collective: every rank calls it, with a fragment for each parameter in the order of the model.
        """


@dataclass(frozen=True)
class GroupRate:
    """Learning rate of one group of parameters.

    Attributes:
        lr_scale: The group's rate as a multiple of ``optimizer.learning_rate`` in every step of the schedule, > 0;
            multiplied with what ``model.init=mup`` asks for. Weight decay does not follow it.
    """

    lr_scale: pydantic.PositiveFloat


@dataclass(frozen=True)
class GroupRates:
    """Learning rates of the groups of parameters; ``model.parameter_groups`` says which parameter is in which.

    Attributes:
        embedding: The embedding, and with ``model.tie_embeddings`` the head that it is.
        head: The output head.
        norms: Weights of all norms.
        attention: Projections of attention.
        router: All weights of the routing scheme, factorised ones and those of attentive gating too, and the ``W_down``
            by which Autonomy-of-Experts routes.
        experts: The routed experts.
        ffn: Dense networks, the dense twin of ``router=dense`` and the shared experts.
    """

    embedding: GroupRate
    head: GroupRate
    norms: GroupRate
    attention: GroupRate
    router: GroupRate
    experts: GroupRate
    ffn: GroupRate

    def scale(self, name: GroupName) -> float:
        """``lr_scale`` of a group."""
        rates: dict[GroupName, GroupRate] = {
            "embedding": self.embedding,
            "head": self.head,
            "norms": self.norms,
            "attention": self.attention,
            "router": self.router,
            "experts": self.experts,
            "ffn": self.ffn,
        }
        return rates[name].lr_scale


@dataclass(frozen=True)
class OptimizerConfig(ABC):
    """Fields of every optimizer; ``name`` of a subclass chooses it.

    Attributes:
        learning_rate: Peak learning rate.
        groups: Rates of groups of parameters, relative to it.
        weight_decay: Decoupled decay of matrices; norms and other vectors do not decay. Per step a matrix loses the
            share ``learning rate of the step * weight_decay``, whatever scale its own rate has.
        trainable: ``all``, or ``routers``: everything else keeps the bits it starts with, to teach a router of another
            kind the choices of trained experts (``checkpoint.warm_start``). This is the distillation of attentive
            gating (arXiv:2302.14703), with the language model's loss.
    """

    name: str
    learning_rate: pydantic.PositiveFloat
    groups: GroupRates
    weight_decay: pydantic.NonNegativeFloat
    trainable: Literal["all", "routers"]

    @abstractmethod
    def state(self, role: ParameterRole) -> OptimizerState:
        """State of a parameter; parameters of different states are put into different groups."""

    def width_power(self, role: ParameterRole) -> float:
        """Power of base fan-in over fan-in by which ``model.init=mup`` scales the rate of a matrix."""
        return 1.0

    def update_flops(self, model: ModelConfig, router: RouterConfig) -> float:
        """FLOPs of one update of all parameters beyond a few for each element."""
        return 0.0

    def update_bytes(self, model: DecoderLM) -> float:
        """Bytes that an update of ``model`` needs beside state, weights and gradients."""
        return 0.0

    def check(self, model: DecoderLM) -> None:  # noqa: B027  # most optimizers take any model
        """Raise ``ValueError`` if it is not for such a model, which may be on the meta device."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], is_exact: bool) -> Withholding:
        """The optimizer over ``parameter_groups``.

        Args:
            groups: Parameters, ``name``, ``weight_decay``, ``lr_scale`` and names of the ``moments`` of each group.
            is_exact: Every element must be rounded alike, wherever in a tensor it lies.
        """

    @abstractmethod
    def conditioned(self) -> "OptimizerConfig":
        """The same optimizer with updates that rounding does not decide, to compare one computation with another."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Of this class itself: the subclass that ``name`` chooses."""
        if cls is not OptimizerConfig:
            return handler(source)
        kinds = {kind.__annotations__["name"].__args__[0]: kind for kind in cls.__subclasses__()}
        choices = {name: handler.generate_schema(kind) for name, kind in kinds.items()}
        return core_schema.tagged_union_schema(choices, discriminator="name")


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices (and stacks of them), not to norms."""
    return parameter.ndim >= 2


def freeze_all_but_routers(model: nn.Module) -> set[int]:
    """Let no gradient reach weights outside routers; the ids of these weights.

    They stay in the optimizer, with moments of zero, so that a checkpoint has the same parts as any other. Without
    gradient and decay an update adds a zero.
    """
    routers = {id(own) for router in model.modules() if isinstance(router, Router) for own in router.parameters()}
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in routers]
    for parameter in frozen:
        parameter.register_hook(torch.zeros_like)
    return {id(parameter) for parameter in frozen}


def rate_scales(model: DecoderLM, config: OptimizerConfig) -> dict[str, float]:
    """Learning rate of every parameter by name, as a multiple of ``optimizer.learning_rate``."""
    roles = parameter_roles(model)
    return {
        name: rate_scale(roles[name], parameter, model.config, config.width_power(roles[name]))
        * config.groups.scale(roles[name].group)
        for name, parameter in model.named_parameters()
    }


def rate_scales_by_group(model: DecoderLM, config: OptimizerConfig) -> dict[GroupName, list[float]]:
    """The different scales within each group that ``model`` has, largest first."""
    roles, scales = parameter_roles(model), rate_scales(model, config)
    found: dict[GroupName, set[float]] = {name: set() for name in GROUP_NAMES}
    for name, scale in scales.items():
        found[roles[name].group].add(scale)
    return {group: sorted(values, reverse=True) for group, values in found.items() if values}


def describe_rates(by_group: dict[GroupName, list[float]]) -> str | None:
    """In a line, what is learnt at another rate than ``optimizer.learning_rate``; None if nothing is."""
    words = [
        f"{group} {' and '.join(f'{scale:.4g}' for scale in scales)}"
        for group, scales in by_group.items()
        if scales != [1.0]
    ]
    return f"learning rates, as multiples of optimizer.learning_rate: {', '.join(words)}; else 1" if words else None


def present_groups(model: DecoderLM) -> set[GroupName]:
    """The groups that ``model`` has weights in."""
    return {role.group for role in parameter_roles(model).values()}


def check_optimizer(config: OptimizerConfig, model: ModelConfig, router: RouterConfig) -> None:
    """Raise ``ValueError`` if a group has a rate that nothing would learn by, or the optimizer is not for the model."""
    own = [name for name in GROUP_NAMES if config.groups.scale(name) != 1]
    built = meta_model(model, router)
    config.check(built)
    present = present_groups(built)
    for name in own:
        field = f"optimizer.groups.{name}.lr_scale={config.groups.scale(name):g} must be 1"
        if name not in present:
            raise ValueError(
                f"{field}: this model (router={router.name}, model.tie_embeddings={str(model.tie_embeddings).lower()}) "
                f"has no weights in that group; it has {', '.join(group for group in GROUP_NAMES if group in present)}"
            )
        if config.trainable == "routers" and name != "router":
            raise ValueError(f"{field} with optimizer.trainable=routers: nothing else is trained")


def parameter_groups(model: DecoderLM, config: OptimizerConfig, frozen: Collection[int] = ()) -> list[dict[str, Any]]:
    """Every trainable parameter once.

    Apart from each other: those of different rates, decayed or not (as are the ``frozen`` ids), those kept in float32,
    those of different state, experts. Each group says by its ``lr_scale`` how its rate follows
    ``optimizer.learning_rate``, and has a decay that makes up for it: AdamW multiplies the two.
    """
    kept = {id(parameter) for parameter in float32_parameters(model)}
    scales, roles = rate_scales(model, config), parameter_roles(model)
    groups: dict[str, dict[str, Any]] = {}
    for own_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = scales[own_name]
        decayed = decays(parameter) and id(parameter) not in frozen
        words = ["decayed" if decayed else "plain", *(["float32"] if id(parameter) in kept else [])]
        state = config.state(roles[own_name])
        name = "_".join([*words, *state.moments, *([f"x{scale!r}"] if scale != 1 else [])])
        decay = config.weight_decay / scale if decayed else 0.0
        facts = {"name": name, "weight_decay": decay, "lr_scale": scale, "moments": state.moments}
        groups.setdefault(name, {"params": [], **facts})["params"].append(parameter)
    return split_expert_groups(list(groups.values()))


def set_learning_rate(param_groups: list[dict[str, Any]], rate: float) -> None:
    """Give every group its multiple of ``rate``."""
    for group in param_groups:
        group["lr"] = rate * group["lr_scale"]


def build_optimizer(model: DecoderLM, config: OptimizerConfig, is_exact: bool = False) -> Withholding:
    """The optimizer of ``config`` over ``model``; with ``is_exact`` it rounds every element of a tensor alike."""
    frozen = freeze_all_but_routers(model) if config.trainable == "routers" else ()
    return config.build(parameter_groups(model, config, frozen), is_exact)
