"""The oracle's statistics of attention: from explicit softmax matrices, one token at a time."""

import math

import torch
from torch import Tensor

from moe_pretrain.moe.types import AttentionStatistic


@torch.no_grad()
def statistic_of_matrices(name: AttentionStatistic, matrices: list[Tensor], documents: Tensor) -> Tensor:
    """The statistic ``name`` of every token of one row.

    Args:
        name: ``model/attention_statistic.py`` says what each is; no code is shared with it.
        matrices: Each head's attention weights ``[sequence, sequence]``, query by key.
        documents: Document of each token ``[sequence]``.

    Returns:
        ``[sequence]``.
    """
    heads = [matrix.tolist() for matrix in matrices]
    owner = documents.tolist()
    values = []
    for token in range(len(owner)):
        document = [other for other in range(len(owner)) if owner[other] == owner[token]]
        seen = [key for key in document if key <= token]
        if name == "received":
            later = [query for query in document if query >= token]
            per_head = [sum(head[query][token] for query in later) / len(later) for head in heads]
        else:
            per_head = [_of_row(name, [head[token][key] for key in seen]) for head in heads]
        value = sum(per_head) / len(per_head)
        if name.startswith("corrected"):
            uniform = 1 / len(seen)
            value = max(0.0, (value - uniform) / (1 - uniform)) if uniform < 1 else 0.0
        values.append(value)
    return torch.tensor(values)


def _of_row(name: AttentionStatistic, weights: list[float]) -> float:
    """One head's statistic of one query; ``weights`` are those of the keys that it sees, the first to itself."""
    if name == "row_max":
        return max(weights)
    if name == "corrected_row_max":
        return max(weights[1:], default=0.0)
    if name == "corrected_row_max_without_self":
        return max(weights[1:-1], default=0.0)
    assert name == "entropy"
    if len(weights) == 1:
        return 1.0
    return 1 + sum(weight * math.log(weight) for weight in weights if weight > 0) / math.log(len(weights))
