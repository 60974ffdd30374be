"""``evaluate``: the loss of a run on text of any kind."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_pretrain.commands.options import Parser
from moe_pretrain.commands.trained_run import add_run, add_tokenizer, find_tokenizer, open_run
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.inference.corpus_loss import corpus_loss


def arguments(parser: Parser) -> None:
    """A run, and files of text."""
    add_run(parser)
    parser.add_argument(
        "words",
        metavar="FILE",
        nargs="+",
        help="text, or .jsonl; router_file=PATH: python of the run's own router",
    )
    parser.add_argument("--column", default="text", help="field of a .jsonl row that holds the text (default: text)")
    parser.add_argument("--max-documents", type=int, metavar="N", help="documents of each file that are read")
    add_tokenizer(parser)
    parser.add_examples("outputs/tiny-top_k books.txt code.jsonl --max-documents=100")


def run(options: argparse.Namespace) -> int:
    """Print the loss on each file."""
    options.router_files = [word for word in options.words if word.startswith("router_file=")]
    files = [Path(word) for word in options.words if not word.startswith("router_file=")]
    if not files:
        raise ConfigError("FILE must name a text to evaluate on")
    if options.max_documents is not None and options.max_documents < 1:
        raise ConfigError(f"--max-documents={options.max_documents} must be at least 1")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"FILE={file} must be a file that exists")
        next(_texts(file, options.column), None)  # a wrong column is said before a model is loaded
    trained = open_run(options)
    tokenizer, _ = find_tokenizer(trained, options.tokenizer)
    model = trained.model("cuda" if torch.cuda.is_available() else "cpu")
    if not all(layer.router.causal_in_evaluation for layer in model.moe_layers()):
        raise ConfigError(
            f"router={trained.config.router.name}: a token's experts depend on later tokens in evaluation too, so that "
            "its loss is not that of a language model"
        )
    print(f"{'documents':>9} {'tokens':>10} {'nats/token':>10} {'perplexity':>10} {'bits/byte':>9}  file")
    for file in files:
        texts = _texts(file, options.column)
        found = corpus_loss(model, tokenizer, itertools.islice(texts, options.max_documents))
        if not found.documents:
            raise ConfigError(f"FILE={file} holds no text")
        print(
            f"{found.documents:>9,} {found.tokens:>10,} {found.loss:>10.4f} {found.perplexity:>10.2f} "
            f"{found.bits_per_byte:>9.4f}  {file}",
            flush=True,
        )
    return 0


def _texts(file: Path, column: str) -> Iterator[str]:
    """The documents of a file: one for each row of a .jsonl, else the whole of it.

    Raises:
        ConfigError: It is not UTF-8, or a row has no such text.
    """
    try:
        if file.suffix != ".jsonl":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[column]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise ConfigError(f"FILE={file} has no text {column!r} in line {number}: --column names the field")
                yield text
    except UnicodeDecodeError as error:
        raise ConfigError(f"FILE={file} must be UTF-8: {error.reason} at byte {error.start}") from None
