"""``ladder``: the law of loss over size and tokens that the runs of a folder follow."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.compare.tables import markdown_table
from moe_pretrain.analysis.ladder import (
    as_values,
    choose_reference,
    gain_table,
    gains,
    law_table,
    optimum_table,
    read_ladders,
)
from moe_pretrain.commands.options import Parser
from moe_pretrain.run_folder.paths import LADDER_FILE
from moe_pretrain.run_folder.record import find_runs
from moe_pretrain.system.files import write_json


def arguments(parser: Parser) -> None:
    """A folder of runs, what counts as size, and how far to look beyond it."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="runs below it, of four sizes at least")
    parser.add_argument("--parameters", choices=("active", "total"), default="active", help="what N counts")
    parser.add_argument("--reference", metavar="SCHEME", help="the scheme that the others are compared with")
    parser.add_argument("--scale", type=float, default=10.0, metavar="X", help="larger scale: X times size and tokens")
    parser.add_argument("--without-diverged", action="store_true", help="leave out runs that diverged")
    parser.add_examples("outputs/my_sweep", "outputs/my_sweep --reference top_k --scale 30")


def run(options: argparse.Namespace) -> int:
    """Fit the law to each scheme below a folder; print the constants, the optimum and which gains survive."""
    if not options.scale > 1:
        raise ValueError(f"--scale={options.scale:g} must be more than 1")
    root, scale = options.folder, options.scale
    ladders = read_ladders(find_runs(root), root, options.parameters, options.without_diverged)
    reference = choose_reference(ladders, options.reference)
    found = gains(ladders, reference, scale)
    print(f"L = E + A N^-alpha + B D^-beta, N the {options.parameters} parameters, D tokens; 95% intervals\n")
    print(markdown_table(law_table(ladders)))
    print("\nLowest loss for the FLOPs of the dearest run and for more; beyond the runs it is extrapolated:\n")
    print(markdown_table(optimum_table(ladders, scale)))
    if found:
        print("\n" + markdown_table(gain_table(found, reference.name, scale)))
    write_json(root / LADDER_FILE, as_values(ladders, found))
    print(f"\n{root / LADDER_FILE}")
    return 0
