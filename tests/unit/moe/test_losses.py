"""Values of the auxiliary losses where they are known exactly, and where their gradients go."""

import math

import pytest
import torch
from torch import Tensor

from moe_pretrain.moe.losses import (
    count_routes,
    distillation_loss,
    importance_loss,
    load_balance_loss,
    router_z_loss,
    sample_similarity_loss,
)

ALL_TEXT = torch.ones(12, dtype=torch.bool)


def counts_of(expert_index: Tensor, mask: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """Routes ``[tokens, top_k]`` counted per group of consecutive tokens."""
    tokens, top_k = expert_index.shape
    group = torch.arange(tokens).repeat_interleave(top_k) // (tokens // num_groups)
    return count_routes(expert_index.flatten(), mask.repeat_interleave(top_k), group, num_groups, num_experts)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (4, 4), (2, 1), (1, 1)])
def test_even_routing_gives_exactly_one(num_experts: int, top_k: int, num_groups: int) -> None:
    probs = torch.full((12, num_experts), 1 / num_experts)
    index = (torch.arange(12)[:, None] + torch.arange(top_k)) % num_experts
    loss = load_balance_loss(probs, counts_of(index, ALL_TEXT, num_groups, num_experts), ALL_TEXT)
    assert loss.item() == 1.0


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (4, 4), (8, 2), (1, 1)])
def test_collapse_gives_experts_over_top_k(num_experts: int, top_k: int, num_groups: int) -> None:
    index = torch.arange(top_k).expand(12, top_k)
    probs = torch.zeros(12, num_experts).scatter(1, index, 1 / top_k)
    loss = load_balance_loss(probs, counts_of(index, ALL_TEXT, num_groups, num_experts), ALL_TEXT)
    assert loss.item() == pytest.approx(num_experts / top_k)


def test_equals_the_formula_token_by_token() -> None:
    probs = torch.randn(12, 4).softmax(1)
    index = probs.topk(2).indices
    mask = torch.rand(12) < 0.7
    counts = counts_of(index, mask, 3, 4)
    total = 0.0
    for token in range(12):
        if mask[token]:
            group = token // 4
            own = [int(e) for t in range(group * 4, group * 4 + 4) if mask[t] for e in index[t]]
            total += sum(own.count(e) / len(own) * probs[token, e].item() for e in range(4))
    expected = 4 * total / int(mask.sum())
    assert load_balance_loss(probs, counts, mask).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_goes_through_the_probabilities_only() -> None:
    """It is the expert's share, so experts with more routes are pushed down harder."""
    probs = torch.full((12, 4), 0.25, requires_grad=True)
    counts = torch.tensor([[12.0, 6.0, 6.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = load_balance_loss(probs, counts.detach(), ALL_TEXT)
    (grad,) = torch.autograd.grad(loss, [probs])
    torch.testing.assert_close(grad, (4 / 12 * torch.tensor([0.5, 0.25, 0.25, 0.0])).expand(12, 4))
    assert not counts_of(probs.topk(2).indices, ALL_TEXT, 1, 4).requires_grad


def test_mirrored_sequences_balance_as_a_batch_but_not_each() -> None:
    """Sequence 1 leans on experts 0 and 1, sequence 2 just as much on 2 and 3 (defect C13)."""
    index = torch.tensor([[0, 1]] * 6 + [[2, 3]] * 6)
    probs = torch.zeros(12, 4).scatter(1, index, 0.5)
    assert load_balance_loss(probs, counts_of(index, ALL_TEXT, 1, 4), ALL_TEXT).item() == 1.0
    assert load_balance_loss(probs, counts_of(index, ALL_TEXT, 2, 4), ALL_TEXT).item() == 2.0


def test_padding_counts_nowhere() -> None:
    """Whatever the router says about padding, value and gradient are those of the text alone."""
    text = torch.randn(6, 4).softmax(1)
    index = text.topk(2).indices
    mask = torch.tensor([True] * 6 + [False] * 6)
    short = load_balance_loss(text, counts_of(index, mask[:6], 1, 4), mask[:6])
    for padding in (torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1.0]])):
        probs = torch.cat([text, padding.expand(6, 4)]).requires_grad_()
        padded_index = torch.cat([index, padding.topk(2).indices.expand(6, 2)])
        loss = load_balance_loss(probs, counts_of(padded_index, mask, 1, 4), mask)
        assert loss.item() == pytest.approx(short.item(), rel=1e-6)
        (grad,) = torch.autograd.grad(loss, [probs])
        assert not grad[6:].any() and grad[:6].any()
    logits = torch.randn(12, 4)
    assert router_z_loss(logits, mask).item() == pytest.approx(router_z_loss(logits[:6], mask[:6]).item(), rel=1e-6)


def test_no_text_gives_zero_and_finite_gradients() -> None:
    mask = torch.zeros(12, dtype=torch.bool)
    logits = torch.randn(12, 4, requires_grad=True)
    probs = logits.softmax(1)
    counts = counts_of(probs.topk(2).indices, mask, 3, 4)
    assert not counts.any()
    loss = load_balance_loss(probs, counts, mask) + router_z_loss(logits, mask)
    assert loss.item() == 0.0
    (grad,) = torch.autograd.grad(loss, [logits])
    assert torch.equal(grad, torch.zeros(12, 4))


def test_balance_loss_wants_float32() -> None:
    with pytest.raises(ValueError, match="router_probs must be float32, got torch.bfloat16"):
        load_balance_loss(torch.ones(12, 4, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.float64), ALL_TEXT)


def test_router_z_loss_is_the_mean_squared_logsumexp() -> None:
    mask = torch.tensor([True, True, False])
    assert router_z_loss(torch.zeros(3, 8), mask).item() == pytest.approx(math.log(8) ** 2)
    logits = torch.tensor([[0.0, math.log(3)], [math.log(5), math.log(2)], [100.0, 100.0]])
    assert router_z_loss(logits, mask).item() == pytest.approx((math.log(4) ** 2 + math.log(7) ** 2) / 2)


def test_count_routes_equals_a_loop() -> None:
    index, group = torch.randint(4, (40,)), torch.randint(3, (40,))
    counted = torch.rand(40) < 0.5
    counts = count_routes(index, counted, group, 3, 4)
    assert counts.dtype == torch.float64
    for g in range(3):
        for e in range(4):
            assert counts[g, e] == sum(bool(counted[r]) and index[r] == e and group[r] == g for r in range(40))


def pairs(probs: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``same``, ``diff`` and the mean of ``D``, pair of tokens by pair of tokens (attentive gating, eq. of L_s)."""
    tokens, experts = probs.shape
    distance = torch.stack([torch.stack([(a - b).square().sum() for b in points]) for a in points])
    distance = distance / distance.mean()
    same = diff = torch.zeros(())
    for e in range(experts):
        for f in range(experts):
            term = (probs[:, e, None] * probs[None, :, f] * distance).sum() / tokens**2
            same, diff = (same + term / experts, diff) if e == f else (same, diff + term / (experts**2 - experts))
    return same, diff, distance.mean()


def test_similarity_equals_all_pairs_of_text() -> None:
    """Padding with far-off hidden states counts nowhere; a shift of all tokens costs no digits."""
    probs, points = torch.randn(12, 4).softmax(1).requires_grad_(), torch.randn(12, 5)
    mask = torch.arange(12) < 9
    points[9:] = 1e3
    expected = pairs(probs[:9], points[:9])[0]
    for shift in (0.0, 50.0):
        loss = sample_similarity_loss(probs, points + shift, mask)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        ours, theirs = (torch.autograd.grad(value, probs, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert not ours[9:].any()


def test_similarity_has_one_coefficient() -> None:
    """``diff = (sum D - n * same) / (n ** 2 - n)``; so the paper's two coefficients are one, and the docstring's."""
    num_experts = 4
    logits, points = torch.randn(12, num_experts, requires_grad=True), torch.randn(12, 5)
    probs = logits.softmax(1)
    same, diff, mean = pairs(probs, points)
    torch.testing.assert_close(diff, (mean - num_experts * same) / (num_experts**2 - num_experts))
    ours = sample_similarity_loss(probs, points, ALL_TEXT)
    torch.testing.assert_close(ours, same)
    (of_ours,) = torch.autograd.grad(ours, logits, retain_graph=True)
    for beta_s, beta_d in ((1.0, 0.0), (0.3, 2.0), (0.0, 0.7)):
        (theirs,) = torch.autograd.grad(beta_s * same - beta_d * diff, logits, retain_graph=True)
        torch.testing.assert_close(theirs, (beta_s + beta_d / (num_experts - 1)) * of_ours)


def test_similarity_prefers_clusters_and_knows_its_ends() -> None:
    num_experts = 3
    cluster = torch.arange(num_experts).repeat(4)
    points = torch.randn(num_experts, 5)[cluster] * 5 + torch.randn(12, 5)

    def loss(probs: Tensor, of: Tensor = points) -> float:
        return sample_similarity_loss(probs, of, ALL_TEXT).item()

    by_cluster = loss(torch.eye(num_experts)[cluster])
    by_chance = loss(torch.eye(num_experts)[cluster[torch.randperm(12)]])
    uniform = loss(torch.full((12, num_experts), 1 / num_experts))
    collapsed = loss(torch.eye(num_experts)[torch.zeros(12, dtype=torch.int64)])
    assert by_cluster < 0.3 * by_chance and by_cluster < uniform < collapsed
    assert uniform == pytest.approx(1 / num_experts**2) and collapsed == pytest.approx(1 / num_experts)
    assert loss(torch.eye(num_experts)[cluster], torch.ones(12, 5)) == 0


@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_importance_is_zero_when_even_and_the_number_of_experts_at_collapse(num_experts: int) -> None:
    even = torch.full((12, num_experts), 1 / num_experts)
    assert importance_loss(even, ALL_TEXT).item() == pytest.approx(0, abs=1e-10)
    collapsed = torch.eye(num_experts)[torch.zeros(12, dtype=torch.int64)]
    assert importance_loss(collapsed, ALL_TEXT).item() == pytest.approx(num_experts)


def test_importance_is_the_unbiased_squared_variation_of_text() -> None:
    probs, mask = torch.randn(12, 4).softmax(1), torch.arange(12) % 3 > 0
    importance = probs[mask].sum(0)
    torch.testing.assert_close(importance_loss(probs, mask), (importance.std() / importance.mean()) ** 2)
    assert importance_loss(torch.ones(12, 1), ALL_TEXT) == 0


def test_distillation_is_the_teachers_entropy_where_the_student_agrees() -> None:
    logits, mask = torch.randn(12, 3), torch.arange(12) < 7
    teacher = logits.softmax(1)
    entropy = -(teacher * teacher.log()).sum(1)[:7].mean()
    torch.testing.assert_close(distillation_loss(logits + 3, teacher, mask), entropy)
    assert distillation_loss(logits.flip(1), teacher, mask) > entropy
    assert distillation_loss(logits, teacher, mask & False) == 0
