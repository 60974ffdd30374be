"""Maps between the model's width and the narrower one in which routed experts may work."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LatentMaps(nn.Module):
    """``in_weight x`` before tokens are sent to experts, ``out_weight norm(y)`` once their outputs are combined.

    Both are a layer's own and on every rank; what travels between ranks is ``latent`` wide. The router and the shared
    experts know nothing of it. Without the norm (Nemotron-H) ``norm`` is the identity.

    Args:
        hidden_size: Model width.
        latent_size: Width of the experts' inputs and outputs.
        norm_epsilon: Of the RMSNorm of what experts return (Kimi K3); None for none.
        routes_per_token: Experts of a token, as expected: with the norm, what the layer's output would be without.

    Source:
        LatentMoE (arXiv:2601.18089), as in the code of Nemotron-H in transformers; with the norm Kimi K3 (2607.24653).
    """

    def __init__(self, hidden_size: int, latent_size: int, norm_epsilon: float | None, routes_per_token: float):
        super().__init__()
        self.norm_epsilon, self.routes_per_token = norm_epsilon, routes_per_token
        self.in_weight = nn.Parameter(torch.empty(latent_size, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(hidden_size, latent_size))
        self.norm_weight = None if norm_epsilon is None else nn.Parameter(torch.empty(latent_size))

    def narrow(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens latent"]:
        """Rows for the experts to read."""
        return functional.linear(hidden, self.in_weight)

    def widen(self, combined: Float[Tensor, "tokens latent"]) -> Float[Tensor, "tokens hidden"]:
        """The layer's output of what the experts have returned."""
        if self.norm_weight is not None:
            combined = functional.rms_norm(combined, self.norm_weight.shape, self.norm_weight, self.norm_epsilon)
        return functional.linear(combined, self.out_weight)
