"""What a run folder says of its run beside the metrics: the resolved configuration, sizes, versions."""

import contextlib
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from moe_pretrain.analysis.html import write_whole
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.size import ModelSize
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.plan.layer_cost import layer_cost
from moe_pretrain.train.corpora import Corpus

OVERRIDES_FILE = "overrides.txt"
_GIT_SECONDS = 10.0


def write_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Write down what the run was started with, which the same name goes on with; other ranks may read it meanwhile."""
    write_whole(folder / OVERRIDES_FILE, "".join(f"{word}\n" for word in overrides))


def _processor() -> str:
    """Its model where Linux tells it: times compare between equal ones only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def write_facts(config: Config, size: ModelSize, dtype: Dtype, corpus: Corpus, mesh: Mesh) -> None:
    """Write ``config.yaml`` and ``summary.json`` into the run's folder."""
    folder = config.run.folder
    values = json.loads(json.dumps(to_values(config)))
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else _processor()
    facts = {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "flops_per_token": size.training_flops_per_token,
        "planned_steps": config.num_steps,
        "unigram_entropy": corpus.unigram_entropy,
        "corpus_fingerprint": corpus.fingerprint,
        "versions": versions(),
        "commit": commit(),
        "device": device,
        "dtype": dtype,
        "moe_layer_cost": layer_cost(config, dtype, size),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "summary.json").write_text(json.dumps(facts, indent=2))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    packages = ("moe_pretrain", "torch", "deepspeed", "transformers", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def commit() -> str | None:
    """Commit of the checkout that the package runs from, ``+changes`` if files differ from it; None without one."""
    file = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *words], capture_output=True, text=True, timeout=_GIT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside somebody's repository is not a checkout of this one: there git does not know the file.
    if git("ls-files", "--error-unmatch", file.name) is None or (head := git("rev-parse", "HEAD")) is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
