"""Text to tokens: a byte-level BPE trained on the corpus, or any tokenizer that exists already."""

import importlib.util
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import xxhash

from moe_pretrain.data.documents.config import CorpusConfig, describe
from moe_pretrain.data.documents.hub import Retries, require_network
from moe_pretrain.data.documents.work_units import sample_texts
from moe_pretrain.system.files import write_whole
from moe_pretrain.system.words import one_line

_TOKENIZER_SAMPLE_BYTES = 20_000_000

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_SMALLEST_TRAINED = 256 + 1  # one token per byte, and the end of a document
_HANDFUL = 16  # transformers makes an empty vocabulary of files it does not understand (5.23)

# Files beside a tokenizer.json that say what its tokens are for, and what ends a document, best first.
_ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ROLES = ("eos_token", "bos_token", "sep_token")
# A tokenizer.json on its own does not say it: names that published ones give to the token, then makeshifts.
_KNOWN_ENDS = (
    END_OF_DOCUMENT, "<|end_of_text|>", "<|endofdocument|>", "<|end_of_document|>", "<｜end▁of▁sentence｜>", "</s>",
    "<eos>", "<|eos|>", "<|im_end|>",
)  # fmt: skip
_MAKESHIFT_ENDS = ("[SEP]", "<s>")
_OVERRIDE = "tokenizer.end_of_document names the token to put between documents"

_LONGEST_WHOLE = 1_000_000  # characters
_CUT_CONTEXT = 1000
_CUTS_TRIED = 100
_SPACE_AFTER_WORD = re.compile(r"\S\s")

# Words, digits, indentation, accents, other scripts, an emoji: what tokenizers differ in.
_PROBE = "The 3 quick foxes\n\tdidn't  pay 1,024.50; def f(x):\n        return x  # naïve Größe 東京 🙂"


@dataclass(frozen=True)
class TokenizerConfig:
    """Choice of the tokenizer.

    Attributes:
        kind: ``train`` learns a byte-level BPE from the corpus' training documents,
            ``pretrained`` loads one.
        vocab_size: Tokens to learn, at least 257; a small corpus may give fewer. With
            ``pretrained``, the size it must have, or 0 for whatever it has.
        path: ``pretrained``: a ``tokenizer.json``, a folder, or a Hugging Face name.
            ``train``: None.
        end_of_document: ``pretrained``: the token to put between documents; None for the one that the
            tokenizer's own configuration names: its ``eos_token``, or ``bos_token`` or ``sep_token``.
        max_unknown: Share of unknown tokens in a corpus above which it is refused, in [0, 1].
    """

    kind: Literal["train", "pretrained"]
    vocab_size: int
    path: str | None
    end_of_document: str | None = None
    max_unknown: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_unknown <= 1.0:
            raise ValueError(f"tokenizer.max_unknown={self.max_unknown} must be in [0, 1]")
        if self.kind == "train":
            if self.end_of_document is not None:
                raise ValueError(
                    f"tokenizer.end_of_document={self.end_of_document} has no effect with tokenizer.kind=train, whose "
                    f"token is {END_OF_DOCUMENT}; tokenizer=pretrained tokenizer.path=PATH takes one that is there"
                )
            if self.path is not None:
                raise ValueError(
                    f"tokenizer.path={self.path} has no effect with tokenizer.kind=train: add tokenizer=pretrained"
                )
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
        unknown: Id of the token for what it does not know, or None.

    Attributes:
        vocab_size: One more than the largest id.
        end_of_document: Id of the token after each document.
        end_token: That token.
        unknown: Id of the token for what it does not know; None where it has none, or ends documents with it.
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
        unknown: int | None,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = end_of_document
        self.end_token = next(token for token, index in vocabulary.items() if index == end_of_document)
        self.unknown = None if unknown == end_of_document else unknown
        probe_tokens = json.dumps([encode([_PROBE])[0], end_of_document]).encode()
        self.fingerprint = xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_digest(definition) + probe_tokens)

    def describe(self) -> str:
        """Its size and its end-of-document token, in a line."""
        return f"tokenizer: {self.vocab_size:,} tokens, {self.end_token} (id {self.end_of_document}) ends each document"

    def describe_unknown(self, unknown: int, tokens: int, max_unknown: float) -> str:
        """Share of unknown tokens in a corpus, in a clause; nothing where there are none.

        Raises:
            ValueError: The share is larger than ``max_unknown``.
        """
        if unknown > max_unknown * tokens:
            raise ValueError(
                f"tokenizer: {unknown / tokens:.2%} of the text's tokens are unknown to it (id {self.unknown}), more "
                f"than tokenizer.max_unknown={max_unknown}: it was made for other text; take another, or allow more"
            )
        return f"; {unknown / tokens:.2%} of the text's tokens are unknown to the tokenizer" if unknown else ""

    def encode_batch(self, texts: list[str]) -> list[list[int] | np.ndarray]:
        """Token ids of each text.

        A tokenizer takes a hundred bytes and more for each character that it works on, so a long text is cut at white
        space, where cutting does not change the tokens.
        """
        if all(len(text) <= _LONGEST_WHOLE for text in texts):
            return list(self._encode(texts))
        return [self._encode_long(text) if len(text) > _LONGEST_WHOLE else self._encode([text])[0] for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        parts, start = [], 0
        while start < len(text):
            stop = self._next_cut(text, start + _LONGEST_WHOLE // 2)
            parts.append(np.array(self._encode([text[start:stop]])[0], dtype=np.uint32))  # half of what int64 takes
            start = stop
        return np.concatenate(parts)

    def _next_cut(self, text: str, start: int) -> int:
        """The first place from ``start`` on, before white space, where the tokens of both sides are those of the whole.

        What is around the place shows that: a tokenizer that looks at a whole text, or puts something before it, cuts
        nowhere.
        """
        for _ in range(_CUTS_TRIED):
            found = _SPACE_AFTER_WORD.search(text, start)
            if found is None or found.end() - 1 >= len(text):
                break
            cut = found.end() - 1
            before, after = text[max(0, cut - _CUT_CONTEXT) : cut], text[cut : cut + _CUT_CONTEXT]
            whole, left, right = self._encode([before + after, before, after])
            if whole == [*left, *right]:
                return cut
            start = found.end() + _CUT_CONTEXT
        return len(text)

    def decode(self, ids: list[int]) -> str:
        """The text behind token ids, special tokens included."""
        return self._decode(ids)


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
    while len(text) - start > _LONGEST_WHOLE:
        found = _SPACE_AFTER_WORD.search(text, start + _LONGEST_WHOLE // 2)
        if found is None:
            break
        yield text[start : found.end() - 1]
        start = found.end() - 1
    yield text[start:]


def load_tokenizer_file(file: Path, end_of_document: str | None = None) -> Tokenizer:
    """Read a ``tokenizer.json``, and from the files beside it which token ends a document.

    Args:
        file: The file.
        end_of_document: The token that ends a document, whatever the files say; or None.

    Raises:
        ValueError: It cannot be read, is next to empty, or has no token that ends a document.
    """
    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"tokenizer.path={file}: not a {TOKENIZER_FILE}: {one_line(error)}") from None
    definition = file.read_bytes()
    specials = [token.content for _, token in sorted(model.get_added_tokens_decoder().items()) if token.special]
    vocabulary = model.get_vocab(with_added_tokens=True)
    _check_size(vocabulary, str(file))
    end = end_of_document or _end_of_files(file, specials)
    end_id = _checked_end(end, end_of_document is not None, vocabulary, specials, str(file))
    return _from_backend(model, end_id, definition, vocabulary.get(_unknown_token(definition)))


def _end_of_files(file: Path, specials: list[str]) -> str | None:
    """The token between documents, by what the files beside a ``tokenizer.json`` say, or else by its name.

    Raises:
        ValueError: Nothing is said, and more than one name would do.
    """
    for name in _ROLE_FILES:
        try:
            roles = json.loads((file.parent / name).read_bytes())
        except (OSError, ValueError):
            continue
        for role in _ROLES if isinstance(roles, dict) else ():
            token = roles.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return str(token)
    known = [token for token in _KNOWN_ENDS if token in specials]
    if len(known) > 1:
        raise ValueError(
            f"tokenizer.path={file}: no {_ROLE_FILES[0]} beside it says which of {' '.join(known)} ends a document: "
            f"{_OVERRIDE}"
        )
    return next((token for token in (*known, *_MAKESHIFT_ENDS) if token in specials), None)


def _unknown_token(definition: bytes) -> str:
    """The unknown token of a ``tokenizer.json``, or nothing."""
    try:
        model = json.loads(definition)["model"]
        if model.get("unk_id") is not None:  # Unigram
            return str(model["vocab"][model["unk_id"]][0])
        return model.get("unk_token") or ""
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _checked_end(end: str | None, is_chosen: bool, vocabulary: dict[str, int], specials: list[str], name: str) -> int:
    """Id of the token between documents.

    Raises:
        ValueError: There is none, it is not in the vocabulary, or text may contain it.
    """
    if end is None:
        raise ValueError(f"tokenizer.path={name}: has no eos, bos or sep token: {_OVERRIDE}")
    said = (
        f"tokenizer.end_of_document={end}" if is_chosen else f"tokenizer.path={name}: its end-of-document token {end}"
    )
    if end not in vocabulary:
        others = f"; its special tokens are {' '.join(specials[:20])}" if specials else ""
        raise ValueError(f"{said} is none of its {len(vocabulary):,} tokens: {_OVERRIDE}{others}")
    if end not in specials and not is_chosen:
        raise ValueError(f"{said} is no special token, so that text may contain it: {_OVERRIDE}")
    return vocabulary[end]


def load_pretrained(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that ``config.path`` names.

    Raises:
        ValueError: It cannot be found or read, is next to empty, has no token that ends a
            document, or has another size than ``config.vocab_size`` says.
    """
    assert config.kind == "pretrained" and config.path is not None
    path = Path(config.path)
    try:
        status = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        status = 0  # a name on the hub, or nothing
    except OSError as error:
        raise ValueError(f"tokenizer.path={path}: cannot be reached: {error.strerror}") from None
    if stat.S_ISREG(status):
        tokenizer = load_tokenizer_file(path, config.end_of_document)
    else:
        tokenizer = _load_with_transformers(config.path, config.end_of_document)
    if config.vocab_size not in (0, tokenizer.vocab_size):
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} must be {tokenizer.vocab_size}, the size "
            f"of tokenizer.path={config.path}, or 0 for whatever it has"
        )
    return tokenizer


def _load_with_transformers(name: str, end_of_document: str | None) -> Tokenizer:
    import transformers

    for model_file, package in (("tokenizer.model", "sentencepiece"), ("tekken.json", "mistral-common")):
        is_alone = (Path(name) / model_file).is_file() and not (Path(name) / TOKENIZER_FILE).is_file()
        if is_alone and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"tokenizer.path={name}: {model_file} needs the package {package}: pip install {package}")

    def load(local_files_only: bool) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(
                name, local_files_only=local_files_only, trust_remote_code=False
            )
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

    file = Path(name) / TOKENIZER_FILE
    vocabulary, specials = loaded.get_vocab(), list(loaded.all_special_tokens)
    definition = file.read_bytes() if file.is_file() else json.dumps(sorted(vocabulary.items())).encode()
    _check_size(vocabulary, name)
    roles = (loaded.eos_token, loaded.bos_token, getattr(loaded, "sep_token", None))
    end = end_of_document or next((token for token in roles if token is not None), None)
    known = vocabulary
    if file.is_file():
        # The file alone, as `tokenizer.path=FOLDER/tokenizer.json` reads it: transformers adds to the vocabulary what
        # a configuration names, so that a token which no model was trained on would end the documents.
        model = tokenizers.Tokenizer.from_file(str(file))
        known = model.get_vocab(with_added_tokens=True)
        specials = [token.content for token in model.get_added_tokens_decoder().values() if token.special]
        end = end_of_document or end or _end_of_files(file, specials)
    end_id = _checked_end(end, end_of_document is not None, known, specials, name)
    if loaded.is_fast:
        return _from_backend(loaded.backend_tokenizer, end_id, definition, loaded.unk_token_id)
    return Tokenizer(
        encode=lambda texts: loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        decode=lambda ids: loaded.decode(ids),
        vocabulary=vocabulary,
        end_of_document=end_id,
        definition=definition,
        unknown=loaded.unk_token_id,
    )


def _from_backend(
    model: tokenizers.Tokenizer, end_of_document: int, definition: bytes, unknown: int | None
) -> Tokenizer:
    model.no_truncation()
    model.no_padding()
    # "<|endoftext|>" written in a document is text about tokenizers, not the end of a document.
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=True)
    return Tokenizer(
        encode=lambda texts: [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: model.decode(ids, skip_special_tokens=False),
        vocabulary=vocabulary,
        end_of_document=end_of_document,
        definition=definition,
        unknown=unknown,
    )


def _check_size(vocabulary: dict[str, int], name: str) -> None:
    if len(vocabulary) <= _HANDFUL:
        raise ValueError(
            f"tokenizer.path={name}: only {len(vocabulary)} tokens were read, the files are "
            "not of the kind that its configuration says"
        )


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
        train_tokenizer(sample_texts(corpus, _TOKENIZER_SAMPLE_BYTES, retries), config.vocab_size, file)
    return load_tokenizer_file(file)
