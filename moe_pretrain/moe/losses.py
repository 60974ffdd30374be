"""Auxiliary losses of routers. Pure functions: tensors in, unweighted scalar out (axis legend in ``types.py``).

Every loss is a mean over the text tokens of the micro-batch. The objective weights a micro-batch by its
share of the global batch's tokens, so the value does not depend on how the batch was cut (defect C12).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.host_values import on_device_of


def expert_router_coupling_loss(norms: Float[Tensor, "proxies experts"], alpha: float) -> Float[Tensor, ""]:
    """Penalise experts that respond to another's proxy token, and proxy tokens to which another responds.

    ``1/n^2 sum_i sum_{j != i} max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0)`` of the ``n x n`` norms ``M``. It is of
    parameters alone, no mean over tokens.

    Args:
        norms: Norm of each expert's response (columns) to each expert's proxy token (rows).
        alpha: Share of its own response that others may reach.

    Source:
        Lv et al. 2025 (arXiv:2512.23447), eq. 3 and figure 8.
    """
    own = alpha * norms.diagonal()
    over = (norms - own[:, None]).clamp(min=0) + (norms - own[None, :]).clamp(min=0)
    return (over - over.diagonal().diag()).mean()


def count_routes(
    expert_index: Int[Tensor, "routes"],
    counted: Bool[Tensor, "routes"],
    group_of_route: Int[Tensor, "routes"],
    num_groups: int,
    num_experts: int,
) -> Float[Tensor, "groups experts"]:
    """Count the routes to each expert within each group of tokens.

    Args:
        expert_index: Expert of each route, in ``[0, num_experts)``; ``num_experts`` for none.
        counted: False for routes of padding tokens, which are left out.
        group_of_route: Group of each route, in ``[0, num_groups)``.
        num_groups: Number of groups.
        num_experts: Number of experts.

    Returns:
        Counts in float64, exact up to 2**31. No host synchronisation takes place.
    """
    return _count(expert_index, counted, group_of_route, num_groups, num_experts)


@one_kernel_on_cuda
def count_text_routes(
    token_index: Int[Tensor, "routes"],
    expert_index: Int[Tensor, "routes"],
    token_mask: Bool[Tensor, "tokens"],
    num_groups: int,
    num_experts: int,
) -> Float[Tensor, "groups experts"]:
    """``count_routes`` of text tokens, with equally many of all tokens in each group."""
    group_of_route = token_index // (len(token_mask) // num_groups)
    return _count(expert_index, token_mask[token_index], group_of_route, num_groups, num_experts)


def _count(expert_index: Tensor, counted: Tensor, group_of_route: Tensor, num_groups: int, num_experts: int) -> Tensor:
    bins = num_experts + 1  # the last is that of no expert
    flat = group_of_route * bins + expert_index
    # 32 bits, which compiled kernels add up themselves.
    counts = flat.new_zeros(num_groups * bins, dtype=torch.int32).scatter_add_(0, flat, counted.to(torch.int32))
    return counts.view(num_groups, bins)[:, :num_experts].double()


def load_balance_loss(
    router_probs: Float[Tensor, "tokens experts"],
    route_counts: Float[Tensor, "groups experts"],
    token_mask: Bool[Tensor, "tokens"],
    costs: Sequence[float] = (),
) -> Float[Tensor, ""]:
    """Penalise routing that leans on few experts.

    ``num_experts * mean_t sum_e(f[g(t), e] * P[t, e])``, where ``f[g, e]`` is the share of group ``g``'s routes
    that went to expert ``e`` and ``P[t, e]`` is the token's probability. With one group this is Switch's
    ``num_experts * sum_e f_e * mean_t P_e``. It is exactly 1.0 when routing is even, and
    ``num_experts / top_k`` when every token surely picks the same ``top_k`` experts with equal
    probability. Only ``P`` carries a gradient.

    The level of the statistic is the choice of groups (defect C13): one group is the micro-batch; one
    group per sequence is the sequence level; one group with the counts of all ranks and
    micro-batches is the global-batch level.

    Args:
        router_probs: Distribution over all experts before any top-k cut; rows sum to 1. float32.
            Tokens are ordered by group, the same number in each.
        route_counts: Routes to each expert in each group, padding left out.
        token_mask: True for text tokens; the others count nowhere.
        costs: Factor of each expert's share, what a route to it costs; empty for 1.

    Returns:
        Unweighted loss, dimensionless; 0 when the micro-batch has no text token.

    Raises:
        ValueError: ``router_probs`` is not float32. In bfloat16 the mean over tokens loses the small
            differences that this loss measures.

    Source:
        Switch Transformers (Fedus et al. 2021, arXiv:2101.03961), eq. 4-6; sequence level as in DeepSeek-V3
        (arXiv:2412.19437), eq. 17-20; global level as in Qiu et al. 2025 (arXiv:2501.11873). Deviation: ``f``
        is divided by the number of routes, not of tokens, so the value keeps its scale for any ``top_k``. With costs it
        is HMoE's parameter penalty (arXiv:2408.10681, eq. 4) over the mean width and the routes per token.
    """
    if router_probs.dtype != torch.float32:
        raise ValueError(f"router_probs must be float32, got {router_probs.dtype}")
    cost = on_device_of(route_counts, costs) if costs else None
    return _balance(router_probs, route_counts, token_mask, cost)


def cost_balance_loss(
    router_probs: Float[Tensor, "tokens experts"],
    route_counts: Float[Tensor, "groups experts"],
    cost: Float[Tensor, "experts"],
    routes_per_token: float,
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """``load_balance_loss`` of experts that do not cost the same: where it is even, ``cost * routes`` is the same.

    ``mean_t sum_e(cost[e] * f[g(t), e] * P[t, e])`` with the share ``f`` of the group's tokens that go to expert ``e``,
    so that ``sum_e f = routes_per_token``, and no factor of the number of experts. Only ``P`` carries a gradient.

    Args:
        router_probs: float32; rows sum to 1. Tokens are ordered by group, the same number in each.
        route_counts: Routes to each expert in each group, padding left out.
        cost: What a route to each expert costs.
        routes_per_token: Of every token.
        token_mask: True for text tokens; the others count nowhere.

    Returns:
        Unweighted loss, in the unit of ``cost``; 0 when the micro-batch has no text token.

    Source:
        MoE++ (Jin et al. 2024, arXiv:2410.07348), eq. 7, the heterogeneous load balance loss.
    """
    num_experts = router_probs.shape[1]
    share = routes_per_token * route_counts / route_counts.sum(dim=1, keepdim=True).clamp(min=1)
    return _mean_of_shares(share * cost / num_experts, router_probs, token_mask)


def sparsity_loss(
    gates: Float[Tensor, "tokens experts"],
    route_counts: Float[Tensor, "groups experts"],
    group_tokens: Float[Tensor, "groups"],
    target_experts: float,
    token_mask: Bool[Tensor, "tokens"],
    costs: Sequence[float] = (),
) -> Float[Tensor, ""]:
    """Penalise gates by their size, those of busy experts more: an L1 norm that also balances.

    ``mean_t sum_e(f[g(t), e] * gates[t, e])`` with ``f[g, e] = num_experts * routes_e / (target_experts * tokens_g)``:
    1 for every expert when group ``g`` has ``target_experts`` routes per token and spreads them evenly. Only the gates
    carry a gradient.

    Args:
        gates: Gates, not negative; float32. Tokens are ordered by group, the same number in each.
        route_counts: Routes to each expert in each group, padding left out.
        group_tokens: Text tokens of each group.
        target_experts: Routes per token that are wanted, the paper's ``k``.
        token_mask: True for text tokens; the others count nowhere.
        costs: Factor of each expert's share, what a route to it costs; empty for 1.

    Returns:
        Unweighted loss, in the unit of the gates; 0 when the micro-batch has no text token.

    Source:
        ReMoE (Wang et al. 2024, arXiv:2412.14711), the load-balancing L1 regularisation of one layer.
    """
    share = route_counts / (target_experts * group_tokens[:, None].clamp(min=1))
    if costs:
        share = share * on_device_of(share, costs)
    return _mean_of_shares(share, gates, token_mask)


@one_kernel_on_cuda
def _balance(
    router_probs: Float[Tensor, "tokens experts"],
    route_counts: Float[Tensor, "groups experts"],
    token_mask: Bool[Tensor, "tokens"],
    cost: Float[Tensor, "experts"] | None,
) -> Float[Tensor, ""]:
    # An empty group has no routes; clamp keeps 0/0 out of the gradient.
    share = route_counts / route_counts.sum(dim=1, keepdim=True).clamp(min=1)
    return _mean(share if cost is None else share * cost, router_probs, token_mask)


@one_kernel_on_cuda
def _mean_of_shares(
    share: Float[Tensor, "groups experts"],
    values: Float[Tensor, "tokens experts"],
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """``num_experts * mean_t sum_e(share[g(t), e] * values[t, e])`` over text tokens."""
    return _mean(share, values, token_mask)


def _mean(share: Tensor, values: Tensor, token_mask: Tensor) -> Tensor:
    num_groups, num_experts = share.shape
    by_group = (values * token_mask[:, None]).view(num_groups, -1, num_experts).sum(dim=1)
    return num_experts * (share.float() * by_group).sum() / token_mask.sum().clamp(min=1)


@one_kernel_on_cuda
def entropy_loss(
    router_probs: Float[Tensor, "tokens experts"],
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """Mean over text tokens of the entropy of the routing distribution.

    Args:
        router_probs: float32; rows sum to 1.
        token_mask: True for text tokens.

    Returns:
        Unweighted loss, nats: 0 when every token is sure, ``log(num_experts)`` when all are undecided.

    Source:
        Huang et al. 2024 (arXiv:2403.07652), the dynamic loss; Lv et al. 2025 (arXiv:2501.13074), eq. 8.
    """
    entropy = -torch.special.xlogy(router_probs, router_probs.clamp(min=1e-30)).sum(dim=-1)
    return (entropy * token_mask).sum() / token_mask.sum().clamp(min=1)


@one_kernel_on_cuda
def router_z_loss(
    router_logits: Float[Tensor, "tokens experts"],
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """Keep router logits small: the mean over text tokens of ``logsumexp(logits) ** 2``.

    Args:
        router_logits: float32 logits before noise and bias.
        token_mask: True for text tokens.

    Returns:
        Unweighted loss, nats squared. It is ``log(num_experts) ** 2`` when all logits are 0.

    Source:
        ST-MoE (Zoph et al. 2022, arXiv:2202.08906), eq. 5.
    """
    squared = router_logits.logsumexp(dim=-1).square()
    return (squared * token_mask).sum() / token_mask.sum().clamp(min=1)


def importance_loss(
    router_probs: Float[Tensor, "tokens experts"],
    token_mask: Bool[Tensor, "tokens"],
    costs: Sequence[float] = (),
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' importance, the sum of their probabilities over text tokens.

    ``variance / mean ** 2`` with the unbiased variance: 0 when importance is even, ``num_experts`` when one expert has
    all of it. A statistic of the micro-batch: the mean over micro-batches is not the value of the whole.

    Args:
        router_probs: float32.
        token_mask: True for text tokens.
        costs: Factor of each expert's importance, what a route to it costs; empty for 1.

    Returns:
        Unweighted loss, dimensionless; 0 when the micro-batch has no text token, or the layer one expert.

    Source:
        Shazeer et al. 2017 (arXiv:1701.06538), eq. 6-7; the unbiased variance as in the code of arXiv:2302.14703.
        With costs it is that of MoCE-IR (arXiv:2411.18466), there over the largest, which proportions do not see.
    """
    importance = (router_probs * token_mask[:, None]).sum(dim=0)
    return _squared_variation(importance * on_device_of(importance, costs) if costs else importance)


def load_loss(
    logits: Float[Tensor, "tokens experts"],
    threshold: Float[Tensor, "tokens"],
    noise_std: float,
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' load: the tokens that they would get if noise were drawn anew.

    An expert gets a token with probability ``Phi((logit - threshold) / noise_std)``, which, unlike the number of its
    tokens, has a gradient. ``variance / mean ** 2`` of the sums, as in ``importance_loss``.

    Args:
        logits: float32, without noise.
        threshold: Of every token, the noisy logit that an expert's must reach for it to be chosen.
        noise_std: Standard deviation of the noise, > 0.
        token_mask: True for text tokens.

    Returns:
        Unweighted loss, dimensionless, a statistic of the micro-batch; 0 when that has no text token, or the layer one
        expert.

    Source:
        Shazeer et al. 2017 (arXiv:1701.06538), eq. 8-11, with the same noise for all experts and the threshold of the
        code of MoCE-IR (arXiv:2411.18466): the smallest noisy logit that was chosen, for all experts alike.
    """
    chosen = torch.special.ndtr((logits - threshold[:, None]) / noise_std)
    return _squared_variation((chosen * token_mask[:, None]).sum(dim=0))


def _squared_variation(values: Float[Tensor, "experts"]) -> Float[Tensor, ""]:
    """Unbiased variance over the squared mean; 0 for zeros, and for one value."""
    mean = values.mean()
    variance = (values - mean).square().sum() / max(1, len(values) - 1)
    return variance / mean.square().clamp(min=1e-20)


def sample_similarity_loss(
    router_probs: Float[Tensor, "tokens experts"],
    hidden: Float[Tensor, "tokens hidden"],
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """Spread of the tokens of each expert: the loss is low where an expert has few tokens, and these are alike.

    ``same = 1 / (n * T ** 2) * sum_e sum_ab P[a, e] P[b, e] D[a, b]`` over the ``T`` text tokens and ``n`` experts,
    with ``D`` the squared distance of hidden states over its own mean over all pairs. It is ``1 / n`` when one expert
    has all tokens, ``1 / n ** 2`` when probabilities are uniform, lower when each expert has a cluster, and at least 0.

    The paper subtracts a second term, ``diff``: the same between two different experts, over ``n ** 2 - n``. As rows
    sum to 1, ``diff = (sum D - n * same) / (n ** 2 - n)``, so ``beta_s * same - beta_d * diff`` is ``(beta_s + beta_d /
    (n - 1)) * same`` less a constant: one coefficient, the one in brackets, is all there is.

    Args:
        router_probs: float32; rows sum to 1.
        hidden: What the distance is of; no gradient goes to it.
        token_mask: True for text tokens.

    Returns:
        Unweighted loss, dimensionless; 0 when all text tokens are alike or there are none. A statistic of the
        micro-batch: pairs are formed within it, of any documents.

    Source:
        Krishnamurthy et al. 2023 (arXiv:2302.14703), L_s. There the distance is of raw images, not squared, over the
        batch's largest, and their ``beta_s`` multiplies a sum over pairs: it is ours over ``T ** 2``. Squared distances
        have a closed form in O(T n d): with ``m_e = sum_a P[a, e]``, ``q_e = sum_a P[a, e] |x_a|^2`` and
        ``mu_e = sum_a P[a, e] x_a``, ``sum_ab P[a, e] P[b, e] D[a, b] = 2 (m_e q_e - |mu_e|^2)``.
    """
    text = token_mask[:, None]
    num_tokens = token_mask.sum().clamp(min=1)
    # Distances do not see the centre, and without it the difference of the closed form keeps its digits.
    points = hidden.detach().float() * text
    points = (points - points.sum(dim=0) / num_tokens) * text
    squares = points.square().sum(dim=1)
    mean_distance = 2 * squares.sum() / num_tokens
    share = router_probs * text / num_tokens
    within = 2 * (share.sum(dim=0) * (share * squares[:, None]).sum(dim=0) - (share.t() @ points).square().sum(dim=1))
    return within.mean() / mean_distance.clamp(min=1e-20)


def distillation_loss(
    student_logits: Float[Tensor, "tokens slots"],
    teacher_probs: Float[Tensor, "tokens slots"],
    token_mask: Bool[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """Mean over text tokens of the cross-entropy of a teacher's distribution against the student's.

    Args:
        student_logits: float32.
        teacher_probs: float32; rows sum to 1.
        token_mask: True for text tokens.

    Returns:
        Unweighted loss, nats; the teacher's entropy where the student agrees.
    """
    cross_entropy = -(teacher_probs * student_logits.log_softmax(dim=-1)).sum(dim=-1)
    return (cross_entropy * token_mask).sum() / token_mask.sum().clamp(min=1)
