"""Which runs below a folder wandb can be given."""

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from moe_pretrain.metrics.wandb_sink import WandbRun
from moe_pretrain.metrics.writer import wandb_run
from moe_pretrain.run_folder.record import find_runs


def wandb_runs(root: Path, say: Callable[[str], None]) -> Iterator[WandbRun]:
    """Every run below ``root``, itself included, that has metrics; ``say`` hears of the others.

    Raises:
        ValueError: There is no run.
    """
    for run in find_runs(root):
        if not run.values or not run.train:
            say(f"left out: {run.name}: {run.problem or 'it has no train rows'}")
            continue
        config = yaml.safe_load((run.folder / "config.yaml").read_text())
        metrics = config["metrics"]
        name = config["run"]["name"]
        yield wandb_run(run.folder, metrics["wandb_project"], metrics.get("wandb_group"), name, config)
