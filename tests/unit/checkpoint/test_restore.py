"""Numbers of a checkpoint are refused where no run writes them: of weights, of moments, of router state."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from torch import nn

from moe_pretrain.checkpoint.manifest import BUFFER, CheckpointError, Interval, read_manifest
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import ExpertShard


def reader(folder: Path, step: int) -> Reader:
    path = write_checkpoint(folder, step)
    return Reader(path, read_manifest(path))


@pytest.mark.parametrize(
    "step,kind,fragment",
    [(255, "weight", "weight of norm.weight is not finite"), (129, "exp_avg_sq", "a mean of squares, is negative")],
)
def test_what_no_run_writes_is_refused(tmp_path: Path, step: int, kind: str, fragment: str) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        reader(tmp_path, step).read("norm.weight", kind, 0, 5)
    assert reader(tmp_path, 129).read("norm.weight", "exp_avg", 0, 5).lt(0).all(), "a mean may be negative"


def test_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"norm.weight is torch.float32, not torch.int64"):
        reader(tmp_path, 3).read("norm.weight", "weight", 0, 5, torch.int64)


ROUTERS: dict[str, list[tuple[str, Any]]] = {
    "loss_free": [("expert_bias", math.nan), ("expert_bias", math.inf)],
    "expert_threshold": [("ema_weight", -0.1), ("ema_weight", 1.1), ("threshold", math.nan)],
    "expert_choice": [("z_score_steps", -1.0), ("thresholds", -math.inf)],
    "relu": [("sparsity_weight", -1.0), ("sparsity_weight", math.inf)],
    "hash": [("table", -1), ("table", 8)],
}


@pytest.mark.parametrize("router,own_name,value", [(router, *each) for router, all in ROUTERS.items() for each in all])
def test_router_state_out_of_range_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: str, own_name: str, value: Any
) -> None:
    with torch.device("cpu"):
        config = load([f"router={router}", "model=tiny"])
        model = DecoderLM(config.model, config.router, ExpertShard())
    model.moe_layers()[0].router.use_token_counts(torch.ones(16, dtype=torch.int64))
    name, buffer = next(each for each in model.named_buffers() if each[0].endswith(f".{own_name}"))
    good, found = buffer.clone(), reader(tmp_path, 3)
    stored = Interval(name, BUFFER, 0, buffer.numel(), "rank_00000.safetensors")
    monkeypatch.setitem(found._intervals, (name, BUFFER), [stored])
    values = good.flatten().clone()
    monkeypatch.setattr(found, "part", lambda interval, first, stop: values[first:stop])
    assert torch.equal(found.read_buffer(model, name, buffer), good)
    values[-1] = value
    with pytest.raises(CheckpointError, match=own_name):
        found.read_buffer(model, name, buffer)


def test_a_longer_buffer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = nn.Module(), reader(tmp_path, 3)
    model.register_buffer("own", torch.zeros(2))
    monkeypatch.setitem(found._intervals, ("own", BUFFER), [Interval("own", BUFFER, 0, 3, "rank_00000.safetensors")])
    with pytest.raises(CheckpointError, match="own has 3 elements, not 2"):
        found.read_buffer(model, "own", torch.zeros(2))
