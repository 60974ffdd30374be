"""What a checkpoint costs: how long training waits, how fast it is written, how large it is.

    python scripts/bench_checkpoint.py [--processes 1] [--steps 24] [--folder DIR] [OVERRIDE ...]

One model, one disk, one process: steps without saves, steps with an asynchronous save every few steps, steps with a save
that training waits for, and ``torch.save`` of the same bytes, taken in turn so that a busy machine slows all alike.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.checkpoint.layout import MOMENTS, pieces
from moe_pretrain.config import Config, load
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.pretrain import resolve_device
from moe_pretrain.study.verify import build_engine, own_micro_batches

THEORETICAL_BYTES = 12  # float32 weight and two moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="steps of each kind")
    parser.add_argument("--every", type=int, default=8, help="steps between saves")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    defaults = ["model=small", "batch.global_batch_tokens=4096", "batch.micro_batch_size=4", "metrics.wandb=off"]
    config = load([*defaults, "engine.check_every_steps=0", *options.overrides])
    print(f"{os.cpu_count()} CPUs, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(config, Path(folder), options.steps, options.every)


def measure(config: Config, folder: Path, num_steps: int, every: int) -> None:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
