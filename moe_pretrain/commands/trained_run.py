"""Arguments of commands that go on after training, and the run and the tokenizer that they name."""

import argparse
from pathlib import Path

from moe_pretrain.commands.options import Parser, router_files
from moe_pretrain.config.recorded import allowed_router_file
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import TrainedRun, open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer
from moe_pretrain.huggingface.tokenizer_files import load_run_tokenizer


def add_run(parser: Parser) -> None:
    """Take a run, or one of its checkpoints."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder (its newest checkpoint), or a checkpoint")


def add_router_files(parser: Parser) -> None:
    """Take the file of a run's own router; behind all other words."""
    parser.add_argument(
        "router_files",
        metavar="router_file=PATH",
        nargs="*",
        default=[],
        help="python of the run's own router, which may be run",
    )


def add_tokenizer(parser: Parser) -> None:
    """Take the place of the tokenizer."""
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="the run's tokenizer, where its cache is not at hand"
    )


def open_run(options: argparse.Namespace) -> TrainedRun:
    """The run that the options name.

    Raises:
        ConfigError: There is no such run.
        CheckpointError: It has no good checkpoint.
    """
    given = router_files(options.router_files)
    return open_trained(options.run, lambda file: allowed_router_file(file, given, str(options.run)), print)


def find_tokenizer(run: TrainedRun, path: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer of ``run`` and its place: ``path``, the one that its configuration names, or one in its cache.

    Raises:
        ConfigError: It is nowhere.
        ValueError: The one that is named is another one.
    """
    config, fingerprint = run.config, run.state.identity.tokenizer
    if path is None and config.tokenizer.kind == "pretrained":
        path = Path(str(config.tokenizer.path))
    if path is not None:
        return load_run_tokenizer(path, fingerprint, config.tokenizer.end_of_document), path
    cache = Path(config.run.cache_dir)
    for file in sorted([*cache.glob(f"*/{TOKENIZER_FILE}"), *cache.glob(f"*/*/{TOKENIZER_FILE}")]):
        try:
            tokenizer = load_tokenizer_file(file)
        except ValueError:
            continue  # of another corpus, and damaged
        if tokenizer.fingerprint == fingerprint:
            return tokenizer, file
    raise ConfigError(f"the tokenizer of {run.folder} is not in {cache}: --tokenizer=PATH says where it is")
