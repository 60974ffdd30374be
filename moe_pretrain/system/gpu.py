"""Reasons why torch cannot use a GPU that is there, and the memory of one that it can."""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DEVICE_FILE = Path("/dev/nvidiactl")
_OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""CUDA's major version -> oldest Linux driver (CUDA Toolkit release notes, table of minor version compatibility)."""
_GROUPED_CAPABILITY = 9
_COMPILERS = ("gcc", "clang")
"""Names that Triton looks for, after ``CC``."""


def unusable_gpu() -> str | None:
    """Reason why torch finds no CUDA device where this machine has one of NVIDIA's; None if it has none, or torch can.

    A GPU that ``CUDA_VISIBLE_DEVICES`` hides is hidden on purpose.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not (_DEVICE_FILE.exists() or _DRIVER_FILE.exists()):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    driver = _driver()
    needed = _OLDEST_DRIVERS.get(int(torch.version.cuda.split(".")[0]))
    if driver is None or needed is None or _numbers(driver) >= _numbers(needed):
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none (nvidia-smi tells more)"
    return (
        f"torch {torch.__version__} for CUDA {torch.version.cuda} needs driver {needed} or newer, and this one is "
        f"{driver}: update it, or install a torch for CUDA {_newest_cuda(driver)}"
    )


def device_for_inference(number: int = 0) -> str:
    """``cuda:NUMBER`` where torch can use a GPU, else ``cpu``: the same numbers, only slower.

    Where a GPU is there that torch cannot use, a line on the standard error says why it is slow.
    """
    if torch.cuda.is_available():
        return f"cuda:{number}"
    if reason := unusable_gpu():
        print(f"moe-pretrain: on the CPU, since {reason}", file=sys.stderr)
    return "cpu"


def smallest_memory() -> int:
    """Bytes of the visible CUDA device that has the fewest."""
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def lacks_grouped_products() -> str | None:
    """Reason why experts in bfloat16 are slow on the GPU of this process; None where torch has a kernel for them.

    From compute capability 9.0 on torch multiplies the rows of all experts in one launch. On older GPUs it copies the
    experts' row counts to the host and multiplies expert by expert: two products forward and four backward.
    """
    major, minor = torch.cuda.get_device_capability()
    if major >= _GROUPED_CAPABILITY:
        return None
    return (
        f"slow experts: {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no grouped product in "
        "torch, which waits for the GPU in each of a layer's six and multiplies expert by expert; "
        f"{_GROUPED_CAPABILITY}.0 (H100) and newer have one"
    )


def missing_compiler() -> str | None:
    """Tools that Triton lacks to build its launchers, which compiled attention needs; None if they are there."""
    if not os.environ.get("CC") and not any(shutil.which(name) for name in _COMPILERS):
        return "a C compiler (gcc or clang; CC names another)"
    if not (header := Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python's headers ({header}; Debian's package is python3-dev)"
    return None


def _driver() -> str | None:
    try:
        found = re.search(
            r"(?:Kernel Module|x86_64|aarch64)\s+(\d+\.\d+(?:\.\d+)?)", _DRIVER_FILE.read_text(encoding="utf-8")
        )
    except OSError:
        return None
    return found[1] if found else None


def _newest_cuda(driver: str) -> str:
    """The newest CUDA that a driver is new enough for."""
    fitting = [cuda for cuda, oldest in _OLDEST_DRIVERS.items() if _numbers(oldest) <= _numbers(driver)]
    return str(max(fitting)) if fitting else f"{min(_OLDEST_DRIVERS) - 1} or older"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
