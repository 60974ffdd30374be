"""Times the engine's own training steps and holds them against the plan: time, memory, kernels.

    python scripts/bench/bench_product.py model=700m batch.global_batch_tokens=131072         # on a GPU
    torchrun --nproc-per-node=2 scripts/bench/bench_product.py model=700m batch.global_batch_tokens=262144 \\
        parallel.processes=2 parallel.expert_parallel_size=2                                  # on two
    python scripts/bench/bench_product.py model=tiny                                          # what a CPU can say

Words of the form ``key=value`` are the overrides of ``moe-pretrain train``. Steps are those of a run: accumulated
micro-batches, rows of several documents, the configured balance level. Kernels and bytes are counted on tensors without
storage that take the branches of CUDA in bfloat16; on a GPU the kernels that were launched stand beside them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from bench_step import build_engine
from bench_tools import device_name, print_table

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.cuda_branches import count

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batch
from moe_pretrain.metrics.throughput import model_flops_utilization, peak_flops_per_second
from moe_pretrain.parallel.mesh import Mesh, build_mesh
from moe_pretrain.parallel.rendezvous import launched_world_size
from moe_pretrain.plan.local_parameters import local_parameters
from moe_pretrain.plan.memory import memory_per_rank
from moe_pretrain.plan.step_time import Machine, step_time
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.system.cpu import keep_freed_memory

GIB = 2**30
DOCUMENT_TOKENS = 600
"""Mean length of the documents."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for moe-pretrain train")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not")
    options = parser.parse_args()
    config = load([*options.overrides, "engine.check_every_steps=0"])
    run = plan_run(config, launched_world_size() or 1)
    on_gpu = run.device == "cuda"
    if not on_gpu:
        keep_freed_memory()
    mesh = build_mesh(config.parallel, run.device)
    batches = make_batches(config, run.batches, mesh)
    step = build_engine(config, run.dtype, run.batches, mesh, batches)
    for _ in range(2):  # the first compiles and makes the moments, at the level last_step the first also counts ahead
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, on_gpu) for _ in range(options.steps)]
    launched = launches(step) / run.batches.accumulation if on_gpu else None
    if not mesh.is_main:
        return

    median = float(np.median(seconds))
    tokens_per_second = run.batches.tokens_per_step / median
    name = device_name(mesh.device)
    peak = peak_flops_per_second(name) if on_gpu else None
    machine = Machine(peak=peak) if peak else Machine()
    parameters = local_parameters(config)
    planned_time = step_time(config, run, parameters, machine).total
    target = run.device, run.dtype
    planned_memory = memory_per_rank(config, *target, run.batches, mesh.world_size, 1.0, parameters).total
    kernels = moved = "-"
    if config.parallel.expert_parallel_size == 1:
        account = count(config, run.batches.micro_batch_size).account
        kernels, moved = f"{len(account.kernels)}", f"{account.total()[1] / 1e9:.2f}"
    print(
        f"\n{mesh.world_size} x {name}, torch {torch.__version__}: model={config.model.name} "
        f"router={config.router.name}, expert parallel {config.parallel.expert_parallel_size}, "
        f"ZeRO {config.engine.stage(run.dtype, mesh.world_size)}, {run.dtype}; "
        f"{run.batches.tokens_per_step} tokens per step in {run.batches.accumulation} micro-batches"
    )
    mfu = "-"
    if peak:
        flops = run.size.training_flops_per_token
        mfu = f"{model_flops_utilization(flops, tokens_per_second, mesh.world_size, peak):.1%}"
    held = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    planned_speed = run.batches.tokens_per_step / planned_time
    print_table(
        ["a step", "measured", "planned"],
        [
            ["seconds", f"{median:.3f}", f"{planned_time:.3f}" if on_gpu else "-"],
            ["tokens/s", f"{tokens_per_second:,.0f}", f"{planned_speed:,.0f}" if on_gpu else "-"],
            ["MFU", mfu, "-"],
            ["peak GiB of a rank", f"{held:.2f}" if on_gpu else "-", f"{planned_memory / GIB:.2f}"],
            ["kernels of a micro-batch", "-" if launched is None else f"{launched:.0f}", kernels],
            ["GB beside products, of a micro-batch", "-", moved],
        ],
    )


def make_batches(config: Config, plan: BatchPlan, mesh: Mesh) -> list[MicroBatch]:
    """This rank's micro-batches: random tokens in documents of geometric length."""
    random = np.random.default_rng(mesh.rank)
    shape = (plan.micro_batch_size, config.model.sequence_length + 1)
    own = mesh.rank * plan.accumulation
    return [
        build_micro_batch(
            random.integers(0, config.model.vocab_size, shape),
            random.random(shape) < 1 / DOCUMENT_TOKENS,
            np.arange(plan.micro_batch_size) + (own + index) * plan.micro_batch_size,
            isolate_documents=True,
        )
        for index in range(plan.accumulation)
    ]


def timed(step: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    if on_gpu:
        slowest = slowest.cuda()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def launches(step: Callable[[], object]) -> int:
    """Kernels of a step on this rank, copies and fills among them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(1 for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA)


if __name__ == "__main__":
    main()
