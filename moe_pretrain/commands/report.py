"""``report``: a run's HTML page."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.report import write_report
from moe_pretrain.commands.options import Parser


def arguments(parser: Parser) -> None:
    """A run's folder."""
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="OUTPUT_DIR/RUN_NAME")
    parser.add_examples("outputs/tiny-top_k")


def run(options: argparse.Namespace) -> int:
    """Write a run's HTML page and print where it is."""
    print(write_report(options.folder))
    return 0
