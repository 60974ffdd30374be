"""Hash routing: the table, its balance, and what a route may depend on."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.routing import refusal
from torch import Tensor

from moe_pretrain.moe.routers.hash import HashConfig, HashRouter, balanced_table
from moe_pretrain.moe.types import RoutingContext

HIDDEN, EXPERTS, VOCAB = 6, 5, 300
CONFIG = HashConfig(name="hash", top_k=2, table="balanced", weights="equal", weight_scale=1.0)


def zipf(seed: int = 0) -> Tensor:
    """Counts that fall as text's do, in no order of ids; the rarest ids do not occur."""
    counts = (20_000 / torch.arange(1, VOCAB + 1)).floor().long() - 80
    return counts.clamp(min=0)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))]


def make_router(counts: Tensor | None = None, layer: int = 1, **changes: Any) -> HashRouter:
    router = HashRouter(dataclasses.replace(CONFIG, **changes), HIDDEN, EXPERTS, layer)
    router.use_token_counts(zipf() if counts is None else counts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def context(ids: Tensor, mask: Tensor | None = None) -> RoutingContext:
    text = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask
    return RoutingContext(text, torch.arange(len(ids)), 1, seed=0, step=0, token_ids=ids)


@pytest.mark.parametrize("table", ["balanced", "random"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_every_id_has_distinct_experts_and_every_expert_has_ids(table: str, top_k: int):
    router = make_router(table=table, top_k=top_k)
    assert router.table.shape == (VOCAB, top_k)
    assert all(len(set(row)) == top_k for row in router.table.tolist())
    assert set(router.table.flatten().tolist()) == set(range(EXPERTS))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_balanced_table_gives_experts_equal_numbers_of_tokens(top_k: int):
    counts = zipf()
    load = torch.zeros(EXPERTS)
    for token_id, experts in enumerate(balanced_table(counts, EXPERTS, top_k, layer=0).tolist()):
        for expert in experts:
            load[expert] += counts[token_id]
    # The most frequent id alone may be more than an expert's share; beyond that the greedy rule fills up evenly.
    assert load.max() <= max(float(counts.max()), float(load.mean()) * 1.02)
    random = make_router(counts, table="random", top_k=top_k).table
    spread = torch.zeros(EXPERTS).index_add(0, random.flatten(), counts.float().repeat_interleave(top_k))
    assert spread.max() / spread.mean() > load.max() / load.mean()


def test_unseen_ids_are_spread():
    unseen = balanced_table(torch.zeros(VOCAB, dtype=torch.int64), EXPERTS, 2, layer=0)
    assert torch.bincount(unseen.flatten()).tolist() == [VOCAB * 2 // EXPERTS] * EXPERTS


def test_layers_differ_and_the_same_layer_does_not():
    first, again, other = (make_router(layer=layer).table for layer in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("weights", ["equal", "learned"])
def test_the_same_id_has_the_same_experts_wherever_it_stands(weights: str):
    router = make_router(weights=weights)
    ids = torch.tensor([7, 3, 7, 299, 7])
    routing = router(torch.randn(5, HIDDEN), context(ids))
    assert routing.token_index.tolist() == [t for t in range(5) for _ in range(2)]
    assert torch.equal(routing.expert_index.view(5, 2), router.table[ids])


def test_weights():
    hidden, ids = torch.randn(9, HIDDEN), torch.randint(0, VOCAB, (9,))
    assert make_router(weight_scale=1.5)(hidden, context(ids)).weight.tolist() == [0.75] * 18
    router = make_router(weights="learned", weight_scale=1.5)
    weight = router(hidden, context(ids)).weight.view(9, 2)
    for token in range(9):
        logits = router.weight @ hidden[token]
        scores = [(1 + logits[expert].exp()).log().sqrt() for expert in router.table[ids[token]]]
        expected = torch.stack([1.5 * score / sum(scores) for score in scores])
        torch.testing.assert_close(weight[token], expected)
    (gradient,) = torch.autograd.grad(weight[:, 0].sum(), [router.weight])
    assert gradient.abs().sum() > 0


def test_padding_is_not_counted():
    ids, mask = torch.randint(0, VOCAB, (9,)), torch.tensor([True] * 6 + [False] * 3)
    router = make_router(weights="learned")
    use = router(torch.randn(9, HIDDEN), context(ids, mask)).use
    assert torch.equal(
        use.tokens_per_expert, torch.bincount(router.table[ids[:6]].flatten(), minlength=EXPERTS).double()
    )
    assert use.tokens == 6 and 0 < use.router_entropy <= 6 * torch.tensor(2.0).log()


def test_the_table_is_saved():
    saved = make_router().state_dict()
    fresh = make_router(torch.ones(VOCAB, dtype=torch.int64))
    assert not torch.equal(fresh.table, saved["table"])
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.table, saved["table"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"top_k": 6}, "router.top_k=6 must be at most model.moe.num_experts=5"),
        ({"top_k": 1, "weights": "learned"}, "router.weights=learned must be equal when router.top_k=1"),
        ({"weight_scale": 0.0}, "router.weight_scale=0.0 must be positive"),
    ],
)
def test_wrong_values_get_one_line(changes: dict[str, Any], message: str):
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint
