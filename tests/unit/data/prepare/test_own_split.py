"""A user's own split: files that are held out, or the end of the corpus, instead of the hash of each document."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import files

from moe_pretrain.config.load import load
from moe_pretrain.data import TokenizerConfig, prepare_corpus
from moe_pretrain.data.documents import work_units as sources

TOKENIZER = TokenizerConfig("train", 300, None)


def sides(config, tmp_path, workers=1):
    """Texts of the training and of the validation side."""
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, workers, None)
    found = []
    for reader in (corpus.train, corpus.validation):
        ends = reader.document_ends.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        found.append([corpus.tokenizer.decode(reader.read(start, end - 1).tolist()) for start, end in spans])
    return found


def write_lines(path, texts):
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def texts():
    return [f"text number {number} is {number**3}" for number in range(300)]


@pytest.mark.parametrize("unit_bytes", [4_000_000, 1000])
def test_files_that_are_named_are_held_out_and_nothing_else(tmp_path, texts, monkeypatch, unit_bytes):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", unit_bytes)
    write_lines(tmp_path / "a.jsonl", texts[:200])
    write_lines(tmp_path / "b.jsonl.gz", texts[200:250])
    write_lines(tmp_path / "c.jsonl", texts[250:])
    config = files(tmp_path / "a.jsonl", tmp_path / "c.jsonl", validation_paths=(str(tmp_path / "b.*"),))
    assert sides(config, tmp_path, workers=2) == [[*texts[:200], *texts[250:]], texts[200:250]]


def test_a_file_is_not_on_both_sides(tmp_path, texts):
    write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    for held_out in ("a.jsonl", "b.jsonl"):
        config = files(tmp_path / "a.jsonl", validation_paths=(str(tmp_path / held_out),))
        with pytest.raises(ValueError, match=rf"^data.validation_paths: .*{held_out} is in data.paths too"):
            prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)
    config = files(tmp_path / "a.jsonl", validation_paths=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(ValueError, match="^data.validation_paths: .*none.jsonl does not exist"):
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)


@pytest.mark.parametrize("unit_bytes", [4_000_000, 1000])
def test_the_end_of_lines_is_held_out(tmp_path, texts, monkeypatch, unit_bytes):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", unit_bytes)
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", texts[start : start + 100])
        for name, start in zip("abc", (0, 100, 200), strict=True)
    ]
    config = files(*paths, fraction=0.25, validation_split="end")
    train, validation = sides(config, tmp_path, workers=2)
    assert [*train, *validation] == texts
    size = sum(path.stat().st_size for path in paths)
    assert abs(sum(len(text) + len('{"text": ""}\n') for text in validation) - size / 4) < 60


@pytest.mark.parametrize("fraction", [0.1, 0.101, 0.102, 0.103])
def test_a_text_file_is_cut_between_two_characters(tmp_path, fraction):
    text = "".join(f"Zeile {number} über Öl, 東京\n" for number in range(500))
    (tmp_path / "a.txt").write_text(text)
    (train,), (validation,) = sides(files(tmp_path / "a.txt", fraction=fraction, validation_split="end"), tmp_path)
    assert train + validation == text
    size = len(text.encode())
    assert 0 <= len(train.encode()) - int(size * (1 - fraction)) < 3


def test_the_same_document_on_both_sides_is_counted(tmp_path, texts):
    long = [f"{text} {' '.join(texts[number : number + 5])}" for number, text in enumerate(texts[:100])]
    write_lines(tmp_path / "a.jsonl", long)
    write_lines(tmp_path / "b.jsonl", [*long[:7], "something else altogether", "and yet another text"])
    config = files(tmp_path / "a.jsonl", validation_paths=(str(tmp_path / "b.jsonl"),), near_duplicates="drop")
    counts = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None).counts
    assert (counts.exact_duplicates, counts.duplicate, counts.validation) == (7, 7, 2)


def test_equal_documents_are_counted_even_where_near_ones_are_ignored(tmp_path, texts):
    near = "text number 7 is 343 and " + " ".join(texts[:40])
    write_lines(tmp_path / "a.jsonl", [*texts, near])
    write_lines(tmp_path / "b.jsonl", [texts[3], near + " more", *texts[5:7]])
    config = files(tmp_path / "a.jsonl", validation_paths=(str(tmp_path / "b.jsonl"),), near_duplicates="ignore")
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)
    assert (corpus.counts.exact_duplicates, corpus.counts.near_duplicates) == (3, 3)
    assert corpus.validation.num_documents == 4 and "(3 exact), kept" in corpus.describe_size()


def test_the_end_of_tokens_is_held_out(tmp_path, texts):
    config = files(write_lines(tmp_path / "a.jsonl", texts))
    made = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)
    tokenizer = TokenizerConfig("pretrained", 0, str(made.train.folder.parent / "tokenizer.json"))
    end = made.tokenizer.end_of_document
    stream = np.concatenate([[*ids, end] for ids in made.tokenizer.encode_batch(texts)]).astype("<u2")
    (tmp_path / "a.bin").write_bytes(stream.tobytes())
    words = [
        "data=tokens",
        f'data.paths=["{tmp_path}/a.bin"]',
        "tokenizer=pretrained",
        f'tokenizer.path="{tokenizer.path}"',
    ]
    data = load([*words, "data.validation_split=end", "data.validation_fraction=0.2"]).data
    corpus = prepare_corpus(data, tokenizer, tmp_path / "cache", None, 1, None)
    held_out = corpus.validation.read(0, corpus.validation.num_tokens)
    assert held_out.tolist() == stream[-len(held_out) :].tolist() and abs(len(held_out) - len(stream) / 5) < 40
    assert len(held_out) + corpus.train.num_tokens == len(stream)


def test_a_stream_has_no_split_of_its_own():
    words = ["data=files", "data.paths=[a.txt]", "streaming.mode=always"]
    with pytest.raises(ValueError, match="data.validation_split=end are for data that is not streamed"):
        load([*words, "data.validation_split=end"])
    with pytest.raises(ValueError, match="data.validation_paths"):
        load([*words, "data.validation_paths=[b.txt]"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_an_end_that_cannot_be_cut_off_says_what_can(tmp_path, texts, name):
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name)
    else:
        write_lines(tmp_path / name, texts)
    config = files(tmp_path / name, validation_split="end", fraction=0.2)
    words = (
        r"^data.validation_fraction=0.2 data.validation_split=end leaves no training [^\n]*: name what is held out in"
    )
    with pytest.raises(ValueError, match=words):
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)


def test_named_files_without_a_text_are_named(tmp_path, texts):
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl", ["", ""])
    config = files(tmp_path / "a.jsonl", validation_paths=(str(tmp_path / "b.jsonl"),))
    with pytest.raises(ValueError, match=r"^data.validation_paths=\['.*b.jsonl'\] leaves no validation document"):
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)
