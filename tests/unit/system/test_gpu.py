"""A GPU that is there and cannot be used is said, never worked around; on a machine that only says that it has one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_pretrain import cli
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import check_devices, preflight
from moe_pretrain.system import gpu

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with a driver, and a torch for a CUDA that finds no device."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(cuda: str | None, driver: str) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(gpu, "_DRIVER_FILE", tmp_path / "version")
        (tmp_path / "version").write_text(driver)

    return make


@pytest.mark.parametrize(
    ("cuda", "driver", "told"),
    [
        ("13.0", PROPRIETARY.format("535.104.05"), "needs driver 580.65.06 or newer, and this one is 535.104.05: "),
        ("13.0", OPEN.format("565.57.01"), "and this one is 565.57.01: update it, or install a torch for CUDA 12"),
        ("12.8", PROPRIETARY.format("470.256.02"), "525.60.13 or newer, and this one is 470.256.02: .* for CUDA 11$"),
        ("12.8", PROPRIETARY.format("535.104.05"), "for CUDA 12.8 finds none"),
        ("13.0", OPEN.format("580.65.06"), "for CUDA 13.0 finds none"),
        ("13.0", "what a later driver may write", "for CUDA 13.0 finds none"),
        (None, PROPRIETARY.format("580.65.06"), "is built without CUDA$"),
    ],
)
def test_a_run_on_an_unusable_gpu_is_refused_with_the_reason(machine, cuda, driver, told) -> None:
    machine(cuda, driver)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=rf"^engine.device={device} must be cpu, or the GPU .* usable: .*{told}"):
            preflight(load([f"engine.device={device}"]), 1)
    assert preflight(load(["engine.device=cpu"]), 1).device == "cpu"


def test_the_line_is_what_a_user_sees(machine, capsys: pytest.CaptureFixture) -> None:
    machine("13.0", PROPRIETARY.format("535.104.05"))
    assert cli.main(["train", "run.name=driver"]) == cli.USAGE_CODE
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "needs driver 580.65.06" in told


def test_evaluation_goes_on_the_cpu_and_says_why(machine, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    machine("13.0", PROPRIETARY.format("535.104.05"))
    assert gpu.device_for_inference(1) == "cpu"
    told = capsys.readouterr().err
    assert told.startswith("moe-pretrain: on the CPU, since torch") and "580.65.06" in told and told.count("\n") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.device_for_inference() == "cpu" and not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.device_for_inference(1) == "cuda:1"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_none(machine, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    machine("13.0", PROPRIETARY.format("535.104.05"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert preflight(load([]), 1).device == "cpu"


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = preflight(load([]), 1)
    with pytest.raises(ValueError, match=r"^engine.device=cuda must be cpu, or this machine have a C compiler .*gcc"):
        check_devices(plan, 1)
    (tmp_path / "clang").touch(0o755)
    with pytest.raises(ValueError, match=r"have Python's headers .*python3-dev"):
        check_devices(plan, 1)
    (headers / "Python.h").touch()
    check_devices(plan, 1)
    check_devices(preflight(load(["engine.device=cpu"]), 1), 1)


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}])
def test_the_allocator_s_segments_grow_unless_the_environment_speaks(own: dict[str, str]) -> None:
    program = (
        "import os, sys; from moe_pretrain.cli import main; main(['--version']); main(['plan', '--help']); "
        "print([v for n, v in os.environ.items() if n.endswith('ALLOC_CONF')], file=sys.stderr)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", program], env=clean | own, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == str(list(own.values()) or ["expandable_segments:True"])


@pytest.mark.parametrize(
    ("capability", "told"),
    [
        ((8, 0), "NVIDIA A100 (compute capability 8.0)"),
        ((8, 9), "NVIDIA A100 (compute capability 8.9)"),
        ((9, 0), None),
    ],
)
def test_a_gpu_without_grouped_products_is_named_in_one_line(capability, told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    line = gpu.lacks_grouped_products()
    assert (line is None) == (told is None)
    if line is not None:
        assert told in line and "\n" not in line and "9.0 (H100)" in line
