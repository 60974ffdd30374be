"""The architecture as drawn: imports go down only, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_pretrain"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    **dict.fromkeys(("system", "schedule", "moe", "__init__"), 1),
    **dict.fromkeys(("run_folder", "data", "model"), 2),
    "parallel": 3,
    "engine": 4,
    **dict.fromkeys(("checkpoint", "metrics"), 5),
    "config": 6,
    **dict.fromkeys(("plan", "verify", "sweep", "huggingface", "inference", "surgery"), 7),
    **dict.fromkeys(("train", "analysis"), 8),
    "commands": 9,
    "cli": 10,
    "__main__": 11,
}
"""A room imports lower levels only, and no other room of its own level."""

# Package -> the files of ours that may import it.
CONFINED = {
    "deepspeed": {"engine/engine.py", "parallel/deepspeed_moe.py"},
    "hydra": {"config/compose.py", "sweep/"},
    "omegaconf": {"config/compose.py", "sweep/"},
    "lm_eval": {"inference/harness/"},
    "wandb": {"metrics/wandb_sink.py"},
    "matplotlib": {"analysis/"},
    "liger_kernel": {"moe/kernels.py"},
    "quack": {"moe/experts/fused_products.py"},
    "torch.distributed": {
        "parallel/",
        "engine/",
        "checkpoint/",
        "metrics/",
        "train/",
        "verify/",
        "system/stop_signals.py",
    },
}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    part = part_of(path)
    assert part in LEVELS, f"{part} has no level: add it to the drawing"
    for module in imported_modules(path):
        if not module.startswith("moe_pretrain."):
            continue
        other = module.split(".")[1]
        if other not in LEVELS:
            continue  # `from moe_pretrain import data` also yields names inside modules
        is_lower = LEVELS[other] < LEVELS[part] or other == part
        assert is_lower, f"{part} (level {LEVELS[part]}) imports {module} (level {LEVELS[other]})"


@pytest.mark.parametrize("package", CONFINED)
def test_package_is_confined(package: str):
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if any(name == allowed or name.startswith(allowed) for allowed in CONFINED[package]):
            continue
        users = {module for module in imported_modules(path) if f"{module}.".startswith(f"{package}.")}
        assert not users, f"{name} imports {sorted(users)}"


def test_environment_is_read_in_two_places_only():
    allowed = {
        *(
            "parallel/launcher.py",
            "parallel/rendezvous.py",
            "parallel/mesh.py",
            "system/child_process.py",
            "system/cpu.py",
            "system/cuda_allocator.py",
            "system/gpu.py",
        ),
        *("metrics/wandb_start.py", "train/build.py"),
        "verify/certificate/elsewhere.py",  # which routers find there, if they look
        *("sweep/running_job.py", "sweep/launcher.py", "sweep/slurm.py", "sweep/slurm_task.py"),
    }
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if name not in allowed:
            assert "os.environ" not in path.read_text(), name


def test_no_mutable_module_state():
    """Module-level names bound to lists, dicts or sets must be constants (upper case or dunder)."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            if isinstance(value, ast.List | ast.Dict | ast.Set):
                for target in targets:
                    if isinstance(target, ast.Name):
                        assert target.id.isupper() or target.id.strip("_").isupper() or target.id == "__all__", path


def test_a_start_loads_no_plotting_and_no_compiler():
    """A run on a cluster's node draws nothing, and TorchInductor, which DeepSpeed's Muon pulls in, compiles nothing."""
    code = (
        "import sys, moe_pretrain.commands.train, moe_pretrain.train.trainer\n"
        "from moe_pretrain.config.load import load\n"
        "from moe_pretrain.parallel.mesh import build_mesh\n"
        "build_mesh(load(['model=tiny']).parallel, 'cpu')\n"
        "import deepspeed.runtime.zero.muon.muon_optimizer\n"
        "print(sorted(sys.modules.keys() & {'matplotlib', 'PIL', 'torch._inductor.compile_fx'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
