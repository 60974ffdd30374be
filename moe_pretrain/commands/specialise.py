"""``specialise``: what the experts of runs specialise in."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.specialisation import specialise
from moe_pretrain.commands.errors import for_one_of_each_variant
from moe_pretrain.commands.options import Parser
from moe_pretrain.config.load import read_run
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.train.corpora import prepare_corpora


def arguments(parser: Parser) -> None:
    """A folder of runs."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a run's folder, or one with runs below it")
    parser.add_examples("outputs/tiny-top_k", "outputs/my_sweep")


def run(options: argparse.Namespace) -> int:
    """Say what the experts of a run, or of a run of each variant, specialise in."""
    return for_one_of_each_variant(options.folder, _specialise_one)


def _specialise_one(folder: Path) -> int:
    config = read_run(folder)
    corpus, sets = prepare_corpora(config, print)
    # A mixture's sources are among the sets already.
    return specialise(config, plan_run(config, 1), folder, {**corpus.validation_sets(), **sets}, print)
