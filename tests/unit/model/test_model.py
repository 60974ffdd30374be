import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moe_pretrain.config.load import load
from moe_pretrain.model.attention import _visible, attend, document_mask
from moe_pretrain.model.cross_entropy import IGNORE_INDEX, chunked_cross_entropy
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.types import ExpertShard, RoutingContext

SMALL = [
    "model.vocab_size=61",
    "tokenizer.kind=pretrained",
    "tokenizer.path=x",
    "model.sequence_length=12",
    "model.num_layers=3",
    "model.hidden_size=24",
    "model.num_heads=4",
    "model.num_key_value_heads=2",
    "model.ffn_hidden_size=20",
    "model.moe.num_experts=4",
    "model.moe.expert_hidden_size=16",
    "model.moe.num_shared_experts=1",
    "model.moe.shared_expert_hidden_size=8",
    "model.moe.num_leading_dense_layers=1",
    "model.cross_entropy_chunk_tokens=7",
    "model.init=normal",
    "model.init_std=0.3",
]


def build(*more: str) -> DecoderLM:
    config = load([*SMALL, *more])
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=3)
    return model


def inputs(rows: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RoutingContext]:
    ids = torch.randint(0, 61, (rows, length))
    documents = torch.zeros(rows, length, dtype=torch.long)
    documents[0, 5:] = 1
    documents[-1, 2:9] = 1
    documents[-1, 9:] = 2
    positions = torch.arange(length).expand(rows, length).clone()
    for row in range(rows):
        for document in documents[row].unique():
            at = documents[row] == document
            positions[row, at] -= positions[row, at].min()
    return ids, documents, positions, context(rows, length)


def context(rows: int, length: int) -> RoutingContext:
    mask = torch.ones(rows * length, dtype=torch.bool)
    ids = torch.arange(rows * length) % 61
    return RoutingContext(mask, torch.arange(rows * length), rows, seed=0, step=0, token_ids=ids)


@pytest.mark.parametrize("training", [True, False])
def test_future_tokens_change_nothing(training: bool):
    """Known defect C28, in training and in evaluation."""
    model = build().train(training)
    ids, documents, positions, routing = inputs()
    before = model.logits(ids, documents, positions, routing)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    after = model.logits(changed, documents, positions, routing)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_packed_documents_equal_documents_alone():
    """Known defect C40."""
    model = build().eval()
    ids, documents, positions, routing = inputs()
    packed = model.logits(ids, documents, positions, routing)
    for row in range(2):
        for document in documents[row].unique():
            at = documents[row] == document
            alone = ids[row, at][None]
            length = alone.shape[1]
            zeros, places = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
            expected = model.logits(alone, zeros, places, context(1, length))[0]
            torch.testing.assert_close(packed[row, at], expected, atol=2e-5, rtol=1e-5)


def explicit_attention(query, key, value, documents):
    """Softmax over allowed keys, written out."""
    heads_per_key = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for batch, head, place in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        allowed = [k for k in range(place + 1) if documents[batch, k] == documents[batch, place]]
        keys = key[batch, head // heads_per_key, allowed]
        scores = keys @ query[batch, head, place] / query.shape[-1] ** 0.5
        out[batch, head, place] = scores.softmax(0) @ value[batch, head // heads_per_key, allowed]
    return out


def test_attention_equals_explicit_softmax():
    _, documents, _, _ = inputs()
    query, key, value = torch.randn(2, 4, 12, 6), torch.randn(2, 2, 12, 6), torch.randn(2, 2, 12, 6)
    expected = explicit_attention(query, key, value, documents)
    torch.testing.assert_close(attend(query, key, value, document_mask(documents)), expected)


def test_rows_of_one_document_are_attended_together(monkeypatch: pytest.MonkeyPatch):
    """And the others document by document, all of them in their places."""
    lengths = [[12], [12], [5, 7], [12], [3, 3, 6], [12]]
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    query, key, value = torch.randn(6, 4, 12, 6), torch.randn(6, 2, 12, 6), torch.randn(6, 2, 12, 6)
    calls, sdpa = [], functional.scaled_dot_product_attention
    noted = lambda query, *others, **words: calls.append(tuple(query.shape)) or sdpa(query, *others, **words)  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    found = attend(query, key, value, document_mask(documents))
    torch.testing.assert_close(found, explicit_attention(query, key, value, documents))
    assert [(shape[0], shape[2]) for shape in calls] == [
        (2, 12),
        (1, 5),
        (1, 7),
        (1, 12),
        (1, 3),
        (1, 3),
        (1, 6),
        (1, 12),
    ]


def test_flex_attention_mask_is_the_same_rule():
    """The CUDA path's mask function, on the CPU through dense SDPA and FlexAttention's forward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, documents, _, _ = inputs()
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    block_mask = create_block_mask(_visible(documents), 2, None, 12, 12, device="cpu")
    flex = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(flex, attend(query, key, value, document_mask(documents)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [5, 23, 100])
def test_chunked_cross_entropy_equals_torch(chunk: int):
    labels = torch.randint(0, 31, (23,))
    labels[[0, 7, 22]] = IGNORE_INDEX
    results = []
    for chunked in (True, False):
        torch.manual_seed(5)
        hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
        if chunked:
            loss = chunked_cross_entropy(hidden, weight, labels, chunk)
        else:
            loss = functional.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        (loss * 0.37).backward()
        results.append((loss, hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_chunked_cross_entropy_is_exact_in_bfloat16():
    hidden, weight = torch.randn(50, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    labels = torch.randint(0, 40, (50,))
    exact = functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    ours = chunked_cross_entropy(hidden, weight, labels, 8)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.long), 8).backward()
    assert largest.numel == 8 * 1000


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_but_memory(recompute: str):
    """Known defects C14 and C24: same loss, aux, gradients, and each token routed and counted once."""
    results = []
    for mode in ("none", recompute):
        model = build(f"model.recompute={mode}")
        ids, documents, positions, routing = (torch.manual_seed(1), inputs())[1]
        output = model(ids, ids, documents, positions, routing)
        (output.loss_sum + output.aux["load_balance"] + output.aux["router_z"]).backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_grads), (again, again_grads) = results
    assert torch.equal(plain.loss_sum, again.loss_sum)
    for name, grad in plain_grads.items():
        assert torch.equal(grad, again_grads[name]), name
    for ours, theirs in zip(plain.uses, again.uses, strict=True):
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
        assert ours.tokens_per_expert.sum() == 24 * 2


def test_recompute_saves_memory():
    saved = {}
    for mode in ("none", "selective", "full"):
        model = build(f"model.recompute={mode}")
        ids, documents, positions, routing = inputs()
        sizes: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor, sizes=sizes, parameters=parameters) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(ids, ids, documents, positions, routing)
        saved[mode] = sum(sizes.values())
        del output
    assert saved["full"] < saved["selective"] < saved["none"], saved


def test_initialisation_does_not_depend_on_the_shard():
    """Known defect C30: keyed by (seed, name, global expert id)."""
    config = load(SMALL)
    whole = build()
    for rank in range(2):
        part = DecoderLM(config.model, config.router, ExpertShard(rank, 2))
        initialise(part, seed=3)
        for (name, ours), theirs in zip(part.named_parameters(), whole.parameters(), strict=True):
            expected = theirs[2 * rank : 2 * rank + 2] if ".experts." in name else theirs
            assert torch.equal(ours, expected), name


def test_initialisation_differs_and_has_the_stated_spread():
    model = build("model.hidden_size=128", "model.moe.expert_hidden_size=64", "model.init_std=0.02")
    for layer in model.moe_layers():
        experts = layer.experts.in_weight.flatten(1)
        assert len(experts.unique(dim=0)) == 4
        assert experts.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.experts.out_weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
    names = [p for p in model.parameters() if p.ndim >= 2]
    assert len({float(p.detach().flatten()[0]) for p in names}) == len(names), "two tensors start alike"


ADAPTIVE = ("top_p", "relu", "expert_choice", "expert_threshold", "autonomy_top_p", "autonomy_expert_choice", "dynmoe")
"""Schemes that are charged for the experts they were measured to use."""


@pytest.mark.parametrize(
    "router",
    [
        ["router=top_k"],
        ["router=autonomy", "router.gate_rank=8"],
        ["router=top_k", "model.moe.gate_rank=8"],
        ["router=top_k", "router.projection_size=10"],
        ["router=top_k_factorised", "model.moe.gate_rank=8"],
        ["router=hash", "router.weights=learned"],
        ["router=random"],
        ["router=uniform"],
        ["router=thor"],
        ["router=lory", "router.segment_tokens=4"],
        ["router=top_p", "router.threshold=1"],
        ["router=quantile"],
        ["router=expert_threshold", "router.initial_threshold=1e-6"],
        ["router=attentive", "router.num_candidates=3"],
        ["router=attentive_dense"],
        ["router=attentive_low_rank", "router.gate_rank=8"],
        ["router=loss_free"],
        ["router=relu"],
        ["router=sinkhorn"],
        ["router=moe_plus_plus"],
        ["router=moce_ir", "model.moe.experts.pattern=[1,1]"],
        ["router=dynmoe"],
        ["router=top_k", "experts=unequal", "model.moe.experts.pattern=[1,3]"],
        ["router=moe_plus_plus", "router.projection=two_layer", "model.moe.experts.num_constant=0"],
        ["router=top_k", "experts=zero_computation"],
        ["router=k_means"],
        ["router=k_means", "router.rule=least_squares"],
        ["router=expert_choice"],
        ["router=autonomy_top_p", "router.gate_rank=8"],
        ["router=autonomy_expert_choice", "router.gate_rank=8"],
        ["router=top_k", "router.top_k=3", "combine=orthogonal"],
        ["router=by_layer", "router.layers={1:{router:hash,weights:learned},rest:{router:top_k,top_k:3}}"],
        ["router=top_k", "model.moe.latent_size=12", "model.moe.latent_norm=true"],
        ["router=top_k", "model.moe.latent_size=12", "experts=unequal", "model.moe.experts.pattern=[1,3]"],
        ["router=top_k", "model.moe.latent_size=12", "router.top_k=3", "combine=orthogonal"],
        ["router=dense"],
    ],
)
def test_flops_equal_a_counter_on_the_module(router: list[str]):
    """Known defect C41: active experts only; router, all of autonomy's down projections and head included."""
    config = load([*SMALL, "model.num_key_value_heads=4", *router])
    model = build("model.num_key_value_heads=4", *router).eval()
    ids = torch.randint(0, 61, (2, 12))
    zeros, positions = torch.zeros_like(ids), torch.arange(12).expand(2, 12)
    # Without gradients, because the cross-entropy makes its own in forward; as plain products, which the counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        uses = model(ids, ids, zeros, positions, context(2, 12)).uses
    size, counted = model_size(config.model, config.router), counter.get_total_flops()
    if config.router.name in ADAPTIVE or config.model.moe.experts.name != "swiglu":
        costs = torch.tensor(config.model.moe.kinds.costs or [1.0], dtype=torch.float64)
        networks = sum((use.tokens_per_expert[: config.model.moe.num_experts] * costs).sum() for use in uses)
        size = size.with_experts_per_token(float(networks) / len(uses) / 24)
    if config.router.name == "dynmoe":  # cosines of all keys, once in a batch and not for every token
        keys = sum(layer.router.weight.numel() * len(layer.router.weight) for layer in model.moe_layers())
        counted -= 2 * keys
    # The plain products take scores for the full square; a causal mask needs half of it.
    assert counted / 24 == pytest.approx(size.forward_flops_per_token + size.attention_score_flops)


def test_tied_embeddings_share_their_gradient():
    model = build("model.tie_embeddings=true")
    ids, documents, positions, routing = inputs()
    model(ids, ids, documents, positions, routing).loss_sum.backward()
    unused = sorted(set(range(61)) - set(ids.flatten().tolist()))
    assert model.head is None and model.embedding.weight.grad[unused].abs().sum() > 0


def test_evaluation_of_one_row_equals_that_of_many():
    """Known defect C29."""
    model = build().eval()
    ids, documents, positions, routing = inputs()
    together = model.logits(ids, documents, positions, routing)
    for row in range(2):
        part = slice(row, row + 1)
        alone = model.logits(ids[part], documents[part], positions[part], context(1, 12))
        torch.testing.assert_close(together[part], alone, atol=2e-5, rtol=1e-5)


def test_padding_counts_nowhere():
    """Known defect C17: counts, tokens and aux losses of a batch with padding equal those without it."""
    model = build()
    ids, documents, positions, routing = inputs()
    ids[1], documents[1] = ids[0], documents[0]
    positions[1] = positions[0]
    mask = routing.token_mask.clone()
    mask[12:] = False
    padded = dataclasses.replace(routing, token_mask=mask)
    labels = ids.clone()
    labels[1] = IGNORE_INDEX
    with_padding = model(ids, labels, documents, positions, padded)
    alone = model(ids[:1], ids[:1], documents[:1], positions[:1], context(1, 12))
    torch.testing.assert_close(with_padding.loss_sum, alone.loss_sum)
    for name, value in alone.aux.items():
        torch.testing.assert_close(with_padding.aux[name], value)
    for ours, theirs in zip(with_padding.uses, alone.uses, strict=True):
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert) and ours.tokens == 12
