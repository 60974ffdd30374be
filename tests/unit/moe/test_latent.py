"""Routed experts of another width than the model's: against plain loops, and what travels to them."""

import pytest
import torch
from helpers.routing import make_context, moe_layer_of
from torch.nn import functional

from moe_pretrain.config.load import load
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import RoutingContext
from moe_pretrain.plan.cost import ROUTES, traffic
from moe_pretrain.schedule.batch_plan import plan_batches

HIDDEN, LATENT, TOKENS = 16, 6, 10
WORDS = [
    *("model.num_layers=1", f"model.hidden_size={HIDDEN}", "model.num_heads=2", "model.ffn_hidden_size=20"),
    *("model.moe.num_experts=5", "model.moe.expert_hidden_size=7", "model.init=normal", "model.init_std=0.3"),
    *("model.moe.num_shared_experts=1", "router=top_k", "router.top_k=3", f"model.moe.latent_size={LATENT}"),
]


def layer_of(*words: str) -> MoELayer:
    return moe_layer_of(*WORDS, *words)


def context() -> RoutingContext:
    return make_context(TOKENS)


def by_loops(weights: dict[str, torch.Tensor], hidden: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Kimi K3's block, token by token in float64: y = W_up norm(sum_e p_e E_e(W_down x)) + S(x)."""

    def network(x: torch.Tensor, gate_and_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_and_up @ x).chunk(2)
        return out @ (functional.silu(gate) * up)

    outputs = []
    for x in hidden:
        scores = (weights["router.weight"] @ x).softmax(dim=0)
        best = scores.argsort(descending=True)[:3]
        narrow, combined = weights["latent.in_weight"] @ x, torch.zeros(LATENT, dtype=torch.float64)
        for expert in best:
            of_expert = network(narrow, weights["experts.in_weight"][expert], weights["experts.out_weight"][expert])
            combined = combined + scores[expert] / scores[best].sum() * of_expert
        if "latent.norm_weight" in weights:
            combined = combined / (combined.square().mean() + epsilon).sqrt() * weights["latent.norm_weight"]
        shared = network(x, weights["shared_experts.in_weight"], weights["shared_experts.out_weight"])
        outputs.append(weights["latent.out_weight"] @ combined + shared)
    return torch.stack(outputs)


@pytest.mark.parametrize("norm", ["true", "false"])
def test_outputs_and_gradients_are_those_of_plain_loops(norm: str):
    torch.manual_seed(0)
    layer = layer_of(f"model.moe.latent_norm={norm}", "model.norm_epsilon=0.01")
    if layer.latent.norm_weight is not None:
        torch.nn.init.uniform_(layer.latent.norm_weight, 0.5, 1.5)
    exact = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    assert ("latent.norm_weight" in exact) == (norm == "true")
    hidden, factor = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    inputs, exact_inputs = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    found = layer(inputs, context(), recompute_experts=True).hidden
    expected = by_loops(exact, exact_inputs, 0.01)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    (found * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(inputs.grad.double(), exact_inputs.grad, atol=1e-4, rtol=1e-4)
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(weight.grad.double(), exact[name].grad, atol=1e-4, rtol=1e-4)


class Loopback:
    """An exchange with one rank that remembers how wide the rows were."""

    size = 1

    def __init__(self) -> None:
        self.widths: list[int] = []

    def exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return counts

    def start(self, rows: list[torch.Tensor], send: list[int], receive: list[int]) -> "Loopback":
        self.widths += [tensor.shape[1] for tensor in rows]
        self.rows = rows
        return self

    def wait(self) -> list[torch.Tensor]:
        return self.rows


def test_rows_travel_at_the_experts_width_and_the_plan_counts_them():
    layer, hidden = layer_of(), torch.randn(TOKENS, HIDDEN)
    alone = layer(hidden, context(), False).hidden
    layer.exchange = Loopback()
    torch.testing.assert_close(layer(hidden, context(), False).hidden, alone)
    assert layer.exchange.widths == [LATENT, 1, LATENT]  # with their weights there, and back

    def sent(*words: str) -> float:
        config = load([*WORDS, *words, "parallel.processes=2", "parallel.expert_parallel_size=2", *BATCH])
        plan = plan_batches(config.batch, config.model.sequence_length, 2, config.num_steps)
        return traffic(config, "float32", plan)[ROUTES]

    # Half of the routes leave a rank: forward and backward, rows and a weight there, rows back.
    assert sent() == 2 * (3 * 24 / 2) * (LATENT * 4 + 4 + LATENT * 4)
    assert sent("model.moe.latent_size=null") == 2 * (3 * 24 / 2) * (HIDDEN * 4 + 4 + HIDDEN * 4)


BATCH = [
    *("model.sequence_length=12", "batch.micro_batch_size=2", "batch.global_batch_tokens=48"),
    "model.moe.num_experts=6",
]
