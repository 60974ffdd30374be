"""A step's metrics row: what every layer has, and what a scheme adds of its own."""

import pytest
import torch
from helpers.builders import tiny

from moe_pretrain.engine.engine import StepResult
from moe_pretrain.metrics.step_rows import train_row
from moe_pretrain.metrics.throughput import Window
from moe_pretrain.metrics.wandb_sink import reduce_layers
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertKinds, ExpertShard
from moe_pretrain.run_folder.metrics_file import MetricsRow


def row_of(scheme: str, layer: int = 1, **state: list[float]) -> MetricsRow:
    """A step of 10 tokens in which expert e of 4 got e routes in the first layer, and one in the second."""
    config = tiny(f"router={scheme}")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    for name, value in state.items():  # of one layer's router
        getattr(model.moe_layers()[layer].router, name).copy_(torch.tensor(value))
    num_sums = model.moe_layers()[0].router.num_sums
    result = StepResult(
        loss=2.0,
        aux={},
        aux_weights={},
        gradient_norm=1.0,
        gradient_norms={"router": 0.6, "rest": 0.8},
        tokens_per_expert=torch.tensor([[0.0, 1, 2, 3], [1, 1, 1, 1]], dtype=torch.float64),
        kinds=ExpertKinds(4),
        tokens=10,
        router_entropy=[0.5, 0.25],
        dropped_share=[0.0, 0.0],
        sums=list(torch.tensor([[4.0], [6.0]], dtype=torch.float64).expand(2, num_sums)),
        token_hash=0,
    )
    return train_row(result, model, Window(100.0, 0.1, 0.0), 0.01, 1e6, 1, None)


def test_layers_have_their_statistics() -> None:
    row = row_of("top_k")
    of_layer = {name.removeprefix("moe/layer_00/"): value for name, value in row.items() if "layer_00" in name}
    del of_layer["router_weight_norm"]
    norms = {name: value for name, value in row.items() if "gradient_norm" in name}
    assert norms == {"train/gradient_norm": 1.0, "train/gradient_norm_router": 0.6, "train/gradient_norm_rest": 0.8}
    assert of_layer == {
        "load_max_over_mean": 2.0,
        "router_entropy": 0.5,
        "dead_experts": 1.0,
        "dropped_share": 0.0,
        "experts_per_token": 0.6,
        "expert_share": pytest.approx([0, 1 / 6, 2 / 6, 3 / 6]),
    }


@pytest.mark.parametrize("scheme", ["loss_free", "quantile"])
def test_biased_schemes_add_the_range_of_their_bias(scheme: str) -> None:
    row = row_of(scheme, expert_bias=[0.5, 0.0, -0.25, 0.0])
    assert [row[f"moe/layer_{layer:02d}/expert_bias_range"] for layer in (0, 1)] == [0.0, 0.75]


def test_expert_threshold_adds_its_own_of_each_layer() -> None:
    row = row_of("expert_threshold", threshold=[0.5, 0.6, 0.7, 1.0])
    assert [row[f"moe/layer_{layer:02d}/unrouted_share"] for layer in (0, 1)] == [0.4, 0.6]
    assert [row[f"moe/layer_{layer:02d}/threshold_mean"] for layer in (0, 1)] == pytest.approx([0.55, 0.7])
    assert reduce_layers({**row, "step": 1, "tokens": 10})["moe/max/unrouted_share"] == 0.6


@pytest.mark.parametrize("in_use,dead", [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.0)])
def test_slots_without_an_expert_are_not_counted_as_dead(in_use: list[float], dead: float) -> None:
    assert row_of("dynmoe", 0, in_use=in_use)["moe/layer_00/dead_experts"] == dead
