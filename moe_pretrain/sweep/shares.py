"""What each of several jobs side by side gets of this machine."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def shares(parallel: int, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Variables for each of ``parallel`` places at which jobs run at the same time.

    Args:
        parallel: Number of places; a job that has the machine to itself needs no share.
        jobs: The resolved configurations of the jobs that are to be run at them.

    Raises:
        ValueError: There are not enough GPUs.
    """
    if parallel == 1 or not jobs:
        return [{} for _ in range(parallel)]
    processes = max(values["parallel"]["processes"] for values in jobs)
    uses_gpus = torch.cuda.is_available() and any(values["engine"]["device"] != "cpu" for values in jobs)
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (parallel * processes))))
    gpus = divide(visible_gpus(), parallel, processes) if uses_gpus else [{} for _ in range(parallel)]
    return [{"OMP_NUM_THREADS": threads, **each} for each in gpus]


def visible_gpus() -> list[str]:
    """Names of this process's GPUs, as ``CUDA_VISIBLE_DEVICES`` has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def divide(gpus: Sequence[str], parallel: int, processes: int) -> list[dict[str, str]]:
    """``processes`` GPUs for each of ``parallel`` places, none for two of them: they would slow each other down."""
    if len(gpus) < parallel * processes:
        raise ValueError(
            f"sweep.parallel={parallel} must be at most {len(gpus) // processes}: runs of {processes} process"
            f"{'es' if processes > 1 else ''} each, {len(gpus)} GPUs"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * processes : (place + 1) * processes])}
        for place in range(parallel)
    ]
