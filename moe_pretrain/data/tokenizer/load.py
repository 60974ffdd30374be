"""Tokenizers that exist already: files here, or names on the Hugging Face hub, and which token ends a document."""

import contextlib
import importlib.util
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from moe_pretrain.data.documents.hub import require_network
from moe_pretrain.data.tokenizer.tokenizer import END_OF_DOCUMENT, TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.system.words import one_line

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
    return _from_backend(model, end_id, definition, vocabulary.get(_unknown_token(definition)), str(file))


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
        return _from_backend(loaded.backend_tokenizer, end_id, definition, loaded.unk_token_id, name)
    return Tokenizer(
        encode=lambda texts: loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        decode=lambda ids: loaded.decode(ids),
        vocabulary=vocabulary,
        end_of_document=end_id,
        definition=definition,
        unknown=loaded.unk_token_id,
    )


def _from_backend(
    model: tokenizers.Tokenizer, end_of_document: int, definition: bytes, unknown: int | None, name: str
) -> Tokenizer:
    model.no_truncation()
    model.no_padding()
    if getattr(model.model, "dropout", None) is not None:
        model.model.dropout = None  # merges left out at random: other tokens at each start, and in a validation
    # "<|endoftext|>" written in a document is text about tokenizers, not the end of a document.
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=True)

    @contextlib.contextmanager
    def cutting() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"tokenizer.path={name}: cannot cut every text, and needs a token for what it does not know: "
                f"{one_line(error)}"
            ) from None

    @cutting()
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]

    @cutting()
    def spans(text: str) -> list[tuple[int, int]]:
        return list(model.encode(text, add_special_tokens=False).offsets)

    return Tokenizer(
        encode=encode,
        decode=lambda ids: model.decode(ids, skip_special_tokens=False),
        vocabulary=vocabulary,
        end_of_document=end_of_document,
        definition=definition,
        unknown=unknown,
        spans=spans,
    )


def _check_size(vocabulary: dict[str, int], name: str) -> None:
    if len(vocabulary) <= _HANDFUL:
        raise ValueError(
            f"tokenizer.path={name}: only {len(vocabulary)} tokens were read, the files are "
            "not of the kind that its configuration says"
        )
