"""Rows of the table of known defects that one process shows; each test is named by its row.

Rows that need several ranks are in ``tests/distributed/test_known_defects.py``.
"""

import pytest
import torch
from helpers.builders import SEQUENCE, WITH_ALL_PARTS, context_of, random_batches, tiny
from torch import Tensor

from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.optimizers import build_optimizer
from moe_pretrain.engine.sanity import SanityError, check_optimizer_covers
from moe_pretrain.model.decoder import DecoderLM, LMOutput
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.types import ExpertShard, RoutingContext


def build(config: Config, shard: ExpertShard | None = None) -> DecoderLM:
    model = DecoderLM(config.model, config.router, shard or ExpertShard())
    initialise(model, config.seed)
    return model


def run(model: DecoderLM, batch: MicroBatch) -> LMOutput:
    return model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context_of(batch))


def one_batch(config: Config) -> MicroBatch:
    return random_batches(config, 1)[0][0]


def rows_of(batch: MicroBatch, rows: list[int]) -> MicroBatch:
    parts = ("input_ids", "labels", "document_ids", "position_ids", "row_positions")
    return MicroBatch(**{part: getattr(batch, part)[rows] for part in parts}, token_hash=0)


def set_router(model: DecoderLM, layer: int, experts: list[int], size: float) -> None:
    """Make every token of ``layer`` prefer ``experts``, equally."""
    with torch.no_grad():
        model.embedding.weight[:, 0] = 5.0
        weight = model.moe_layers()[layer].router.weight
        weight.zero_()
        weight[experts, 0] = size


def context(tokens: int) -> RoutingContext:
    return RoutingContext(torch.ones(tokens, dtype=torch.bool), torch.arange(tokens), 1, 0, 0)


def test_c08_no_row_of_an_expert_output_is_left_unwritten() -> None:
    """Uninitialised memory is filled with NaN while deterministic algorithms are on; idle experts come last."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    model = build(tiny(*WITH_ALL_PARTS))
    layer = model.moe_layers()[0]
    with torch.no_grad():
        layer.router.weight.zero_()  # all tokens to the first two of eight experts
    hidden = torch.randn(10, 24, requires_grad=True)
    for _ in range(2):
        output = layer(hidden, context(10), False)
        output.hidden.square().sum().backward()
        assert output.hidden.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert (parameter.grad[2:] == 0).all() and (parameter.grad[:2] != 0).any()


def test_c10_optimizer_must_hold_the_models_own_parameters() -> None:
    config = tiny()
    model = build(config)
    adamw = build_optimizer(model, config.optimizer)
    held = [parameter for group in adamw.param_groups for parameter in group["params"]]
    check_optimizer_covers(model, held)
    layer = model.moe_layers()[0]
    layer.experts = SwiGLUExperts(4, 16, 20, ExpertShard())  # surgery after the optimizer was built
    with pytest.raises(SanityError, match="blocks.0.feed_forward.experts"):
        check_optimizer_covers(model, held)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (8, 3), (8, 8)])
@pytest.mark.parametrize("level", ["micro_batch", "sequence", "global_batch"])
def test_c15_balance_loss_has_one_scale(num_layers: int, num_experts: int, top_k: int, level: str) -> None:
    config = tiny(
        f"model.num_layers={num_layers}",
        f"model.moe.num_experts={num_experts}",
        f"router.top_k={top_k}",
        "router.weights=raw",
        f"router.load_balance_level={level}",
        rows=5,
        micro_batch_size=5,
    )
    model, batch = build(config), one_batch(config)
    for layer in range(num_layers):
        set_router(model, layer, [], 0.0)
    assert float(run(model, batch).aux["load_balance"]) == 1.0  # equal probabilities
    for layer in range(num_layers):
        set_router(model, layer, list(range(top_k)), 40.0)
    collapsed = float(run(model, batch).aux["load_balance"])
    assert collapsed == pytest.approx(num_experts / top_k, rel=1e-5)


def test_c16_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    config = tiny(rows=4, micro_batch_size=4)
    model, batch = build(config), one_batch(config)
    set_router(model, 0, [0, 1], 40.0)
    set_router(model, 1, [2, 3], 40.0)
    assert float(run(model, batch).aux["load_balance"]) == pytest.approx(2.0, rel=1e-5)


def test_c17_padding_counts_nowhere() -> None:
    config = tiny("router.load_balance_level=global_batch", rows=5, micro_batch_size=5)
    model, batch = build(config), one_batch(config)
    text = [row for row, position in enumerate(batch.row_positions.tolist()) if position >= 0]
    assert 0 < len(text) < 5
    with_padding, without = run(model, batch), run(model, rows_of(batch, text))
    assert float(with_padding.loss_sum) == pytest.approx(float(without.loss_sum), rel=1e-6)
    for name, value in without.aux.items():
        assert float(with_padding.aux[name]) == pytest.approx(float(value), rel=1e-6), name
    for ours, theirs in zip(with_padding.uses, without.uses, strict=True):
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
        assert float(ours.tokens) == len(text) * SEQUENCE == float(theirs.tokens)
        assert float(ours.router_entropy) == pytest.approx(float(theirs.router_entropy), rel=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", ["renormalised", "raw"])
@pytest.mark.parametrize("case", ["equal", "one hot", "all tiny", "huge", "no text", "no tokens"])
def test_c21_extreme_inputs_have_finite_losses_and_gradients(score: str, weights: str, case: str) -> None:
    config = tiny(f"router.score={score}", f"router.weights={weights}")
    router = TopKRouter(config.router, 16, 4, layer=0)
    hidden = torch.ones(0 if case == "no tokens" else 6, 16, requires_grad=True)
    scale = {"equal": 0.0, "one hot": 100.0, "all tiny": -100.0, "huge": 1e4}.get(case, 1.0)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[slice(None) if case == "all tiny" else 0] = scale / 16
    facts = context(hidden.shape[0])
    if case == "no text":
        facts = RoutingContext(torch.zeros(6, dtype=torch.bool), torch.arange(6), 1, 0, 0)
    routing = router(hidden, facts)
    total = routing.weight.square().sum() + sum(routing.aux.values())
    total.backward()
    assert total.isfinite() and routing.use.router_entropy.isfinite()
    for gradient in (router.weight.grad, hidden.grad):
        assert gradient is not None and gradient.isfinite().all()


def test_c23_router_computes_in_float32_from_bfloat16_hidden_states() -> None:
    """Logits that bfloat16 rounds to the same value: the router must tell them apart."""
    config = tiny()
    router = TopKRouter(config.router, 16, 4, layer=0)
    with torch.no_grad():
        router.weight.copy_(1.0 + 1e-4 * torch.tensor([0.0, 2.0, 1.0, 3.0])[:, None])
    routing = router(torch.ones(3, 16, dtype=torch.bfloat16), context(3))
    assert routing.expert_index.view(3, 2).tolist() == [[3, 1]] * 3
    assert routing.weight.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in routing.aux.values())


def test_c24_ties_go_to_the_lower_expert() -> None:
    config = tiny("router.top_k=3", "model.moe.num_experts=8")
    router = TopKRouter(config.router, 16, 8, layer=0)
    router.weight.data.zero_()
    routing = router(torch.randn(50, 16), context(50))
    assert routing.expert_index.view(50, 3).tolist() == [[0, 1, 2]] * 50


def test_c29_evaluation_is_deterministic_and_blind_to_the_batch() -> None:
    config = tiny(*WITH_ALL_PARTS, "router.jitter=0.5", rows=6, micro_batch_size=6)
    model, batch = build(config), one_batch(config)
    rows = list(range(6))

    def logits(of: list[int], step: int = 0) -> Tensor:
        part = rows_of(batch, of)
        facts = context_of(part, step=step)
        return model.logits(part.input_ids, part.document_ids, part.position_ids, facts)

    assert not torch.equal(logits(rows), logits(rows, step=1))  # training has noise, drawn per step
    model.eval()
    whole = logits(rows)
    assert torch.equal(whole, logits(rows, step=1))
    for row in rows:
        torch.testing.assert_close(logits([row])[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c30_experts_differ_and_do_not_depend_on_expert_parallel(size: int) -> None:
    config = tiny("model.num_layers=3", "model.moe.num_leading_dense_layers=1")
    whole = dict(build(config).named_parameters())
    shards = [dict(build(config, ExpertShard(rank, size)).named_parameters()) for rank in range(size)]
    experts = []
    for name, parameter in whole.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([shard[name] for shard in shards]), parameter)
            experts += [expert for expert in parameter if parameter.shape[1] == 40]
        else:
            assert all(torch.equal(shard[name], parameter) for shard in shards), name
    assert len(experts) == 8
    assert not any(torch.equal(a, b) for i, a in enumerate(experts) for b in experts[:i])
