"""Experts that cost next to nothing: a constant, a copy, nothing."""

import math
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_pretrain.moe.routers.base import router_logits
from moe_pretrain.moe.types import ExpertKinds


class ConstantExpert(nn.Module):
    """``a x + b v`` with ``(a, b) = softmax(mix_weight x)``; ``mix_weight [2, hidden]``, ``value [hidden]``."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mix_weight = nn.Parameter(torch.empty(2, hidden_size))
        self.value = nn.Parameter(torch.empty(hidden_size))
        # The value as in the authors' code, like a row of a normed input; the map as any linear layer there.
        self.start_stds = MappingProxyType({"value": 1.0, "mix_weight": 1 / math.sqrt(3 * hidden_size)})


class ZeroComputationExperts(nn.Module):
    """The experts of a layer that are no networks, on every rank alike, with gradients as those of dense parameters.

    What they add to a token is ``factor x + sum_j share_j v_j``: the weights of its routes to copies and the parts of
    its routes to constants. So there are no rows, and nothing to sort; a zero expert is not computed at all.

    Source:
        Jin et al. 2024 (arXiv:2410.07348), MoE++, eq. 3-5.
    """

    def __init__(self, kinds: ExpertKinds, hidden_size: int):
        super().__init__()
        self.kinds = kinds
        self.constants = nn.ModuleList(ConstantExpert(hidden_size) for _ in range(kinds.constant))

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        token_index: Int[Tensor, "routes"],
        expert_index: Int[Tensor, "routes"],
        weight: Float[Tensor, "routes"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Weighted outputs of these experts, summed per token; arguments are those of all routes, and of padding."""
        kinds = self.kinds
        # Each pair is there once, so this is no sum, and its order does not matter. Padding has the last column.
        empty = weight.new_zeros(len(hidden), kinds.total + 1)
        weights = empty.index_put((token_index, expert_index), weight)
        sizes = [kinds.ffn, kinds.constant, kinds.copy, kinds.zero, 1]
        _, of_constant, of_copy, _, _ = weights.split(sizes, dim=1)
        factor = of_copy.sum(dim=1)
        if not kinds.constant:
            return factor[:, None].to(hidden.dtype) * hidden
        constants = [expert for expert in self.constants if isinstance(expert, ConstantExpert)]
        logits = router_logits(hidden, torch.cat([expert.mix_weight for expert in constants]))
        mix = logits.view(len(hidden), -1, 2).softmax(dim=-1)
        factor = factor + (of_constant * mix[:, :, 0]).sum(dim=1)
        shares = of_constant * mix[:, :, 1]
        values = torch.stack([expert.value for expert in constants])
        return factor[:, None].to(hidden.dtype) * hidden + shares.to(values.dtype).mm(values)
