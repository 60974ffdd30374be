"""Statistics of attention against explicit softmax rows; core.md section 3g lists what must hold."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from helpers.routing import PLAIN_TOP_K
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from moe_pretrain.model import attention
from moe_pretrain.model.attention import Attention, DocumentMask, attend, document_mask
from moe_pretrain.model.attention_statistic import MAX_SCORES
from moe_pretrain.model.attention_statistic import attention_statistic as measure
from moe_pretrain.model.block import Block
from moe_pretrain.model.rotary import rotary_table
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.types import AttentionStatistic, ExpertShard, MoEOutput, Routing, RoutingContext
from moe_pretrain.verify.oracle_parts import statistic_of_matrices

NAMES = get_args(AttentionStatistic)
CAUSAL = [name for name in NAMES if name != "received"]
BATCH, HEADS, KV_HEADS, SEQUENCE, SIZE = 2, 6, 3, 13, 8
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 7, [0] * 9 + [-1] * 4])  # the last four are padding
TEXT = DOCUMENTS >= 0


def heads(std: float = 1.5, sequence: int = SEQUENCE) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, HEADS, sequence, SIZE) * std, torch.randn(BATCH, KV_HEADS, sequence, SIZE)


def first_keys(documents: Tensor) -> Tensor:
    return document_mask(documents).first_key


def matrix(query: Tensor, key: Tensor, documents: Tensor, row: int, head: int) -> Tensor:
    """``A`` of one head, float64, one query at a time."""
    length = len(documents[row])
    weights = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        seen = [j for j in range(t + 1) if documents[row, j] == documents[row, t]]
        scores = key[row, head // (query.shape[1] // key.shape[1]), seen].double() @ query[row, head, t].double()
        weights[t, seen] = (scores / math.sqrt(query.shape[-1])).softmax(0)
    return weights


def by_hand(name: str, query: Tensor, key: Tensor, documents: Tensor) -> Tensor:
    """Every token's value from the dense matrices, written out by the definitions."""
    values = torch.zeros(documents.shape, dtype=torch.float64)
    for row in range(len(documents)):
        weights = torch.stack([matrix(query, key, documents, row, head) for head in range(query.shape[1])])
        for t in range(documents.shape[1]):
            seen = [j for j in range(t + 1) if documents[row, j] == documents[row, t]]
            n, own = len(seen), weights[:, t]
            if name == "row_max":
                values[row, t] = own.amax(dim=1).mean()
            elif name == "entropy":
                entropy = -(own[:, seen] * own[:, seen].log()).sum(dim=1).mean()
                values[row, t] = 1.0 if n == 1 else 1 - entropy / math.log(n)
            elif name == "received":
                later = [i for i in range(t, documents.shape[1]) if documents[row, i] == documents[row, t]]
                values[row, t] = weights[:, later, t].mean()
            else:
                left = [j for j in seen[1:] if j != t or not name.endswith("without_self")]
                if left:
                    values[row, t] = max(0.0, (own[:, left].amax(dim=1).mean() - 1 / n) / (1 - 1 / n))
    return values.float()


@pytest.mark.parametrize("max_scores", [1, 4 * BATCH * HEADS * SEQUENCE + 1, MAX_SCORES])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_softmax(name: AttentionStatistic, max_scores: int) -> None:
    """3g 1 for every statistic: blocks of 1, 4 and all queries, shared keys, packed documents, padding."""
    query, key = heads()
    found = measure(name, query, key, first_keys(DOCUMENTS), max_scores)
    expected = by_hand(name, query, key, DOCUMENTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected[TEXT].unique().numel() > 12 and (found >= 0).all() and (found <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_has_the_same_definition(name: AttentionStatistic) -> None:
    query, key = heads()
    expected = by_hand(name, query, key, DOCUMENTS)
    for row in range(BATCH):
        matrices = [matrix(query, key, DOCUMENTS, row, head) for head in range(HEADS)]
        torch.testing.assert_close(statistic_of_matrices(name, matrices, DOCUMENTS[row]), expected[row])


def test_bfloat16_heads_are_measured_in_float32() -> None:
    query, key = (tensor.bfloat16() for tensor in heads())
    found = measure("row_max", query, key, first_keys(DOCUMENTS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand("row_max", query, key, DOCUMENTS), rtol=1e-5, atol=1e-6)


def test_documents_begin_where_ids_change() -> None:
    assert first_keys(DOCUMENTS).tolist() == [[0] * 5 + [5] + [6] * 7, [0] * 9 + [9] * 4]


@pytest.mark.parametrize(
    ("name", "alone", "uniform"),
    [
        ("row_max", 1.0, lambda n: 1 / n),
        ("corrected_row_max", 0.0, lambda n: 0.0),
        ("corrected_row_max_without_self", 0.0, lambda n: 0.0),
        ("entropy", 1.0, lambda n: float(n == 1)),
        ("received", 1.0, lambda n: sum(1 / (i + 1) for i in range(n - 1, SEQUENCE)) / (SEQUENCE - n + 1)),
    ],
)
def test_values_of_one_key_and_of_uniform_attention(name: AttentionStatistic, alone: float, uniform) -> None:
    """3g 4 and 5."""
    query, key = heads()
    one = measure(name, query[:, :, :1], key[:, :, :1], torch.zeros(BATCH, 1, dtype=torch.long))
    assert one.flatten().tolist() == [alone] * BATCH
    zeros = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    found = measure(name, torch.zeros_like(query), key, zeros)
    expected = torch.tensor([uniform(n) for n in range(1, SEQUENCE + 1)])
    torch.testing.assert_close(found, expected.expand(BATCH, -1), atol=1e-6, rtol=1e-6)


def test_the_sink_and_the_token_itself_are_left_out() -> None:
    """Token 3 looks at the first key, then only at itself, then only at token 1."""
    key = torch.eye(4)[None, None]
    zeros = torch.zeros(1, 4, dtype=torch.long)
    values = {}
    for target in (0, 3, 1):
        query = torch.zeros(1, 1, 4, 4)
        query[0, 0, 3, target] = 100.0
        values[target] = [round(measure(name, query, key, zeros)[0, 3].item(), 5) for name in CAUSAL[:3]]
    assert values == {0: [1.0, 0.0, 0.0], 3: [1.0, 1.0, 0.0], 1: [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("name", NAMES)
def test_heads_may_be_permuted_and_documents_be_apart(name: AttentionStatistic) -> None:
    """3g 8: also what padding holds matters to no text."""
    query, key = heads()
    found = measure(name, query, key, first_keys(DOCUMENTS))
    order = torch.tensor([2, 0, 1])
    of_query = (2 * order[:, None] + torch.tensor([1, 0])).flatten()
    permuted = measure(name, query[:, of_query], key[:, order], first_keys(DOCUMENTS))
    torch.testing.assert_close(permuted, found)
    for row, document in ((0, 0), (0, 1), (0, 2), (1, 0)):
        at = DOCUMENTS[row] == document
        start = torch.zeros(1, int(at.sum()), dtype=torch.long)
        alone = measure(name, query[row : row + 1, :, at], key[row : row + 1, :, at], start)
        torch.testing.assert_close(alone[0], found[row, at])


def test_the_key_of_a_query_head_is_its_groups() -> None:
    query, key = heads()
    found = measure("row_max", query, key, first_keys(DOCUMENTS))
    copied = measure("row_max", query, key.repeat_interleave(HEADS // KV_HEADS, dim=1), first_keys(DOCUMENTS))
    torch.testing.assert_close(found, copied)


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_matter_only_to_what_is_received(name: AttentionStatistic) -> None:
    """3g 2: the same perturbation must be seen by O3, or it could show nothing."""
    documents = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    query, key = heads()
    before = measure(name, query, key, first_keys(documents), max_scores=5 * BATCH * HEADS * SEQUENCE)
    for cut in range(1, SEQUENCE):
        changed = [torch.cat([part[:, :, :cut], torch.randn_like(part[:, :, cut:])], dim=2) for part in (query, key)]
        after = measure(name, *changed, first_keys(documents), max_scores=5 * BATCH * HEADS * SEQUENCE)
        same = torch.equal(after[:, :cut], before[:, :cut])
        assert same == (name != "received")
        assert cut < 3 or not torch.equal(after, before)  # the first two have few values


def test_nothing_flows_back() -> None:
    """3g 9."""
    query, key = (tensor.requires_grad_() for tensor in heads())
    for name in NAMES:
        found = measure(name, query, key, first_keys(DOCUMENTS))
        assert not found.requires_grad and found.grad_fn is None


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_never_exists(name: AttentionStatistic) -> None:
    """No tensor is larger than the limit, which is a tenth of the matrix; nor are keys copied per query head."""
    sequence, query_heads = 64, 12
    query, key = torch.randn(2, query_heads, sequence, 1), torch.randn(2, 1, sequence, 1)
    whole = 2 * query_heads * sequence**2
    with Largest() as largest:
        measure(name, query, key, torch.zeros(2, sequence, dtype=torch.long), max_scores=whole // 10)
    assert whole // 20 < largest.numel <= whole // 10
    with Largest() as largest:
        measure(name, query, key, torch.zeros(2, sequence, dtype=torch.long), max_scores=1)
    assert largest.numel == 2 * query_heads * sequence


def test_the_default_limit_holds() -> None:
    """The matrix would be 1.1 times ``MAX_SCORES``."""
    sequence = int(math.sqrt(1.1 * MAX_SCORES / 32))
    query, key = torch.randn(1, 32, sequence, 2), torch.randn(1, 4, sequence, 2)
    with Largest() as largest:
        measure("row_max", query, key, torch.zeros(1, sequence, dtype=torch.long))
    assert 0.8 * MAX_SCORES < largest.numel <= MAX_SCORES < 32 * sequence**2


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_measures_the_heads_that_it_attends_with(
    name: AttentionStatistic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rotary positions, and with the documents of its mask."""
    seen: list[tuple[Tensor, Tensor]] = []

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask) -> Tensor:
        seen.append((query, key))
        return attend(query, key, value, mask)

    monkeypatch.setattr(attention, "attend", noting)
    layer = Attention(24, num_heads=4, num_key_value_heads=2, head_size=6)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rotary = rotary_table(torch.arange(SEQUENCE).expand(BATCH, -1), 6, 1e4)
    hidden = torch.randn(BATCH, SEQUENCE, 24)
    _, found = layer(hidden, rotary, document_mask(DOCUMENTS), name)
    torch.testing.assert_close(found, by_hand(name, *seen[0], DOCUMENTS), rtol=1e-5, atol=1e-6)
    assert layer(hidden, rotary, document_mask(DOCUMENTS))[1] is None


class _Asking(TopKRouter):
    """Top-k that asks for a statistic and notes what it gets."""

    def __init__(self, statistic: str | None):
        config = replace(PLAIN_TOP_K, weights="raw", load_balance_weight=0.0, router_z_weight=0.0)
        super().__init__(config, 12, 4, layer=0)
        self.attention_statistic = statistic
        self.got: list[Tensor | None] = []

    def forward(self, hidden: Tensor, context: RoutingContext) -> Routing:
        self.got.append(context.attention)
        return super().forward(hidden, context)


def run_block(router: TopKRouter, recompute: str) -> tuple[Tensor, Tensor]:
    """Output of a block and the gradient of its queries and keys."""
    layer = MoELayer(MoEConfig(4, 6, 0, 1, 1, 0, None, 8), router, SwiGLUExperts(4, 12, 6, ExpertShard()), 12)
    subject = Block(Attention(12, 2, 2, 6), layer, 12, 1e-6, recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in subject.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    hidden = torch.randn(BATCH, SEQUENCE, 12, generator=generator).requires_grad_()
    rotary = rotary_table(torch.arange(SEQUENCE).expand(BATCH, -1), 6, 1e4)
    tokens = BATCH * SEQUENCE
    context = RoutingContext(TEXT.flatten(), torch.arange(tokens), BATCH, seed=0, step=0)
    stream, delta, record = subject(hidden, None, rotary, document_mask(DOCUMENTS), context)
    assert isinstance(record, MoEOutput)
    output = stream + delta
    output.square().sum().backward()
    return output.detach(), subject.attention.qkv_weight.grad


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_measures_once_and_only_what_its_router_wants(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(name: AttentionStatistic, query: Tensor, key: Tensor, first_key: Tensor) -> Tensor:
        calls.append(name)
        return measure(name, query, key, first_key)

    monkeypatch.setattr(attention, "attention_statistic", counting)
    silent, asking = _Asking(None), _Asking("entropy")
    with set_checkpoint_early_stop(False):  # else a recomputation may end before it gets there
        without, with_statistic = run_block(silent, recompute), run_block(asking, recompute)
    assert calls == ["entropy"]  # not again in backward
    assert silent.got == [None] and len(asking.got) == 1
    assert asking.got[0].shape == (BATCH * SEQUENCE,) and not asking.got[0].requires_grad
    for ours, theirs in zip(with_statistic, without, strict=True):
        assert torch.equal(ours, theirs)


def test_an_unknown_statistic_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match="attention_statistic='row_min' must be one of row_max, corrected_row_max"):
        run_block(_Asking("row_min"), "none")
