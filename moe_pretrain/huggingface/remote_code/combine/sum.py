"""The weighted sum of a token's expert outputs."""

from collections.abc import Callable

import torch
from torch import Tensor


def combine(hidden: Tensor, gates: Tensor, run: Callable[[Tensor, int], Tensor], form: str | None) -> Tensor:
    """``sum_e gates[:, e] run(hidden, e)``, each expert for the tokens that it has a gate for."""
    output = torch.zeros_like(hidden)
    for expert in (gates != 0).any(dim=0).nonzero().flatten().tolist():
        token = gates[:, expert].nonzero().flatten()
        rows = run(hidden[token], expert) * gates[token, expert, None]
        output.index_add_(0, token, rows.to(output.dtype))
    return output
