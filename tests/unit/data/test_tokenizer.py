"""Tokenizers: lossless, repeatable, and no text can forge the end of a document."""

import datasets
import pytest
import tokenizers
import transformers

from moe_pretrain.data.tokenizer import (
    TokenizerConfig,
    load_pretrained,
    load_tokenizer_file,
    train_tokenizer,
)

TEXTS = [f"def function_{n}(argument): return argument * {n}\n" for n in range(300)]
HARD = ["", " ", "\x00\xff", "naïve 東京 🙂", "a <|endoftext|> b", "\r\n\t x", "never seen: ЖЩ"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(TEXTS), 320, path)
    return path


def pretrained(path, vocab_size=0):
    return load_pretrained(TokenizerConfig("pretrained", vocab_size, str(path)))


def test_training_is_repeatable_and_reaches_the_size(file, tmp_path):
    train_tokenizer(iter(TEXTS), 320, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    tokenizer = load_tokenizer_file(file)
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode_batch(["def function_1(argument)"])[0]) < 15


def test_any_text_comes_back(file):
    tokenizer = load_tokenizer_file(file)
    encoded = tokenizer.encode_batch(HARD + TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == HARD + TEXTS
    assert all(0 <= token < 320 for ids in encoded for token in ids)


def test_text_cannot_hold_the_end_of_a_document(file, tmp_path):
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>").save_pretrained(tmp_path)
    for tokenizer in (load_tokenizer_file(file), pretrained(tmp_path)):
        ids = tokenizer.encode_batch(["a<|endoftext|>b"])[0]
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == "a<|endoftext|>b<|endoftext|>"


def test_a_folder_and_a_file_give_the_same_tokens(file, tmp_path):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    fast.model_max_length = 4  # must not cut documents
    fast.save_pretrained(tmp_path)
    from_folder, from_file = pretrained(tmp_path), pretrained(file, vocab_size=320)
    assert from_folder.encode_batch(TEXTS) == from_file.encode_batch(TEXTS)
    assert from_folder.end_of_document == from_file.end_of_document


def test_truncation_and_padding_in_a_file_are_switched_off(file, tmp_path):
    cutting = tokenizers.Tokenizer.from_file(str(file))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=10)
    cutting.save(str(tmp_path / "cutting.json"))
    found = pretrained(tmp_path / "cutting.json").encode_batch([*TEXTS, "a"])
    assert found == load_tokenizer_file(file).encode_batch([*TEXTS, "a"])


def test_a_tokenizer_without_a_fast_version_works(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = pretrained(tmp_path)
    ids = tokenizer.encode_batch(["né"])[0]
    assert ids == [byte + 3 for byte in "né".encode()]  # ByT5: bytes after three special tokens
    assert tokenizer.end_of_document == 1


def test_fingerprint_sees_the_file_and_its_output(file, tmp_path):
    fingerprint = load_tokenizer_file(file).fingerprint
    assert load_tokenizer_file(file).fingerprint == fingerprint
    train_tokenizer(iter(TEXTS[:20]), 320, tmp_path / "other.json")
    assert load_tokenizer_file(tmp_path / "other.json").fingerprint != fingerprint
    (tmp_path / "spaces.json").write_bytes(file.read_bytes() + b"\n")
    assert load_tokenizer_file(tmp_path / "spaces.json").fingerprint != fingerprint


def test_bad_settings_are_one_line():
    for options, line in [
        (("train", 256, None), r"^tokenizer\.vocab_size=256 must be at least 257 "),
        (("train", 300, "x"), r"^tokenizer\.path=x has no effect with tokenizer\.kind=train$"),
        (("pretrained", 0, None), r"^tokenizer\.path must name a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=line):
            TokenizerConfig(*options)


def test_bad_tokenizers_are_one_line(file, tmp_path, monkeypatch):
    (tmp_path / "garbage.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(tmp_path / "no_end")
    transformers.GPT2TokenizerFast().save_pretrained(tmp_path / "one_token")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for path, words in [
        (tmp_path / "garbage.json", "not a tokenizer.json"),
        (tmp_path / "empty", ""),
        (tmp_path / "no_end", "needs an eos, bos or sep token"),
        (tmp_path / "one_token", "only 1 tokens were read"),
        ("no-such-org/no-such-name", "cannot be reached"),
    ]:
        with pytest.raises(ValueError) as caught:
            pretrained(path)
        line = str(caught.value)
        assert line.startswith(f"tokenizer.path={path}") and words in line and "\n" not in line
    with pytest.raises(ValueError, match=r"^tokenizer\.vocab_size=7 must be 320, "):
        pretrained(file, vocab_size=7)
