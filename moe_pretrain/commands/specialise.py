"""``specialise``: what the experts of runs specialise in."""

import argparse
from pathlib import Path

from moe_pretrain.analysis.specialisation import specialise
from moe_pretrain.commands.errors import for_one_of_each_variant
from moe_pretrain.commands.options import Parser, router_files
from moe_pretrain.config.load import read_run
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.recorded import allowed_router_file
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.train.corpora import prepare_corpora


def arguments(parser: Parser) -> None:
    """A folder of runs."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a run's folder, or one with runs below it")
    parser.add_argument(
        "router_files",
        metavar="router_file=PATH",
        nargs="*",
        default=[],
        help="python of a run's own router, which may be run",
    )
    parser.add_examples("outputs/tiny-top_k", "outputs/my_sweep", "outputs/own router_file=my_router.py")


def run(options: argparse.Namespace) -> int:
    """Say what the experts of a run, or of a run of each variant, specialise in."""
    given = router_files(options.router_files)
    return for_one_of_each_variant(options.folder, lambda folder: _specialise_one(folder, given))


def _specialise_one(folder: Path, given: list[str]) -> int:
    config = read_run(folder, lambda file: allowed_router_file(file, given, str(folder)))
    if config.router.dense_experts or not config.model.moe_layers:
        raise ConfigError(f"router={config.router.name} in {folder}: a model without routing has nothing to specialise")
    corpus, sets = prepare_corpora(config, print)
    # A mixture's sources are among the sets already.
    return specialise(config, plan_run(config, 1), folder, {**corpus.validation_sets(), **sets}, print)
