"""Named validation sets: corpora of their own, all of them evaluated on, in the training corpus' tokens."""

import json

import pytest
from helpers.corpora import files

from moe_pretrain import cli
from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data import TokenizerConfig, prepare_corpus, prepare_evaluation_set
from moe_pretrain.data.documents.document import is_validation
from moe_pretrain.data.prepare import prepare_corpus as preparation

TOKENIZER = TokenizerConfig("train", 300, None)


@pytest.fixture
def trained_on(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n} {n**2}"}) + "\n" for n in range(200)))
    return prepare_corpus(files(path, fraction=0.2), TOKENIZER, tmp_path / "cache", None, 1, None)


def evaluation_set(corpus, trained_on, tmp_path):
    return prepare_evaluation_set("code", corpus, trained_on, TOKENIZER, tmp_path / "cache", 100, 1, None)


def test_a_set_is_the_whole_corpus_in_the_same_tokens(trained_on, tmp_path):
    texts = [f"def f{n}(): return {n}" for n in range(50)]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # Whatever the fraction: nothing is held out of a set that is not trained on.
    reader = evaluation_set(files(path, fraction=0.9), trained_on, tmp_path)
    ends = reader.document_ends.tolist()
    spans = zip([0, *ends[:-1]], ends, strict=True)
    assert [trained_on.tokenizer.decode(reader.read(start, end - 1).tolist()) for start, end in spans] == texts
    assert reader.text_bytes == sum(map(len, texts))
    assert evaluation_set(files(path, fraction=0.9), trained_on, tmp_path).folder == reader.folder
    # The same file as a training corpus has a folder of its own.
    other = prepare_corpus(files(path, fraction=0.9), TOKENIZER, tmp_path / "cache", None, 1, None)
    assert other.train.folder.parent != reader.folder.parent and other.validation.num_documents > 30


@pytest.mark.parametrize("policy, found", [("ignore", None), ("count", 3)])
def test_documents_that_are_trained_on_are_counted_and_stay(tmp_path, policy, found):
    def text_of(n):
        return f"{n} " + " ".join(str(n * k % 997) for k in range(60))

    path, code = tmp_path / "train.jsonl", tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(n)}) + "\n" for n in range(1, 60)))
    corpus = prepare_corpus(files(path, fraction=0.2), TOKENIZER, tmp_path / "cache", None, 1, None)
    trained_on = [text for n in range(1, 60) if not is_validation(text := text_of(n), 0.2)]
    texts = [trained_on[0] + " end", trained_on[1], trained_on[2] + " and", text_of(100), text_of(101)]
    code.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):
        lines: list[str] = []
        config = files(code, near_duplicates=policy)
        # A set may have the name of a source.
        reader = prepare_evaluation_set(
            "held-out documents", config, corpus, TOKENIZER, tmp_path / "cache", 100, 1, lines.append
        )
        number = 1 if found is None else found
        words = f"{number} of 5 documents are near duplicates of training documents (1 exact), kept"
        assert lines[-1] == f"evaluation.sets.held-out documents: {words}" and reader.num_documents == 5


def test_errors_name_the_set(trained_on, tmp_path):
    with pytest.raises(ValueError, match=r"^evaluation\.sets\.code: data\.paths: .*none\.txt does not exist$"):
        evaluation_set(files(tmp_path / "none.txt"), trained_on, tmp_path)


def test_sets_are_composed_from_the_data_group():
    config = load(["+data@evaluation.sets.code=files", "evaluation.sets.code.paths=[a.txt]"])
    assert config.evaluation.sets["code"].paths == ("a.txt",)
    config = load(
        ["+data@evaluation.sets.one=builtin", "+data@evaluation.sets.two=hub", "evaluation.sets.two.name=a/b"]
    )
    assert [one.source for one in config.evaluation.sets.values()] == ["builtin", "hub"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["+evaluation.sets.a={source: builtin, near_duplicates: ignore, validation_fraction: 2}"],
            "validation_fraction=2",
        ),
        (
            ["+evaluation.sets.a={source: builtin, near_duplicates: ignore, validation_fraction: 0.1, x: 1}"],
            "evaluation.sets.a.x",
        ),
        (
            ["+evaluation.sets.a={source: builtin, near_duplicates: ignore}"],
            "evaluation.sets.a.validation_fraction is missing",
        ),
        (["+evaluation.sets.a={source: nowhere}"], "evaluation.sets.a"),
        (["+evaluation.sets={'a/b': {source: builtin, near_duplicates: ignore, validation_fraction: 0.1}}"], "a/b"),
    ],
)
def test_wrong_sets_are_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        ["data=files", "data.paths=[train.jsonl]"],
        ["data=mixture", "+data@data.sources.one=files", "data.sources.one.paths=[train.jsonl]", "+data.weights.one=1"],
    ],
    ids=["files", "mixture"],
)
def test_prepare_and_its_check_cover_every_set(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words in (("train", "text"), ("code", "def")):
        rows = [json.dumps({"text": f"{words} {n} {n**2}"}) for n in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    overrides = [
        *source, "+data@evaluation.sets.code=files", "evaluation.sets.code.paths=[code.jsonl]",
        "model.sequence_length=8", "batch.global_batch_tokens=8", "batch.micro_batch_size=1", "budget.tokens=800",
        f"{'data' if source[0] == 'data=files' else 'data.sources.one'}.validation_fraction=0.2",
        "tokenizer.vocab_size=300", "run.prepare_workers=1",
    ]  # fmt: skip
    without_set = [word for word in overrides if "evaluation" not in word]
    assert cli.main(["prepare", *without_set]) == 0
    assert cli.main(["prepare", "--check", *overrides]) == cli.USAGE_CODE
    assert "evaluation.sets.code: " in (error := capsys.readouterr().err) and "not prepared" in error
    assert cli.main(["prepare", *overrides]) == 0
    assert cli.main(["prepare", "--check", *overrides]) == 0
    out = capsys.readouterr().out
    assert "every checksum is right" in out and out.count("evaluation.sets.code: 300 documents") == 2
    (folder,) = (manifest.parent for manifest in tmp_path.rglob("manifest.json") if _documents(manifest) == 300)
    shard = folder / "shard-00000.idx"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    monkeypatch.setattr(preparation, "_VERIFIED_BYTES", 0)  # a large set: only the check reads all of it
    assert cli.main(["prepare", "--check", *overrides]) == cli.USAGE_CODE
    error = capsys.readouterr().err
    assert f"evaluation.sets.code: {shard.relative_to(tmp_path)}: damaged" in error and error.count("\n") == 1


def _documents(manifest):
    return json.loads(manifest.read_text())["documents"]
