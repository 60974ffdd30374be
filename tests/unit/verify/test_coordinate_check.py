"""Coordinate check: under ``mup`` activations and their changes keep their size over widths, and it tells if not."""

from collections.abc import Callable

import pytest
import torch

from moe_pretrain.config.load import load
from moe_pretrain.engine.optimizers import base
from moe_pretrain.model import init
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.verify import coordinate_check
from moe_pretrain.verify.coordinate_check import Coordinates, coordinates, growth

WIDTHS = (32, 64, 128, 256)
LARGEST, SMALLEST = 0.25, -0.4
"""Exponents over widths between which nothing grows; without muP they are above 0.6. In models as narrow as these
agreement by chance still counts, and falls with the width."""


def over_widths(kind: str, router: str = "top_k") -> list[dict[str, Coordinates]]:
    common = ["model.num_layers=2", "model.vocab_size=64", "model.sequence_length=16",
              "tokenizer=pretrained", "tokenizer.path=unused", "model.moe.num_experts=4",
              "model.mup_base_width=64", "model.mup_base_layers=2", f"model.init={kind}",
              f"router={router}"]  # fmt: skip
    shapes = [
        [f"model.hidden_size={width}", f"model.num_heads={width // 16}", f"model.moe.expert_hidden_size={2 * width}"]
        for width in WIDTHS
    ]
    return [coordinates(load([*common, *shape]), (0, 3), rate=8e-3, rows=8) for shape in shapes]


def exponents(runs: list[dict[str, Coordinates]]) -> dict[str, float]:
    """Of the changes after the last step."""
    return {name: growth(WIDTHS, [run[name].change[-1] for run in runs]) for name in runs[0]}


QUANTITIES = ("attention", "MoE layer", "residual stream", "logits", "router logits")


@pytest.fixture(scope="module")
def sound() -> list[dict[str, Coordinates]]:
    return over_widths("mup")


def test_changes_keep_their_size(sound: list[dict[str, Coordinates]]):
    found = exponents(sound)
    assert all(SMALLEST < found[name] < LARGEST for name in QUANTITIES), found
    starts = {name: growth(WIDTHS, [run[name].size[0] for run in sound]) for name in QUANTITIES}
    # Output matrices start smaller, by design: see the table of model/parameter_groups.py.
    expected = {**dict.fromkeys(QUANTITIES, 0.0), "logits": -0.5, "router logits": -0.5}
    assert starts == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("kind", ["normal", "width_aware"])
def test_without_it_they_grow(kind: str):
    found = exponents(over_widths(kind))
    assert min(found[name] for name in ("MoE layer", "residual stream", "router logits")) > 0.6, found


DROPPED: dict[str, tuple[Callable[[str], bool], str]] = {
    "attention": (lambda name: ".attention." in name, "attention"),
    "router": (lambda name: ".router." in name, "router logits"),
    "experts_in": (lambda name: "experts.in_weight" in name, "MoE layer"),
    "experts_out": (lambda name: "experts.out_weight" in name, "MoE layer"),
}
"""A rate that is left as it was -> the weights it is of, and the quantity that must show it."""


@pytest.mark.parametrize("which", DROPPED)
def test_a_rate_that_is_not_scaled_shows(
    which: str, sound: list[dict[str, Coordinates]], monkeypatch: pytest.MonkeyPatch
):
    is_of, quantity = DROPPED[which]
    scales = base.rate_scales

    def forgetful(model, config):
        return {name: 1.0 if is_of(name) else scale for name, scale in scales(model, config).items()}

    monkeypatch.setattr(base, "rate_scales", forgetful)
    found = exponents(over_widths("mup"))
    assert found[quantity] > exponents(sound)[quantity] + 0.2, found


def test_logits_that_are_not_scaled_show(sound: list[dict[str, Coordinates]], monkeypatch: pytest.MonkeyPatch):
    def forgetful(model: DecoderLM, seed: int) -> None:
        init.initialise(model, seed)
        torch.nn.init.ones_(model.norm.weight)

    monkeypatch.setattr(coordinate_check, "initialise", forgetful)
    found = exponents(over_widths("mup"))
    assert found["logits"] > exponents(sound)["logits"] + 0.4, found


def test_a_router_that_starts_as_a_hidden_matrix_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(init, "_output_factor", lambda config: 1.0)
    starts = [run["router logits"].size[0] for run in over_widths("mup")]
    assert abs(growth(WIDTHS, starts)) < 0.1


def test_growth_is_the_exponent():
    assert growth([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth([1, 2], [0.0, 1.0]) != growth([1, 2], [0.0, 1.0])
