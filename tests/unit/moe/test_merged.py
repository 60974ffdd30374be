"""Merged experts: SMEAR and Lory beside the papers' loops in fp64, causality, slices of the width, what they cost."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, tiny
from helpers.cuda_branches import Waits, says_cuda
from helpers.routing import make_context, refusal
from reference.papers import merged_experts as paper
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.inference.cached_decoder import CachedDecoder, check_generates
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.experts import merged
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.merged_layer import MergedLayer
from moe_pretrain.moe.segments import cut, segment_means
from moe_pretrain.moe.types import ExpertShard, Merging, RoutingContext, StepUse

HIDDEN, EXPERTS, WIDTH, ROW = 8, 3, 6, 10
DOCUMENTS = [[0] * 10, [0] * 3 + [1] * 7, [0, 0, 0, 0, 1, 2, 2, -1, -1, -1]]
"""Of the tokens of three rows; the last ends in padding."""


def make_layer(router: str, *overrides: str, shared: bool = False) -> MergedLayer:
    """A layer with float32 weights that are all visible in its output."""
    words = [f"router={router}", f"model.moe.num_experts={EXPERTS}", f"model.moe.expert_hidden_size={WIDTH}"]
    words += [f"model.moe.num_shared_experts={int(shared)}", "model.moe.shared_expert_hidden_size=4", *overrides]
    config = load(words)
    layer = build_moe_layer(config.model.moe, config.router, HIDDEN, 0, ExpertShard())
    assert isinstance(layer, MergedLayer)
    drawn = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=drawn)
    return layer


def context(documents: list[list[int]] = DOCUMENTS) -> RoutingContext:
    ids = torch.tensor(documents).flatten()
    return replace(make_context(len(ids), len(documents)), document_ids=ids, token_mask=ids >= 0)


def drawn(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stretches(documents: list[list[int]]) -> list[slice]:
    """Tokens of each document of each row, padding among them as one, in order."""
    found, first = [], 0
    flat = [(row, document) for row, own in enumerate(documents) for document in own]
    for place in range(1, len(flat) + 1):
        if place == len(flat) or flat[place] != flat[first]:
            found.append(slice(first, place))
            first = place
    return found


def weights_of(experts: MergedExperts) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up ``[experts, width, hidden]`` and output ``[experts, hidden, width]``, fp64, with gradient to ours."""
    stacked = experts.in_weight.double()
    return (
        stacked[:, 0].transpose(0, 1),
        stacked[:, 1].transpose(0, 1),
        experts.out_weight.double().permute(1, 2, 0),
    )


def compare_with(layer: MergedLayer, reference: Any) -> None:
    """Output and all gradients beside ``reference(document's tokens [1, n, hidden], their place)``."""
    hidden = drawn(len(DOCUMENTS) * ROW).requires_grad_()
    output = layer(hidden, context(), False).hidden
    wide = hidden.double()
    expected = torch.cat([reference(wide[part][None], part).y[0] for part in stretches(DOCUMENTS)])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = drawn(len(hidden), seed=5)
    wanted = {"input": hidden, **dict(layer.named_parameters())}
    ours = torch.autograd.grad((output * upstream).sum(), list(wanted.values()))
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), list(wanted.values()))
    for name, one, other in zip(wanted, ours, theirs, strict=True):
        assert other.any(), f"{name} has no gradient to compare"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("chunk", [1, 2**24], ids=["one network at a time", "all"])
@pytest.mark.parametrize("first", ["prior", "own_stop_gradient"])
def test_lory_is_the_reference_s(first: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merged, "_CHUNK_NUMBERS", chunk)
    layer = make_layer("lory", "router.segment_tokens=3", f"router.first_segment={first}")
    router, weights = layer.router, weights_of(layer.experts)
    prior = None if router.prior is None else router.prior.double()
    compare_with(layer, lambda x, part: paper.lory(x, router.weight.double(), *weights, 3, first, prior))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_smear_is_the_reference_s(dropout: float):
    layer = make_layer("smear", f"router.expert_dropout={dropout}", "router.router_gain=0.5")
    router, weights = layer.router, weights_of(layer.experts)
    merging = router(drawn(len(DOCUMENTS) * ROW), context())
    kept = {part.start: merging.mixture[index] > 1e-6 for index, part in enumerate(stretches(DOCUMENTS))}
    assert all(keep.all() for keep in kept.values()) == (dropout == 0)

    def reference(x: Tensor, part: slice) -> Any:
        keep = kept[part.start][None]
        own = router.weight.double(), router.bias.double()
        return paper.smear(x, *own, *weights, router_gain=0.5, keep=keep if dropout else None)

    compare_with(layer, reference)


def test_smear_evaluates_by_what_came_before():
    """A segment's mixture is that of the mean of its document up to there; the first one's is the bias alone."""
    layer = make_layer("smear", "router.evaluation_segment_tokens=3", "router.router_gain=0.5").eval()
    hidden, router = drawn(len(DOCUMENTS) * ROW), layer.router
    weight = router(hidden, context()).weight.view(-1, EXPERTS)
    for part in stretches(DOCUMENTS):
        for place in range(part.start, part.stop):
            begin = part.start + (place - part.start) // 3 * 3
            if begin == part.start:
                expected = router.bias.softmax(dim=0)
            else:
                before = hidden[part.start : begin][None].double()
                own = router.weight.double(), router.bias.double()
                expected = paper.smear(before, *own, *weights_of(layer.experts), router_gain=0.5).mixture[0]
            torch.testing.assert_close(weight[place].double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_expert_dropout_depends_on_nothing_but_its_keys():
    layer = make_layer("smear", "router.expert_dropout=0.5")
    hidden, base = drawn(len(DOCUMENTS) * ROW), context()

    def kept(step: int = 0, rows: slice = slice(0, 3)) -> list[list[bool]]:
        tokens = slice(rows.start * ROW, rows.stop * ROW)
        own = replace(
            base,
            step=step,
            num_sequences=rows.stop - rows.start,
            document_ids=base.document_ids[tokens],
            token_mask=base.token_mask[tokens],
            token_position=base.token_position[tokens],
        )
        return (layer.router(hidden[tokens], own).mixture > 1e-6).tolist()

    assert kept() == kept() and kept() != kept(step=1)
    assert kept(rows=slice(0, 1)) + kept(rows=slice(1, 3)) == kept()


# Merging.


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_a_mixture_of_one_expert_is_that_expert(expert: int):
    layer = make_layer("lory")
    hidden = drawn(7)
    mixture = torch.eye(EXPERTS)[expert][None]
    gate, up, out = (weight.float()[expert] for weight in weights_of(layer.experts))
    expected = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ out.T
    torch.testing.assert_close(layer.experts(hidden, mixture, torch.tensor([7])), expected)


def test_merged_experts_are_no_ensemble_unless_they_are_equal():
    layer = make_layer("lory")
    hidden, mixture = drawn(7), torch.tensor([[0.5, 0.3, 0.2]])
    lengths = torch.tensor([7])

    def ensemble() -> Tensor:
        alone = [layer.experts(hidden, one[None], lengths) for one in torch.eye(EXPERTS)]
        return sum(share * output for share, output in zip(mixture[0], alone, strict=True))

    merged_output = layer.experts(hidden, mixture, lengths)
    assert float((merged_output - ensemble()).detach().norm() / merged_output.detach().norm()) > 0.1
    with torch.no_grad():
        layer.experts.in_weight.copy_(layer.experts.in_weight[:, :, :1].expand_as(layer.experts.in_weight))
        layer.experts.out_weight.copy_(layer.experts.out_weight[:, :1].expand_as(layer.experts.out_weight))
    torch.testing.assert_close(layer.experts(hidden, mixture, lengths), ensemble())


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_slices_of_the_width_add_up(ranks: int):
    """Outputs of all ranks' slices sum to the whole's, and their gradients are slices of the whole's."""
    whole = make_layer("lory").experts
    hidden = drawn(9).requires_grad_()
    mixture = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], requires_grad=True)
    lengths = torch.tensor([5, 4])
    slices = [MergedExperts(EXPERTS, HIDDEN, WIDTH, ExpertShard(rank, ranks)) for rank in range(ranks)]
    for own, rank in zip(slices, range(ranks), strict=True):
        units = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
        assert list(own.units) == list(range(units.start, units.stop))
        own.in_weight.data, own.out_weight.data = whole.in_weight.data[units], whole.out_weight.data[units]
    output = whole(hidden, mixture, lengths)
    total = sum(own(hidden, mixture, lengths) for own in slices)
    torch.testing.assert_close(total, output)
    upstream = drawn(9, seed=3)
    expected = torch.autograd.grad((output * upstream).sum(), [hidden, mixture, whole.in_weight, whole.out_weight])
    parts = [*(own.in_weight for own in slices), *(own.out_weight for own in slices)]
    found = torch.autograd.grad((total * upstream).sum(), [hidden, mixture, *parts])
    joined = [*found[:2], torch.cat(found[2 : 2 + ranks]), torch.cat(found[2 + ranks :])]
    for one, other in zip(joined, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_starts_with_its_slice_of_the_same_experts(ranks: int):
    """And the evenly merged network starts with the spread of a single one."""
    config = tiny("router=lory", "router.segment_tokens=4")
    whole = DecoderLM(config.model, config.router, ExpertShard())
    initialise(whole, 0)
    parts = [DecoderLM(config.model, config.router, ExpertShard(rank, ranks)) for rank in range(ranks)]
    for part in parts:
        initialise(part, 0)
    for name in ("in_weight", "out_weight"):
        weights = [getattr(model.moe_layers()[0].experts, name) for model in (whole, *parts)]
        assert torch.equal(weights[0], torch.cat(weights[1:]))
    assert whole.moe_layers()[0].experts.in_weight.mean(dim=2).std().item() == pytest.approx(0.2, rel=0.1)


# Segments.


def test_segments_begin_with_documents_and_never_cross_them():
    segments = cut(context(), 4)
    expected = [4, 4, 2, 3, 4, 3, 4, 1, 2, 3]
    assert segments.lengths.tolist() == expected
    assert segments.continues.tolist() == [False, True, True, False, False, True, False, False, False, False]
    assert segments.of_token.tolist() == [index for index, length in enumerate(expected) for _ in range(length)]
    hidden = drawn(30).requires_grad_()
    means = segment_means(hidden, segments)
    torch.testing.assert_close(means, torch.stack([part.mean(dim=0) for part in hidden.split(expected)]))
    assert torch.autograd.gradcheck(lambda x: segment_means(x, segments), hidden, eps=1e-2, atol=1e-3)
    assert cut(context(), None).lengths.tolist() == [part.stop - part.start for part in stretches(DOCUMENTS)]


@pytest.mark.parametrize("segment_tokens", [None, 1, 3, 4, 100])
def test_segments_are_the_same_where_the_host_knows_the_documents(segment_tokens: int | None):
    """And no device is read there: lists on the host are all that says where segments end."""
    read, known = (
        replace(context(), document_lengths=lengths)
        for lengths in (None, [part.stop - part.start for part in stretches(DOCUMENTS)])
    )
    expected = cut(read, segment_tokens)
    with says_cuda(), Waits() as waits:
        found = cut(known, segment_tokens)
    assert not waits.found
    assert found.ends == expected.ends == expected.lengths.cumsum(0).tolist()
    for name in ("of_token", "lengths", "continues"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


# Causality.


def outputs_moved(layer: MergedLayer, token: int) -> list[int]:
    """Tokens of one row, a document, whose output changes with the input of ``token``."""
    hidden, own = drawn(ROW), context([[0] * ROW])
    other = hidden.clone()
    other[token] += drawn(1, seed=8)[0]
    with torch.no_grad():
        before, after = (layer(given, own, False).hidden for given in (hidden, other))
    return ((before - after).abs().amax(dim=1) > 1e-7).nonzero()[:, 0].tolist()


def test_lory_with_a_prior_never_looks_back():
    layer = make_layer("lory", "router.segment_tokens=3")
    for token in range(ROW):
        # Itself, and all of the next segment.
        after = range((token // 3 + 1) * 3, min(ROW, (token // 3 + 2) * 3))
        assert outputs_moved(layer, token) == [token, *after]


def test_lory_as_published_looks_back_within_the_first_segment_and_says_so():
    layer = make_layer("lory", "router.segment_tokens=3", "router.first_segment=own_stop_gradient")
    assert outputs_moved(layer, 2) == [0, 1, 2, 3, 4, 5]
    assert outputs_moved(layer, 4) == [4, 6, 7, 8]
    assert not layer.router.causal_in_training and layer.router.causal_in_evaluation
    assert outputs_moved(layer.eval(), 2) == [2, 3, 4, 5]


def test_smear_looks_back_in_training_alone_and_says_so():
    layer = make_layer("smear", "router.evaluation_segment_tokens=4", "router.expert_dropout=0")
    assert outputs_moved(layer, 9) == list(range(ROW))
    assert not layer.router.causal_in_training and layer.router.causal_in_evaluation
    assert outputs_moved(layer.eval(), 5) == [5, 8, 9]


# In the model.


def model_of(*overrides: str) -> tuple[Any, DecoderLM, Any]:
    config = tiny(*overrides)
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    return config, model, random_batches(config, 1)[0][0]


def run(model: DecoderLM, batch: Any) -> Any:
    return model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))


@pytest.mark.parametrize("router", [("lory", "router.segment_tokens=3"), ("smear",)], ids=lambda words: words[0])
def test_every_expert_and_the_router_learn_in_every_step(router: tuple[str, ...]):
    _, model, batch = model_of(f"router={router[0]}", *router[1:])
    output = run(model, batch)
    output.loss_sum.backward()
    for layer in model.moe_layers():
        by_expert = (
            layer.experts.in_weight.grad.abs().amax(dim=(0, 1, 3)),
            layer.experts.out_weight.grad.abs().amax((0, 2)),
        )
        assert all(bool((largest > 0).all()) for largest in by_expert)
        assert all(bool(parameter.grad.any()) for parameter in layer.router.parameters())


def test_statistics_say_how_even_and_how_long_the_merges_are():
    _, model, batch = model_of("router=lory", "router.segment_tokens=3")
    with recorded_routings(model) as routings:
        uses = run(model, batch).uses
    text = batch.document_ids >= 0
    for routing, use in zip(routings, uses, strict=True):
        assert isinstance(routing, Merging)
        tokens = float(text.sum())
        assert float(use.tokens_per_expert.sum()) == pytest.approx(tokens)
        mixture = routing.weight.detach().view(*text.shape, -1)[text].double()
        assert float(use.router_entropy) == pytest.approx(float(-(mixture * mixture.log()).sum()))
        merges = cut(context_of(batch), 3)
        of_text = int(text.flatten()[merges.lengths.cumsum(0) - 1].sum())
        assert use.sums.tolist() == [of_text]
        step = StepUse(use.tokens_per_expert, int(tokens), 1.0, use.sums)
        assert model.moe_layers()[0].router.metrics(step) == {"tokens_per_merge": tokens / of_text}


@pytest.mark.parametrize(
    ("router", "networks"), [(("lory", "router.segment_tokens=4"), 3), (("smear",), 1)], ids=["lory", "smear"]
)
def test_training_flops_are_one_network_and_its_merging(router: tuple[str, ...], networks: int):
    """Beside a counter on forward and backward passes over rows of one document; merged once more in backward."""
    config, model, batch = model_of(f"router={router[0]}", *router[1:])
    batch = replace(batch, document_ids=torch.zeros_like(batch.document_ids))
    size = model_size(config.model, config.router)
    tokens = batch.input_ids.numel()
    with FlopCounterMode(display=False) as counter:
        run(model, batch).loss_sum.backward()
    products = counter.get_flop_counts()["Global"]
    counted = (products[torch.ops.aten.mm] + products.get(torch.ops.aten.addmm, 0)) / tokens
    layers, experts, width, inner = 2, 4, 16, 20
    merging = 2.0 * layers * experts * (3 * width * inner + width) * networks / batch.input_ids.shape[1]
    assert size.merging_flops_per_token == pytest.approx(merging)
    again = 2.0 * layers * experts * 3 * width * inner * networks / batch.input_ids.shape[1]
    assert counted == pytest.approx(size.training_flops_per_token - 3 * size.attention_score_flops + again)
    assert size.with_tokens_per_merge(2.0).merging_flops_per_token == pytest.approx(
        merging * batch.input_ids.shape[1] / networks / 2
    )


# Refusals.


def test_wrong_values_are_refused_in_one_line():
    lory, smear = (load([f"router={name}"]).router for name in ("lory", "smear"))
    assert "router.segment_tokens=256 must be below model.sequence_length=256" in refusal(lory, 8, segment_tokens=256)
    assert "model.moe.num_experts=1 must be at least 2 for router=lory" in refusal(lory, 1)
    assert "router.expert_dropout=1 must be below 1" in refusal(smear, 8, expert_dropout=1)
    assert "router.first_segment" in refusal(lory, 8, first_segment="own")
    assert asdict(lory)["first_segment"] == "prior"
    for words, complaint in (
        (["combine=orthogonal"], "router=lory, which merges experts instead of their outputs"),
        (
            ["experts=zero_computation"],
            "must be another with router=lory, which merges parameters, and these have none",
        ),
        (["model.moe.gate_rank=4"], "model.moe.gate_rank=4 must be null with router=lory"),
        (["model.init=mup"], "model.init=mup must be normal or width_aware with router=lory"),
    ):
        with pytest.raises(ValueError, match=complaint):
            load(["router=lory", *words])


@pytest.mark.parametrize("router", ["lory", "smear"])
def test_text_is_generated_but_not_contrasted(router: str):
    config, model, _ = model_of(f"router={router}", *(["router.segment_tokens=4"] if router == "lory" else []))
    assert ("come before them" in (check_generates(model, config.router.name) or "")) == (router == "smear")
    with pytest.raises(ValueError, match="there is no second-best one"):
        CachedDecoder(model, 1, 1, (1,))


def test_ranks_share_the_width_and_not_the_experts():
    words = ["router=lory", "model.moe.num_experts=3", "parallel.processes=2", "parallel.expert_parallel_size=2"]
    words += ["engine.device=cpu", "tokenizer=pretrained", "tokenizer.path=unused"]
    preflight(load(words), 2)
    with pytest.raises(ValueError, match=r"must divide model.moe.expert_hidden_size=255; valid: \[1\]"):
        preflight(load([*words, "model.moe.expert_hidden_size=255"]), 2)
    elastic = ["engine.determinism=elastic", "batch.micro_batch_size=2", "engine.dtype=float32"]
    with pytest.raises(ValueError, match="router=lory must be another with engine.determinism=elastic"):
        preflight(load([*words, *elastic]), 2)
