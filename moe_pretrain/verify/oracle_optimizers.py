"""Each optimizer's update of one weight, as its paper writes it, and the rate at which a weight learns."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_pretrain.config.schema import Config

_PARTS = {
    ".router.": "router",
    ".experts.": "experts",
    ".zero_computation.": "experts",
    ".attention.": "attention",
    ".feed_forward.": "ffn",
    "embedding.": "embedding",
    "head.": "head",
    "norm.": "norms",
}
"""What the name of a weight contains -> its group; the first that fits."""


def rate_scale(config: Config, name: str, weight: Tensor) -> float:
    """Learning rate of the weight called ``name`` as a multiple of the run's.

    By the group's ``lr_scale``, and with ``model.init=mup`` by base fan-in over fan-in (arXiv:2203.03466, table 3), for
    what is added to the residual stream also by base depth over depth (arXiv:2505.01618). Told by names alone.
    """
    model = config.model
    group = next(group for mark, group in _PARTS.items() if mark in name)
    scale: float = getattr(config.optimizer.groups, group).lr_scale
    if model.init != "mup":
        return scale
    base: float = model.mup_base_width
    fan_in, kind = weight.shape[-1], name.rpartition(".")[2]
    if name == "norm.weight":
        return scale * base / model.hidden_size
    if weight.ndim == 1 or group in ("embedding", "head"):
        return scale
    if kind == "out_weight" and group != "attention":
        base *= 2
    elif kind == "key_weight":
        base = base / 4 if config.router.expert_gate_rank else base * 2
    elif kind == "up_weight" or (name.endswith(".router.weight") and fan_in != model.hidden_size):
        base = base / 4
    elif fan_in != model.hidden_size:
        return scale
    depth = model.mup_base_layers / model.num_layers if kind == "out_weight" else 1.0
    return scale * base / fan_in * depth


def adamw(
    config: Any,
    weight: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    rate: float,
    scale: float,
    count: int,
) -> None:
    """AdamW with decay on matrices (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2), their alpha ``scale``."""
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    first.mul_(config.beta1).add_(gradient * (1 - config.beta1))
    second.mul_(config.beta2).add_(gradient**2 * (1 - config.beta2))
    unbiased = first / (1 - config.beta1**count)
    root = (second / (1 - config.beta2**count)).sqrt()
    decay = config.weight_decay if weight.ndim >= 2 else 0.0
    weight.copy_(weight - rate * (decay * weight + scale * unbiased / (root + config.epsilon)))


UPDATES: dict[str, Callable[[Any, Tensor, Tensor, dict[str, Tensor], float, float, int], None]] = {"adamw": adamw}
"""By ``optimizer.name``: changes the weight and its moments, from the clipped gradient, the run's learning rate, the
weight's multiple of it and the number of updates with this one."""
