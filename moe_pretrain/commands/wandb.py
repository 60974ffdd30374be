"""``wandb``: the offline files of all runs below a folder, written anew."""

import argparse
from pathlib import Path

from moe_pretrain.commands.options import Parser
from moe_pretrain.metrics.wandb_sink import wandb_runs, write_offline


def arguments(parser: Parser) -> None:
    """A folder of runs."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a run's folder, or one with runs below it")
    parser.add_examples("outputs")


def run(options: argparse.Namespace) -> int:
    """Write wandb's offline files of all runs below a folder anew, and print how to upload them."""
    for folder in write_offline(wandb_runs(options.folder, print)):
        print(f"wandb sync {folder}")
    return 0
