"""Tokenizers: lossless, repeatable, and no text can forge the end of a document."""

import json

import datasets
import pytest
import tokenizers
import transformers
from helpers.corpora import files

from moe_pretrain.data import prepare_corpus
from moe_pretrain.data.tokenizer import tokenizer as tokenizer_module
from moe_pretrain.data.tokenizer import train
from moe_pretrain.data.tokenizer.load import load_pretrained, load_tokenizer_file
from moe_pretrain.data.tokenizer.tokenizer import TokenizerConfig
from moe_pretrain.data.tokenizer.train import train_tokenizer

TEXTS = [f"def function_{n}(argument): return argument * {n}\n" for n in range(300)]
HARD = ["", " ", "\x00\xff", "naïve 東京 🙂", "a <|endoftext|> b", "\r\n\t x", "never seen: ЖЩ"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(TEXTS), 320, path)
    return path


def pretrained(path, vocab_size=0, end_of_document=None):
    return load_pretrained(TokenizerConfig("pretrained", vocab_size, str(path), end_of_document))


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
        (
            ("train", 300, "x"),
            r"^tokenizer\.path=x has no effect with tokenizer\.kind=train: add tokenizer=pretrained$",
        ),
        (("pretrained", 0, None), r"^tokenizer\.path must name a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=line):
            TokenizerConfig(*options)


def test_bad_tokenizers_are_one_line(file, tmp_path, monkeypatch):
    (tmp_path / "garbage.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_end").mkdir()
    (tmp_path / "no_end" / "tokenizer.json").write_text(file.read_text().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "no_end" / "config.json").write_text('{"model_type": "gpt_neox"}')
    transformers.GPT2TokenizerFast().save_pretrained(tmp_path / "one_token")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for path, words in [
        (tmp_path / "garbage.json", "not a tokenizer.json"),
        (tmp_path / "empty", ""),
        (tmp_path / "no_end" / "tokenizer.json", "has no eos, bos or sep token: tokenizer.end_of_document names"),
        (tmp_path / "one_token", "only 1 tokens were read"),
        ("no-such-org/no-such-name", "cannot be reached"),
    ]:
        with pytest.raises(ValueError) as caught:
            pretrained(path)
        line = str(caught.value)
        assert line.startswith(f"tokenizer.path={path}") and words in line and "\n" not in line
    with pytest.raises(ValueError, match=r"^tokenizer\.vocab_size=7 must be 320, "):
        pretrained(file, vocab_size=7)


def with_tokens(file, path, specials=(), learnt=(), **roles):
    """A copy of a tokenizer with more tokens, and a configuration beside it that gives them roles."""
    path.mkdir()
    values = json.loads(file.read_text())
    for token in (*specials, *learnt):
        index = len(values["model"]["vocab"]) + len(values["added_tokens"])
        entry = {"id": index, "content": token, "special": token in specials}
        values["added_tokens"].append(dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | entry)
    (path / "tokenizer.json").write_text(json.dumps(values))
    if roles:
        roles = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
        (path / "tokenizer_config.json").write_text(json.dumps(roles))
    return path


@pytest.mark.parametrize(
    "specials, learnt, roles, expected",
    [
        (["<eos>", "<bos>"], ["</s>"], {"eos_token": "<eos>", "bos_token": "<bos>"}, "<eos>"),
        (["<|im_end|>"], [], {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}, "<|im_end|>"),
        (["</s>"], [], {"eos_token": "</s>", "pad_token": "<|endoftext|>"}, "</s>"),
        (["[CLS]", "[SEP]"], [], {"cls_token": "[CLS]", "sep_token": "[SEP]"}, "[SEP]"),
        (["<s>"], ["</s>"], {}, "<|endoftext|>"),
    ],
)
def test_the_end_of_a_document_is_what_the_configuration_says_in_folder_and_file(
    file, tmp_path, specials, learnt, roles, expected
):
    folder = with_tokens(file, tmp_path / "t", specials, learnt, **roles)
    from_file = pretrained(folder / "tokenizer.json")
    from_folder = pretrained(folder) if roles else from_file
    assert from_file.end_token == from_folder.end_token == expected
    assert from_file.fingerprint == from_folder.fingerprint
    assert f"{expected} (id {from_file.end_of_document}) ends each document" in from_file.describe()
    # Written in a text it is text.
    assert from_file.end_of_document not in from_file.encode_batch([f"a {expected} b"])[0]
    chosen = pretrained(folder / "tokenizer.json", end_of_document="<|endoftext|>")
    assert chosen.end_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "specials, learnt, roles, words",
    [
        ([], [], {"eos_token": "<|eos_new|>"}, "<|eos_new|> is none of its "),
        ([], ["</s>"], {"eos_token": "</s>"}, "</s> is no special token, so that text may contain it"),
        (["<|im_end|>", "</s>"], [], {}, "which of <|endoftext|> </s> <|im_end|> ends a document"),
    ],
)
def test_an_end_that_would_be_guessed_is_refused_in_folder_and_file(file, tmp_path, specials, learnt, roles, words):
    folder = with_tokens(file, tmp_path / "t", specials, learnt, **roles)
    for path in (folder, folder / "tokenizer.json") if roles else (folder / "tokenizer.json",):
        with pytest.raises(ValueError) as caught:
            pretrained(path)
        assert words in str(caught.value) and "tokenizer.end_of_document names" in str(caught.value)
        assert pretrained(path, end_of_document="<|endoftext|>").end_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="tokenizer.end_of_document=<nothing> is none of its"):
        pretrained(folder / "tokenizer.json", end_of_document="<nothing>")


def test_a_text_of_unknown_tokens_is_refused_and_a_few_are_said(tmp_path):
    words = {word: index for index, word in enumerate(["[UNK]", "[SEP]", *(f"w{number}" for number in range(30))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["[UNK]", "[SEP]"])
    model.save(str(tmp_path / "words.json"))
    texts = [" ".join(f"w{(number + k) % 33}" for k in range(20)) for number in range(100)]  # of 33 words 3 are unknown
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = []

    def prepared(max_unknown):
        config = TokenizerConfig("pretrained", 0, str(tmp_path / "words.json"), None, max_unknown)
        return prepare_corpus(files(tmp_path / "a.jsonl"), config, tmp_path / "cache", None, 1, lines.append)

    with pytest.raises(
        ValueError, match=r"^tokenizer: \d.\d\d% of the text's tokens are unknown to it \(id 0\), more than"
    ):
        prepared(0.02)
    counts = prepared(0.2).counts
    assert counts.unknown == sum(text.split().count(f"w{k}") for text in texts for k in (30, 31, 32))
    for _ in range(2):  # the second time it is in the cache
        assert sum(f"{counts.unknown / 2000:.2%} of the text's tokens are unknown" in line for line in lines) == 1
        lines.clear()
        prepared(0.2)
    with pytest.raises(ValueError, match="more than tokenizer.max_unknown=0.02"):
        prepared(0.02)  # allowed by whoever prepared it


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files(path)


def test_characters_that_a_tokenizer_leaves_out_are_counted_as_unknown(tmp_path):
    """Byte pairs without an unknown token, bytes for the rest or ``ByteLevel`` leave out what they do not know."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<|endoftext|>"], show_progress=False)
    model.train_from_iterator([*TEXTS, tokenizer_module._PROBE], trainer)  # so it knows all of that
    model.save(str(tmp_path / "leaves.json"))

    def prepared(texts, name, **config):
        settings = TokenizerConfig("pretrained", 0, str(tmp_path / "leaves.json"), **config)
        return prepare_corpus(
            write_lines(tmp_path / f"{name}.jsonl", texts), settings, tmp_path / "cache", None, 1, lines.append
        )

    lines = []
    assert prepared(TEXTS, "known").counts.unknown == 0
    foreign = [f"北海 {text}" for text in TEXTS]
    assert prepared(foreign, "few", max_unknown=0.2).counts.unknown == 2 * len(TEXTS)
    assert any("% of the text's tokens are unknown to the tokenizer, which it leaves out" in line for line in lines)
    with pytest.raises(
        ValueError, match=r"^tokenizer: 1\d\.\d\d% of the text's tokens are unknown to it \(which it leaves"
    ):
        prepared(foreign, "refused", max_unknown=0.1)
    with pytest.raises(ValueError, match=r"^tokenizer: 9\d\.\d\d% of the text's tokens are unknown to it"):
        prepared([f"{'北海' * 50}{number}" for number in range(40)], "most")


def test_a_normalizer_that_takes_text_away_is_found_out(file, tmp_path):
    model = tokenizers.Tokenizer.from_file(str(file))
    model.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("[a-z]"), "")
    model.save(str(tmp_path / "eats.json"))
    assert pretrained(tmp_path / "eats.json").count_left_out(["aB c", "  "]) == 2
    assert load_tokenizer_file(file).count_left_out(["ꙮ aB\x00"]) == 0


def test_bytes_in_the_place_of_the_unknown_leave_nothing_out(tmp_path):
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(tmp_path / "bytes.json"))
    assert pretrained(tmp_path / "bytes.json").count_left_out(["東京 ꙮ abc", "🙂"]) == 0


def test_a_tokenizer_that_leaves_merges_out_at_random_does_not(file, tmp_path):
    definition = json.loads(file.read_text())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "dropout.json").write_text(json.dumps(definition))
    found = pretrained(tmp_path / "dropout.json")
    assert found.encode_batch(TEXTS) == load_tokenizer_file(file).encode_batch(TEXTS)


@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_a_tokenizer_that_cannot_cut_every_text_is_one_line(tmp_path, kind):
    words = [f"word{number}" for number in range(50)]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
        if kind == "words"
        else tokenizers.models.Unigram([(word, -1.0) for word in words])
    )
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "known.json"))
    with pytest.raises(ValueError, match=r"^tokenizer\.path=[^\n]*known\.json: cannot cut every text[^\n]*$"):
        pretrained(tmp_path / "known.json")


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "whole"])
def test_a_long_text_is_cut_where_that_changes_no_token(file, tmp_path, monkeypatch, kind):
    """A tokenizer that puts a mark before a text, or joins words, is given the whole."""
    model = tokenizers.Tokenizer.from_file(str(file))
    if kind == "metaspace":
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    elif kind == "whole":
        model.normalizer = tokenizers.normalizers.Prepend("Z")
    model.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer_file(tmp_path / "t.json")
    texts = ["".join(TEXTS) + "naïve 東京 🙂  \n\n  " * 30, "x" * 5000, "short"]
    whole = [list(ids) for ids in tokenizer.encode_batch(texts)]
    monkeypatch.setattr("moe_pretrain.data.tokenizer.tokenizer.LONGEST_WHOLE", 2000)
    monkeypatch.setattr("moe_pretrain.data.tokenizer.tokenizer._CUT_CONTEXT", 100)
    longest = 0
    encode = tokenizer._encode

    def watched(some):
        nonlocal longest
        longest = max(longest, *map(len, some))
        return encode(some)

    monkeypatch.setattr(tokenizer, "_encode", watched)
    assert [list(ids) for ids in tokenizer.encode_batch(texts[:1])] == whole[:1]
    assert (longest < 2000) == (kind != "whole")
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == whole


def test_a_tokenizer_learnt_from_a_long_text_in_parts_is_that_of_the_whole(tmp_path, monkeypatch):
    text = "It's  a text,\n\n of 12 words\tand naïve 東京 spaces. don't" * 300
    train_tokenizer(iter([text]), 400, tmp_path / "whole.json")
    monkeypatch.setattr("moe_pretrain.data.tokenizer.train.LONGEST_WHOLE", 500)
    assert len(list(train._parts(text))) > 10 and "".join(train._parts(text)) == text
    train_tokenizer(iter([text]), 400, tmp_path / "parts.json")
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_missing_package_and_a_closed_folder_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tokenizer.model needs the package sentencepiece: pip install sentencepiece"):
        pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.path=.* cannot be reached: File name too long"):
        pretrained("x" * 5000)
