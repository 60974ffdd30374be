"""Common part of both benchmarks: interleaved timing and ratios with intervals.

Machines change speed while they are measured, so a ratio is only taken between variants of one run: every round runs
each variant once, in a new order.
"""

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def interleave(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    warmup_rounds: int,
    device: torch.device,
    cleanup: Callable[[], None],
    cpu_clock: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round; ``cleanup`` runs, untimed, after each.

    ``cpu_clock`` counts the processor time of this process instead of wall time: with one thread it is the steadier
    clock on a machine that others use too.
    """
    names = list(variants)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup_rounds, rounds):
        order.shuffle(names)
        for name in names:
            milliseconds = _milliseconds(variants[name], device, cpu_clock)
            cleanup()
            if round_number >= 0:
                times[name].append(milliseconds)
    return times


def _milliseconds(run: Callable[[], object], device: torch.device, cpu_clock: bool) -> float:
    if device.type != "cuda":
        clock = time.process_time if cpu_clock else time.perf_counter
        start = clock()
        run()
        return (clock() - start) * 1e3
    torch.cuda.synchronize(device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """``median(numerator) / median(denominator)`` with its 90 % interval, from 2000 resamplings of the rounds.

    Whole rounds are resampled: what slowed one variant in a round often slowed its neighbour too.
    """
    pairs = np.array([numerator, denominator])
    picks = np.random.default_rng(0).integers(0, pairs.shape[1], size=(2000, pairs.shape[1]))
    medians = np.median(pairs[:, picks], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.05, 0.95])
    value = np.median(pairs, axis=1)
    return f"{value[0] / value[1]:.2f} [{low:.2f}, {high:.2f}]"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """First column left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def device_name(device: torch.device) -> str:
    """Name for the title of a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
