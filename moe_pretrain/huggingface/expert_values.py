"""Values of ``config.json`` that describe the experts of a model in remote code."""

from typing import Any

from moe_pretrain.config.schema import Config
from moe_pretrain.moe.combine import OrthogonalConfig
from moe_pretrain.moe.experts.config import MatrixProductConfig, UnequalConfig
from moe_pretrain.moe.experts.matrix_product import core_shapes, matrix_sizes
from moe_pretrain.moe.experts.unequal import class_widths


def expert_values(config: Config) -> dict[str, Any]:
    """Numbers, widths and cores of the experts of every layer, and how their outputs are combined."""
    moe = config.model.moe
    kinds, experts = moe.kinds, moe.experts
    values: dict[str, Any] = {
        "num_experts": kinds.total,
        "num_networks": kinds.ffn,
        "num_constant_experts": kinds.constant,
        "num_copy_experts": kinds.copy,
        "num_zero_experts": kinds.zero,
        "expert_input_scale": moe.expert_input_scale,
        "combine_form": moe.combine.form if isinstance(moe.combine, OrthogonalConfig) else None,
    }
    if isinstance(experts, UnequalConfig):
        widths = class_widths(experts.pattern, moe.expert_hidden_size)
        values["expert_widths"] = [widths[expert % len(widths)] for expert in range(kinds.ffn)]
    if isinstance(experts, MatrixProductConfig):
        sizes = matrix_sizes(moe.routed_size(config.model.hidden_size), moe.expert_hidden_size)
        values["core_shapes"] = {name: list(map(list, core_shapes(experts, *size))) for name, size in sizes.items()}
    return values
