"""Tokenizers of an exported folder: with transformers they make of a text what training was given of it."""

import json
from pathlib import Path

import pytest
import transformers
from helpers.trained import tiny_run, tokenizer_in
from tokenizers import Tokenizer, processors

from moe_pretrain import cli
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.huggingface import tokenizer_files
from moe_pretrain.huggingface.check import check_tokens
from moe_pretrain.huggingface.tokenizer_files import write_tokenizer

BEGIN = "<|begin|>"
END = "<|endoftext|>"
TEXT = "The statement executes."


def with_template(home: Path, kind: str) -> Path:
    """A tokenizer that puts a token before every text, as Llama's do, and one of an end behind it, as T5's."""
    model = Tokenizer.from_file(str(tokenizer_in(home)))
    model.add_special_tokens([BEGIN])
    tokens = [(BEGIN, model.token_to_id(BEGIN)), (END, model.token_to_id(END))]
    template = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=tokens)
    levels = processors.ByteLevel(trim_offsets=False)
    model.post_processor = {
        "alone": template,
        "in a sequence": processors.Sequence([levels, template]),
        "none": levels,
    }[kind]
    folder = home / kind
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "bos_token": BEGIN, "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["alone", "in a sequence", "none"])
def test_nothing_is_put_around_a_text(kind: str, tmp_path: Path):
    folder = with_template(tmp_path, kind)
    tokenizer = load_tokenizer_file(folder / "tokenizer.json")
    ours = tokenizer.encode_batch([TEXT])[0]
    assert transformers.AutoTokenizer.from_pretrained(folder).bos_token == BEGIN, "it says so itself"
    target = tmp_path / "exported"
    target.mkdir()
    write_tokenizer(target, folder, tokenizer, 40)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    assert theirs(TEXT).input_ids == theirs.encode(TEXT) == list(ours)
    assert theirs.decode(theirs(TEXT).input_ids) == TEXT
    # What an empty context is to models of transformers is what it is in training.
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_document
    files = [path / "tokenizer.json" for path in (folder, target)]
    assert (files[0].read_bytes() == files[1].read_bytes()) == (kind == "none")
    check_tokens(target, tokenizer)


def test_other_tokens_are_found_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = tiny_run(tmp_path, "run", "router=top_k")

    def without_merges(definition: bytes) -> bytes:
        values = json.loads(definition)
        values["model"]["merges"] = []
        return json.dumps(values).encode()

    monkeypatch.setattr(tokenizer_files, "_adding_nothing", without_merges)
    assert cli.main(["export", str(run), str(tmp_path / "exported")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "the exported tokenizer is not that of the run: token" in line
        and "nothing was written, and --no-check would" in line
    )
    assert not list(tmp_path.glob("exported*"))
