"""Held-out documents of one source that another trains on are counted or left out, between any two sources."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.corpora import files

from moe_pretrain.data import MixtureConfig, RunLength, TokenizerConfig, check_mixture, prepare_mixture
from moe_pretrain.data.documents.document import is_validation

TOKENIZER = TokenizerConfig("train", 300, None)
RUN = RunLength(num_steps=10, rows_per_step=4, sequence_length=8)
FRACTION = 0.3


def text_of(number):
    return f"{number} {' '.join(str(number * k % 997) for k in range(60))}"


def sides(texts):
    return ([t for t in texts if not is_validation(t, FRACTION)], [t for t in texts if is_validation(t, FRACTION)])


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def mixture(tmp_path):
    """Two sources: of the first sixty documents of one the other has the same, or the same but for a word."""
    web = [text_of(number) for number in range(1, 91)]
    own = next(
        t for t in map(text_of, range(91, 200)) if is_validation(t, FRACTION) and f"{t} end" in sides([f"{t} end"])[0]
    )
    web += [own, f"{own} end"]  # what a source itself trains on is not another's
    books = [f"{text} end" if n % 2 else text for n, text in enumerate(web[:60])] + [
        text_of(n) for n in range(200, 240)
    ]
    write(tmp_path / "web.jsonl", web)
    write(tmp_path / "books.jsonl", books)

    def prepare(web_policy, books_policy, prepare=prepare_mixture):
        sources = {
            name: files(tmp_path / f"{name}.jsonl", fraction=FRACTION, near_duplicates=policy)
            for name, policy in (("web", web_policy), ("books", books_policy))
        }
        config = MixtureConfig("mixture", sources, {"web": 1, "books": 1}, (), "repeat")
        more = () if prepare is check_mixture else (1, None)
        return prepare(config, TOKENIZER, tmp_path / "cache", RUN, *more)

    trained_on = set(sides(books)[0])
    held_out = sides(web)[1]
    exact = [text for text in held_out if text in trained_on]
    near = [text for text in held_out if {text, f"{text} end"} & trained_on]
    return prepare, held_out, exact, near, own


def texts_of(corpus):
    reader, start, found = corpus.validation, 0, []
    for end in reader.document_ends.tolist():
        found.append(corpus.tokenizer.decode(reader.read(start, end - 1).tolist()))
        start = end
    return found


def test_they_are_counted_said_and_left_out_as_the_source_that_holds_them_out_says(mixture):
    prepare, held_out, exact, near, own = mixture
    assert not exact, "the hash of a text decides its side in every source"
    assert len(near) > 5
    counted, dropped, ignored = prepare("count", "count"), prepare("drop", "count"), prepare("ignore", "drop")
    assert texts_of(counted.sources["web"]) == held_out == texts_of(ignored.sources["web"])
    assert (counted.found["web"].near, counted.found["web"].exact) == (len(near), 0)
    words = f"{len(near)} of web (0 exact), "
    assert words + "kept (data.sources.web.near_duplicates=drop leaves them out)" in counted.describe_size()
    assert ignored.found["web"].near == 0 < ignored.found["books"].near
    assert texts_of(dropped.sources["web"]) == [text for text in held_out if text not in (*near, own)]
    assert texts_of(dropped.sources["books"]) == texts_of(counted.sources["books"])
    assert words + "left out" in dropped.describe_size() and "left out" in dropped.describe_prepared(1)
    web = dropped.sources["web"]
    assert web.validation.text_bytes == sum(len(text) for text in held_out if text not in (*near, own))
    assert f"+ {len(near) + 1} on both sides" in web.describe_counts()
    assert web.counts.read == web.counts.train + web.counts.validation + web.counts.duplicate
    assert dropped.fingerprint != counted.fingerprint
    assert dropped.validation_sets()["web"].num_documents == len(held_out) - len(near) - 1


def test_they_are_looked_for_once_and_checked(mixture, monkeypatch):
    prepare, *_ = mixture
    first = prepare("drop", "count")
    monkeypatch.setattr("moe_pretrain.data.prepare.across_sources._look_up", None)
    assert prepare("drop", "count", check_mixture).fingerprint == first.fingerprint
    shard = first.sources["web"].validation.folder / "shard-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"^{shard}: damaged: xxh3 is ") as caught:
        prepare("drop", "count", check_mixture)
    monkeypatch.undo()
    removed = Path(str(caught.value).partition("delete ")[2].partition(" to write it again")[0])
    shutil.rmtree(removed)  # as the line says
    assert prepare("drop", "count", check_mixture).fingerprint == first.fingerprint
    found = removed / "found.json"
    found.write_text("{}")
    with pytest.raises(ValueError, match=rf"^{found}: damaged: [^\n]*; delete it to write it again"):
        prepare("drop", "count", check_mixture)
    found.unlink()
    assert prepare("drop", "count", check_mixture).found == first.found


def test_a_full_disk_is_one_line_and_the_next_attempt_begins_again(mixture, monkeypatch):
    prepare, *_ = mixture

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("moe_pretrain.data.prepare.across_sources.write_whole", full)
        with pytest.raises(ValueError, match=r"^[^\n]*across-[^\n]*: No space left on device; the same command"):
            prepare("count", "count")
    assert prepare("count", "count").found["web"].near > 0


def test_the_same_text_on_two_sides_is_exact(mixture, tmp_path):
    """Files of one source are the validation side of another: equal documents are counted even without near ones."""
    texts = [text_of(number) for number in range(1, 31)]
    write(tmp_path / "train.jsonl", texts[:10])
    write(tmp_path / "held.jsonl", texts[10:20])
    write(tmp_path / "other.jsonl", texts[15:])
    own = files(tmp_path / "train.jsonl", validation_paths=(str(tmp_path / "held.jsonl"),), near_duplicates="ignore")
    sources = {"own": own, "other": files(tmp_path / "other.jsonl", fraction=FRACTION, near_duplicates="ignore")}
    config = MixtureConfig("mixture", sources, {"own": 1, "other": 1}, (), "repeat")
    made = prepare_mixture(config, TOKENIZER, tmp_path / "cache", RUN, 1, None)
    expected = len(set(texts[10:20]) & set(sides(texts[15:])[0]))
    assert 0 < expected < 5 and made.found["own"].exact == made.found["own"].near == expected
    assert made.found["other"].near == 0
    assert "no source trains on what another holds out" not in made.describe_size()


@pytest.fixture
def dropping(tmp_path):
    """A source whose validation documents all, or all but one, have a near duplicate in another source."""
    held_out = [text_of(number) for number in range(1, 6)]
    write(tmp_path / "train.jsonl", [text_of(number) for number in range(50, 60)])
    write(tmp_path / "held.jsonl", held_out)
    own = files(tmp_path / "train.jsonl", validation_paths=(str(tmp_path / "held.jsonl"),), near_duplicates="drop")
    write(tmp_path / "held_elsewhere.jsonl", [text_of(100)])

    def prepare(first):
        write(tmp_path / "other.jsonl", [f"{text} end" for text in held_out[first:]])
        paths = (str(tmp_path / "held_elsewhere.jsonl"),)
        sources = {"own": own, "other": files(tmp_path / "other.jsonl", validation_paths=paths)}
        config = MixtureConfig("mixture", sources, {"own": 1, "other": 1}, (), "repeat")
        return prepare_mixture(config, TOKENIZER, tmp_path / "cache", RUN, 1, None)

    return prepare


def test_a_source_of_which_nothing_would_be_left_is_one_line(dropping):
    words = (
        r"^data\.sources\.own\.near_duplicates=drop leaves no validation document: other sources train on [^\n]* all 5;"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            dropping(0)


def test_a_source_of_an_earlier_release_is_one_line(dropping, tmp_path):
    assert dropping(1).sources["own"].validation.num_documents == 1
    for path in tmp_path.rglob("document-bytes.bin"):
        path.unlink()
    for folder in (tmp_path / "cache").glob("across-*"):
        shutil.rmtree(folder)
    with pytest.raises(
        ValueError, match="^[^\n]*was prepared by an earlier release, and data.sources.own[^\n]*delete the"
    ):
        dropping(1)
