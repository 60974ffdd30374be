"""A byte-level BPE learnt from the corpus, where none exists already."""

from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from moe_pretrain.data.documents.config import CorpusConfig, describe
from moe_pretrain.data.documents.hub import Retries
from moe_pretrain.data.documents.work_units import sample_texts
from moe_pretrain.data.tokenizer.load import load_pretrained, load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import (
    END_OF_DOCUMENT,
    LONGEST_WHOLE,
    SPACE_AFTER_WORD,
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerConfig,
)
from moe_pretrain.system.files import write_whole

_SAMPLE_BYTES = 20_000_000


def make_tokenizer(
    corpus: CorpusConfig,
    config: TokenizerConfig,
    folder: Path,
    report: Callable[[str], None],
    retries: Retries | None = None,
) -> Tokenizer:
    """Load the tokenizer, or learn it from the first 20 MB of training documents and leave it in ``folder``.

    Local files take turns in those 20 MB; a stream gives what comes first. ``retries``: see ``sources.stream_units``.

    Raises:
        ValueError: It cannot be loaded, or the source cannot be read.
    """
    if config.kind == "pretrained":
        return load_pretrained(config)
    file = folder / TOKENIZER_FILE
    if not file.exists():
        report(f"training a {config.vocab_size}-token tokenizer ({describe(corpus)})")
        train_tokenizer(sample_texts(corpus, _SAMPLE_BYTES, retries), config.vocab_size, file)
    return load_tokenizer_file(file)


def train_tokenizer(texts: Iterator[str], vocab_size: int, file: Path) -> None:
    """Learn a byte-level BPE and write it as a ``tokenizer.json``.

    The same texts give the same file.

    Args:
        texts: Training documents.
        vocab_size: Tokens to learn, the end of a document among them.
        file: Written whole or not at all; its folder exists.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    write_whole(file, model.to_str(pretty=True))


def _parts(text: str) -> Iterator[str]:
    """A long text cut before white space, where ``ByteLevel`` cuts too: the words and their counts stay the same."""
    start = 0
    while len(text) - start > LONGEST_WHOLE:
        found = SPACE_AFTER_WORD.search(text, start + LONGEST_WHOLE // 2)
        if found is None:
            break
        yield text[start : found.end() - 1]
        start = found.end() - 1
    yield text[start:]
