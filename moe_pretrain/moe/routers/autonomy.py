"""Autonomy-of-Experts: no router; experts rank themselves by the norm of their first activation."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.routers.linear import BalancedRouter, BalancedRouterConfig
from moe_pretrain.moe.types import Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class AutonomyConfig(BalancedRouterConfig):
    """Fields of ``router=autonomy``, beside those of ``BalancedRouterConfig``.

    Attributes:
        name: ``autonomy``.
        top_k: Experts per token, in [1, num_experts].
        low_size: Rank of the factorised gate (the paper's d_low), in [1, hidden_size).
        width_multiple: The experts' width, solved from equation 5, is rounded to the nearest multiple of this.
        weights: ``selected``: softmax over the norms of the selected experts (the paper, and the first released
            code, which writes it as a renormalised softmax). ``full``: softmax over all norms, not renormalised (the
            released megablocks version); weights then sum to less than 1, and unselected experts get
            gradient from the LM loss.
    """

    name: Literal["autonomy"]
    top_k: int
    low_size: int
    width_multiple: int
    weights: Literal["selected", "full"]

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("top_k", "low_size", "width_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"router.{field}={getattr(self, field)} must be at least 1")

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        if self.top_k > num_experts:
            raise ValueError(f"router.top_k={self.top_k} must be at most model.moe.num_experts={num_experts}")

    def check_hidden_size(self, hidden_size: int) -> None:
        """Raise if the gate's rank is not below the model's width."""
        if self.low_size >= hidden_size:
            raise ValueError(f"router.low_size={self.low_size} must be below model.hidden_size={hidden_size}")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return float(self.top_k)

    def expert_width(self, hidden_size: int, expert_hidden_size: int) -> int:
        """Width at which an expert has as many weights as a SwiGLU expert of ``expert_hidden_size``.

        Equation 5: ``(3 d d_ffn - d_low d) / (d_low + 2 d)``; the removed router is not counted.
        """
        exact = (3 * hidden_size * expert_hidden_size - self.low_size * hidden_size) / (self.low_size + 2 * hidden_size)
        return max(1, round(exact / self.width_multiple)) * self.width_multiple


class AutonomyRouter(BalancedRouter):
    """Scores of an expert are ``||x W_down||``, the norm of its own low-rank gate activation.

    ``down_weight [experts, low, hidden]`` is held by every rank (layout A of the specification): all experts'
    activations are one product, and the selected ones travel to the experts as the routes' payload, with gradient.
    Norms are float32: in bfloat16 their spacing is a sixth of what separates experts at initialisation.

    The probabilities of the balance loss are the softmax over all norms; only that loss reaches unselected experts'
    ``W_down`` with ``weights=selected``. With ``top_k`` 1 and ``selected`` the weight is 1 and ranking itself gets no
    gradient from the LM loss, though ``W_down`` does, through the expert.

    Source:
        Lv et al. 2025 (arXiv:2501.13074), algorithm 2 and equations 3-6. Deviation: the balance loss is 1.0 when
        even (theirs is ``top_k``), so their weight 0.01 is ours times ``top_k``.
    """

    keep_float32 = False  # the down projections are expert weights, and large

    def __init__(self, config: AutonomyConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, num_experts, layer)
        config.check_num_experts(num_experts)
        config.check_hidden_size(hidden_size)
        self.config = config
        self.down_weight = nn.Parameter(torch.empty(num_experts, config.low_size, hidden_size))

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Run every expert's first projection and keep the ``top_k`` with the largest norm."""
        config, num_tokens = self.config, hidden.shape[0]
        low = functional.linear(hidden, self.down_weight.flatten(0, 1)).view(num_tokens, self.num_experts, -1)
        norms = torch.linalg.vector_norm(low.float(), dim=-1)
        probs = norms.softmax(dim=-1)
        chosen = norms.detach().sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        if config.weights == "selected":
            weight = norms.gather(1, chosen).softmax(dim=-1)
        else:
            weight = probs.gather(1, chosen)
        token_index = torch.arange(num_tokens, device=hidden.device).repeat_interleave(config.top_k)
        payload = low.gather(1, chosen[:, :, None].expand(-1, -1, config.low_size)).flatten(0, 1)
        return self.route(norms, probs, token_index, chosen.flatten(), weight.flatten(), config.top_k, context, payload)
