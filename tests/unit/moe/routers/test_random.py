"""The frozen random router: its choices, and that nothing moves it."""

from pathlib import Path

import pytest
import torch
from helpers.builders import NUM_STEPS, tiny
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from helpers.routing import by_token, make_context

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.routers.random import RandomConfig, RandomRouter
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.verify.small_twin import random_batches

HIDDEN, EXPERTS, TOKENS = 6, 5, 40


def make_router(top_k: int = 2) -> RandomRouter:
    router = RandomRouter(RandomConfig(name="random", top_k=top_k), HIDDEN, EXPERTS, layer=1)
    router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0)))
    return router


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_a_token_goes_to_its_largest_logits_with_equal_weights(top_k: int):
    router, hidden = make_router(top_k), torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context(TOKENS))
    best = (hidden @ router.weight.T).topk(top_k, dim=1).indices.tolist()
    assert by_token(routing, TOKENS) == [dict.fromkeys(experts, pytest.approx(1 / top_k)) for experts in best]
    assert routing.routes_per_token == top_k and not routing.aux
    assert float(routing.use.tokens_per_expert.sum()) == top_k * TOKENS


def test_nothing_is_to_be_learnt():
    router, hidden = make_router(), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context(TOKENS))
    assert not list(router.parameters()) and not routing.weight.requires_grad
    assert router.weight_norm() == pytest.approx(float(router.weight.norm()))


def model_of(*words: str) -> DecoderLM:
    config = load(["model=tiny", *words])
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    return model


def test_it_starts_with_the_weights_of_a_trained_router():
    for ours, trained in zip(
        model_of("router=random").moe_layers(), model_of("router=top_k").moe_layers(), strict=True
    ):
        assert torch.equal(ours.router.weight, trained.router.weight.detach())
    first = model_of("router=random").moe_layers()[0].router.weight
    assert not torch.equal(first, model_of("router=random", "seed=1").moe_layers()[0].router.weight)


def test_frozen_weights_cost_a_forward_product():
    sizes = [model_size(config.model, config.router) for config in (load(["router=random"]), load(["router=uniform"]))]
    entries = 4 * 8 * 128  # layers, experts, width
    assert [size.frozen_routers for size in sizes] == [entries, 0]
    forward, training = (
        [getattr(size, name) for size in sizes] for name in ("forward_flops_per_token", "training_flops_per_token")
    )
    assert forward[0] - forward[1] == training[0] - training[1] == 2 * entries
    assert sizes[0].total_parameters == sizes[1].total_parameters


def train_and_restore(folder: str) -> list[list[torch.Tensor]]:
    """Weights of the routers at the start, after the steps, and restored in an engine of another seed."""
    found = []
    config = tiny("router=random", "engine.dtype=bfloat16", "optimizer.weight_decay=0.5", rows=4)
    engine = build_engine(config)
    found.append([layer.router.weight.clone() for layer in engine.model.moe_layers()])
    for step, batches in enumerate(random_batches(config, engine._plan)):
        engine.step(step, batches)
    found.append([layer.router.weight.clone() for layer in engine.model.moe_layers()])
    store.save(engine, Path(folder), TrainState(step=NUM_STEPS), keep_last=1)
    other = build_engine(tiny("router=random", "engine.dtype=bfloat16", "seed=5", rows=4))
    assert not torch.equal(other.model.moe_layers()[0].router.weight, found[0][0])
    path, manifest = store.newest(Path(folder), pytest.fail)
    store.restore(other, path, manifest)
    found.append([layer.router.weight.clone() for layer in other.model.moe_layers()])
    return found


def test_training_moves_nothing_and_checkpoints_hold_it(tmp_path: Path):
    (found,) = run_on_ranks(train_and_restore, 1, str(tmp_path))
    start, trained, restored = found
    for layer, weight in enumerate(start):
        assert weight.dtype == torch.float32 and weight.std() > 0
        assert not torch.equal(weight, weight.bfloat16().float())  # a bfloat16 engine does not round it
        assert torch.equal(weight, trained[layer]) and torch.equal(weight, restored[layer])
