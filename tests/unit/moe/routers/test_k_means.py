"""K-means routing beside plain loops: clusters, state pooled over the batch, dead clusters split, the fitted map."""

import math
from typing import Any

import pytest
import torch
from helpers.routing import by_token, make_context, refusal
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.moe.routers.k_means import KMeansConfig, KMeansRouter
from moe_pretrain.moe.types import StepUse
from moe_pretrain.verify.certificate.certify import examine

HIDDEN, EXPERTS, FEATURES = 12, 4, 6
FIELDS: dict[str, Any] = {
    "name": "k_means",
    "top_k": 1,
    "rule": "nearest",
    "num_features": FEATURES,
    "temperature": 0.7,
    "decay": 0.9,
    "bias_update_rate": 0.0,
    "dead_share": 0.1,
    "refit_every_steps": 2,
    "ridge": 1e-6,
}


def make_router(**changes: Any) -> KMeansRouter:
    router = KMeansRouter(KMeansConfig(**(FIELDS | changes)), HIDDEN, EXPERTS, layer=1)
    drawn = torch.Generator().manual_seed(3)
    for name in router.frozen_weights:
        buffer = router.get_buffer(name)
        buffer.copy_(0.1 * torch.randn(buffer.shape, generator=drawn))
    return router


def step(router: KMeansRouter, *parts: Tensor) -> None:
    """One optimizer step whose global batch is ``parts``, each a micro-batch of text."""
    uses = [router(part, make_context(len(part))).use for part in parts]
    counts = sum(use.tokens_per_expert for use in uses)
    tokens = sum(len(part) for part in parts)
    router.after_step(StepUse(counts, tokens, 1.0, sum(use.sums for use in uses)))


def blobs(tokens: int, seed: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Hidden states around ``EXPERTS`` directions, and the direction of each."""
    centres = 3 * torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))
    drawn = torch.Generator().manual_seed(seed)
    label = torch.randint(0, EXPERTS, (tokens,), generator=drawn)
    return centres[label] + spread * torch.randn(tokens, HIDDEN, generator=drawn), label


def nearest(router: KMeansRouter, hidden: Tensor) -> list[list[float]]:
    """Distance of every token to every centroid, by loops over the paper's formula."""
    rows = []
    for x in hidden.tolist():
        scale = math.sqrt(sum(value**2 for value in x) / HIDDEN + 1e-6)
        feature = []
        for p in router.projection.tolist():
            length = math.sqrt(sum(value**2 for value in p))
            feature.append(sum(a / length * b / scale for a, b in zip(p, x, strict=True)))
        rows.append(
            [sum((a - b) ** 2 for a, b in zip(feature, c, strict=True)) / FEATURES for c in router.centroids.tolist()]
        )
    return rows


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_a_token_takes_its_nearest_centroids(top_k: int) -> None:
    router, hidden = make_router(top_k=top_k), torch.randn(30, HIDDEN)
    expected = []
    for row in nearest(router, hidden):
        best = sorted(range(EXPERTS), key=lambda expert: row[expert])[:top_k]
        masses = [math.exp(-row[expert] / 0.7) for expert in best]
        expected.append({e: pytest.approx(m / sum(masses), abs=1e-5) for e, m in zip(best, masses, strict=True)})
    assert by_token(router(hidden, make_context(30)), 30) == expected


def test_clusters_are_found() -> None:
    """Purity above 0.99 after 50 steps on as many blobs as experts, whatever the first centroids are."""
    router = make_router(bias_update_rate=0.0)
    for number in range(50):
        step(router, blobs(256, number)[0])
    hidden, label = blobs(1000, 999)
    expert = router(hidden, make_context(1000)).expert_index
    table = torch.zeros(EXPERTS, EXPERTS).index_put((expert, label), torch.ones(1000), accumulate=True)
    assert float(table.max(dim=1).values.sum()) / 1000 > 0.99


@pytest.mark.parametrize("rule", ["nearest", "least_squares"])
def test_state_is_that_of_the_pooled_batch(rule: str) -> None:
    """Micro-batches of 10 and 22 tokens move the state as their 32 tokens in one; padding moves nothing."""
    hidden = torch.randn(32, HIDDEN)
    whole, parts, padded = (make_router(rule=rule, bias_update_rate=0.1) for _ in range(3))
    for _ in range(3):
        step(whole, hidden)
        step(parts, hidden[:10], hidden[10:])
        mask = torch.arange(40) < 32
        use = padded(torch.cat([hidden, 50 * torch.ones(8, HIDDEN)]), make_context(40, token_mask=mask)).use
        padded.after_step(StepUse(use.tokens_per_expert, 32, 1.0, use.sums))
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(padded.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


def test_centroids_are_running_means_free_of_the_start() -> None:
    """After one step the means of the clusters' tokens; after two weighted by ``decay``."""
    router = make_router(dead_share=0.0)
    sums, counts, weight = torch.zeros(EXPERTS, FEATURES), torch.zeros(EXPERTS), 1.0
    for seed in (1, 2):
        hidden, _ = blobs(64, seed, spread=2.0)
        features, expert = router.features(hidden), router(hidden, make_context(64)).expert_index
        step(router, hidden)
        sums, counts, weight = 0.9 * sums, 0.9 * counts, 0.9 * weight
        for u, e in zip(features, expert.tolist(), strict=True):
            sums[e] += u
            counts[e] += 1
        seen = counts > 0
        torch.testing.assert_close(router.centroids[seen], (sums / counts[:, None])[seen], rtol=1e-5, atol=1e-6)


def test_a_dead_cluster_takes_half_of_the_largest() -> None:
    """All tokens at one centroid: the step after, another one lies beside it, and everything is finite."""
    router = make_router()
    hidden = blobs(1, 0)[0].expand(64, -1) + 0.01 * torch.randn(64, HIDDEN)
    first = int(router(hidden, make_context(64)).expert_index[0])
    router.centroids[first] = router.features(hidden).mean(dim=0)
    step(router, hidden)
    shares = router.cluster_share.sort(descending=True).values
    assert shares[:2].tolist() == [0.5, 0.5] and float(shares[2:].sum()) == 0
    one, other = router.cluster_share.topk(2).indices.tolist()
    assert 0 < float((router.centroids[one] - router.centroids[other]).square().mean().sqrt()) < 0.2
    for _ in range(5):
        step(router, hidden)
    assert all(buffer.isfinite().all() for buffer in router.buffers())
    kept = make_router(dead_share=0.0)
    kept.centroids[first] = kept.features(hidden).mean(dim=0)
    step(kept, hidden)
    assert float(kept.cluster_share.max()) == 1


def test_the_fitted_map_agrees_with_the_nearest_centroid_on_separate_clusters() -> None:
    """And is the least squares solution that numpy finds, from the first fit on; before it the nearest decide."""
    router = make_router(rule="least_squares", decay=0.0, refit_every_steps=2, ridge=1e-10)
    plain = make_router()
    hidden, _ = blobs(400, 5)
    for number in range(20):
        step(plain, blobs(256, number)[0])
    router.centroids.copy_(plain.centroids)
    context = make_context(400)
    started = router(hidden, context).expert_index
    assert torch.equal(started, plain(hidden, context).expert_index)
    step(router, hidden)
    assert torch.equal(router(hidden, context).expert_index, started), "no fit yet"
    label = router.distances(router.features(hidden)).argmin(dim=1)
    step(router, hidden)
    inputs = torch.cat([router.features(hidden), torch.ones(400, 1)], dim=1).double()
    wanted = torch.linalg.lstsq(inputs, torch.nn.functional.one_hot(label, EXPERTS).double()).solution
    torch.testing.assert_close(router.fitted_map.double().T, wanted, rtol=1e-3, atol=1e-3)
    assert float((router(hidden, context).expert_index == label).double().mean()) > 0.99


def test_the_bias_evens_the_load() -> None:
    loads = []
    for rate in (0.0, 0.05):
        router = make_router(bias_update_rate=rate, dead_share=0.0)
        for number in range(60):
            step(router, torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(number)) + 0.7)
        counts = router(torch.randn(2000, HIDDEN) + 0.7, make_context(2000)).use.tokens_per_expert
        loads.append(float(counts.max() / counts.mean()))
    assert loads[1] < 1.2 < loads[0]


def test_nothing_is_learnt_by_gradient_and_evaluation_moves_nothing() -> None:
    router = make_router()
    hidden = torch.randn(20, HIDDEN, requires_grad=True)
    assert not list(router.parameters()) and not router(hidden, make_context(20)).weight.requires_grad
    assert router.eval()(hidden, make_context(20)).use.sums is None


@pytest.mark.parametrize("rule", ["nearest", "least_squares"])
@pytest.mark.fast("nearest")
def test_certified(rule: str) -> None:
    words = ["router=k_means", f"router.rule={rule}", "router.num_features=8", "router.refit_every_steps=1"]
    rows = list(examine(load(["engine.device=cpu", "model.num_layers=1", "model.moe.num_experts=6", *words])))
    assert [row for row in rows if row.verdict == "FAIL"] == []


def test_wrong_values_are_refused() -> None:
    config = KMeansConfig(**FIELDS)
    assert "router.top_k=9 must be at most model.moe.num_experts=8" in refusal(config, 8, top_k=9)
    assert "router.ridge" in refusal(config, 8, ridge=0.0)
    assert "router.rule" in refusal(config, 8, rule="median")
