"""Values and functions that the parts of an exported model share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Facts:
    """Facts that a router may know beside the hidden states of its layer; ``tokens`` is batch times sequence.

    Attributes:
        token_ids: Vocabulary ids ``[tokens]``.
        place: Place of each token in its row, from 0, ``[tokens]``.
        query: Queries of the block's attention after the rotary positions, ``[batch, heads, sequence, head]``.
        key: Keys, those in the cache among them, ``[batch, kv_heads, keys, head]``.
        visible: Which keys a query sees, ``[batch, sequence, keys]``.
        experts: The layer's experts.
        cache: The key-value cache; None without one.
        carried: What routers of the layers below have left for those above, bottom up.
    """

    token_ids: Tensor
    place: Tensor
    query: Tensor
    key: Tensor
    visible: Tensor
    experts: Any
    cache: Any = None
    carried: list[Tensor] = field(default_factory=list)


def empty(*shape: int) -> nn.Parameter:
    """A parameter that the checkpoint fills."""
    return nn.Parameter(torch.empty(*shape))


def linear_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` in float32 whatever the dtype of the model: rounded logits choose other experts."""
    return nn.functional.linear(hidden.float(), weight.float())


class LinearRouter(nn.Module):
    """A router whose logits are a map of the token, a bias and a soft bound of both."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int, width: int | None = None):
        super().__init__()
        self.fields = config.router
        self.weight = empty(config.num_experts, width or config.hidden_size)
        self.logit_bias = empty(config.num_experts) if self.fields["bias"] else None

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits ``[tokens, experts]``."""
        logits, cap = linear_float32(inputs, self.weight), self.fields["logit_cap"]
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits if cap is None else cap * (logits / cap).tanh()


class Thresholds(nn.Module):
    """The score above which each expert takes a token."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.zeros(num_experts))


def gated(gate: Tensor, up: Tensor, activation: dict[str, Any]) -> Tensor:
    """``(up + offset) * gate * sigmoid(alpha * gate)``, both bounded; SwiGLU without these numbers."""
    if activation["limit"] is not None:
        gate, up = gate.clamp(max=activation["limit"]), up.clamp(-activation["limit"], activation["limit"])
    return (up + activation["offset"]) * gate * torch.sigmoid(activation["alpha"] * gate)


def best_first(scores: Tensor, ties: Tensor) -> Tensor:
    """Experts by score, best first; of equal scores the larger of ``ties``, then the lower expert."""
    by_tie = ties.sort(dim=-1, descending=True, stable=True).indices
    by_score = scores.gather(-1, by_tie).sort(dim=-1, descending=True, stable=True).indices
    return by_tie.gather(-1, by_score)


def gates_of(chosen: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """Gates ``[tokens, experts]`` with ``weight`` at the ``chosen`` experts and 0 elsewhere."""
    return weight.new_zeros(len(chosen), num_experts).scatter(1, chosen, weight)


def prefix_mask(probs: Tensor, logits: Tensor, threshold: Tensor | float, max_experts: int | None) -> Tensor:
    """Experts of each token: the shortest prefix of its ordered probabilities with mass above ``threshold``."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    before = nn.functional.pad(probs.gather(1, order).cumsum(dim=-1)[:, :-1], (1, 0))
    taken = (before <= threshold) | (torch.as_tensor(threshold, device=probs.device) >= 1)
    if max_experts is not None:
        taken[:, max_experts:] = False
    return torch.zeros_like(taken).scatter(1, order, taken)


def counter_uniform(position: Tensor, columns: int, *keys: int) -> Tensor:
    """Numbers in [0, 1), one per position and column, a hash of the arguments (SplitMix64 on wrapping int64)."""
    golden = -7046029254386353131

    def shift(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    def mix(value: Tensor) -> Tensor:
        value = (value ^ shift(value, 30)) * -4658895280553007687
        value = (value ^ shift(value, 27)) * -7723592293110705685
        return value ^ shift(value, 31)

    state = position.new_zeros(1)
    for key in keys:
        state = mix(state * 31 + golden + key)
    column = torch.arange(1, columns + 1, device=position.device)
    bits = mix(mix(position * golden + state)[:, None] + column * golden)
    return shift(bits, 40).float() * 2.0**-24
