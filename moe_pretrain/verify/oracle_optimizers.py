"""Each optimizer's update of one weight, as its paper writes it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def adamw(config: Any, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], rate: float, count: int) -> None:
    """AdamW with decay on matrices (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2)."""
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    first.mul_(config.beta1).add_(gradient * (1 - config.beta1))
    second.mul_(config.beta2).add_(gradient**2 * (1 - config.beta2))
    unbiased = first / (1 - config.beta1**count)
    root = (second / (1 - config.beta2**count)).sqrt()
    decay = config.weight_decay if weight.ndim >= 2 else 0.0
    weight.copy_(weight - rate * decay * weight - rate * unbiased / (root + config.epsilon))


UPDATES: dict[str, Callable[[Any, Tensor, Tensor, dict[str, Tensor], float, int], None]] = {"adamw": adamw}
"""By ``optimizer.name``: changes the weight and its moments, from the clipped gradient, the learning rate and the
number of updates with this one."""
