"""``prepare``: text to shards once, the same on every machine and in every process."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moe_pretrain import data
from moe_pretrain.data import FilesCorpusConfig, HubCorpusConfig, TokenizerConfig, corpora, prepare
from moe_pretrain.data.corpora import Document, is_validation

TOKENIZER = TokenizerConfig("train", 300, None)


@pytest.fixture
def config(tmp_path):
    """200 different documents, then the first 50 of them again."""
    texts = [f"document {number} says {number * number}" for number in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:50]))
    return FilesCorpusConfig("files", (str(path),), "text", 0.2)


def texts_of(corpus, reader):
    ends = reader.document_ends.tolist()
    starts = [0, *ends[:-1]]
    spans = zip(starts, ends, strict=True)
    return [corpus.tokenizer.decode(reader.read(start, end - 1).tolist()) for start, end in spans]


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


def test_every_document_arrives_on_one_side(config, tmp_path):
    lines = []
    corpus = prepare(config, TOKENIZER, tmp_path / "cache", None, lines.append)
    train, validation = texts_of(corpus, corpus.train), texts_of(corpus, corpus.validation)
    expected = [document.text for document in corpora.documents(config)]
    assert train == [text for text in expected if not is_validation(text, 0.2)]
    assert validation == [text for text in expected if is_validation(text, 0.2)]
    assert validation and not set(train) & set(validation)
    assert len(train) + len(validation) == 250
    assert corpus.train.text_bytes == sum(len(text.encode()) for text in train)
    for reader in (corpus.train, corpus.validation):
        last_tokens = [reader.read(end - 1, end)[0] for end in reader.document_ends.tolist()]
        assert set(last_tokens) == {corpus.tokenizer.end_of_document}
        reader.verify()
    counts = np.bincount(corpus.train.read(0, corpus.train.num_tokens))
    shares = counts[counts > 0] / counts.sum()
    assert corpus.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert "tokens/s" in lines[-1] and not any("\n" in line for line in lines)


def test_a_second_call_reads_the_cache(config, tmp_path, monkeypatch):
    first = prepare(config, TOKENIZER, tmp_path / "cache", None, None)
    monkeypatch.setattr(data, "documents", lambda config: pytest.fail("the text was read again"))
    second = prepare(config, TOKENIZER, tmp_path / "cache", 10**9, None)
    assert second.fingerprint == first.fingerprint
    assert second.unigram_entropy == first.unigram_entropy
    assert len(folders(tmp_path / "cache")) == 1


def test_another_cache_gives_the_same_fingerprint_and_another_text_does_not(config, tmp_path):
    first = prepare(config, TOKENIZER, tmp_path / "one", None, None)
    second = prepare(config, TOKENIZER, tmp_path / "two", None, None)
    assert first.fingerprint == second.fingerprint
    with open(config.paths[0], "a") as file:
        file.write('{"text": "one more"}\n')
    third = prepare(config, TOKENIZER, tmp_path / "one", None, None)
    assert third.fingerprint != first.fingerprint
    assert len(folders(tmp_path / "one")) == 2


def test_settings_have_folders_of_their_own(config, tmp_path):
    corpora_made = [
        prepare(config, TOKENIZER, tmp_path / "cache", None, None),
        prepare(config, TokenizerConfig("train", 290, None), tmp_path / "cache", None, None),
        prepare(FilesCorpusConfig("files", config.paths, "text", 0.3), TOKENIZER, tmp_path / "cache", None, None),
    ]
    assert len({corpus.fingerprint for corpus in corpora_made}) == 3
    assert len(folders(tmp_path / "cache")) == 3


def test_a_tokenizer_that_exists_can_be_used(config, tmp_path):
    trained = prepare(config, TOKENIZER, tmp_path / "cache", None, None)
    file = tmp_path / "tokenizer.json"
    shutil.copy(trained.train.folder.parent / "tokenizer.json", file)
    again = prepare(config, TokenizerConfig("pretrained", 0, str(file)), tmp_path / "cache", None, None)
    assert again.fingerprint == trained.fingerprint


def test_an_incomplete_folder_is_redone(config, tmp_path):
    first = prepare(config, TOKENIZER, tmp_path / "cache", None, None)
    (first.train.folder / "manifest.json").unlink()
    second = prepare(config, TOKENIZER, tmp_path / "cache", None, None)
    assert second.fingerprint == first.fingerprint
    assert len(folders(tmp_path / "cache")) == 1


def test_a_failure_leaves_nothing_behind(config, tmp_path):
    with open(config.paths[0], "a") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:251: column 'text' must be a string, got 5"):
        prepare(config, TOKENIZER, tmp_path / "cache", None, None)
    assert folders(tmp_path / "cache") == []


@pytest.mark.parametrize("fraction, side", [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_refused(config, tmp_path, fraction, side):
    lopsided = FilesCorpusConfig("files", config.paths, "text", fraction)
    with pytest.raises(ValueError, match=rf"leaves no {side} document of the 250 in files: ") as caught:
        prepare(lopsided, TOKENIZER, tmp_path / "cache", None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_tokens, tokens_needed, expected", [(500, None, 500), (None, 700, 700), (500, 700, 500)])
def test_a_hub_corpus_stops_when_it_has_enough(tmp_path, monkeypatch, max_tokens, tokens_needed, expected):
    def endless(config):
        number = 0
        while True:
            yield Document(f"row {number}", f"text number {number} of a stream without end")
            number += 1

    monkeypatch.setattr(data, "documents", endless)
    monkeypatch.setattr(corpora, "documents", endless)
    config = HubCorpusConfig("hub", "org/name", None, "train", "text", max_tokens, 0.1)
    monkeypatch.setattr(data, "_TOKENIZER_SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(data, "_BATCH_BYTES", 1000)
    corpus = prepare(config, TOKENIZER, tmp_path / "cache", tokens_needed, None)
    longest = int(np.diff(corpus.train.document_ends, prepend=0).max())
    assert expected <= corpus.train.num_tokens < expected + longest


def test_those_that_start_together_agree(config, tmp_path, monkeypatch):
    all_built = threading.Barrier(3, timeout=60)
    publish = data._publish

    def publish_together(work, folder):
        all_built.wait()
        publish(work, folder)

    monkeypatch.setattr(data, "_publish", publish_together)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(prepare, config, TOKENIZER, tmp_path / "cache", None, None) for _ in range(3)]
        results = [one.result() for one in running]
    assert len({corpus.fingerprint for corpus in results}) == 1
    assert len(folders(tmp_path / "cache")) == 1
    for corpus in results:
        corpus.train.verify()
