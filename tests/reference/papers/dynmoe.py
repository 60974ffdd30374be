"""DynMoE (arXiv:2405.14297): top-any gating and an adaptive number of experts. Keys are the columns of W_g [d, E]."""

from typing import Literal, NamedTuple

import torch
from reference.papers.swiglu import weighted_sum
from torch import Tensor

Fallback = Literal["none", "constant", "straight_through"]


class Routing(NamedTuple):
    """One layer's routing and losses; ``active_count`` is k_t before any fallback."""

    cosine: Tensor  # [T, E] cos(x_t, w_e), of inactive experts too
    scores: Tensor  # [T, E] m_e * sigmoid(scale * cosine)
    mask: Tensor  # [T, E] bool, the pairs that run, with the fallback's
    gates: Tensor  # [T, E] 0 or 1 with the straight-through gradient, with the fallback's
    weights: Tensor  # [T, E] gates / max(k_t, 1)
    active_count: Tensor  # [T] int, number of thresholds passed
    diversity: Tensor  # ||M * (What^T What - I)||_F over active columns
    simplicity: Tensor  # mean over all E columns of ||w_e||
    load_balance: Tensor  # E sum_e mean_t(gates_te / sum gates_t) mean_t(mask_te) over tokens with an expert
    efficiency: Tensor  # mean over all T * E pairs of gates


class State(NamedTuple):
    """What moves without a gradient: keys [d, E], thresholds [E], active [E] bool."""

    keys: Tensor
    thresholds: Tensor
    active: Tensor


class Window(NamedTuple):
    """Sums over the recorded forwards: counts [E], sum of the unrouted x [d], their number."""

    counts: Tensor
    unrouted_sum: Tensor
    unrouted_tokens: int


def route(
    x: Tensor,
    keys: Tensor,
    thresholds: Tensor,
    active: Tensor,
    scale: float | Tensor = 1.0,
    fallback: Fallback = "none",
) -> Routing:
    """Section 3.1: expert e takes token t where ``m_e sigmoid(scale s_te) > sigmoid(scale G_e)``.

    The backward rule, written out: an active gate is 1 with gradient +1 to sigmoid(scale s) and -1 to
    sigmoid(scale G); an inactive gate has none; k_t is an integer and has none.

    Args:
        x: [T, d]. keys: [d, E]. thresholds: [E]. active: [E] bool. scale: tau.
        fallback: What a token with k_t = 0 gets. "none" is the published training, "constant" the published
            evaluation (best active expert, weight 1, no gradient), "straight_through" gives it a gate's gradient.
    """
    num_tokens, num_experts = x.shape[0], keys.shape[1]
    cosine, scores, gates, mask, counts = [], [], [], [], []
    for t in range(num_tokens):
        cosine_row, score_row, gate_row, mask_row = [], [], [], []
        for e in range(num_experts):
            s = (x[t] @ keys[:, e]) / (x[t].norm() * keys[:, e].norm())
            score = torch.sigmoid(scale * s) * active[e]
            margin = score - torch.sigmoid(scale * thresholds[e])
            passed = bool(margin > 0)
            cosine_row.append(s)
            score_row.append(score)
            mask_row.append(passed)
            gate_row.append(1 + (margin - margin.detach()) if passed else torch.zeros_like(s))
        counts.append(sum(mask_row))
        if counts[t] == 0 and fallback != "none":
            best = max((e for e in range(num_experts) if active[e]), key=lambda e: (float(score_row[e]), -e))
            margin = score_row[best] - torch.sigmoid(scale * thresholds[best])
            slope = margin - margin.detach() if fallback == "straight_through" else torch.zeros_like(margin)
            gate_row[best], mask_row[best] = 1 + slope, True
        cosine.append(torch.stack(cosine_row))
        scores.append(torch.stack(score_row))
        gates.append(torch.stack(gate_row))
        mask.append(mask_row)
    active_count, mask_, gates_ = torch.tensor(counts), torch.tensor(mask), torch.stack(gates)
    weights = torch.stack([gates_[t] / max(counts[t], 1) for t in range(num_tokens)])
    diversity, simplicity = key_losses(keys, active)
    return Routing(
        torch.stack(cosine), torch.stack(scores), mask_, gates_, weights, active_count,
        diversity, simplicity, load_balance_loss(gates_, mask_), gates_.mean(),
    )  # fmt: skip


def key_losses(keys: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.2: diversity over the active columns, simplicity over all of them."""
    num_experts = keys.shape[1]
    squares, norms = [], []
    for i in range(num_experts):
        norms.append(keys[:, i].norm())
        for j in range(num_experts):
            if active[i] and active[j]:
                similarity = (keys[:, i] @ keys[:, j]) / (keys[:, i].norm() * keys[:, j].norm())
                squares.append((similarity - (1.0 if i == j else 0.0)) ** 2)
    return torch.stack(squares).sum().sqrt(), torch.stack(norms).mean()


def load_balance_loss(gates: Tensor, mask: Tensor) -> Tensor:
    """The released code's term; the row sum carries the gates' gradient, the mask none. 0 without a routed token."""
    num_experts = gates.shape[1]
    rows = [t for t in range(gates.shape[0]) if mask[t].any()]
    if not rows:
        return gates.sum() * 0
    share = torch.stack([gates[t] / gates[t].sum() for t in rows]).mean(dim=0)
    load = torch.stack([mask[t].to(gates.dtype) for t in rows]).mean(dim=0)
    return num_experts * (share * load).sum()


def forward(x: Tensor, routing: Routing, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Output [T, d] of the experts (w_gate and w_up [E, h, d], w_down [E, d, h]) under ``routing``."""
    return weighted_sum(x, routing.mask, routing.weights, w_gate, w_up, w_down)


def window_action(forward_index: int, published: bool = False) -> tuple[bool, bool]:
    """Whether to record this training forward (counted from 0), and whether to update after it.

    300 idle, 300 recorded, update, 300 idle again. The released code also records the forward at which it updates
    (301 in all) and updates after it (``published``).
    """
    phase = forward_index % 900
    if published:
        return (300 <= phase <= 600), phase == 600
    return (300 <= phase < 600), phase == 599


def record(window: Window, x: Tensor, mask: Tensor) -> Window:
    """Add one forward's x [T, d] and mask [T, E] (without fallback) to the window."""
    counts, unrouted, tokens = window.counts.clone(), window.unrouted_sum.clone(), window.unrouted_tokens
    for t in range(x.shape[0]):
        if mask[t].any():
            counts = counts + mask[t].to(counts.dtype)
        else:
            unrouted, tokens = unrouted + x[t].detach(), tokens + 1
    return Window(counts, unrouted, tokens)


def update(state: State, window: Window, trigger: Literal["tokens", "component_sum"] = "tokens") -> State:
    """Section 3.3: remove the experts that no token chose, then add at most one for the unrouted tokens.

    The new key is the unit sum of the unrouted x, its threshold 0, its slot the first free one (one just removed
    included). ``component_sum`` is the released code's trigger: the components of that sum do not add up to 0.
    """
    keys, thresholds = state.keys.clone(), state.thresholds.clone()
    active = torch.tensor([bool(state.active[e]) and bool(window.counts[e] > 0) for e in range(keys.shape[1])])
    wanted = window.unrouted_tokens > 0 if trigger == "tokens" else bool(window.unrouted_sum.sum() != 0)
    free = [e for e in range(keys.shape[1]) if not active[e]]
    if wanted and free:
        keys[:, free[0]] = window.unrouted_sum / window.unrouted_sum.norm()
        thresholds[free[0]], active[free[0]] = 0.0, True
    return State(keys, thresholds, active)
