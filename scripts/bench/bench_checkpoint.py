"""Cost of a checkpoint: the wait of training, its speed to the disk, its size.

    python scripts/bench/bench_checkpoint.py [--rounds 5] [--steps 6] [--folder DIR] [OVERRIDE ...]

One model, one process, one disk. Each round measures, in a new order: steps without a save; the same steps after
an asynchronous save was begun; a save that training waits for; ``torch.save`` of the same bytes with an fsync. A busy
machine slows all of them alike, so the ratios stand.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from bench_step import make_batches

from moe_pretrain.checkpoint import store
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import pieces
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.parallel.mesh import build_mesh

THEORETICAL_BYTES = 12  # per parameter: float32 weight and two moments


class Bench:
    def __init__(self, config: Config, folder: Path, num_steps: int):
        run = plan_run(config, 1)
        self.mesh, plan = build_mesh(config.parallel, run.device), run.batches
        model = DecoderLM(config.model, config.router, self.mesh.shard)
        initialise(model, config.seed)
        prepare_experts(model, 1)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = TrainEngine(
            model, config.engine, run.dtype, config.optimizer, lambda step: 0.1, plan, self.mesh, config.seed
        )
        self.batches = make_batches(config, plan)
        self.policy = config.checkpoint
        self.num_steps, self.folder, self.saves = num_steps, folder, 0
        self.savers = {is_async: self.saver(is_async) for is_async in (True, False)}
        self.outcomes: dict[bool, list[store.Outcome]] = {True: [], False: []}

    def saver(self, is_async: bool) -> store.Saver:
        policy = replace(self.policy, keep_last=1, asynchronous=is_async)
        return store.Saver(self.engine, self.folder / str(is_async), policy, 600.0)

    def steps(self) -> None:
        for _ in range(self.num_steps):
            self.engine.step(1, self.batches)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self, is_async: bool) -> None:
        self.saves += 1
        self.savers[is_async].save(store.TrainState(step=self.saves))

    def take(self, is_async: bool) -> None:
        outcome = self.savers[is_async].take(wait=True)
        assert outcome is not None and outcome.path is not None, outcome
        self.outcomes[is_async].append(outcome)

    def with_async_save(self) -> None:
        """Steps with a save written behind them; the rest of the writing is not waited for."""
        self.save(True)
        self.steps()

    def torch_save(self) -> None:
        state = {
            f"{kind}/{piece.name}": values for piece in pieces(self.engine) for kind, values in piece.arrays().items()
        }
        with (self.folder / "torch.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed together")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    defaults = ["model=small", "batch.global_batch_tokens=4096", "batch.micro_batch_size=4", "metrics.wandb=off"]
    config = load([*defaults, "engine.check_every_steps=0", *options.overrides])
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(Bench(config, folder, options.steps), options.rounds)
    finally:
        shutil.rmtree(folder)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(bench: Bench, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"steps": [], "async": [], "sync": [], "torch": []}

    def one_async() -> float:
        taken = timed(bench.with_async_save)
        bench.take(True)
        return taken

    def one_sync() -> float:
        taken = timed(lambda: bench.save(False))
        bench.take(False)
        return taken

    variants: dict[str, Callable[[], float]] = {
        "steps": lambda: timed(bench.steps),
        "async": one_async,
        "sync": one_sync,
        "torch": lambda: timed(bench.torch_save),
    }
    order = random.Random(0)
    for number in range(-1, rounds):  # the first round only warms up
        names = list(variants)
        order.shuffle(names)
        for name in names:
            taken = variants[name]()
            if number >= 0:
                seconds[name].append(taken)
    report(bench, {name: median(values) for name, values in seconds.items()})


def report(bench: Bench, seconds: dict[str, float]) -> None:
    step = seconds["steps"] / bench.num_steps
    staged = median(outcome.staging_seconds for outcome in bench.outcomes[True][1:])
    behind = median(outcome.seconds for outcome in bench.outcomes[True][1:])
    size = bench.outcomes[False][-1].num_bytes
    print(f"{bench.num_parameters:,} parameters, {bench.mesh.device}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(f"a step                     {step:8.3f} s")
    print(f"training waits for staging {staged:8.3f} s = {staged / step:.2f} steps")
    slower = seconds["async"] - seconds["steps"]
    print(f"a save, all in all, costs  {slower:8.3f} s = {slower / step:.2f} steps, over {bench.num_steps} steps")
    print(f"complete on disk after     {behind:8.3f} s while training goes on")
    for name, label in (("sync", "save, training waits"), ("torch", "torch.save and fsync")):
        print(f"{label:<26} {seconds[name]:8.3f} s = {size / seconds[name] / 1e6:,.0f} MB/s")
    print(f"speed against torch.save   {seconds['torch'] / seconds['sync']:8.2f} times, with checksums")
    print(
        f"size                       {size / bench.num_parameters:8.2f} bytes per parameter, {THEORETICAL_BYTES} at "
        f"least (+{size / bench.num_parameters / THEORETICAL_BYTES - 1:.2%})"
    )


if __name__ == "__main__":
    main()
