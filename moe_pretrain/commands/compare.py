"""``compare``: all runs below a folder, variant against variant."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.commands.options import Parser


def arguments(parser: Parser) -> None:
    """A folder of runs, and the variant that the others are compared with."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="runs below it are compared")
    parser.add_argument("--reference", metavar="VARIANT", help="the variant that the others are compared with")
    parser.add_examples("outputs/my_sweep", "outputs/my_sweep --reference router=top_k")


def run(options: argparse.Namespace) -> int:
    """Write the comparison of all runs below a folder, print its table and where it is."""
    path, text = write_comparison(options.folder, options.reference)
    print(text)
    print(path)
    return 0
