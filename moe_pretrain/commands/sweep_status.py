"""``sweep-status``: how far the jobs of a sweep are."""

import argparse
from pathlib import Path

from moe_pretrain.commands.options import Parser
from moe_pretrain.sweep.status import describe_sweep, read_progress, table


def arguments(parser: Parser) -> None:
    """A sweep's folder."""
    parser.add_argument("folder", metavar="SWEEP_FOLDER", type=Path, help="OUTPUT_DIR/SWEEP_NAME")
    parser.add_examples("outputs/sweep-router-seed-1a2b3c4d")


def run(options: argparse.Namespace) -> int:
    """Print how far the jobs of a sweep are."""
    jobs = read_progress(options.folder)
    print(describe_sweep(jobs), *table(jobs), sep="\n")
    return 0
