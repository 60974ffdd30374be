"""Tokenizer of a run as the files that transformers reads."""

import json
from pathlib import Path

from moe_pretrain.data.tokenizer.load import load_pretrained
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.system.files import write_json, write_whole

_SETTINGS_FILE = "tokenizer_config.json"


def load_run_tokenizer(path: Path, fingerprint: str | None, end_of_document: str | None) -> Tokenizer:
    """The tokenizer at ``path``, a ``tokenizer.json`` or a folder, if it is that of the run.

    Args:
        path: Its place.
        fingerprint: Fingerprint of the tokenizer that made the run's tokens; None where that was not recorded.
        end_of_document: Token between documents, whatever the files say; or None.

    Raises:
        ValueError: It cannot be read, or is another one.
    """
    tokenizer = load_pretrained(TokenizerConfig("pretrained", 0, str(path), end_of_document))
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"tokenizer {path} does not belong to this run: its fingerprint is {tokenizer.fingerprint}, the run was "
            f"trained on tokens of {fingerprint}"
        )
    return tokenizer


def write_tokenizer(folder: Path, path: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Write the files of ``tokenizer``, which was read from ``path``, into ``folder``.

    As in training nothing is put around a text, whatever the files at ``path`` say: the token with which many
    tokenizers begin one has an embedding that was never trained. What a text without a context follows is the token
    that ends documents.

    Raises:
        ValueError: transformers cannot write it.
    """
    source, target = path / TOKENIZER_FILE if path.is_dir() else path, folder / TOKENIZER_FILE
    if not source.is_file():  # a name on the hub, or a folder without that file
        import transformers

        transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True).save_pretrained(str(folder))
        source = target
    if source.is_file():
        write_whole(target, _adding_nothing(source.read_bytes()))
    beside, end = source.with_name(_SETTINGS_FILE), tokenizer.end_token
    settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    settings |= {"eos_token": end, "bos_token": end, "add_bos_token": False, "add_eos_token": False}
    settings |= {"model_max_length": sequence_length}
    settings.setdefault("pad_token", end)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("clean_up_tokenization_spaces", False)
    write_json(folder / _SETTINGS_FILE, settings)


def _adding_nothing(definition: bytes) -> bytes:
    """A ``tokenizer.json`` without what puts tokens around a text; the same bytes where nothing does."""
    values = json.loads(definition)
    processor = values.get("post_processor")
    parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [part for part in parts if part is None or part["type"] == "ByteLevel"]
    if kept == parts:
        return definition
    values["post_processor"] = kept[0] if kept else None
    return json.dumps(values, ensure_ascii=False).encode()
