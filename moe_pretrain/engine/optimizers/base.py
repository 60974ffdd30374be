"""The seam between an optimizer and those who keep, plan and check its state, and the groups of its parameters."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
from pydantic_core import core_schema
from torch import Tensor, nn

from moe_pretrain.moe.types import Router, float32_parameters
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


class Withholding(torch.optim.Optimizer):
    """Optimizer whose ``step`` does nothing while ``withheld`` is set, so that a sick step changes no state."""

    withheld = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        """Update, or do nothing."""
        if not self.withheld:
            super().step()


@dataclass(frozen=True)
class OptimizerConfig(ABC):
    """Fields of every optimizer; ``name`` of a subclass chooses it.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled decay of matrices; norms and other vectors do not decay.
        trainable: ``all``, or ``routers``: everything else keeps the bits it starts with, to teach a router of another
            kind the choices of trained experts (``checkpoint.warm_start``). This is the distillation of attentive
            gating (arXiv:2302.14703), with the language model's loss.
    """

    name: str
    learning_rate: pydantic.PositiveFloat
    weight_decay: pydantic.NonNegativeFloat
    trainable: Literal["all", "routers"]

    @abstractmethod
    def state(self, name: str, parameter: Tensor) -> OptimizerState:
        """State of one parameter of the model; parameters of different states are put into different groups.

        Args:
            name: Name of the parameter in the model.
            parameter: The parameter, which may be on the meta device.
        """

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], is_exact: bool) -> Withholding:
        """The optimizer over ``parameter_groups``.

        Args:
            groups: Parameters, ``name`` and ``weight_decay`` of each group.
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


def parameter_groups(model: nn.Module, config: OptimizerConfig, frozen: Collection[int] = ()) -> list[dict[str, Any]]:
    """Every trainable parameter once.

    Apart from each other: decayed or not (as are the ``frozen`` ids), those kept in float32, those of different state,
    experts.
    """
    kept = {id(parameter) for parameter in float32_parameters(model)}
    groups: dict[str, dict[str, Any]] = {}
    for own_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = decays(parameter) and id(parameter) not in frozen
        words = ["decayed" if decayed else "plain", *(["float32"] if id(parameter) in kept else [])]
        name = "_".join([*words, *config.state(own_name, parameter).moments])
        group = groups.setdefault(
            name, {"params": [], "name": name, "weight_decay": config.weight_decay if decayed else 0.0}
        )
        group["params"].append(parameter)
    return split_expert_groups(list(groups.values()))


def build_optimizer(model: nn.Module, config: OptimizerConfig, is_exact: bool = False) -> Withholding:
    """The optimizer of ``config`` over ``model``; with ``is_exact`` it rounds every element of a tensor alike."""
    frozen = freeze_all_but_routers(model) if config.trainable == "routers" else ()
    return config.build(parameter_groups(model, config, frozen), is_exact)
