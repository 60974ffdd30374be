"""What a resume says of a corpus that is another one: what differs, and of a mixture in which source."""

import json

import pytest
from helpers.corpora import files

from moe_pretrain.data import (
    MixtureConfig,
    RunLength,
    TokenizerConfig,
    explain_change,
    prepare_corpus,
    prepare_mixture,
)
from moe_pretrain.data import (
    corpus_changes as facts,
)

TOKENIZER = TokenizerConfig("train", 300, None)


@pytest.fixture
def config(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [f"{name} {n} says {n * n}" for n in range(100)])
    return files(tmp_path / "*.jsonl", fraction=0.3)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def facts_of(config, tmp_path, tokenizer=TOKENIZER):
    found = prepare_corpus(config, tokenizer, tmp_path / "cache", None, 1, None).facts(config)
    return json.loads(json.dumps(found))  # as a checkpoint keeps them


def test_documents_tokens_and_files_are_named(config, tmp_path):
    then = facts_of(config, tmp_path)
    assert then["training documents"] + then["validation documents"] == 200 and then["source files"] == 2
    write(tmp_path / "b.jsonl", [f"b {n} says {n * n}" for n in range(90)])
    write(tmp_path / "c.jsonl", ["new"])
    now = facts_of(config, tmp_path)
    said = explain_change(then, now)
    assert f"training documents {then['training documents']} then, {now['training documents']} now" in said
    assert f"training tokens {then['training tokens']:,} then, {now['training tokens']:,} now" in said
    assert "source files 2 then, 3 now" in said and f"{tmp_path / 'c.jsonl'} is new" in said
    sizes = [then["files"][str(tmp_path / "b.jsonl")], now["files"][str(tmp_path / "b.jsonl")]]
    assert f"b.jsonl had {sizes[0]:,} bytes, has {sizes[1]:,}" in said and "a.jsonl" not in said
    assert f"{tmp_path / 'c.jsonl'} is gone" in explain_change(now, then)


def test_another_tokenizer_and_version_are_named(config, tmp_path):
    then = facts_of(config, tmp_path)
    now = facts_of(config, tmp_path, TokenizerConfig("train", 280, None))
    assert f"tokenizer {then['tokenizer']} then, {now['tokenizer']} now" in explain_change(then, now)
    assert "vocabulary 300 then, 280 now" in explain_change(then, now)
    assert "documents" not in explain_change(then, now)
    newer = {**then, "version": "v2"}
    assert explain_change(then, newer) == "version None then, v2 now"


def test_other_text_of_the_same_size_is_said_to_be_that(config, tmp_path):
    then = facts_of(config, tmp_path)
    assert explain_change(then, {**then, "fingerprint": "x"}) == "other text, in as many documents and tokens"
    assert explain_change({}, then) == "what it was is not recorded"  # a checkpoint of an earlier version


def test_of_many_files_few_are_named_and_few_kept(config, tmp_path, monkeypatch):
    then = facts_of(config, tmp_path)
    for number in range(7):
        write(tmp_path / f"more{number}.jsonl", [f"text {number}"])
    said = explain_change(then, facts_of(config, tmp_path))
    assert said.count("is new") == 3 and said.endswith("and 4 more files") and len(said) < 1000
    monkeypatch.setattr(facts, "_MOST_FILES", 3)
    now = facts_of(config, tmp_path)
    assert "files" not in now and now["source files"] == 9
    assert "source files 2 then, 9 now" in explain_change(then, now)


def test_the_source_of_a_mixture_is_named(config, tmp_path):
    parts = {name: files(tmp_path / f"{name}.jsonl", fraction=0.3) for name in "ab"}

    def mixture_facts(sources):
        mixture = MixtureConfig("mixture", sources, dict.fromkeys(sources, 1.0), (), "repeat")
        corpus = prepare_mixture(mixture, TOKENIZER, tmp_path / "cache", RunLength(3, 2, 8), 1, None)
        return json.loads(json.dumps(corpus.facts(mixture)))

    # The tokenizer is learnt from all sources, so it stays only if it is given.
    then = mixture_facts(parts)
    now = json.loads(json.dumps(then))
    now["sources"]["b"] |= {"fingerprint": "x", "training tokens": 7}
    said = explain_change(then, now)
    assert said == f"source b: training tokens {then['sources']['b']['training tokens']:,} then, 7 now"
    only = mixture_facts({"a": parts["a"]})
    assert "source b is gone" in explain_change(then, only)
    assert "source b is new" in explain_change(only, then)
