"""Parameter groups, AdamW and learning-rate schedules."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moe_pretrain.moe.types import Router, float32_parameters
from moe_pretrain.parallel.deepspeed_moe import split_expert_groups


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Attributes:
        learning_rate: Peak learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices; norms and other vectors do not decay.
        trainable: ``all``, or ``routers``: everything else keeps the bits it starts with, to teach a router of another
            kind the choices of trained experts (``checkpoint.warm_start``). This is the distillation of attentive
            gating (arXiv:2302.14703), with the language model's loss.
    """

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    trainable: Literal["all", "routers"]

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        if self.epsilon <= 0:
            raise ValueError(f"optimizer.epsilon={self.epsilon} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must not be negative")


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices (and stacks of them), not to norms."""
    return parameter.ndim >= 2


def freeze_all_but_routers(model: nn.Module) -> set[int]:
    """Let no gradient reach weights outside routers; the ids of these weights.

    They stay in the optimizer, with moments of zero, so that a checkpoint has the same parts as any other. Without
    gradient and decay AdamW adds a zero.
    """
    routers = {id(own) for router in model.modules() if isinstance(router, Router) for own in router.parameters()}
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in routers]
    for parameter in frozen:
        parameter.register_hook(torch.zeros_like)
    return {id(parameter) for parameter in frozen}


def parameter_groups(model: nn.Module, config: OptimizerConfig, frozen: Collection[int] = ()) -> list[dict]:
    """Every trainable parameter once: decayed or not (as are the ``frozen`` ids), float32-kept apart, experts apart."""
    kept = {id(parameter) for parameter in float32_parameters(model)}
    groups: dict[str, dict] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decayed = decays(parameter) and id(parameter) not in frozen
        name = ("decayed" if decayed else "plain") + ("_float32" if id(parameter) in kept else "")
        group = groups.setdefault(
            name, {"params": [], "name": name, "weight_decay": config.weight_decay if decayed else 0.0}
        )
        group["params"].append(parameter)
    return split_expert_groups(list(groups.values()))


class WithholdingAdamW(torch.optim.AdamW):
    """AdamW whose ``step`` does nothing while ``withheld`` is set, so that a sick step changes no state."""

    withheld = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        """Update, or do nothing."""
        if not self.withheld:
            super().step()


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> WithholdingAdamW:
    """AdamW over ``parameter_groups``; by default torch's fused kernel, which runs on CPU and CUDA.

    On a CPU the fused kernel rounds the last few elements of a tensor otherwise than the rest; the slower one does not.
    """
    return WithholdingAdamW(
        parameter_groups(model, config, freeze_all_but_routers(model) if config.trainable == "routers" else ()),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )
