"""Each optimizer's update of one weight, as its paper writes it, and the rate at which a weight learns."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_pretrain.config.schema import Config, ConfigError

_PARTS = {
    ".router.": "router",
    ".experts.": "experts",
    ".latent.": "experts",
    ".zero_computation.": "experts",
    ".attention.": "attention",
    ".feed_forward.": "ffn",
    "embedding.": "embedding",
    "head.": "head",
    "norm.": "norms",
}
"""What the name of a weight contains -> its group; the first that fits."""
_CORE = re.compile(r"\.experts\.(gate|up|out)_(shared|core_\d)$")
"""Cores of ``experts=matrix_product``."""


def norms_by_part(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the gradients of routers, of routed experts and of all else, told by names; of what there is."""
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        group = _group(name)
        part = group if group in ("router", "experts") else "rest"
        squares[part] = squares.get(part, 0.0) + float(gradient.double().square().sum())
    return {part: math.sqrt(square) for part, square in squares.items()}


def _group(name: str) -> str:
    return next(group for mark, group in _PARTS.items() if mark in name)


def rate_scale(config: Config, name: str, weight: Tensor) -> float:
    """Learning rate of the weight called ``name`` as a multiple of the run's.

    By the group's ``lr_scale``, and with ``model.init=mup`` by base fan-in over fan-in (arXiv:2203.03466, table 3), for
    what is added to the residual stream also by base depth over depth (arXiv:2505.01618). Told by names alone.
    """
    model = config.model
    group = _group(name)
    scale: float = getattr(config.optimizer.groups, group).lr_scale
    if model.init != "mup":
        return scale
    base: float = model.mup_base_width
    fan_in, kind = weight.shape[-1], name.rpartition(".")[2]
    if name == "norm.weight":
        return scale * base / model.hidden_size
    if weight.ndim == 1 or group in ("embedding", "head"):
        return scale
    is_map = ".latent." in name
    in_latent = model.moe.latent_size is not None and ".experts." in name
    if kind == "out_weight" and group != "attention" and not is_map:
        base *= 2
    elif fan_in == model.moe.latent_size and (is_map or in_latent):
        base *= fan_in / model.hidden_size  # the same share of the width at the base
    elif kind == "key_weight":
        base = base / 4 if config.router.expert_gate_rank else base * 2
    elif kind == "up_weight" or (name.endswith(".router.weight") and fan_in != model.hidden_size):
        base = base / 4
    elif fan_in != model.hidden_size and group != "attention":
        return scale
    depth = model.mup_base_layers / model.num_layers if kind == "out_weight" and not in_latent else 1.0
    # Muon's update has a spectral norm that grows with the root of the width, AdamW's one that grows with the width.
    is_spectral = config.optimizer.name == "muon" and _is_orthogonalised(name, weight)
    return scale * (math.sqrt(base / fan_in) if is_spectral else base / fan_in) * depth


@dataclass(frozen=True)
class Update:
    """One update of one weight, which the optimizer's formula makes in place.

    Attributes:
        config: Configuration of the run.
        name: Name of the weight.
        weight: The weight, changed by the update.
        gradient: Its clipped gradient.
        moments: Its moments by name, changed too.
        rate: Learning rate of the run.
        scale: The weight's multiple of it.
        count: Number of updates with this one.
    """

    config: Config
    name: str
    weight: Tensor
    gradient: Tensor
    moments: dict[str, Tensor]
    rate: float
    scale: float
    count: int


def adamw(update: Update) -> None:
    """AdamW with decay on matrices (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2), their alpha ``scale``."""
    optimizer: Any = update.config.optimizer
    weight, gradient, count = update.weight, update.gradient, update.count
    first, second = update.moments["exp_avg"], update.moments["exp_avg_sq"]
    first.mul_(optimizer.beta1).add_(gradient * (1 - optimizer.beta1))
    second.mul_(optimizer.beta2).add_(gradient**2 * (1 - optimizer.beta2))
    unbiased = first / (1 - optimizer.beta1**count)
    root = (second / (1 - optimizer.beta2**count)).sqrt()
    decay = optimizer.weight_decay if weight.ndim >= 2 else 0.0
    weight.copy_(weight - update.rate * (decay * weight + update.scale * unbiased / (root + optimizer.epsilon)))


def muon(update: Update) -> None:
    """Muon of every matrix by itself (arXiv:2502.16982, eq. 1-4), in float64; AdamW of what is none."""
    config, name, weight, gradient = update.config, update.name, update.weight, update.gradient
    if not _is_orthogonalised(name, weight):
        adamw(update)
        return
    optimizer: Any = config.optimizer
    momentum = update.moments["momentum"]
    momentum.mul_(optimizer.momentum).add_(gradient * (1 - optimizer.momentum))
    ahead = optimizer.momentum * momentum + (1 - optimizer.momentum) * gradient
    for stack, directions in zip(_own_matrices(config, name, weight), _own_matrices(config, name, ahead), strict=True):
        rows = _rows_of_matrices(config, name, len(stack))
        for matrix, direction in zip(stack.split(rows), directions.double().split(rows), strict=True):
            x = direction / direction.norm().clamp(min=1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
            size = 0.2 * math.sqrt(max(matrix.shape))
            matrix.copy_(matrix - update.rate * (optimizer.weight_decay * matrix + update.scale * size * x.float()))


def _own_matrices(config: Config, name: str, weight: Tensor) -> Sequence[Tensor]:
    """Views of what each expert, or whoever has the weight, has of it."""
    if ".experts." in name and config.router.merges_experts:  # an inner unit's rows of all experts come together
        return weight.flatten(1, -2).unbind(1)
    if _CORE.search(name):  # each core takes a digit and a bond to a digit and a bond
        cores = weight.unsqueeze(0) if name.endswith("_shared") else weight
        return [core.flatten(2, 3).flatten(0, 1) for core in cores]
    return [weight] if weight.ndim == 2 else list(weight)


def _is_orthogonalised(name: str, weight: Tensor) -> bool:
    if _CORE.search(name) and 1 in (weight.shape[-4] * weight.shape[-3], weight.shape[-2] * weight.shape[-1]):
        return False  # a vector
    parts = (".attention.", ".feed_forward.", ".experts.", ".shared_experts.")
    others = (".router.", ".zero_computation.", ".gate_weight")
    return weight.ndim >= 2 and any(part in name for part in parts) and not any(part in name for part in others)


def _rows_of_matrices(config: Config, name: str, rows: int) -> list[int]:
    """Rows of the matrices one below the other: query, key and value, or gate and up."""
    model = config.model
    if name.endswith("qkv_weight"):
        shared = rows * model.num_key_value_heads // (model.num_heads + 2 * model.num_key_value_heads)
        return [rows - 2 * shared, shared, shared]
    is_factorised = ".experts." in name and (model.moe.gate_rank is not None or config.router.expert_gate_rank)
    is_merged = ".experts." in name and config.router.merges_experts
    if name.endswith("in_weight") and not is_factorised and not is_merged and ".latent." not in name:
        return [rows // 2, rows // 2]
    return [rows]


Formula = Callable[[Update], None]
UPDATES: dict[str, Formula] = {
    "adamw": adamw,
    "muon": muon,
}
"""By ``optimizer.name``."""


def update_of(name: str) -> Formula:
    """The entry of ``UPDATES``.

    Raises:
        ConfigError: There is none.
    """
    if name not in UPDATES:
        raise ConfigError(
            f"optimizer.name={name} must be one of {', '.join(UPDATES)} here: verify/oracle_optimizers.py has no "
            "formula of its update"
        )
    return UPDATES[name]
