"""THOR: draws that are a function of their keys, two passes with a consistency loss, and what both cost."""

import math
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, tiny
from helpers.routing import make_context, refusal
from reference.papers import thor as paper
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss
from moe_pretrain.model.cross_entropy import IGNORE_INDEX, chunked_cross_entropy, two_pass_losses
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.routers.thor import ThorConfig, ThorRouter
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.plan.cost import extra_forward

HIDDEN, EXPERTS = 8, 4


def make_router(draw: str = "token", layer: int = 0, experts: int = EXPERTS) -> ThorRouter:
    return ThorRouter(ThorConfig(name="thor", draw=draw, consistency_weight=5.0), experts, layer)


def drawn(router: ThorRouter, tokens: int = 64, rows: int = 4, **changes: Any) -> list[int]:
    """Expert of every token; ``changes`` of the context."""
    context = make_context(tokens, rows)
    context = type(context)(**{**vars(context), **changes})
    return router(torch.zeros(tokens, HIDDEN), context).expert_index.tolist()


def test_a_draw_is_a_function_of_its_keys():
    router = make_router()
    base = drawn(router)
    assert base == drawn(make_router())
    others = [drawn(router, pass_index=1), drawn(router, step=1), drawn(router, seed=1), drawn(make_router(layer=1))]
    others.append(drawn(router, token_position=torch.arange(64) + 64))
    assert all(base != other for other in others) and len({tuple(other) for other in others}) == len(others)


def test_draws_do_not_depend_on_the_cut():
    """The same places in the run, whatever shares their micro-batch."""
    router, places = make_router(), torch.arange(64)
    parts = [drawn(router, 16, 1, token_position=places[first : first + 16]) for first in range(0, 64, 16)]
    assert sum(parts, []) == drawn(router, token_position=places)


@pytest.mark.parametrize("experts", [2, 5, 64])
def test_load_is_even_but_for_chance(experts: int):
    tokens = 64 * 256
    routing = make_router(experts=experts)(torch.zeros(tokens, HIDDEN), make_context(tokens, 64))
    mean = tokens / experts
    assert float((routing.use.tokens_per_expert - mean).abs().max()) < 5 * math.sqrt(mean)
    assert routing.use.tokens_per_expert.sum() == tokens and routing.weight.eq(1).all()


def test_sequences_and_batches_share_their_draw():
    rows = torch.tensor(drawn(make_router("sequence", experts=64), 256, 16)).view(16, -1)
    assert (rows == rows[:, :1]).all() and len(rows[:, 0].unique()) > 4
    draws = {tuple(drawn(make_router("batch", experts=64), step=step)) for step in range(8)}
    assert all(len(set(draw)) == 1 for draw in draws) and len(draws) > 3


def test_evaluation_draws_by_place_in_the_row():
    router = make_router().eval()
    rows = torch.tensor(drawn(router)).view(4, -1)
    assert (rows == rows[:1]).all() and len(rows[0].unique()) == EXPERTS
    assert drawn(router) == drawn(router, seed=9, step=3, token_position=torch.arange(64) * 7, pass_index=1)
    assert drawn(router) != drawn(make_router(layer=1).eval())
    # Places go on where the tokens before are not there, as when text is generated.
    assert drawn(router, 4, 1, first_place=12) == rows[0, 12:].tolist()


def test_one_expert_is_refused():
    config = ThorConfig(name="thor", draw="token", consistency_weight=5.0)
    assert "model.moe.num_experts=1 must be at least 2 for router=thor" in refusal(config, 1)
    assert "router.draw" in refusal(config, 4, draw="batches")
    assert "router.consistency_weight=-1" in refusal(config, 4, consistency_weight=-1)


# The losses.

TOKENS, VOCAB = 23, 37


def logits_parts(
    dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of both passes, head, labels of which some are not counted, text of which some is padding."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    head = scale * torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::5] = IGNORE_INDEX
    text = torch.arange(TOKENS) < 19
    labels[~text] = IGNORE_INDEX
    return *(part.to(dtype).requires_grad_() for part in (first, second, head)), labels, text


@pytest.mark.parametrize("chunk", [1, 12, 4096])
def test_chunked_losses_are_the_reference_s(chunk: int):
    """Both sums, and gradients of both passes' hidden states and of the head, at any weight and any chunk."""
    first, second, head, labels, text = logits_parts()
    cross_entropy, divergence = two_pass_losses(first, second, head, labels, text, chunk)
    wide = [part.detach().double().requires_grad_() for part in (first, second, head)]
    logits = [hidden @ wide[2].T for hidden in wide[:2]]
    counted = labels != IGNORE_INDEX
    of_labels = paper.two_pass_loss(*logits, labels.clamp(min=0), 0.0, counted)
    of_text = paper.two_pass_loss(*logits, labels.clamp(min=0), 0.0, text)
    expected = (of_labels.ce_first + of_labels.ce_second) / 2, of_text.consistency
    torch.testing.assert_close(cross_entropy.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(divergence.double(), expected[1], rtol=1e-6, atol=1e-6)
    for weights in ((2.0, 0.0), (0.0, 1.0), (2.0, 5.0)):
        total = weights[0] * cross_entropy + weights[1] * divergence
        ours = torch.autograd.grad(total, (first, second, head), retain_graph=True)
        theirs = torch.autograd.grad(weights[0] * expected[0] + weights[1] * expected[1], wide, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_the_same_pass_twice_has_no_divergence_and_the_loss_of_one():
    first, _, head, labels, text = logits_parts()
    cross_entropy, divergence = two_pass_losses(first, first, head, labels, text, 8)
    assert float(divergence) == 0
    torch.testing.assert_close(cross_entropy, chunked_cross_entropy(first, head, labels, 8))


def test_losses_are_finite_where_probabilities_vanish():
    """Logits hundreds apart: ``log(softmax)`` would be -inf, and 0 times that is not a number."""
    first, second, head, labels, text = logits_parts(scale=300.0)
    losses = two_pass_losses(first, second, head, labels, text, 8)
    gradients = torch.autograd.grad(losses[0] + losses[1], (first, second, head))
    assert all(value.isfinite().all() for value in (*losses, *gradients))
    assert (torch.softmax(first @ head.T, dim=1) == 0).any()


def test_bfloat16_hidden_states_get_bfloat16_gradients():
    first, second, head, labels, text = logits_parts(torch.bfloat16)
    total = sum(two_pass_losses(first, second, head, labels, text, 8))
    exact = [part.detach().float().requires_grad_() for part in (first, second, head)]
    expected = torch.autograd.grad(sum(two_pass_losses(*exact, labels, text, 8)), exact)
    for one, other in zip(torch.autograd.grad(total, (first, second, head)), expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other).norm() / other.norm()) < 0.02


# The model.


def two_pass_model(*overrides: str) -> tuple[Any, DecoderLM, Any]:
    config = tiny("router=thor", *overrides)
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    return config, model, random_batches(config, 1)[0][0]


def run(model: DecoderLM, batch: Any) -> Any:
    return model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))


def objective(model: DecoderLM, batch: Any) -> Tensor:
    tokens = int((batch.document_ids >= 0).sum())
    return micro_batch_loss(
        run(model, batch), model.aux_weights, tokens, GlobalCounts(batch.num_valid_labels(), tokens)
    )


def test_without_consistency_the_objective_is_the_sum_of_both_passes():
    """alpha = 0: loss and gradients are those of one run for each pass, added up; what is logged is the mean."""
    _, model, batch = two_pass_model("router.consistency_weight=0")
    parameters = list(model.parameters())
    loss = objective(model, batch)
    ours = torch.autograd.grad(loss, parameters)
    single = []
    for index in range(2):
        context = type(context_of(batch))(**{**vars(context_of(batch)), "pass_index": index})
        hidden, _ = model._trunk(batch.input_ids, batch.document_ids, batch.position_ids, context)
        single.append(chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.labels.flatten(), 7))
    total = sum(single) / batch.num_valid_labels()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(run(model, batch).loss_sum, sum(single) / 2)
    for one, other in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert single[0] != single[1]


def test_equal_experts_are_consistent():
    _, model, batch = two_pass_model()
    for layer in model.moe_layers():
        for weight in layer.experts.parameters():
            weight.data = weight.data[:1].expand_as(weight).clone()
    assert float(run(model, batch).aux["consistency"]) < 1e-10
    _, other, _ = two_pass_model()
    assert float(run(other, batch).aux["consistency"]) > 1e-4


def test_statistics_count_a_token_once():
    _, model, batch = two_pass_model()
    with recorded_routings(model) as routings:
        uses = run(model, batch).uses
    tokens = int((batch.document_ids >= 0).sum())
    assert len(routings) == 2 * len(uses)
    for layer, use in enumerate(uses):
        assert float(use.tokens) == tokens == float(use.tokens_per_expert.sum())
        passes = [routings[layer].use, routings[layer + len(uses)].use]
        assert not torch.equal(passes[0].tokens_per_expert, passes[1].tokens_per_expert)
        mean = (passes[0].tokens_per_expert + passes[1].tokens_per_expert) / 2
        assert torch.equal(use.tokens_per_expert, mean)


def test_evaluation_is_one_pass():
    _, model, batch = two_pass_model()
    with recorded_routings(model.eval()) as routings:
        output = run(model, batch)
    assert len(routings) == len(output.uses) == 2 and output.aux == {} and output.num_passes == 1


def test_the_layer_is_the_reference_s():
    """Output and every gradient of a layer beside the paper's loops in fp64."""
    config = load(["router=thor", f"model.moe.num_experts={EXPERTS}", "model.moe.expert_hidden_size=6"])
    layer = build_moe_layer(config.model.moe, config.router, HIDDEN, 0, ExpertShard())
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(12, HIDDEN, generator=generator).requires_grad_()
    output = layer(hidden, make_context(12), False).hidden
    expert = layer.router(hidden, make_context(12)).expert_index
    gate, up = layer.experts.in_weight.double().chunk(2, dim=1)
    expected, _ = paper.forward(hidden.double(), expert, gate, up, layer.experts.out_weight.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(12, HIDDEN, generator=generator)
    wanted = [hidden, *layer.parameters()]
    ours = torch.autograd.grad((output * upstream).sum(), wanted)
    for one, other in zip(ours, torch.autograd.grad((expected * upstream.double()).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_training_flops_are_those_of_both_passes():
    """Per unique token: a counter on a forward and backward pass, which makes both passes' logits once more."""
    config, model, batch = two_pass_model("model.tie_embeddings=false")
    size = model_size(config.model, config.router)
    with FlopCounterMode(display=False) as counter:
        objective(model, batch).backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / batch.input_ids.numel()
    again = extra_forward(config, size, plan_run(config, 1).batches)
    assert again == 2 * 2.0 * size.head_matmul
    # Scores are no plain products, and the documents of a row have fewer than a full row, as is planned.
    scores = 2 * 3 * size.attention_score_flops
    assert counted == pytest.approx(size.training_flops_per_token - scores + again)
    assert size.training_flops_per_token == pytest.approx(6 * size.forward_flops_per_token)
