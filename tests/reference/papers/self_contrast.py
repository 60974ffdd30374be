"""SCMoE (arXiv:2405.14507): decoding that contrasts a model's default routing with a weaker one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from reference.papers.swiglu import weighted_sum
from torch import Tensor


class Selection(NamedTuple):
    """Chosen pairs [T, E] (bool) and their weights [T, E], which sum to 1."""

    mask: Tensor
    weights: Tensor


def select_ranks(scores: Tensor, ranks: Sequence[int]) -> Selection:
    """Experts at the given places of the falling order of their scores, weights renormalised (section 2.2).

    ``range(k)`` is top-k; [1] is the paper's weak pass; [0] is the released code's default.

    Args:
        scores: [T, E] non-negative router scores. ranks: Distinct places, 0 is the best.
    """
    num_experts = scores.shape[1]
    if len(set(ranks)) != len(ranks) or not all(0 <= rank < num_experts for rank in ranks):
        raise ValueError(f"ranks {list(ranks)} must be distinct and in [0, {num_experts})")
    masks, weights = [], []
    for t in range(scores.shape[0]):
        order = sorted(range(num_experts), key=[-float(value) for value in scores[t]].__getitem__)
        chosen = [order[rank] for rank in ranks]
        mass = torch.stack([scores[t, e] for e in chosen]).sum()
        masks.append([e in chosen for e in range(num_experts)])
        weights.append(
            torch.stack([scores[t, e] / mass if e in chosen else scores[t, e] * 0 for e in range(num_experts)])
        )
    return Selection(torch.tensor(masks), torch.stack(weights))


def moe_layer(
    x: Tensor, w_router: Tensor, ranks: Sequence[int], w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Layer [T, d] with a softmax router w_router [E, d] and the experts at ``ranks``."""
    selection = select_ranks(torch.softmax(x @ w_router.T, dim=1), ranks)
    return weighted_sum(x, selection.mask, selection.weights, w_gate, w_up, w_down)


def contrast(
    strong: Tensor,
    weak: Tensor,
    alpha: float = 0.1,
    beta: float = 0.5,
    strong_temperature: float = 1.0,
    weak_temperature: float = 1.0,
) -> Tensor:
    """Equations 4 to 6: ``(1 + beta) strong - beta weak`` where ``strong_v >= log alpha + max strong``, else -inf.

    Args:
        strong: [V] logits of the default routing. weak: [V]. alpha: In (0, 1], share of the best token's probability
            that a token needs. beta: Strength; 0 leaves the strong logits.
        strong_temperature: Divides the logits before everything else, the cut included; so does weak_temperature.
    """
    z, w = strong / strong_temperature, weak / weak_temperature
    cut = math.log(alpha) + float(z.max())
    return torch.stack(
        [(1 + beta) * z[v] - beta * w[v] if float(z[v]) >= cut else z[v].new_tensor(-math.inf) for v in range(len(z))]
    )


class Decoded(NamedTuple):
    """Chosen tokens, and the contrasted logits [V] behind each."""

    tokens: list[int]
    logits: list[Tensor]


def greedy_decode(
    strong_model: Callable[[list[int]], Tensor],
    weak_model: Callable[[list[int]], Tensor],
    prompt: Sequence[int],
    new_tokens: int,
    alpha: float = 0.1,
    beta: float = 0.5,
    banned: Sequence[int] = (),
) -> Decoded:
    """Greedy decoding; both models read the same chosen tokens from the prompt on, each by itself, without a cache.

    Args:
        strong_model: Tokens so far to the [V] logits of the next one. weak_model: Likewise.
        banned: Tokens never chosen (the code bans the end of text), set to -inf after the contrast.
    """
    tokens, all_logits = list(prompt), []
    for _ in range(new_tokens):
        logits = contrast(strong_model(tokens), weak_model(tokens), alpha, beta)
        for token in banned:
            logits[token] = -math.inf
        tokens = [*tokens, int(logits.argmax())]
        all_logits.append(logits)
    return Decoded(tokens[len(prompt) :], all_logits)
