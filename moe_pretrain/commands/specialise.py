"""``specialise``: what the experts of runs specialise in."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.specialisation import specialise
from moe_pretrain.commands.errors import for_one_of_each_variant
from moe_pretrain.commands.options import Parser
from moe_pretrain.config.load import read_run
from moe_pretrain.config.preflight import resolve_device
from moe_pretrain.data import TokenizedMixture
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
    if not isinstance(corpus, TokenizedMixture):  # a mixture's sources are among the sets by name
        sets = {"held-out documents": corpus.validation, **sets}
    device, _ = resolve_device(config.engine)
    return specialise(config, folder, sets, device, print)
