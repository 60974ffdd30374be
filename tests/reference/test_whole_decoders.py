"""Our decoder with copied weights equals transformers' decoders, and trains as a plain PyTorch loop trains those."""

import math

import pytest
import torch
from helpers.builders import tiny
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from helpers.whole_decoders import WORDS, build, copy_weights, in_their_names
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_pretrain.data.rows.micro_batch import build_micro_batch
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, RoutingContext

SIZES = (
    *("model.vocab_size=300", "model.sequence_length=16", "model.num_layers=2", "model.hidden_size=32"),
    *("model.num_heads=4", "model.num_key_value_heads=2", "model.tie_embeddings=false"),
    *("model.moe.num_experts=4", "model.moe.expert_hidden_size=24"),
)
STEPS, ROWS, LENGTH = 40, 8, 16
LEARNING_RATE, WARMUP_STEPS, FLOOR = 0.01, 5, 0.1
WEIGHT_DECAY, BETAS, EPSILON, CLIP = 0.1, (0.9, 0.95), 1e-4, 1.5
BALANCE_WEIGHT, Z_WEIGHT = 0.1, 0.05


@pytest.mark.parametrize("kind", WORDS)
def test_logits_and_gradients_are_equal(kind: str):
    config = tiny(*SIZES, *WORDS[kind])
    ours = DecoderLM(config.model, config.router, ExpertShard())
    initialise(ours, seed=1)
    with torch.no_grad():
        for block in ours.blocks:
            for norm in (block.attention.query_norm, block.attention.key_norm):
                if norm is not None:
                    norm.weight.uniform_(0.5, 1.5)
    theirs = build(kind, config)
    copy_weights(ours, theirs)

    ids = torch.randint(0, 300, (2, LENGTH))
    zeros, positions = torch.zeros_like(ids), torch.arange(LENGTH).expand(2, LENGTH)
    context = RoutingContext(torch.ones(32, dtype=torch.bool), torch.arange(32), 2, seed=0, step=0)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours.logits(ids, zeros, positions, context), expected.detach(), atol=2e-4, rtol=1e-4)

    loss_sum = ours(ids, ids, zeros, positions, context).loss_sum
    loss_sum.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    gradients = in_their_names({name: weight.grad for name, weight in ours.named_parameters()}, theirs)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.fast("mixtral")
def test_forty_steps_equal_those_of_a_plain_loop(kind: str):
    ((losses, norms, expected_losses, expected_norms, far, moved),) = run_on_ranks(_both_trainings, 1, kind)
    torch.testing.assert_close(losses, expected_losses, atol=0, rtol=1e-5)
    torch.testing.assert_close(norms, expected_norms, atol=0, rtol=1e-4)
    assert (expected_norms > CLIP).any() and (expected_norms < CLIP).any()  # clipping is tried, and its absence
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    for name, distance in far.items():
        assert distance < 1e-3 * moved[name], name


def _both_trainings(kind: str):
    """Losses and gradient norms of both; by parameter how far they end apart, and how far training moved it."""
    config = tiny(
        *SIZES,
        *WORDS[kind],
        *(f"optimizer.learning_rate={LEARNING_RATE}", f"optimizer.weight_decay={WEIGHT_DECAY}"),
        *(f"optimizer.beta1={BETAS[0]}", f"optimizer.beta2={BETAS[1]}", f"optimizer.epsilon={EPSILON}"),
        *(f"schedule.warmup_steps={WARMUP_STEPS}", f"schedule.floor={FLOOR}", f"engine.gradient_clipping={CLIP}"),
        "router.load_balance_level=global_batch",
        *(f"router.load_balance_weight={BALANCE_WEIGHT}", f"router.router_z_weight={Z_WEIGHT}"),
        *(f"batch.global_batch_tokens={ROWS * LENGTH}", f"budget.tokens={STEPS * ROWS * LENGTH}"),
        "batch.micro_batch_size=2",  # four micro-batches of ours are one batch there
    )
    engine = build_engine(config)
    theirs = build(kind, config)
    copy_weights(engine.model, theirs)
    start = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    # Text that can be learnt: the next token is a fixed function of this one, but for one place in eight.
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(300, generator=generator)
    rows = torch.randint(0, 300, (STEPS, ROWS, LENGTH + 1), generator=generator)
    for place in range(LENGTH):
        follows = torch.rand(STEPS, ROWS, generator=generator) > 0.125
        rows[:, :, place + 1] = torch.where(follows, successor[rows[:, :, place] % 20], rows[:, :, place + 1])

    losses, norms = [], []
    for step, batch in enumerate(rows):
        starts = torch.zeros(2, LENGTH + 1, dtype=torch.bool).numpy()
        micro_batches = [
            build_micro_batch(part.numpy(), starts, torch.arange(2 * number, 2 * number + 2).numpy(), True)
            for number, part in enumerate(batch.split(2))
        ]
        result = engine.step(step, micro_batches)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    expected_losses, expected_norms = _plain_loop(theirs, rows)
    ended = in_their_names(dict(engine.model.named_parameters()), theirs)
    far = {name: float((ended[name] - parameter).norm()) for name, parameter in theirs.named_parameters()}
    moved = {name: float((start[name] - parameter).norm()) for name, parameter in theirs.named_parameters()}
    return (*map(torch.tensor, (losses, norms, expected_losses, expected_norms)), far, moved)


def _plain_loop(model: PreTrainedModel, rows: torch.Tensor) -> tuple[list[float], list[float]]:
    """Training as one writes it with torch and transformers alone: losses and gradient norms of the steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)
    losses, norms = [], []
    for step, batch in enumerate(rows):
        output = model(batch[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        num_experts, top_k = model.num_experts, model.num_experts_per_tok
        balance = [load_balancing_loss_func((logits,), num_experts, top_k) / top_k for logits in output.router_logits]
        z = [logits.logsumexp(dim=-1).square().mean() for logits in output.router_logits]
        total = loss + (BALANCE_WEIGHT * sum(balance) + Z_WEIGHT * sum(z)) / len(z)
        optimizer.zero_grad()
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        if step < WARMUP_STEPS:
            factor = (step + 1) / WARMUP_STEPS
        else:
            progress = (step + 1 - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
            factor = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms
