"""Statistics of a layer's experts on calibration text: one pass of the model serves every method of pruning.

Axis names as in ``moe.types``; ``sample`` is a part of the calibration tokens, ``routed`` the width of experts' rows.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_pretrain.data import MicroBatch
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.dispatch import run_experts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import RouterUse, Routing, RoutingContext

MOST_SAMPLED = 512
"""Tokens of a layer on which every expert is run, for the similarity of their outputs."""


class LayerStatistics:
    """Sums over calibration tokens of one MoE layer.

    Attributes:
        tokens: Text tokens.
        frequency: Tokens that were routed to each expert, ``[experts]``.
        soft: Sum over tokens of the softmax over all experts' logits; 0 for schemes without logits.
        gated_norm: Sum over an expert's tokens of the length of its output times its gate, gates divided by their sum
            over the token's experts.
        has_logits: Whether the scheme has a score of every expert.
    """

    def __init__(self, num_experts: int):
        self.tokens = 0
        self.frequency = torch.zeros(num_experts, dtype=torch.float64)
        self.soft = torch.zeros(num_experts, dtype=torch.float64)
        self.gated_norm = torch.zeros(num_experts, dtype=torch.float64)
        self.has_logits = True
        self._sum = torch.zeros(num_experts, dtype=torch.float64)
        self._products = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self._sample: list[Tensor] = []

    def add(self, layer: MoELayer, hidden: Tensor, context: RoutingContext, routing: Routing) -> None:
        """Count one forward pass of ``layer``; padding is left out."""
        text = context.token_mask
        counted = text[routing.token_index]
        token, expert = routing.token_index[counted], routing.expert_index[counted]
        weight = routing.weight[counted].double()
        total = torch.zeros(len(hidden), dtype=torch.float64).index_add_(0, token, weight)
        gate = weight / total[token].clamp(min=1e-20)
        self.tokens += int(text.sum())
        self.frequency += torch.bincount(expert, minlength=len(self.frequency))
        for index in expert.unique().tolist():
            of_expert = expert == index
            rows = output_of(layer, hidden[token[of_expert]], index)
            self.gated_norm[index] += (gate[of_expert] * rows.double().norm(dim=1)).sum()
        logits = logits_of(layer, hidden, context)
        if logits is None:
            self.has_logits = False
        else:
            logits = logits[text].double()
            self.soft += logits.softmax(dim=1).sum(dim=0)
            self._sum += logits.sum(dim=0)
            self._products += logits.T @ logits
        left = MOST_SAMPLED - sum(map(len, self._sample))
        self._sample.append(hidden[text][:left])

    @property
    def reap(self) -> Float[Tensor, "experts"]:
        """Mean over an expert's tokens of gate times length of its output; 0 for one without tokens."""
        return self.gated_norm / self.frequency.clamp(min=1)

    def logit_correlation(self) -> Float[Tensor, "experts experts"]:
        """Pearson correlation of the experts' logits over all tokens."""
        centred = self._products - torch.outer(self._sum, self._sum) / max(self.tokens, 1)
        scale = centred.diagonal().clamp(min=1e-30).sqrt()
        return centred / torch.outer(scale, scale)

    def output_similarity(self, layer: MoELayer) -> Float[Tensor, "experts experts"]:
        """Linear CKA of all experts' outputs on the sampled tokens."""
        hidden = torch.cat(self._sample)
        return linear_cka([output_of(layer, hidden, expert) for expert in range(layer.kinds.ffn)])


@torch.no_grad()
def output_of(layer: MoELayer, hidden: Float[Tensor, "tokens hidden"], expert: int) -> Float[Tensor, "tokens routed"]:
    """Output of one expert for every row, whatever the router would say; as wide as the experts' own rows are."""
    if layer.latent is not None:
        hidden = layer.latent.narrow(hidden)
    ones = torch.ones(len(hidden))
    index = torch.arange(len(hidden))
    none = torch.zeros((), dtype=torch.float64)
    use = RouterUse(torch.zeros(layer.kinds.ffn, dtype=torch.float64), none, none, none)
    routing = Routing(index, torch.full_like(index, expert), ones, 1, use)
    down = getattr(layer.router, "down_weight", None)
    experts = partial(layer.experts, **({} if down is None else {"down_weight": down}))
    return run_experts(hidden, routing, layer.kinds.ffn, experts, None)[0]


def logits_of(layer: MoELayer, hidden: Tensor, context: RoutingContext) -> Float[Tensor, "tokens experts"] | None:
    """Scores of all experts whose softmax is the scheme's distribution, without a balancing bias; None without such."""
    logits = layer.router.logits(hidden, context)
    if logits is not None:
        return logits
    ranking = layer.router.ranking(hidden, context)
    return None if ranking is None else ranking.scores


def linear_cka(outputs: list[Tensor]) -> Float[Tensor, "experts experts"]:
    """``||Y^T X||^2 / (||X^T X|| ||Y^T Y||)`` of centred outputs ``[sample, hidden]`` of the same tokens, pair by pair.

    Source:
        Kornblith et al. 2019 (arXiv:1905.00414), eq. 3; by Gram matrices, whose size is that of the sample.
    """
    grams = []
    for output in outputs:
        centred = output.double() - output.double().mean(dim=0)
        gram = (centred @ centred.T).flatten()
        grams.append(gram / gram.norm().clamp(min=1e-30))
    stacked = torch.stack(grams)
    return stacked @ stacked.T


@torch.no_grad()
def measure(model: DecoderLM, batches: Iterable[MicroBatch], seed: int) -> list[LayerStatistics]:
    """Statistics of every MoE layer of ``model``, in evaluation, over ``batches``; bottom up."""
    layers = model.moe_layers()
    found = [LayerStatistics(layer.kinds.ffn) for layer in layers]
    seen: list[tuple[Tensor, RoutingContext, Routing]] = []

    def note(module: Any, inputs: tuple[Any, ...], routing: Routing) -> None:
        seen.append((inputs[0], inputs[1], routing.exact()))

    handles = [layer.router.register_forward_hook(note) for layer in layers]
    try:
        for batch in batches:
            seen.clear()
            model.routes(batch.input_ids, batch.document_ids, batch.position_ids, routing_context(batch, seed, 0))
            for statistics, layer, (hidden, context, routing) in zip(found, layers, list(seen), strict=True):
                statistics.add(layer, hidden, context, routing)
    finally:
        for handle in handles:
            handle.remove()
    return found
