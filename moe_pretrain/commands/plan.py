"""``plan``: what a run would cost; starts nothing."""

import argparse

from moe_pretrain.commands.options import Parser, overrides_of, shows
from moe_pretrain.plan.plan import Assumptions, describe

_ASSUMED = {
    "mfu": "share of the peak that model FLOPs reach, in (0, 1], in place of the estimate by part",
    "peak": "FLOP/s of one device",
    "memory_bandwidth": "GB/s of its memory that copies reach",
    "link": "GB/s that one device sends to others of its node",
    "network": "GB/s that one device sends to other nodes",
    "gpus_per_node": "devices of a node",
    "host_link": "GB/s from one device to the memory of its host",
    "disk": "GB/s that a node writes",
    "gpu_memory": "GiB of one device",
    "worst_load": "rows on the busiest rank over the mean, under expert parallelism",
}


def arguments(parser: Parser) -> None:
    """Overrides, and what is assumed of the machine."""
    parser.add_overrides()
    for name, meaning in _ASSUMED.items():
        default = getattr(Assumptions, name)
        help_text = meaning if default is None else f"{meaning} (default {default:g})"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="X", type=_number, default=default, help=help_text)
    parser.add_examples(
        "model=700m router=top_p", "model=4b parallel.processes=8 --gpu-memory=141 --memory-bandwidth=4300"
    )


def run(options: argparse.Namespace) -> int:
    """Print what a run would cost."""
    overrides = overrides_of(options)
    if shows(options, overrides):
        return 0
    return describe(overrides, Assumptions(**{name: getattr(options, name) for name in _ASSUMED}), print)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from error
