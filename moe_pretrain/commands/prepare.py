"""``prepare``: the corpora tokenised ahead of ``train``, or their checksums compared."""

import argparse

from moe_pretrain.commands.options import Parser, overrides_of, shows
from moe_pretrain.config.load import load
from moe_pretrain.train.corpora import check_corpora, prepare_corpora


def arguments(parser: Parser) -> None:
    """Overrides, and whether to check only."""
    parser.add_overrides()
    parser.add_argument("--check", action="store_true", help="compare the checksums of what is prepared")
    parser.add_examples("data=files data.paths=[books.txt]", "--check data=files data.paths=[books.txt]")


def run(options: argparse.Namespace) -> int:
    """Tokenise the corpora ahead of ``train``, or compare the checksums of those that are prepared."""
    overrides = overrides_of(options)
    if shows(options, overrides):
        return 0
    config = load(overrides)
    corpus, sets = check_corpora(config) if options.check else prepare_corpora(config, print)
    if options.check:
        print("every checksum is right")
    for name in config.evaluation.sets:
        print(f"evaluation.sets.{name}: {sets[name].num_documents:,} documents, {sets[name].num_tokens:,} tokens")
    print(corpus.describe_prepared(config.num_tokens))
    for folder in corpus.folders:
        print(f"shards: {folder}")
    return 0
