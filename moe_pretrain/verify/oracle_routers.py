"""Schemes that the oracle computes by a formula of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.types import RoutingContext
from moe_pretrain.verify.oracle_parts import coupling_loss

JITTER_STREAM, COUPLING_STREAM = 1, 10


def top_k(
    hidden: Tensor, router: TopKRouter, context: RoutingContext, last_routes: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Routes as (token, expert) pairs, the weight of each, and the aux losses.

    Args:
        hidden: ``[tokens, hidden]``.
        router: The router, whose parameters and configuration are read.
        context: Facts of these tokens.
        last_routes: Routes of text per expert of the last step's global batch; None before the first.
    """
    config, num_experts = router.config, router.num_experts
    if config.jitter and router.training:
        keys = (context.seed, JITTER_STREAM, context.step, router.layer)
        noise = counter_uniform(context.token_position, hidden.shape[1], *keys)
        hidden = hidden * (1 + config.jitter * (2 * noise - 1))
    if router.projection is not None:
        hidden = hidden @ router.projection.T
    logits = hidden @ router.weight.T
    if router.logit_bias is not None:
        logits = logits + router.logit_bias
    if config.logit_cap is not None:
        logits = config.logit_cap * torch.tanh(logits / config.logit_cap)
    positive = {
        "softmax": lambda: logits.softmax(dim=-1),
        "sigmoid": lambda: 1 / (1 + (-logits).exp()),
        "sqrt_softplus": lambda: (1 + logits.exp()).log() ** 0.5,
    }
    scores = positive[config.score]()
    probs = scores / scores.sum(dim=-1, keepdim=True)
    chosen = []
    size = num_experts // config.num_groups
    for row in scores.tolist():  # the highest first; of equal scores the lower expert or group
        two_best = [sum(sorted(row[first : first + size])[-2:]) for first in range(0, num_experts, size)]
        groups = sorted(range(config.num_groups), key=lambda group: (-two_best[group], group))
        allowed = [e for e in range(num_experts) if e // size in groups[: config.groups_per_token]]
        chosen.append(sorted(allowed, key=lambda expert: (-row[expert], expert))[: config.top_k])
    routed = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, torch.tensor(chosen), True)
    weight = scores
    if config.weights == "renormalised":
        weight = scores / (scores * routed).sum(dim=-1, keepdim=True)
    weight = weight * config.weight_scale
    text = context.token_mask
    num_groups = context.num_sequences if config.load_balance_level == "sequence" else 1
    balance = torch.zeros(())
    for group in torch.arange(len(text)).chunk(num_groups):
        routes = routed[group][text[group]].sum(dim=0)
        if config.load_balance_level == "last_step" and router.training:
            routes = routes if last_routes is None else last_routes
        share = routes / routes.sum().clamp(min=1)
        cost = torch.tensor(router.balanced_costs or [1.0] * num_experts)
        balance = balance + num_experts * (cost * share * probs[group][text[group]]).sum()
    num_text = text.sum().clamp(min=1)
    squares = logits[text].exp().sum(dim=-1).log().square()
    aux = {"load_balance": balance / num_text, "router_z": squares.sum() / num_text}
    if config.entropy_weight:
        entropies = [-sum(share * share.log() for share in row) for row in probs[text]]
        aux["entropy"] = sum(entropies, torch.zeros(())) / num_text
    if context.proxy_norms is not None:
        keys = (context.seed, COUPLING_STREAM, context.step, router.layer)
        noise = 2 * counter_uniform(torch.arange(num_experts), router.weight.shape[1], *keys) - 1
        alpha = config.expert_router_coupling_alpha
        aux["expert_router_coupling"] = coupling_loss(router.weight, alpha, context.proxy_norms, noise)
    return routed, weight, aux


FORMULAS: dict[type[Router], Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]] = {
    TopKRouter: top_k,
}
"""Router -> its formula. Not of its subclasses, which may differ."""
