"""``average``: the mean of a run's last checkpoints."""

import argparse
from pathlib import Path

from moe_pretrain.commands.options import Parser, router_files
from moe_pretrain.commands.trained_run import add_router_files
from moe_pretrain.config.load import read_run
from moe_pretrain.config.recorded import allowed_router_file
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.surgery.average import average


def arguments(parser: Parser) -> None:
    """A run, and how many of its checkpoints."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    add_router_files(parser)
    parser.add_argument("--last", type=int, default=5, metavar="N", help="checkpoints, the newest ones (default: 5)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="folder of the new run (default: RUN-average)")
    parser.add_examples("outputs/tiny-top_k --last=5", "outputs/tiny-top_k --last=3 --to=outputs/mean")


def run(options: argparse.Namespace) -> int:
    """Write the mean into a run folder of its own."""
    given = router_files(options.router_files)
    config = read_run(options.run, lambda file: allowed_router_file(file, given, str(options.run)))
    source = options.run.absolute()
    folder = options.to or options.run.parent / f"{source.name}-average"
    place, steps = average(options.run, folder, options.last, meta_model(config.model, config.router))
    print(f"written: {place}, the mean of the steps {', '.join(f'{step:,}' for step in steps)} of {config.run.name}")
    return 0
