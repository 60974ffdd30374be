"""What a run on CUDA is refused for before it starts, on a machine that only says that it has GPUs."""

import pytest
import torch

from moe_pretrain import cli
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import check_devices, preflight


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Two of them, of a capability."""

    def make(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")

    return make


def test_a_gpu_without_bfloat16_trains_in_float32_and_only_so(gpus):
    gpus((7, 0))
    assert (preflight(load([]), 1).device, preflight(load([]), 1).dtype) == ("cuda", "float32")
    with pytest.raises(ValueError, match=r"^engine.dtype=bfloat16 must be auto or float32: Tesla V100 has no bfloat16"):
        preflight(load(["engine.dtype=bfloat16"]), 1)
    assert preflight(load(["engine.dtype=bfloat16", "engine.device=cpu"]), 1).dtype == "bfloat16"
    gpus((8, 0))
    assert preflight(load([]), 1).dtype == "bfloat16"


def test_heads_that_the_kernels_cannot_take_are_refused(gpus):
    gpus((9, 0))
    words = ["model.hidden_size=128", "model.num_heads=16"]
    with pytest.raises(
        ValueError, match=r"^model.hidden_size/num_heads=8 must be at least 16 on CUDA.*at most 8, or another"
    ):
        preflight(load(words), 1)
    with pytest.raises(ValueError, match=r"^model.head_size=10 must be at least 16 on CUDA"):
        preflight(load([*words, "model.head_size=10"]), 1)
    preflight(load([*words, "engine.device=cpu"]), 1)
    preflight(load([*words, "model.head_size=16"]), 1)
    preflight(load(["model.hidden_size=128", "model.num_heads=8"]), 1)


def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    gpus((9, 0))
    plan = preflight(load([]), 4)
    check_devices(plan, 2)
    with pytest.raises(ValueError, match=r"^3 ranks on this host must be at most its 2 CUDA devices"):
        check_devices(plan, 3)
    check_devices(preflight(load(["engine.device=cpu"]), 4), 4)
    assert cli.main(["train", "run.name=many", "parallel.processes=4"]) == cli.USAGE_CODE
    assert "4 ranks on this host must be at most its 2 CUDA devices" in capsys.readouterr().err
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "run.name=many"]) == cli.USAGE_CODE
    assert "3 ranks on this host must be at most its 2 CUDA devices" in capsys.readouterr().err
