"""``export``: a run as a folder that transformers loads."""

import argparse
from pathlib import Path

from moe_pretrain.commands.options import Parser
from moe_pretrain.commands.trained_run import add_router_files, add_run, add_tokenizer, find_tokenizer, open_run
from moe_pretrain.huggingface.export import export
from moe_pretrain.system.files import check_unused

_GIGABYTE = 1_000_000_000


def arguments(parser: Parser) -> None:
    """A run and the folder to write."""
    add_run(parser)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; empty, or not there yet")
    add_router_files(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights (default: float32)"
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file of weights (default: 5)"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the logits with the framework's own on real text (default), which takes the model in memory",
    )
    add_tokenizer(parser)
    parser.add_examples(
        "outputs/tiny-top_k exported",
        "outputs/tiny-top_k/checkpoints/step_00000100 exported --dtype=bfloat16",
        "outputs/4b exported --shard-gb=2 --no-check",
    )


def run(options: argparse.Namespace) -> int:
    """Write the folder."""
    if not options.shard_gb > 0:
        raise ValueError(f"--shard-gb={options.shard_gb} must be positive")
    check_unused(options.folder)
    trained = open_run(options)
    tokenizer, path = find_tokenizer(trained, options.tokenizer)
    size = round(options.shard_gb * _GIGABYTE)
    export(trained, options.folder, tokenizer, path, options.dtype, size, options.check, print)
    return 0
