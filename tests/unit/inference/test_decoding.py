"""Choice of tokens: candidates, draws, seeds; self-contrast against its formula, token by token."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.builders import tiny
from helpers.trained import model_of
from reference.papers import self_contrast
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.huggingface.check import our_logits
from moe_pretrain.inference.cached_decoder import CachedDecoder
from moe_pretrain.inference.decoding import Generator, Sampling, SelfContrast, contrast, filtered
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.ranks import route_by_rank
from moe_pretrain.moe.types import RoutingContext

GREEDY = Sampling(0.0, None, 1.0, 0)
STEPS = 6


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return model_of(tiny("router=top_k", "model.moe.num_experts=6"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (1, 5))


def candidates(logits: list[float], top_k: int | None, top_p: float) -> set[int]:
    """One token at a time, by the definitions."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    total, kept, mass = sum(math.exp(value) for value in logits), [], 0.0
    for token in order:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += math.exp(logits[token]) / total
    return set(kept[:top_k])


@pytest.mark.parametrize(
    "top_k,top_p", [(None, 1.0), (3, 1.0), (None, 0.6), (4, 0.7), (1, 1.0), (None, 1e-9), (99, 0.9)]
)
def test_candidates(top_k: int | None, top_p: float):
    logits = torch.randn(8, 11) * 2
    logits[0] = 0.0
    found = filtered(logits, top_k, top_p)
    for row, kept in zip(logits.double().tolist(), found, strict=True):
        assert {int(token) for token in kept.isfinite().nonzero()} == candidates(row, top_k, top_p)
    assert torch.equal(found[found.isfinite()], logits[found.isfinite()])


def drawn(model: DecoderLM, ids: Tensor, sampling: Sampling, contrast: SelfContrast | None = None) -> list[int]:
    generator, new = Generator(model, 1, 40, sampling, contrast), []
    for _ in range(STEPS):
        ids = generator.next(ids)
        new.append(int(ids))
    return new


def test_a_seed_is_a_text_and_temperature_0_the_likeliest(model: DecoderLM, ids: Tensor):
    draws = [drawn(model, ids, Sampling(1.0, None, 1.0, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    text, likeliest = ids, []
    for _ in range(STEPS):
        likeliest.append(int(our_logits(model, text)[0, -1].argmax()))
        text = torch.cat([text, torch.tensor([[likeliest[-1]]])], dim=1)
    assert drawn(model, ids, GREEDY) == likeliest == drawn(model, ids, Sampling(1.0, 1, 1.0, 5))
    assert drawn(model, ids, Sampling(1e-4, None, 1.0, 3)) == likeliest


def test_draws_follow_the_probabilities_at_the_temperature(model: DecoderLM, ids: Tensor):
    many, temperature = 20_000, 0.7
    generator = Generator(model, many, 8, Sampling(temperature, 5, 1.0, 0))
    logits = our_logits(model, ids)[0, -1] / temperature
    expected = filtered(logits, 5, 1.0).softmax(0)
    share = torch.bincount(generator.next(ids.expand(many, -1)).flatten(), minlength=64) / many
    assert (share - expected).abs().max() < 0.015 and share[expected == 0].sum() == 0


def by_hand(strong: Tensor, weak: Tensor, alpha: float, beta: float) -> list[float]:
    most = max(strong.tolist())
    return [
        (1 + beta) * s - beta * w if s >= math.log(alpha) + most else -math.inf
        for s, w in zip(strong.tolist(), weak.tolist(), strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [(1,), (2, 3)])
def test_self_contrast_is_the_formula_at_every_step(
    model: DecoderLM, ids: Tensor, ranks: tuple[int, ...], temperature: float
):
    """The weak pass is a model of its own, routed by rank, over the same text; both are divided before the cut."""
    alpha, beta, kept = 0.02, 0.7, 0
    generator = Generator(model, 1, 40, Sampling(temperature, None, 1.0, 0), SelfContrast(alpha, beta, ranks))
    text, new = ids, ids
    scale = temperature or 1.0
    for _ in range(STEPS):
        found = generator.logits(new)[0]
        strong = our_logits(model, text)[0, -1] / scale
        weak = CachedDecoder(model, 1, 40, ranks).feed(text)[0, -1] / scale
        expected = torch.tensor(by_hand(strong, weak, alpha, beta))
        kept += int(expected.isfinite().sum())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        new = found.argmax()[None, None]
        text = torch.cat([text, new], dim=1)
    assert STEPS < kept < STEPS * 64


def test_texts_and_routes_are_the_references(model: DecoderLM, ids: Tensor):
    """Greedy decoding by two models without a cache; the weak one is a model of the second-best expert."""

    def last(ranks: tuple[int, ...] | None) -> Callable[[list[int]], Tensor]:
        return lambda tokens: CachedDecoder(model, 1, 40, ranks).feed(torch.tensor([tokens]))[0, -1]

    expected = self_contrast.greedy_decode(last(None), last((1,)), ids[0].tolist(), STEPS, alpha=0.01, beta=3.0)
    assert drawn(model, ids, GREEDY, SelfContrast(0.01, 3.0, (1,))) == expected.tokens
    layer = model.moe_layers()[0]
    hidden = torch.randn(7, 16)
    for ranks in ((0, 1), (1,), (3, 0, 4)):
        context = RoutingContext(torch.ones(7, dtype=torch.bool), torch.arange(7), 1, 0, 0, ranks=ranks)
        routing = route_by_rank(layer.router, hidden, context)
        wanted = self_contrast.select_ranks((hidden @ layer.router.weight.T).softmax(dim=1), ranks)
        weights = torch.zeros(7, 6).index_put((routing.token_index, routing.expert_index), routing.weight)
        torch.testing.assert_close(weights, wanted.weights)
        gate, up = layer.experts.in_weight.chunk(2, dim=1)
        output = self_contrast.moe_layer(hidden, layer.router.weight, ranks, gate, up, layer.experts.out_weight)
        torch.testing.assert_close(layer(hidden, context, False).hidden, output, atol=1e-5, rtol=1e-4)


def test_without_strength_it_is_the_base_decoder_and_with_alpha_1_its_likeliest_token(model: DecoderLM, ids: Tensor):
    base = drawn(model, ids, GREEDY)
    assert drawn(model, ids, GREEDY, SelfContrast(0.1, 0.0, (1,))) == base
    assert drawn(model, ids, GREEDY, SelfContrast(1.0, 5.0, (1,))) == base
    others = {tuple(drawn(model, ids, GREEDY, SelfContrast(1e-6, beta, (1,)))) for beta in (0.5, 5.0, 50.0)}
    assert len(others | {tuple(base)}) > 1
    strong, weak = torch.randn(3, 9), torch.randn(3, 9)
    assert torch.equal(contrast(strong, weak, 1.0, 0.5).isfinite().sum(dim=1), torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "words,ranks,fragment",
    [
        (("router=hash",), (1,), "HashRouter orders no experts"),
        (("router=dense",), (1,), "has none to contrast"),
        (("router=top_k",), (4,), "must be at most the 4 experts"),
        (("router=top_k", "model.moe.num_experts=1", "router.top_k=1", "router.weights=raw"), (0,), "must be two"),
    ],
)
def test_no_weak_pass_is_an_error(words: tuple[str, ...], ranks: tuple[int, ...], fragment: str):
    with pytest.raises(ConfigError, match=fragment):
        Generator(model_of(tiny(*words)), 1, 8, GREEDY, SelfContrast(0.1, 0.5, ranks))


@pytest.mark.parametrize(
    "make,fragment",
    [
        (lambda: Sampling(-1.0, None, 1.0, 0), "--temperature=-1.0"),
        (lambda: Sampling(math.nan, None, 1.0, 0), "--temperature=nan"),
        (lambda: Sampling(1.0, 0, 1.0, 0), "--top-k=0"),
        (lambda: Sampling(1.0, None, 0.0, 0), "--top-p=0.0"),
        (lambda: SelfContrast(0.0, 0.5, (1,)), "--alpha=0.0"),
        (lambda: SelfContrast(0.1, -0.5, (1,)), "--beta=-0.5"),
        (lambda: SelfContrast(0.1, 0.5, (1, 1)), "--weak-ranks"),
    ],
)
def test_wrong_settings_are_named(make, fragment: str):
    with pytest.raises(ConfigError, match=fragment):
        make()
