"""Where text comes from: every format is read, every bad input is one line that names the place."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import files, hub

from moe_pretrain.data import TokenizerConfig
from moe_pretrain.data.documents import hub as hub_module
from moe_pretrain.data.documents.config import BuiltinCorpusConfig
from moe_pretrain.data.documents.document import is_validation
from moe_pretrain.data.documents.work_units import content_identity, documents, sample_texts
from moe_pretrain.data.prepare.prepare_corpus import folder_name
from moe_pretrain.data.shards.unit_shards import SIDES

TEXTS = ["one\n\ntwo", "naïve 東京 🙂", "2020-01-01", '{"a": 1}', "line\u2028separator"]


def write_json_lines(path, rows, **options):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, **options) for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _write_twice(path):
    columns = [pyarrow.array(["one"]), pyarrow.array(["two"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), path)
    return path.name


def texts_of(config):
    return [document.text for document in documents(config)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_json_lines_are_read(tmp_path, name, ensure_ascii):
    rows = [{"id": 1, "text": text} for text in TEXTS]
    path = write_json_lines(tmp_path / name, rows, ensure_ascii=ensure_ascii)
    found = list(documents(files(path)))
    assert [document.text for document in found] == TEXTS
    assert found[2].identity == f"{path}:3"


def test_parquet_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=TEXTS, id=[1, 2, 3, 4, 5])
    found = list(documents(files(path, column="body")))
    assert [document.text for document in found] == TEXTS
    assert found[4].identity == f"{path}#5"


def test_text_files_are_one_document_each(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "5.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    assert texts_of(files(tmp_path / "*.txt", tmp_path / "*.txt.gz")) == [*TEXTS, TEXTS[0]]


def test_source_code_is_text_where_its_endings_are_named(tmp_path):
    for name in ("a.py", "b.MD", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.py.gz").write_bytes(gzip.compress(b"d"))
    config = files(tmp_path / "*", text_endings=(".py", ".md", ".txt"))
    assert texts_of(config) == ["a.py", "b.MD", "c.txt", "d"]
    with pytest.raises(ValueError, match=r"a\.py: name must end in one of \.txt "):
        texts_of(files(tmp_path / "*"))
    for ending in ("py", ".PY", ".jsonl", ".gz"):
        with pytest.raises(ValueError, match="^data.text_endings: "):
            files(tmp_path / "*", text_endings=(ending,))


def test_patterns_are_sorted_and_no_file_comes_twice(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    config = files(tmp_path / "b.txt", tmp_path / "**" / "*.txt", tmp_path / "odd[1].txt")
    assert texts_of(config) == ["b.txt", "a.txt", "deep/c.txt", "odd[1].txt"]


def test_empty_texts_are_left_out(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}, "", {"text": "y"}])
    found = [(document.identity, document.text) for document in documents(files(path))]
    assert found == [(f"{path}:2", "x"), (f"{path}:4", "y")]


def test_other_columns_may_change_type(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a", "m": 1}, {"text": "b", "m": {"q": []}}])
    assert texts_of(files(path)) == ["a", "b"]


def bad_inputs(folder):
    """(what, paths, words that the error line must hold)."""
    good = {"text": "good"}
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "latin.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n  \n")
    (folder / "none.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "a.csv").write_text("text\nx\n")
    (folder / "fake.txt.gz").write_bytes(b"not compressed")
    whole = gzip.compress(b'{"text": "good"}\n' * 2000)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    parquet = write_parquet(folder / "good.parquet", text=["a", "b"]).read_bytes()
    (folder / "cut.parquet").write_bytes(parquet[: len(parquet) // 2])

    def lines(name, *rows):
        return write_json_lines(folder / name, rows).name

    late = lines("late.jsonl", *[good] * 3000, {"text": 5})
    return [
        ("missing file", "none.jsonl", ["none.jsonl", "does not exist"]),
        ("empty pattern", "*.zip", ["*.zip", "matches no file"]),
        ("folder", "", ["is a folder"]),
        ("unknown ending", "a.csv", ["a.csv", "must end in"]),
        ("empty file", "empty.jsonl", ["empty.jsonl", "is empty"]),
        ("blank lines", "blank.jsonl", ["blank.jsonl", "has no rows"]),
        ("nothing compressed", "none.jsonl.gz", ["none.jsonl.gz", "has no rows"]),
        ("parquet of no rows", write_parquet(folder / "no.parquet", text=[]).name, ["no.parquet", "has no rows"]),
        ("missing column", lines("column.jsonl", good, {"txt": "x"}), ["column.jsonl:2", "'text'", "txt"]),
        ("number", lines("number.jsonl", good, {"text": 5}), ["number.jsonl:2", "must be a string, got 5"]),
        ("late number", late, ["late.jsonl:3001", "must be a string, got 5"]),
        ("null", lines("null.jsonl", {"text": None}), ["null.jsonl:1", "must be a string, got None"]),
        ("broken JSON", lines("broken.jsonl", good, '{"text": "x"'), ["broken.jsonl:2", "broken JSON"]),
        ("no object", lines("array.jsonl", '["x"]'), ["array.jsonl:1", "must be one JSON object"]),
        (
            "lone surrogate",
            lines("lone.jsonl", good, '{"text": "\\ud800"}'),
            ["lone.jsonl:2", "not valid UTF-8"],
        ),
        ("latin-1 line", "latin.jsonl", ["latin.jsonl:2", "utf-8"]),
        ("latin-1 text", "latin.txt", ["latin.txt", "utf-8"]),
        ("not gzip", "fake.txt.gz", ["fake.txt.gz"]),
        ("cut gzip", "cut.jsonl.gz", ["cut.jsonl.gz"]),
        ("cut parquet", "cut.parquet", ["cut.parquet"]),
        (
            "parquet column",
            write_parquet(folder / "c.parquet", x=["a"]).name,
            ["c.parquet", "no column 'text'", "x"],
        ),
        (
            "parquet column twice",
            _write_twice(folder / "t.parquet"),
            ["t.parquet", "column 'text'", "more than once"],
        ),
        ("parquet null", write_parquet(folder / "n.parquet", text=["a", None]).name, ["n.parquet#2", "None"]),
        ("parquet number", write_parquet(folder / "i.parquet", text=[1]).name, ["i.parquet", "got 1"]),
    ]


def test_bad_input_is_one_line_that_names_the_place(tmp_path, capfd):
    for what, name, words in bad_inputs(tmp_path):
        with pytest.raises(ValueError) as caught:
            list(documents(files(tmp_path / name)))
        line = str(caught.value)
        assert "\n" not in line and line.startswith(("data.paths", str(tmp_path))), what
        assert all(word in line for word in words), (what, line)
    assert capfd.readouterr() == ("", "")  # datasets adds nothing of its own


def test_empty_paths_are_refused():
    with pytest.raises(ValueError, match=r"^data\.paths must list at least one"):
        files()


def test_validation_is_a_share_that_only_grows_with_the_fraction():
    texts = [f"text {number}" for number in range(4000)]
    held_out = {fraction: {text for text in texts if is_validation(text, fraction)} for fraction in (0.1, 0.3)}
    assert held_out[0.1] < held_out[0.3]
    assert 320 < len(held_out[0.1]) < 480 and 1080 < len(held_out[0.3]) < 1320


def test_the_sample_is_training_text_of_all_files_up_to_its_size(tmp_path):
    for name in ("a", "b", "c"):
        write_json_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i:04d}"} for i in range(300)])
    config = files(tmp_path / "*.jsonl", fraction=0.2)
    found = list(sample_texts(config, max_bytes=603))
    assert found == list(sample_texts(config, max_bytes=603))
    assert sum(map(len, found)) == 603  # the last one is cut
    assert not any(is_validation(text, 0.2) for text in found[:-1])
    share = [sum(text.startswith(name) for text in found) for name in "abc"]
    assert min(share) >= 20


def test_content_identity_changes_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = content_identity(files(path))
    assert content_identity(files(path)) == before
    os.utime(path, ns=(1, 1))
    assert content_identity(files(path)) != before
    with pytest.raises(ValueError, match="does not exist"):
        content_identity(files(tmp_path / "none.txt"))


def test_the_built_in_corpus_is_the_standard_library_and_the_manual():
    config = BuiltinCorpusConfig("builtin", 0.1, "ignore")
    found = {document.identity: document.text for document in documents(config)}
    names = list(found)
    first_topic = names.index("builtin:pydoc_data.topics/assert")
    assert names[:first_topic] == sorted(names[:first_topic])
    assert names[first_topic:] == sorted(names[first_topic:])
    assert found["builtin:json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert "builtin:pydoc_data.topics/lambda" in found
    assert sum(map(len, found.values())) > 5_000_000
    parts = {part for identity in found for part in identity.removeprefix("builtin:").split("/")}
    assert not parts & {"site-packages", "__pycache__", "topics.py"}
    # Tables are no text, and the code behind them is.
    assert not found.keys() & {
        f"builtin:{name}" for name in ("encodings/cp437.py", "html/entities.py", "stringprep.py")
    }
    assert found.keys() >= {f"builtin:{name}" for name in ("encodings/idna.py", "html/parser.py", "opcode.py")}


def test_hub_without_a_network_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError) as caught:
        next(documents(hub()))
    line = str(caught.value)
    assert line.startswith("data=hub data.name=org/name cannot be reached: ") and "\n" not in line
    assert line.endswith("; use data=builtin or data=files")


class Stream(list):
    def state_dict(self):
        return {}


def test_hub_rows_and_faults(monkeypatch):
    monkeypatch.setattr(hub_module, "require_network", lambda what, instead: None)
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return Stream([{"body": "a"}, {"body": ""}, {"body": "b"}, {"body": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = documents(hub(subset="small", split="all", text_column="body"))
    found = [next(rows), next(rows)]
    assert [(row.identity, row.text) for row in found] == [("org/name#1", "a"), ("org/name#3", "b")]
    assert asked == [(("org/name", "small"), {"split": "all", "streaming": True})]
    advice = r"; data\.invalid_text=skip leaves [^\n]*$"
    with pytest.raises(ValueError, match=rf"^data=hub data\.name=org/name [^\n]* must be a string, got 3{advice}"):
        next(rows)
    with pytest.raises(ValueError, match=rf"no column 'text' \(data\.text_column\), there is: body{advice}"):
        next(documents(hub()))


def test_every_field_of_a_hub_corpus_that_decides_its_text_is_in_the_cache_key():
    """Another revision of the dataset, for one, is another corpus."""
    tokenizer = TokenizerConfig("train", 300, None)
    changes = [{}, {"version": "v1"}, {"version": "v2"}, {"name": "org/other"}, {"subset": "x"}, {"split": "test"}]
    names = {folder_name(hub(**change), tokenizer, None, 100, SIDES) for change in changes}
    assert len(names) == len(changes)


def test_a_yardsticks_text_is_the_one_that_is_meant(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    checksums = [hashlib.sha256(name.encode()).hexdigest() for name in ("a.txt", "b.txt")]
    both = tmp_path / "*.txt"
    content_identity(files(both, sha256=(checksums[0], checksums[1].upper())))
    with pytest.raises(ValueError, match=r"b\.txt is not the text that data\.sha256 means: 5 bytes of sha256 .*=null"):
        content_identity(files(both, sha256=(checksums[0], checksums[0])))
    with pytest.raises(ValueError, match=r"data\.paths: 2 files, data\.sha256 means 1;"):
        content_identity(files(both, sha256=(checksums[0],)))


def test_a_text_that_a_line_has_twice_is_not_guessed(tmp_path):
    rows = ['{"text": "a", "meta": {"text": "inner"}}', '{"text": "say \\"text\\""}', '{"text": "b", "text": "c"}']
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: broken JSON: 'text' stands there more than once"):
        list(documents(files(path)))
    assert [row.text for row in documents(files(path, invalid_json="skip"))] == ["a", 'say "text"']
