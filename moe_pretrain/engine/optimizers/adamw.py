"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat

from moe_pretrain.engine.optimizers.base import OptimizerConfig, OptimizerState, Withholding
from moe_pretrain.model.parameter_groups import ParameterRole


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW.

    Attributes:
        name: The word that chooses this optimizer.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
    """

    name: Literal["adamw"]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    epsilon: PositiveFloat

    def state(self, role: ParameterRole) -> OptimizerState:
        """Mean of the gradients and of their squares, for every parameter alike."""
        return OptimizerState(moments=("exp_avg", "exp_avg_sq"))

    def build(self, groups: list[dict[str, Any]], is_exact: bool) -> "WithholdingAdamW":
        """By default torch's fused kernel, which runs on CPU and CUDA.

        On a CPU it rounds the last few elements of a tensor otherwise than the rest; the slower one does not.
        """
        return WithholdingAdamW(
            groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon, fused=not is_exact
        )

    def conditioned(self) -> "AdamWConfig":
        """A larger epsilon: with a small one the quotient of a gradient that is almost zero is its sign."""
        return replace(self, epsilon=max(1e-3, self.epsilon))


class WithholdingAdamW(Withholding, torch.optim.AdamW):
    """AdamW that can be told to leave a step out."""
