"""Text that is broken is treated by the named policy; whatever else is mutilated is one line that names the file."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import files, hub

from moe_pretrain.data import TokenizerConfig, prepare_corpus
from moe_pretrain.data.documents.document import LeftOut
from moe_pretrain.data.documents.work_units import content_identity, documents, plan_units, unit_rows

hub_module = sys.modules["moe_pretrain.data.documents.hub"]

BROKEN = "good \ufffd bytes"
MUTILATED = 260


def broken_files(folder):
    """One broken text among good ones, in every format, and the place that an error must name."""
    (folder / "a.txt").write_bytes(b"good \xff bytes")
    (folder / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "good \xff bytes"}\n{"text": "two"}\n')
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    (folder / "d.jsonl").write_text('{"text": "one"}\n{"text": "good \\ud800 bytes"}\n{"text": "two"}\n')
    binary = pyarrow.array([b"one", b"good \xff bytes", b"two"])
    text = pyarrow.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), folder / "e.parquet")
    return {"a.txt": "a.txt", "b.jsonl": "b.jsonl:2", "c.jsonl.gz": "gz:2", "d.jsonl": "d.jsonl:2", "e.parquet": "#2"}


def rows_of(config):
    return [row for unit in plan_units(config) for row in unit_rows(config, unit)]


def test_text_that_is_not_utf8_follows_the_policy(tmp_path):
    for name, place in broken_files(tmp_path).items():
        around = [] if name == "a.txt" else ["one", "two"]
        with pytest.raises(ValueError, match=place) as caught:
            rows_of(files(tmp_path / name))
        assert "utf-8" in str(caught.value).lower() and "\n" not in str(caught.value)
        assert str(caught.value).endswith("; data.invalid_utf8=replace or skip goes on past it")

        replaced = rows_of(files(tmp_path / name, invalid_utf8="replace"))
        assert [row.text for row in replaced if row.repaired] == [BROKEN], name
        assert [row.text for row in replaced if not row.repaired] == around

        skipped = rows_of(files(tmp_path / name, invalid_utf8="skip"))
        assert [row.text for row in skipped if not isinstance(row, LeftOut)] == around
        assert [row.reason for row in skipped if isinstance(row, LeftOut)] == ["invalid_utf8"]


def test_bytes_that_are_no_text_are_not_read_as_one(tmp_path):
    """UTF-16 without a mark, and what a crash leaves of a block, are valid UTF-8: characters of number 0."""
    for name, data in (("wide", "some words".encode("utf-16-le")), ("hole", b"a text " * 9000 + bytes(4096))):
        (tmp_path / f"{name}.txt").write_bytes(data)
        pyarrow.parquet.write_table(pyarrow.table({"text": [b"one", data]}), tmp_path / f"{name}.parquet")
        for path, number in ((tmp_path / f"{name}.txt", 0), (tmp_path / f"{name}.parquet", 1)):
            with pytest.raises(ValueError, match=f"{path.name}.*zero bytes.*data.invalid_utf8=replace or skip"):
                rows_of(files(path))
            for policy in ("replace", "skip"):
                assert getattr(rows_of(files(path, invalid_utf8=policy))[number], "reason", "") == "invalid_utf8"
    (tmp_path / "some.txt").write_bytes(b"a zero \0 alone")
    assert [row.text for row in rows_of(files(tmp_path / "some.txt"))] == ["a zero \0 alone"]


@pytest.mark.parametrize("line", ['{"text": "x"', "[1]", "5", '"text"', "[" * 100_000, "1" * 5000, "{'text': 1}"])
def test_lines_that_are_no_object_follow_the_policy(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + '\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*; data.invalid_json=skip leaves such lines out") as caught:
        rows_of(files(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    rows = rows_of(files(path, invalid_json="skip"))
    assert [getattr(row, "reason", None) for row in rows] == [None, "invalid_json", None]


def test_a_wrong_column_fails_whatever_the_policies(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(ValueError, match="no column 'text'"):
        rows_of(files(tmp_path / "a.jsonl", invalid_json="skip", invalid_utf8="skip"))


MARK = "\ufeff"


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", f'{MARK}{{"text": "one"}}\n{MARK}{{"text": "two"}}\n', ["one", "two"]),
        ("a.jsonl", f'{{"text": "{MARK}one"}}\n{{"text": "t{MARK}wo"}}\n', ["one", f"t{MARK}wo"]),
        ("a.jsonl.gz", f'{MARK}{{"text": "one"}}\n{MARK}{{"text": "two"}}\n', ["one", "two"]),
        ("a.txt", f"{MARK}one\n", ["one\n"]),
        ("a.txt.gz", f"{MARK}{MARK}one\n{MARK}two t{MARK}hree\n", [f"one\ntwo t{MARK}hree\n"]),
        ("a.txt", MARK, []),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content, expected):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [document.text for document in documents(files(tmp_path / name))] == expected


@pytest.mark.parametrize("value", [None, ["a"], 5, {"a": 1}, ...])
def test_a_row_without_a_text_is_named_or_left_out_and_counted(tmp_path, value, monkeypatch):
    rows = [{"text": f"text {number}"} for number in range(40)]
    rows[17] = {"other": 1} if value is ... else {"text": value}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"a\.jsonl:18: .*data\.invalid_text=skip leaves such rows out"):
        list(documents(files(tmp_path / "a.jsonl")))

    class Stream(list):
        def state_dict(self):
            return {}

    monkeypatch.setattr(hub_module, "open_stream", lambda config, start: Stream(rows))
    monkeypatch.setattr(hub_module, "require_network", lambda what, instead: None)
    with pytest.raises(ValueError, match=r"^data=hub data.name=org/name .*: row 18: .*data\.invalid_text=skip"):
        list(documents(hub()))
    for config in (files(tmp_path / "a.jsonl", invalid_text="skip"), hub(invalid_text="skip")):
        lines = []
        corpus = prepare_corpus(config, TokenizerConfig("train", 300, None), tmp_path / "c", None, 1, lines.append)
        counts = corpus.counts
        assert (counts.read, counts.invalid_text, counts.train + counts.validation) == (40, 1, 39)
        assert "+ 1 without a text" in corpus.describe_counts()


def test_a_null_in_parquet_is_left_out_and_counted(tmp_path):
    table = pyarrow.table({"text": ["one", None, "three"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet#2: .*data\.invalid_text=skip"):
        list(documents(files(tmp_path / "a.parquet")))
    assert [row.text for row in documents(files(tmp_path / "a.parquet", invalid_text="skip"))] == ["one", "three"]


@pytest.mark.parametrize("check", ["sampled", "full"])
@pytest.mark.parametrize("size", [300, 3_000_000])
def test_changed_text_behind_the_same_size_and_time_is_noticed(tmp_path, check, size):
    path = tmp_path / "a.txt"
    data = (b"some text " * (size // 10))[:size]
    config = files(path, content_check=check)

    def sign(content):
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        return content_identity(config)

    before = sign(data)
    assert sign(data) == before
    assert sign(data[::-1]) != before
    assert sign(b"S" + data[1:]) != before and sign(data[:-1] + b"T") != before
    if check == "full":
        assert sign(data[:200] + b"!" + data[201:]) != before
        sign(data)
        os.utime(path, ns=(10**18 + 5, 10**18 + 5))
        assert content_identity(config) == before  # the same text at another time


def test_a_corpus_that_comes_from_the_cache_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    said = []
    for _ in range(2):
        lines = []
        config = files(tmp_path / "a.jsonl")
        prepare_corpus(config, TokenizerConfig("train", 300, None), tmp_path / "c", None, 1, lines.append)
        said.append([line for line in lines if line.startswith(f"corpus in the cache: {tmp_path}/c/files-")])
    assert not said[0] and len(said[1]) == 1 and ", prepared 20" in said[1][0]


def test_a_corpus_of_empty_texts_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"^data: no document with text in files: .* \(4 rows read = 4 \S+\)$"):
        prepare_corpus(files(tmp_path / "*.*"), TokenizerConfig("train", 300, None), tmp_path / "c", None, 1, None)


def test_other_languages_and_source_code_arrive_byte_for_byte(tmp_path):
    texts = [
        "Größe, naïve",
        "東京の天気は\n晴れ",
        "שלום עולם",
        "الخط العربي",
        "🙂👨‍👩‍👧",
        "def f(x):\n\treturn x\r\n",
        "\x00\x7f",
        " ",
    ]
    texts = [f"{text} {number}" for number in range(10) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    corpus = prepare_corpus(
        files(path, fraction=0.3), TokenizerConfig("train", 400, None), tmp_path / "c", None, 1, None
    )
    found = []
    for reader in (corpus.train, corpus.validation):
        ends = reader.document_ends.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        found += [corpus.tokenizer.decode(reader.read(start, end - 1).tolist()) for start, end in spans]
        assert reader.text_bytes > 0
    assert sorted(found) == sorted(texts)


# ---------------------------------------------------------------- the fuzzer


def good_corpora():
    rows = [{"text": f"text {number} é", "id": number} for number in range(30)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": [row["text"] for row in rows], "id": list(range(30))})
    pyarrow.parquet.write_table(table, sink, row_group_size=10)
    parquet = sink.getvalue().to_pybytes()
    compressed = gzip.compress(lines)
    return {".txt": lines, ".jsonl": lines, ".jsonl.gz": compressed, ".parquet": parquet, ".txt.gz": compressed}


def mutilate(generator, data):
    kind = int(generator.integers(0, 7))
    changed = bytearray(data)
    if kind == 0:  # a few bits
        for place in generator.integers(0, len(data), size=int(generator.integers(1, 6))):
            changed[place] ^= 1 << int(generator.integers(0, 8))
    elif kind == 1:
        changed = changed[: int(generator.integers(0, len(data)))]
    elif kind == 2:  # a hole
        place = int(generator.integers(0, len(data)))
        changed[place : place + 20] = b"\x00" * 20
    elif kind == 3:  # a piece of something else
        place = int(generator.integers(0, len(data)))
        changed[place:place] = generator.bytes(int(generator.integers(1, 50)))
    elif kind == 4:
        changed = bytearray()
    elif kind == 5:  # another column, or another type
        swaps = [(b'"text"', b'"txt_"'), (b'"text 1', b'[], "'), (b"text", b"tex\n")]
        old, new = swaps[int(generator.integers(0, len(swaps)))]
        changed = changed.replace(old, new)
    else:
        changed = changed[int(generator.integers(0, len(data))) :]
    return bytes(changed)


FUZZ = """
import sys, json
from pathlib import Path
from moe_pretrain.data import FilesCorpusConfig, TokenizerConfig, prepare_corpus
folder, tokenizer = Path(sys.argv[1]), TokenizerConfig("pretrained", 0, sys.argv[2])
policies = [("fail", "fail"), ("replace", "skip"), ("skip", "skip")]
for number, path in enumerate(sorted(folder.glob("case*"))):
    policy = ("hash", None, "ignore", *policies[number % 3], "fail", "sampled")
    config = FilesCorpusConfig("files", (str(path),), (".txt",), "text", 0.5, *policy, None, None, None)
    print(path.name, flush=True, end="\\t")
    try:
        corpus = prepare_corpus(config, tokenizer, folder / "cache", None, 1, None)
        counts = corpus.counts
        parts = counts.empty + counts.invalid_utf8 + counts.invalid_json + counts.train + counts.validation
        corpus.train.verify()
        assert counts.read == parts and counts.train == corpus.train.num_documents, "counts do not add up"
        print("good", flush=True)
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)
"""


def test_mutilated_inputs_prepare_or_are_one_line_that_names_the_file(tmp_path):
    """In a process of its own: a crash of a native library must not take the tests with it, but fail this one."""
    source = tmp_path / "source.jsonl"
    source.write_bytes(good_corpora()[".jsonl"])
    made = prepare_corpus(files(source), TokenizerConfig("train", 300, None), tmp_path / "made", None, 1, None)
    tokenizer = made.train.folder.parent / "tokenizer.json"
    generator = np.random.default_rng(0)
    corpora = list(good_corpora().items())
    folder = tmp_path / "cases"
    folder.mkdir()
    for number in range(MUTILATED):
        ending, data = corpora[number % len(corpora)]
        (folder / f"case{number:03d}{ending}").write_bytes(mutilate(generator, data))
    command = [sys.executable, "-c", FUZZ, str(folder), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    results = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(results) == MUTILATED
    good = [name for name, result in results.items() if result == "good"]
    assert 10 < len(good) < MUTILATED - 100
    for name, result in results.items():
        if result != "good":
            line = json.loads(result)
            assert "\n" not in line and len(line) < 600, line
            assert name in line, line
    assert not list((folder / "cache").glob("*.partial"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, name):
    """It is cut into pieces first; some of them would be of the old text and some of the new one."""
    path = tmp_path / name

    def write(words):
        lines = "".join(json.dumps({"text": f"{words} {number}"}) + "\n" for number in range(500)).encode()
        if name.endswith(".parquet"):
            texts = [f"{words} {number}" for number in range(500)]
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
        else:
            path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)

    write("a text of some words")
    config = files(path)
    units = plan_units(config, 4000)
    assert [row for unit in units for row in unit_rows(config, unit)]
    for change in (lambda: write("a text of many words"), path.unlink):
        write("a text of some words")
        units = plan_units(config, 4000)
        list(unit_rows(config, units[0]))  # what was read before is what it was
        change()
        with pytest.raises(ValueError, match=f"^data.paths: {path}: (it was changed while|.*No such file)") as caught:
            list(unit_rows(config, units[-1]))
        assert "\n" not in str(caught.value)
    write("shorter")
    units = plan_units(config, 4000)
    os.truncate(path, path.stat().st_size * 2 // 3)  # in the middle of a line: what is broken then is not said
    with pytest.raises(ValueError, match=f"^data.paths: {path}: it was changed while it was read; start again when"):
        [row for unit in units for row in unit_rows(config, unit)]
