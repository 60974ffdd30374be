"""Text to tokens: a byte-level BPE trained on the corpus, or any tokenizer that exists already."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import xxhash

from moe_pretrain.data.documents.config import CorpusConfig, describe
from moe_pretrain.data.documents.hub import Retries, require_network
from moe_pretrain.data.documents.work_units import sample_texts
from moe_pretrain.system.words import one_line

_TOKENIZER_SAMPLE_BYTES = 20_000_000

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_SMALLEST_TRAINED = 256 + 1  # one token per byte, and the end of a document
_HANDFUL = 16  # transformers makes an empty vocabulary of files it does not understand (5.23)

# Names that published tokenizer.json files, which do not say what their tokens are for, give to
# the token between documents.
_KNOWN_SEPARATORS = (
    END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "<s>",
)  # fmt: skip

# Words, digits, indentation, accents, other scripts, an emoji: what tokenizers differ in.
_PROBE = "The 3 quick foxes\n\tdidn't  pay 1,024.50; def f(x):\n        return x  # naïve Größe 東京 🙂"


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    Attributes:
        kind: ``train`` learns a byte-level BPE from the corpus' training documents,
            ``pretrained`` loads one.
        vocab_size: Tokens to learn, at least 257; a small corpus may give fewer. With
            ``pretrained``, the size it must have, or 0 for whatever it has.
        path: ``pretrained``: a ``tokenizer.json``, a folder, or a Hugging Face name.
            ``train``: None.
    """

    kind: Literal["train", "pretrained"]
    vocab_size: int
    path: str | None

    def __post_init__(self) -> None:
        if self.kind == "train":
            if self.path is not None:
                raise ValueError(f"tokenizer.path={self.path} has no effect with tokenizer.kind=train")
            if self.vocab_size < _SMALLEST_TRAINED:
                raise ValueError(
                    f"tokenizer.vocab_size={self.vocab_size} must be at least "
                    f"{_SMALLEST_TRAINED} (256 bytes and {END_OF_DOCUMENT})"
                )
        elif not self.path:
            raise ValueError("tokenizer.path must name a tokenizer with tokenizer.kind=pretrained")


class Tokenizer:
    """A tokenizer that adds no special token and recognises none in a text.

    The end-of-document token comes from the shard writer alone.

    Args:
        encode: Texts to token ids.
        decode: Token ids to text.
        vocabulary: Token to id.
        end_of_document: Id of the token after each document.
        definition: Bytes that define the tokenizer, for the fingerprint.

    Attributes:
        vocab_size: One more than the largest id.
        end_of_document: Id of the token after each document.
        fingerprint: Hash of the definition and of the tokens of a fixed text: the same files
            read by another version of a library may cut words differently.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        vocabulary: dict[str, int],
        end_of_document: int,
        definition: bytes,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = end_of_document
        probe_tokens = json.dumps([encode([_PROBE])[0], end_of_document]).encode()
        self.fingerprint = xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_digest(definition) + probe_tokens)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._encode(texts)

    def decode(self, ids: list[int]) -> str:
        """The text behind token ids, special tokens included."""
        return self._decode(ids)


def train_tokenizer(texts: Iterator[str], vocab_size: int, file: Path) -> None:
    """Learn a byte-level BPE and write it as a ``tokenizer.json``.

    The same texts give the same file.

    Args:
        texts: Training documents.
        vocab_size: Tokens to learn, the end of a document among them.
        file: Where to write.
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
    model.train_from_iterator(texts, trainer)
    model.save(str(file))


def load_tokenizer_file(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ValueError: It cannot be read, is next to empty, or has no token that ends a document.
    """
    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"tokenizer.path={file}: not a {TOKENIZER_FILE}: {one_line(error)}") from None
    vocabulary = model.get_vocab(with_added_tokens=True)
    separator = next((name for name in _KNOWN_SEPARATORS if name in vocabulary), None)
    end_of_document = None if separator is None else vocabulary[separator]
    return _from_backend(model, end_of_document, file.read_bytes(), str(file))


def load_pretrained(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that ``config.path`` names.

    Raises:
        ValueError: It cannot be found or read, is next to empty, has no token that ends a
            document, or has another size than ``config.vocab_size`` says.
    """
    assert config.kind == "pretrained" and config.path is not None
    path = Path(config.path)
    if path.is_file():
        tokenizer = load_tokenizer_file(path)
    else:
        tokenizer = _load_with_transformers(config.path)
    if config.vocab_size not in (0, tokenizer.vocab_size):
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} must be {tokenizer.vocab_size}, the size "
            f"of tokenizer.path={config.path}, or 0 for whatever it has"
        )
    return tokenizer


def _load_with_transformers(name: str) -> Tokenizer:
    import transformers

    def load(local_files_only: bool) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        except Exception as error:  # whatever the tokenizer's class raises
            raise ValueError(f"tokenizer.path={name}: {one_line(error)}") from None

    try:
        loaded = load(local_files_only=True)
    except ValueError:
        if Path(name).is_dir():
            raise
        require_network(
            f"tokenizer.path={name} is no file or folder here, and the Hugging Face hub",
            "use tokenizer.kind=train or a local tokenizer.path",
        )
        loaded = load(local_files_only=False)

    roles = (loaded.eos_token_id, loaded.bos_token_id, getattr(loaded, "sep_token_id", None))
    end_of_document = next((token for token in roles if token is not None), None)
    vocabulary = loaded.get_vocab()
    file = Path(name) / TOKENIZER_FILE
    definition = file.read_bytes() if file.is_file() else json.dumps(sorted(vocabulary.items())).encode()
    if loaded.is_fast:
        return _from_backend(loaded.backend_tokenizer, end_of_document, definition, name)
    return Tokenizer(
        encode=lambda texts: loaded(texts, add_special_tokens=False)["input_ids"],
        decode=lambda ids: loaded.decode(ids),
        vocabulary=vocabulary,
        end_of_document=_checked_end_of_document(end_of_document, vocabulary, name),
        definition=definition,
    )


def _from_backend(model: tokenizers.Tokenizer, end_of_document: int | None, definition: bytes, name: str) -> Tokenizer:
    model.no_truncation()
    model.no_padding()
    # "<|endoftext|>" written in a document is text about tokenizers, not the end of a document.
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=True)
    return Tokenizer(
        encode=lambda texts: [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: model.decode(ids, skip_special_tokens=False),
        vocabulary=vocabulary,
        end_of_document=_checked_end_of_document(end_of_document, vocabulary, name),
        definition=definition,
    )


def _checked_end_of_document(end_of_document: int | None, vocabulary: dict[str, int], name: str) -> int:
    if len(vocabulary) <= _HANDFUL:
        raise ValueError(
            f"tokenizer.path={name}: only {len(vocabulary)} tokens were read, the files are "
            "not of the kind that its configuration says"
        )
    if end_of_document is None:
        raise ValueError(f"tokenizer.path={name}: needs an eos, bos or sep token to put between documents")
    return end_of_document


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
        half_written = file.with_name(f"{TOKENIZER_FILE}.tmp")
        train_tokenizer(sample_texts(corpus, _TOKENIZER_SAMPLE_BYTES, retries), config.vocab_size, half_written)
        half_written.rename(file)
    return load_tokenizer_file(file)
