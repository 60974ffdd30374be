"""``prepare_corpus``: text to shards once, the same on every machine, in every process, after every kill."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import files, hub

from moe_pretrain import cli
from moe_pretrain.data import TokenizerConfig, check_prepared
from moe_pretrain.data import prepare_corpus as prepare_with_workers
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.documents.document import LeftOut, is_validation
from moe_pretrain.data.documents.work_units import documents
from moe_pretrain.data.prepare import attempt as building
from moe_pretrain.data.prepare import prepare_corpus as preparation
from moe_pretrain.data.shards import unit_shards as units
from moe_pretrain.system.files import WholeFile

TOKENIZER = TokenizerConfig("train", 300, None)


def prepare_corpus(config, tokenizer, cache, tokens_needed, progress, workers=1):
    return prepare_with_workers(config, tokenizer, cache, tokens_needed, workers, progress)


@pytest.fixture
def config(tmp_path):
    """200 different documents, then the first 50 of them again."""
    texts = [f"document {number} says {number * number}" for number in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:50]))
    return files(path, fraction=0.2)


def texts_of(corpus, reader):
    ends = reader.document_ends.tolist()
    starts = [0, *ends[:-1]]
    spans = zip(starts, ends, strict=True)
    return [corpus.tokenizer.decode(reader.read(start, end - 1).tolist()) for start, end in spans]


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


def test_every_document_arrives_on_one_side(config, tmp_path):
    lines = []
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, lines.append)
    train, validation = texts_of(corpus, corpus.train), texts_of(corpus, corpus.validation)
    expected = [document.text for document in documents(config)]
    assert train == [text for text in expected if not is_validation(text, 0.2)]
    assert validation == [text for text in expected if is_validation(text, 0.2)]
    assert validation and not set(train) & set(validation)
    assert len(train) + len(validation) == 250
    assert corpus.train.text_bytes == sum(len(text.encode()) for text in train)
    for reader in (corpus.train, corpus.validation):
        last_tokens = [reader.read(end - 1, end)[0] for end in reader.document_ends.tolist()]
        assert set(last_tokens) == {corpus.tokenizer.end_of_document}
        reader.verify()
    (counts,) = corpus.train_token_counts().values()
    tokens = corpus.train.read(0, corpus.train.num_tokens)
    assert counts.tolist() == np.bincount(tokens, minlength=corpus.tokenizer.vocab_size).tolist()
    assert (
        any("tokens/s" in line for line in lines)
        and "ends each document" in lines[-1]
        and not any("\n" in line for line in lines)
    )


def test_a_second_call_reads_the_cache(config, tmp_path, monkeypatch):
    first = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    monkeypatch.setattr(units, "unit_rows", lambda config, unit: pytest.fail("the text was read again"))
    second = prepare_corpus(config, TOKENIZER, tmp_path / "cache", 10**9, None)
    assert second.fingerprint == first.fingerprint
    assert len(folders(tmp_path / "cache")) == 1


def test_another_cache_gives_the_same_fingerprint_and_another_text_does_not(config, tmp_path):
    first = prepare_corpus(config, TOKENIZER, tmp_path / "one", None, None)
    second = prepare_corpus(config, TOKENIZER, tmp_path / "two", None, None)
    assert first.fingerprint == second.fingerprint
    with open(config.paths[0], "a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    third = prepare_corpus(config, TOKENIZER, tmp_path / "one", None, None)
    assert third.fingerprint != first.fingerprint
    assert len(folders(tmp_path / "one")) == 2


def test_settings_have_folders_of_their_own(config, tmp_path):
    corpora_made = [
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None),
        prepare_corpus(config, TokenizerConfig("train", 290, None), tmp_path / "cache", None, None),
        prepare_corpus(files(*config.paths, fraction=0.3), TOKENIZER, tmp_path / "cache", None, None),
    ]
    assert len({corpus.fingerprint for corpus in corpora_made}) == 3
    assert len(folders(tmp_path / "cache")) == 3


def test_a_tokenizer_that_exists_can_be_used(config, tmp_path):
    trained = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    file = tmp_path / "tokenizer.json"
    shutil.copy(trained.train.folder.parent / "tokenizer.json", file)
    again = prepare_corpus(config, TokenizerConfig("pretrained", 0, str(file)), tmp_path / "cache", None, None)
    assert again.fingerprint == trained.fingerprint


def test_an_incomplete_folder_is_redone(config, tmp_path):
    first = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    (first.train.folder / "manifest.json").unlink()
    second = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    assert second.fingerprint == first.fingerprint
    assert len(folders(tmp_path / "cache")) == 1


def test_a_failure_leaves_nothing_behind(config, tmp_path):
    with open(config.paths[0], "a", encoding="utf-8") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:251: column 'text' must be a string, got 5"):
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    assert folders(tmp_path / "cache") == []


@pytest.mark.parametrize("fraction, side", [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_refused(config, tmp_path, fraction, side):
    lopsided = files(*config.paths, fraction=fraction)
    with pytest.raises(ValueError, match=rf"leaves no {side} document of the 250 in files: ") as caught:
        prepare_corpus(lopsided, TOKENIZER, tmp_path / "cache", None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_tokens, tokens_needed, expected", [(500, None, 500), (None, 700, 700), (500, 700, 500)])
def test_a_hub_corpus_stops_when_it_has_enough(tmp_path, monkeypatch, max_tokens, tokens_needed, expected):
    stream_numbered_texts(monkeypatch)
    config = hub(max_tokens=max_tokens, validation_fraction=0.1)
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", tokens_needed, None)
    longest = int(np.diff(corpus.train.document_ends, prepend=0).max())
    assert expected <= corpus.train.num_tokens < expected + longest


def stream_numbered_texts(monkeypatch, rows=10**9):
    """A hub dataset of numbered texts; returns the list of row numbers at which it was opened."""
    opened = []

    class Numbered:
        def __init__(self, config, start):
            opened.append(start.rows)
            self.number = start.rows

        def __iter__(self):
            while self.number < rows:
                self.number += 1
                yield {"text": f"text number {self.number - 1} of a stream without end"}

        def state_dict(self):
            return {"number": self.number}

    monkeypatch.setattr(sys.modules["moe_pretrain.data.documents.hub"], "open_stream", Numbered)
    monkeypatch.setattr(sys.modules["moe_pretrain.data.documents.hub"], "require_network", lambda what, instead: None)
    monkeypatch.setattr("moe_pretrain.data.tokenizer.train._SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 1000)
    monkeypatch.setattr(units, "_BATCH_CHARACTERS", 300)
    return opened


@pytest.mark.parametrize("limit", [300, 1500])
def test_a_stream_goes_on_after_a_failure_and_is_the_same(tmp_path, monkeypatch, limit):
    """Failures at every unit, each attempt going on from the last: the same tokens as in one go."""
    config = hub(max_tokens=limit, validation_fraction=0.1)
    opened = stream_numbered_texts(monkeypatch)
    whole = prepare_corpus(config, TOKENIZER, tmp_path / "one", None, None)
    write, attempts = units.write_unit, []

    def failing(*arguments):
        if len(attempts) % 2 == 0:
            attempts.append("failed")
            raise OSError(errno.ENOSPC, "No space left on device")
        attempts.append("done")
        return write(*arguments)

    monkeypatch.setattr(sys.modules["moe_pretrain.data.prepare.worker_pool"], "write_unit", failing)
    opened.clear()
    for _ in range(100):
        try:
            corpus = prepare_corpus(config, TOKENIZER, tmp_path / "two", None, None)
            break
        except ValueError as error:
            assert "No space left on device; finished shards are kept" in str(error)
    assert corpus.fingerprint == whole.fingerprint and corpus.counts == whole.counts
    assert max(opened) > 0 or limit == 300  # later attempts do not read again what is done


def test_a_stream_that_ends_early_is_a_corpus(tmp_path, monkeypatch):
    stream_numbered_texts(monkeypatch, rows=90)
    corpus = prepare_corpus(hub(validation_fraction=0.2), TOKENIZER, tmp_path / "cache", 10**9, None)
    assert corpus.counts.read == 90 == corpus.counts.train + corpus.counts.validation


def test_those_that_start_together_agree(config, tmp_path, monkeypatch):
    built = []
    run = building.Preparation.run

    def slow_run(self):
        built.append(1)
        time.sleep(0.3)
        run(self)

    monkeypatch.setattr(building.Preparation, "run", slow_run)
    lines = []
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(prepare_corpus, config, TOKENIZER, tmp_path / "cache", None, lines.append) for _ in range(3)
        ]
        results = [one.result() for one in running]
    assert len(built) == 1 and any("waiting for it" in line for line in lines)
    assert len({corpus.fingerprint for corpus in results}) == 1
    assert len(folders(tmp_path / "cache")) == 1
    for corpus in results:
        corpus.train.verify()


# ---------------------------------------------------------------- work units, workers, kills


@pytest.fixture
def mixed_corpus(tmp_path):
    """About 1 MB in files of every kind that are cut differently, with some rows to leave out."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    generator = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]

    def text(number):
        return f"{number} " + " ".join(generator.choice(words, size=int(generator.integers(0, 60))))

    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text(number) if number % 50 else ""}) for number in range(2000)]
    lines[77] = "no JSON"
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:300]).encode()))
    for number in range(30):
        (folder / f"c{number:02d}.txt").write_text(text(number) * 5)
    (folder / "d.txt").write_bytes(b"broken \xff text")
    table = pyarrow.table({"text": [text(number) for number in range(1500)]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=100)
    return files(folder / "*", fraction=0.1, invalid_json="skip", invalid_utf8="replace")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_counts_add_up_and_pieces_are_the_whole(mixed_corpus, tmp_path, monkeypatch):
    whole = list(documents(mixed_corpus))
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 3000)
    units_made = sources.plan_units(mixed_corpus)
    assert len(units_made) > 50
    # No line is lost or doubled where a file is cut.
    assert [row.text for row in documents(mixed_corpus)] == [row.text for row in whole]
    rows = [row for unit in units_made for row in sources.unit_rows(mixed_corpus, unit)]
    reasons = [row.reason for row in rows if isinstance(row, LeftOut)]

    corpus = prepare_corpus(mixed_corpus, TOKENIZER, tmp_path / "cache", None, None)
    counts = corpus.counts
    assert counts.empty == reasons.count("empty") == 40 + 6
    assert counts.invalid_json == reasons.count("invalid_json") == 2
    assert counts.repaired == 1
    assert counts.read == len(rows) == len(whole) + len(reasons)
    assert counts.read == counts.empty + counts.invalid_json + counts.invalid_utf8 + counts.train + counts.validation
    assert (counts.train, counts.validation) == (corpus.train.num_documents, corpus.validation.num_documents)
    line = corpus.describe_counts()
    assert f"{counts.read:,} read" in line and "46 empty + 2 not JSON (1 with bytes replaced)" in line


def test_held_out_documents_that_are_trained_on_nearly_are_counted_or_left_out(tmp_path, monkeypatch):
    """Twins differ in one word of forty, so the hash puts some of them on two sides."""
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 4000)
    path = tmp_path / "twins.jsonl"
    words = [f"{number} {' '.join(str(number * k % 997) for k in range(60))}" for number in range(1, 121)]
    texts = [text for number, text in enumerate(words) for text in ([text, f"{text} end"] if number < 80 else [text])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpora = {
        policy: prepare_corpus(files(path, near_duplicates=policy), TOKENIZER, tmp_path / "cache", None, None, workers)
        for policy, workers in (("ignore", 1), ("count", 2), ("drop", 2))
    }
    kept = {policy: texts_of(corpus, corpus.validation) for policy, corpus in corpora.items()}
    trained_on = set(texts_of(corpora["drop"], corpora["drop"].train))
    expected = [text for text in kept["ignore"] if not {text.removesuffix(" end"), f"{text} end"} & trained_on]
    found = len(kept["ignore"]) - len(expected)
    assert found > 15
    assert kept["count"] == kept["ignore"] and kept["drop"] == expected
    corpora["drop"].validation.verify()
    assert corpora["drop"].validation.text_bytes == sum(map(len, expected))
    assert (
        corpora["drop"].train.fingerprint == corpora["count"].train.fingerprint == corpora["ignore"].train.fingerprint
    )
    assert [corpora[policy].counts.near_duplicates for policy in ("ignore", "count", "drop")] == [0, found, found]
    counts = corpora["drop"].counts
    assert (counts.read, counts.duplicate, counts.validation) == (len(texts), found, len(expected))
    assert f"+ {found} on both sides" in corpora["drop"].describe_counts()
    assert f"{found} held-out documents are near duplicates of training documents (0 exact), kept" in (
        corpora["count"].describe_counts()
    )


def test_a_killed_removal_of_duplicates_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 2000)
    path = tmp_path / "twins.jsonl"
    texts = [f"{number} {' '.join(str(number * k % 997) for k in range(60))}" for number in range(40)]
    path.write_text("".join(json.dumps({"text": t + end}) + "\n" for end in ("", " end") for t in texts))
    config = files(path, near_duplicates="drop")
    whole = prepare_corpus(config, TOKENIZER, tmp_path / "whole", None, None)

    def dying(*arguments):
        raise KeyboardInterrupt

    for moment in ("_write_sketches", "write_whole"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            drop = units.drop_from_validation

            def cut_off(*arguments, drop=drop, moment=moment, patch=patch):
                patch.setattr(units, moment, dying)
                return drop(*arguments)

            patch.setattr(building, "drop_from_validation", cut_off)
            prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    again = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    assert (again.fingerprint, again.counts) == (whole.fingerprint, whole.counts)
    assert again.counts.duplicate > 5


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_lines_are_cut_at_any_byte(tmp_path, monkeypatch, size):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "é" * (n % 5) + str(n)}) + "\n" * (1 + n % 3) for n in range(40)))
    expected = [document.text for document in documents(files(path))]
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", size)
    assert [document.text for document in documents(files(path))] == expected
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"text": 5}')
    number = path.read_bytes().count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"a\.jsonl:{number}: "):
        list(documents(files(path)))


PROGRAM = """
import json, sys
from pathlib import Path
from moe_pretrain.data import FilesCorpusConfig, TokenizerConfig, prepare_corpus
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.shards import unit_shards as units
sources._SMALLEST_UNIT_BYTES = 10_000
units._BATCH_CHARACTERS = 2_000
paths, cache, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
policies = ("hash", None, "ignore", "replace", "skip", "fail", "sampled")
config = FilesCorpusConfig("files", (paths,), (".txt",), "text", 0.1, *policies, None, None, None)
prepare_corpus(config, TokenizerConfig("train", 300, None), cache, None, workers, lambda line: print(line, flush=True))
"""


def start(config, cache, workers):
    command = [sys.executable, "-c", PROGRAM, config.paths[0], str(cache), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_any_number_of_workers_and_any_kills_give_the_same_bytes(mixed_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 10_000)
    reference = prepare_corpus(mixed_corpus, TOKENIZER, tmp_path / "one", None, None).train.folder.parent
    with start(mixed_corpus, tmp_path / "three", 3) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert contents(tmp_path / "three" / reference.name) == contents(reference)

    # Killed again and again once a few more shards are done, each time at another moment.
    killed, records = tmp_path / "killed", tmp_path / "killed" / f"{reference.name}.partial" / "units"
    generator = np.random.default_rng(1)
    seen: dict[Path, int] = {}
    for attempt in range(4):
        before = len(list(records.glob("*.json")))
        with start(mixed_corpus, killed, 1 + attempt % 2) as process:
            while process.poll() is None and len(list(records.glob("*.json"))) < before + 6:
                time.sleep(0.001)
            time.sleep(float(generator.uniform(0, 0.01)))
            process.send_signal(signal.SIGKILL)
        for path, changed in seen.items():
            assert not path.exists() or path.stat().st_mtime_ns == changed, f"{path} was made again"
        seen = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
        if not records.exists():
            break
    with start(mixed_corpus, killed, 2) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert contents(killed / reference.name) == contents(reference)
    assert folders(killed) == [reference.name]


def test_a_full_disk_keeps_finished_shards(mixed_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 20_000)
    reference = prepare_corpus(mixed_corpus, TOKENIZER, tmp_path / "one", None, None).train.folder.parent
    write = WholeFile.write
    left = [60_000]

    def write_until_full(self, data):
        if len(data) > left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(data)
        write(self, data)

    monkeypatch.setattr(WholeFile, "write", write_until_full)
    with pytest.raises(ValueError, match="No space left on device; finished shards are kept") as caught:
        prepare_corpus(mixed_corpus, TOKENIZER, tmp_path / "two", None, None)
    assert "\n" not in str(caught.value)
    partial = tmp_path / "two" / f"{reference.name}.partial"
    done = {path: path.stat().st_mtime_ns for path in (partial / "units").glob("*.json")}
    assert done and not list(partial.rglob("*.tmp"))
    left[0] = 10**9
    lines = []
    corpus = prepare_corpus(mixed_corpus, TOKENIZER, tmp_path / "two", None, lines.append)
    assert lines[0].startswith(f"going on with {len(done)} finished shards")
    assert contents(corpus.train.folder.parent) == contents(reference)


def test_a_record_without_its_shard_is_done_again(config, tmp_path, monkeypatch):
    """What a machine that lost its power may leave."""
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 1000)
    monkeypatch.setattr(building.Preparation, "_finish", lambda self, tokenizer: None)
    with pytest.raises(ValueError, match="no manifest"):
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 1000)
    (shard := next((tmp_path / "cache").rglob("shard-00001.bin"))).write_bytes(shard.read_bytes()[:-2])
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    assert corpus.fingerprint == prepare_corpus(config, TOKENIZER, tmp_path / "other", None, None).fingerprint


def test_what_is_damaged_in_the_cache_is_named_with_the_way_out(config, tmp_path):
    made = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    folder = made.train.folder.parent
    for name in ("counts.json", "tokenizer.json", "train/manifest.json", "validation/shard-00000.idx"):
        good = (folder / name).read_bytes()
        for content in (b"", b"\0" * 100, b"{}", b"[]"):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"^{folder}[^\n]*damaged: [^\n]*; delete (it|{folder}) to write it"):
                prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
        (folder / name).write_bytes(good)
    shutil.rmtree(folder)
    assert prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None).fingerprint == made.fingerprint


def test_token_counts_that_are_cut_short_are_counted_again(config, tmp_path):
    made = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    expected = made.train.token_counts().tolist()
    os.truncate(made.train.folder / "token-counts.bin", 101)
    assert made.train.token_counts().tolist() == expected


def test_a_damaged_record_is_no_record(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 2000)
    expected = prepare_corpus(config, TOKENIZER, tmp_path / "whole", None, None).fingerprint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building.Preparation, "_finish", raise_interrupt)
        prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    records = sorted((tmp_path / "cache").glob("*.partial/units/unit-*.json"))
    contents = (b"", b"\0" * 100, b"{}", b'{"shards": 5}')
    assert len(records) > len(contents)
    for record, content in zip(records, contents, strict=False):
        record.write_bytes(content)
    lines = []
    assert prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, lines.append).fingerprint == expected
    assert any(line.startswith(f"going on with {len(records) - len(contents)} finished shards") for line in lines)


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_stale_folders_are_removed_and_fresh_ones_stay(config, tmp_path):
    cache = tmp_path / "cache"
    for name, age in (("files-old.partial", 8 * 86400), ("files-new.partial", 3600)):
        (cache / name / "train").mkdir(parents=True)
        for path in (cache / name / "train", cache / name):
            os.utime(path, (time.time() - age,) * 2)
    prepare_corpus(config, TOKENIZER, cache, None, None)
    names = folders(cache)
    assert "files-new.partial" in names and "files-old.partial" not in names and len(names) == 2


def test_check_names_the_damaged_shard(config, tmp_path, monkeypatch, capsys):
    overrides = [
        "data=files", f"data.paths=[{config.paths[0]}]", "data.validation_fraction=0.2", "data.licence=CC0-1.0",
        f"run.cache_dir={tmp_path / 'cache'}", "tokenizer.vocab_size=300", "run.prepare_workers=1",
    ]  # fmt: skip
    assert cli.main(["prepare", *overrides]) == 0
    assert "250 read" in capsys.readouterr().out
    assert cli.main(["prepare", "--check", *overrides]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    (manifest,) = (tmp_path / "cache").glob("*/train/manifest.json")
    assert json.loads(manifest.read_text())["licence"] == "CC0-1.0"
    shard = manifest.with_name("shard-00000.bin")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    for words in (["prepare", "--check"], ["prepare"]):
        assert cli.main([*words, *overrides]) == cli.USAGE_CODE
        error = capsys.readouterr().err
        assert f"{shard}: damaged: xxh3 is " in error and error.count("\n") == 1
    assert cli.main(["prepare", "--check", *overrides, "data.licence=MIT"]) == cli.USAGE_CODE
    assert "not prepared" in capsys.readouterr().err


def test_a_large_corpus_is_not_read_whole_at_every_start(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_VERIFIED_BYTES", 10)
    corpus = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    shard = corpus.train.folder / "shard-00000.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[0] ^= 1
    shard.write_bytes(damaged)
    prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, None)
    with pytest.raises(ValueError, match="damaged"):
        check_prepared(config, TOKENIZER, tmp_path / "cache", None)


def test_counts_add():
    one = units.Counts(*range(14))
    assert dataclasses.astuple(one + one) == tuple(range(0, 28, 2))


def test_a_stream_is_the_same_with_any_number_of_workers(tmp_path, monkeypatch):
    """Workers run ahead of the limit; what is too much is forgotten."""
    stream_numbered_texts(monkeypatch)
    config = hub(max_tokens=1500, validation_fraction=0.1)
    folders_made = [
        prepare_corpus(config, TOKENIZER, tmp_path / str(workers), None, None, workers).train.folder.parent
        for workers in (1, 2)
    ]
    assert contents(folders_made[0]) == contents(folders_made[1])
