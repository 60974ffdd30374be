"""Tokenizer of a run as the files that transformers reads."""

import json
from pathlib import Path

from moe_pretrain.data.tokenizer.load import load_pretrained
from moe_pretrain.data.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from moe_pretrain.system.files import write_json, write_whole


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

    Raises:
        ValueError: transformers cannot write it.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():  # a name on the hub, or a folder without that file
        import transformers

        transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True).save_pretrained(str(folder))
        return
    write_whole(folder / TOKENIZER_FILE, file.read_bytes())
    beside = file.with_name("tokenizer_config.json")
    settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    settings |= {"eos_token": tokenizer.end_token, "model_max_length": sequence_length}
    settings.setdefault("pad_token", tokenizer.end_token)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("clean_up_tokenization_spaces", False)
    write_json(folder / "tokenizer_config.json", settings)
