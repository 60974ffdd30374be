"""The ReLU router against one token at a time, its loss against loops, and the coefficient that makes it sparse."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, step_use, tiny
from helpers.routing import by_token, experts_only, make_context, refusal
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.routers.relu import ReLUConfig, ReLURouter
from moe_pretrain.moe.types import ExpertShard, step_uses

TOKENS, HIDDEN, EXPERTS = 12, 8, 5
CONFIG = ReLUConfig(
    name="relu",
    target_experts=2.0,
    initial_sparsity_weight=1e-8,
    sparsity_weight_factor=1.2,
    load_balance_level="micro_batch",
)


def make_router(num_experts: int = EXPERTS, **changes: Any) -> ReLURouter:
    router = ReLURouter(replace(CONFIG, **changes), HIDDEN, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def make_layer() -> MoELayer:
    layer = build_moe_layer(experts_only(EXPERTS, 6), CONFIG, HIDDEN, 3, ExpertShard())
    assert isinstance(layer, MoELayer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def loss_by_hand(gates: Tensor, text: list[bool], sequences: int, share_of: dict[str, Any] | None = None) -> float:
    """The paper's ``1/T sum_t sum_e f_e g_te`` in loops; ``f`` of each sequence, or that of ``share_of``."""
    rows, length = gates.tolist(), len(gates) // sequences
    total = 0.0
    for first in range(0, len(rows), length):
        own = [rows[t] for t in range(first, first + length) if text[t]]
        for expert in range(EXPERTS):
            routes, tokens = sum(row[expert] > 0 for row in own), len(own)
            if share_of is not None:
                routes, tokens = share_of["routes"][expert], share_of["tokens"]
            share = EXPERTS * routes / (CONFIG.target_experts * max(tokens, 1))
            total += sum(share * row[expert] for row in own)
    return total / sum(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_token_at_a_time(dtype: torch.dtype) -> None:
    tokens = 300
    router = make_router()
    # In sixteenths every product and sum is exact, so that no processor rounds what is left of terms near 1.
    router.weight.data = (router.weight.data * 16).round() / 16
    hidden = ((torch.randn(tokens, HIDDEN) * 16).round() / 16).to(dtype)
    routing = router(hidden, make_context(tokens))
    assert routing.weight.dtype == torch.float32 and routing.routes_per_token is None
    found = by_token(routing, tokens)
    for token, row in enumerate((hidden.double() @ router.weight.double().t()).tolist()):
        assert found[token] == pytest.approx({e: z for e, z in enumerate(row) if z > 0}, rel=1e-5, abs=1e-7)
    assert {len(experts) for experts in found} == set(range(EXPERTS + 1))  # none and all, too


def test_closed_gates_are_not_dispatched() -> None:
    """A gate of exactly 0 is no route; a token without any gets exactly nothing, and no gradient."""
    layer = make_layer()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0], layer.router.weight[2, 0] = 1.0, -1.0  # the others stay at exactly 0
    hidden = torch.zeros(3, HIDDEN, requires_grad=True)
    with torch.no_grad():
        hidden[0, 0], hidden[1, 0] = 2.0, -2.0
    assert by_token(layer.router(hidden, make_context(3)), 3) == [{1: 2.0}, {2: 2.0}, {}]
    output = layer(hidden, make_context(3), False).hidden
    assert (output[:2] != 0).any(dim=1).all() and (output[2] == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    assert (gradient[:2] != 0).any(dim=1).all() and (gradient[2] == 0).all()


def test_a_micro_batch_without_a_single_route() -> None:
    """Every parameter still joins the backward, with zeros."""
    layer = make_layer()
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)
    hidden = torch.rand(TOKENS, HIDDEN, requires_grad=True)
    output = layer(hidden, make_context(TOKENS), False)
    assert output.use.tokens_per_expert.tolist() == [0.0] * EXPERTS and output.use.router_entropy == 0
    (output.hidden.sum() + output.aux["sparsity"]).backward()
    assert (output.hidden == 0).all() and output.aux["sparsity"] == 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_output_is_continuous_where_a_gate_opens() -> None:
    """What top-k cannot do: as a logit passes 0 the route appears with weight 0, and the output does not jump."""
    layer = make_layer()
    hidden = torch.randn(1, HIDDEN)
    along = hidden / hidden.square().sum()
    outputs, open_gates = [], []
    for logit in (-1e-4, 0.0, 1e-4, 1.0):
        with torch.no_grad():
            layer.router.weight[2] += (logit - layer.router.weight[2] @ hidden[0]) * along[0]
        outputs.append(layer(hidden, make_context(1), False).hidden)
        open_gates.append(2 in layer.router(hidden, make_context(1)).expert_index)
    assert open_gates[0] is False and open_gates[2:] == [True, True]
    far = float((outputs[3] - outputs[0]).norm())
    assert far > 0.1 and float((outputs[2] - outputs[0]).norm()) < 3e-4 * far


def test_gradient_of_the_weights() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context(TOKENS))
    factor = torch.randn(len(routing.weight))
    logits = hidden @ router.weight.t()
    expected = (logits[logits > 0] * factor).sum()
    for ours, theirs in zip(
        torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden]),
        torch.autograd.grad(expected, [router.weight, hidden]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("level", "sequences"), [("micro_batch", 1), ("sequence", 3)])
def test_sparsity_loss_by_hand(level: str, sequences: int) -> None:
    """Its value in loops; its gradient is that of the gates alone, with the shares constant."""
    router = make_router(load_balance_level=level)
    hidden = torch.randn(TOKENS, HIDDEN)
    text = [token % 5 != 1 for token in range(TOKENS)]
    context = make_context(TOKENS, 3, token_mask=torch.tensor(text))
    loss = router(hidden, context).aux["sparsity"]
    gates = (hidden @ router.weight.t()).relu()
    assert loss.item() == pytest.approx(loss_by_hand(gates, text, sequences), rel=1e-5)
    open_gates = (gates > 0).float() * torch.tensor(text)[:, None]
    share = torch.zeros_like(gates)
    for part in torch.arange(TOKENS).chunk(sequences):
        share[part] = EXPERTS * open_gates[part].sum(dim=0) / (2.0 * sum(text[t] for t in part.tolist()))
    # d loss / d W_e = 1/T sum_t f_e 1[g_te > 0] x_t
    (gradient,) = torch.autograd.grad(loss, router.weight)
    torch.testing.assert_close(gradient, (share * open_gates / sum(text)).t() @ hidden)


def test_sparsity_loss_is_one_per_unit_of_gates_at_the_target() -> None:
    """Even load at the target makes every share 1, so the loss is the plain L1 norm; twice the routes double it."""
    router = make_router(4, target_experts=2.0)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :4] = torch.eye(4)
    two = torch.zeros(4, HIDDEN)
    for token in range(4):
        two[token, token] = two[token, (token + 1) % 4] = 0.5
    assert router(two, make_context(4)).aux["sparsity"].item() == pytest.approx(2 * 0.5)
    assert router(torch.full((4, HIDDEN), 0.5), make_context(4)).aux["sparsity"].item() == pytest.approx(2 * 4 * 0.5)


def test_shares_of_the_global_batch() -> None:
    router = make_router(load_balance_level="global_batch")
    hidden = torch.randn(TOKENS, HIDDEN)
    everywhere = torch.tensor([7.0, 0.0, 100.0, 3.0, 30.0], dtype=torch.float64)
    asked = []

    def over_ranks(layer: int, counts: Tensor) -> Tensor:
        asked.append((layer, counts.tolist()))
        return everywhere

    routing = router(hidden, make_context(TOKENS, sum_over_global_batch=over_ranks, global_tokens=110))
    gates = (hidden @ router.weight.t()).relu()
    expected = loss_by_hand(gates, [True] * TOKENS, 1, {"routes": everywhere.tolist(), "tokens": 110})
    assert routing.aux["sparsity"].item() == pytest.approx(expected, rel=1e-5)
    assert asked == [(3, (gates > 0).sum(dim=0).double().tolist())]
    assert routing.use.tokens_per_expert.tolist() == asked[0][1]  # the statistics stay this micro-batch's
    alone = router(hidden, make_context(TOKENS)).aux["sparsity"].item()
    assert alone == pytest.approx(loss_by_hand(gates, [True] * TOKENS, 1), rel=1e-5)
    assert router.needs_global_routes and not make_router().needs_global_routes


@pytest.mark.parametrize("level", ["micro_batch", "sequence"])
def test_padding_counts_nowhere(level: str) -> None:
    router = make_router(load_balance_level=level)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    mask = torch.arange(TOKENS) % 6 < 4
    ours = router(hidden, make_context(TOKENS, 2, token_mask=mask))
    theirs = router(hidden[mask], make_context(8, 2))
    torch.testing.assert_close(ours.aux["sparsity"], theirs.aux["sparsity"])
    (gradient,) = torch.autograd.grad(ours.aux["sparsity"], hidden)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    assert torch.equal(ours.use.tokens_per_expert, theirs.use.tokens_per_expert) and ours.use.tokens == 8
    torch.testing.assert_close(ours.use.router_entropy, theirs.use.router_entropy)
    nothing = router(hidden, make_context(TOKENS, 2, token_mask=torch.zeros(TOKENS, dtype=torch.bool)))
    assert nothing.aux["sparsity"] == 0 and nothing.use.tokens == 0


def test_entropy_is_that_of_the_gates_shares() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context(TOKENS))
    total = 0.0
    for token in by_token(routing, TOKENS):
        shares = [gate / sum(token.values()) for gate in token.values()]
        total -= sum(share * math.log(share) for share in shares)
    assert routing.use.router_entropy.item() == pytest.approx(total, rel=1e-5)


def test_coefficient_moves_by_hand() -> None:
    """``1.2 ** sign((1 - k/E) - S)``: raised by more open gates than the target; sign(0) is 0."""
    router = make_router()
    assert router.aux_weights == {"sparsity": pytest.approx(1e-8, rel=1e-6)}

    def after(routes: list[float]) -> float:
        router.after_step(step_use(routes, 10))
        return router.aux_weights["sparsity"] / 1e-8

    assert after([10, 10, 1, 0, 0]) == pytest.approx(1.2, rel=1e-5)  # S = 1 - 2.1 / 5 is below 1 - 2 / 5
    assert after([10, 9, 9, 9, 9]) == pytest.approx(1.44, rel=1e-5)  # by the sign alone
    assert after([4, 4, 4, 4, 4]) == pytest.approx(1.44, rel=1e-5)
    assert after([10, 9, 0, 0, 0]) == pytest.approx(1.2, rel=1e-5)
    assert after([0, 0, 0, 0, 0]) == pytest.approx(1.0, rel=1e-5)
    assert router.sparsity_weight.dtype == torch.float32 and not router.sparsity_weight.requires_grad
    assert torch.equal(router.state_dict()["sparsity_weight"], router.sparsity_weight)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_coefficient_can_always_grow_again() -> None:
    router = make_router()
    for _ in range(700):  # 1e-8 / 1.2**700 is 0 in float32
        router.after_step(step_use([1.0, 0, 0, 0, 0], 10))
    low = router.aux_weights["sparsity"]
    assert low > 0
    router.after_step(step_use([9.0] * EXPERTS, 10))
    assert router.aux_weights["sparsity"] / low == pytest.approx(1.2, rel=1e-5)


def test_coefficient_is_one_for_all_layers() -> None:
    """Every layer moves by the mean over layers, also where its own sparsity is on the other side of the target."""
    config = tiny("router=relu", "router.target_experts=1")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    routers = [layer.router for layer in model.moe_layers()]
    with torch.no_grad():
        routers[1].weight[1:].zero_()  # one open gate at most
    batch = random_batches(config, 1)[0][0]
    output = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))
    means = [float(use.tokens_per_expert.sum() / use.tokens) for use in output.uses]
    assert means[1] < 1 < sum(means) / 2 < means[0]
    for router, use in zip(routers, step_uses(output.uses), strict=True):
        router.after_step(use)
    assert [router.aux_weights["sparsity"] for router in routers] == [pytest.approx(1.2e-8)] * 2


@pytest.mark.parametrize("training", [True, False])
def test_forward_moves_nothing(training: bool) -> None:
    router = make_router().train(training)
    hidden = torch.randn(TOKENS, HIDDEN)
    first, second = (router(hidden, make_context(TOKENS)) for _ in range(2))
    assert router.aux_weights["sparsity"] == pytest.approx(1e-8) and torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_sparsity_reaches_its_target(target: float) -> None:
    """On a toy task the mean share of closed gates comes within 0.01 of ``1 - k/E``, and load nearly even.

    The task has gates to be copied, half of them open, of one expert far more; a plain L1 norm would close the others
    first. A token's first number is 1, so that gates have a bias to close by.
    """
    num_experts, tokens, steps = 8, 512, 400
    router = make_router(num_experts, target_experts=target)
    teacher = torch.randn(num_experts, HIDDEN)
    teacher[:, 0] = 0.0
    teacher[3, 0] = 3.0
    optimizer = torch.optim.SGD([router.weight], lr=0.2)
    sparsity, loads = [], []
    for _ in range(steps):
        hidden = torch.randn(tokens, HIDDEN)
        hidden[:, 0] = 1.0
        wanted = (hidden @ teacher.t()).relu()
        routing = router(hidden, make_context(tokens))
        gates = torch.zeros(tokens, num_experts).index_put((routing.token_index, routing.expert_index), routing.weight)
        loss = (gates - wanted).square().sum(dim=1).mean()
        (loss + router.aux_weights["sparsity"] * routing.aux["sparsity"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = routing.use.tokens_per_expert
        router.after_step(step_use(counts, tokens))
        sparsity.append(1 - float(counts.sum()) / (tokens * num_experts))
        loads.append(float(counts.max() / counts.mean()))

    assert abs(sparsity[0] - (1 - target / num_experts)) > 0.1
    assert abs(sum(sparsity[-100:]) / 100 - (1 - target / num_experts)) < 0.01
    assert sum(loads[-100:]) / 100 < 2.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_experts": 0.0}, "router.target_experts=0.0 must be positive"),
        ({"target_experts": math.nan}, "router.target_experts=nan must be finite"),
        ({"target_experts": 5.5}, "router.target_experts=5.5 must be at most model.moe.num_experts=5"),
        ({"initial_sparsity_weight": 0.0}, "router.initial_sparsity_weight=0.0 must be positive"),
        ({"sparsity_weight_factor": 1.0}, "router.sparsity_weight_factor=1.0 must be above 1"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


def test_wrong_override_gets_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("router=relu", "router.target_experts=9")
    assert "router.target_experts=9" in str(caught.value) and "\n" not in str(caught.value)
