"""Token shards: what was written is read back, and nothing damaged goes unseen."""

import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from helpers.corpora import write_shards

from moe_pretrain.data import ShardReader, ShardWriter
from moe_pretrain.data.shards import token_file
from moe_pretrain.data.shards.reader import is_complete
from moe_pretrain.data.shards.token_file import BLOCK_BYTES, SUMS_DTYPE, TokenFile

END = 9


write = write_shards


def random_texts(seed, count=40, vocab_size=1000):
    generator = np.random.default_rng(seed)
    return [generator.integers(10, vocab_size, size=generator.integers(0, 15)).tolist() for _ in range(count)]


@pytest.mark.parametrize("tokens_per_shard", [1, 20, 100, 2**27])
@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_round_trip(tmp_path, vocab_size, dtype, tokens_per_shard):
    texts = [*random_texts(0, vocab_size=vocab_size), [vocab_size - 1]]
    reader = write(tmp_path, texts, vocab_size, tokens_per_shard)
    stream = [token for text in texts for token in [*text, END]]
    ends = np.cumsum([len(text) + 1 for text in texts])

    assert reader.read(0, len(stream)).tolist() == stream
    assert reader.read(0, 1).dtype == dtype
    assert reader.document_ends.tolist() == ends.tolist()
    assert (reader.num_tokens, reader.num_documents) == (len(stream), len(texts))
    assert reader.text_bytes == 3 * sum(map(len, texts))
    generator = np.random.default_rng(1)
    for start, stop in np.sort(generator.integers(0, len(stream) + 1, size=(200, 2))).tolist():
        assert reader.read(start, stop).tolist() == stream[start:stop]
    assert (len(reader.manifest.shards) > 1) == (tokens_per_shard <= 100)
    reader.verify()


def test_files_have_the_documented_bytes(tmp_path):
    write(tmp_path, [[300, 2], [5]])
    assert (tmp_path / "shard-00000.bin").read_bytes() == b"\x2c\x01\x02\x00\x09\x00\x05\x00\x09\x00"
    assert (tmp_path / "shard-00000.idx").read_bytes() == b"\x03" + b"\x00" * 7 + b"\x05" + b"\x00" * 7
    assert {path.name for path in tmp_path.iterdir()} == {
        "shard-00000.bin",
        "shard-00000.idx",
        "shard-00000.sums",
        "manifest.json",
        "token-counts.bin",
    }


def test_entropy_is_that_of_the_tokens(tmp_path):
    reader = write(tmp_path, [[1, 1, 2]])  # 1 half of the time, 2 and the end a quarter each
    expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert reader.manifest.unigram_entropy_nats == pytest.approx(expected)


def test_reading_outside_is_refused(tmp_path):
    reader = write(tmp_path, [[1, 2]])
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(ValueError, match=r"must be inside \[0, 3\)"):
            reader.read(start, stop)


@pytest.mark.parametrize("token", [1000, -1, 70000])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, token):
    writer = ShardWriter(tmp_path, 0, 1000, END)
    with pytest.raises(ValueError, match="from 0 to vocab_size-1=999"):
        writer.add([1, token], 1)


def test_without_a_manifest_a_folder_is_incomplete(tmp_path):
    writer = ShardWriter(tmp_path, 0, 1000, END)
    for tokens in random_texts(1):
        writer.add(tokens, 1)
    writer.abort()
    assert not is_complete(tmp_path) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        ShardReader(tmp_path)
    reader = write(tmp_path, [[1, 2]])
    assert is_complete(tmp_path)
    assert reader.read(0, 3).tolist() == [1, 2, END]
    assert len(list(tmp_path.iterdir())) == 5
    assert (reader.manifest.version, reader.manifest.licence) == ("v1", "CC0-1.0")


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no document was written"):
        write(tmp_path, [])
    assert not is_complete(tmp_path)


def test_every_flipped_byte_is_found_and_its_file_named(tmp_path):
    reader = write(tmp_path, random_texts(2), tokens_per_shard=100)
    generator = np.random.default_rng(0)
    for path in sorted(tmp_path.glob("shard-*")):
        good = path.read_bytes()
        # The head of sums says whose they are.
        for place in generator.integers(16 if path.suffix == ".sums" else 0, len(good), size=5):
            damaged = bytearray(good)
            damaged[place] ^= 1 << int(generator.integers(0, 8))
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path.name}: damaged: xxh3") as caught:
                reader.verify()
            assert "\n" not in str(caught.value)
        path.write_bytes(good)
    reader.verify()


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_truncated_and_missing_files_are_refused_at_open(tmp_path, ending):
    write(tmp_path, random_texts(3))
    path = tmp_path / f"shard-00000.{ending}"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=rf"shard-00000\.{ending}: damaged: has {len(good) - 1} bytes"):
        ShardReader(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"shard-00000\.{ending}: damaged: it is missing"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format_version": 2', '"format_version": 1'),
        lambda text: text.replace('"dtype"', '"dtyp"'),
        lambda text: json.dumps({**json.loads(text), "tokens": 7}),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, damage):
    write(tmp_path, random_texts(4))
    path = tmp_path / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged: ") as caught:
        ShardReader(tmp_path)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_the_tokens_alone(tmp_path):
    texts = random_texts(5)
    one = write(tmp_path / "one", texts)
    same = write(tmp_path / "same", texts)
    texts[-1] = [*texts[-1], 11]
    other = write(tmp_path / "other", texts)
    assert one.fingerprint == same.fingerprint != other.fingerprint


LONG = [list(range(10, 900)) for _ in range(60)]
"""Several blocks of checksums."""


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_a_changed_byte_is_found_when_its_block_is_read_and_no_other(tmp_path, vocab_size):
    """Also one that was read before: a run reads its rows again in each epoch."""
    reader = write(tmp_path, LONG, vocab_size)
    size = reader.read(0, 1).itemsize
    before = reader.read(0, reader.num_tokens).tolist()
    path = tmp_path / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    assert len(content) > 4 * BLOCK_BYTES
    content[2 * BLOCK_BYTES + 5] ^= 4
    path.write_bytes(content)
    others = (0, 2 * BLOCK_BYTES // size), (3 * BLOCK_BYTES // size, len(before))
    for start, stop in others:
        assert reader.read(start, stop).tolist() == before[start:stop]
    for start, stop in ((0, len(before)), (2 * BLOCK_BYTES // size, 2 * BLOCK_BYTES // size + 1)):
        with pytest.raises(ValueError, match=r"shard-00000\.bin: damaged: bytes \d+ to \d+ are not those") as caught:
            reader.read(start, stop)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="damaged"):
        reader.read_rows(np.array([2 * BLOCK_BYTES // size + 3]), 20)


def test_a_shard_cut_short_under_a_reader_is_one_line(tmp_path):
    """As a mapped file it would be SIGBUS."""
    reader = write(tmp_path, LONG)
    reader.read(0, 10)
    with open(tmp_path / "shard-00000.bin", "r+b") as file:
        file.truncate(BLOCK_BYTES)
    assert len(reader.read(0, 10)) == 10
    with pytest.raises(ValueError, match=rf"shard-00000\.bin: damaged: has {BLOCK_BYTES} bytes, it had \d+ when"):
        reader.read(reader.num_tokens - 10, reader.num_tokens)


def test_an_older_folder_without_sums_must_keep_its_files(tmp_path):
    write(tmp_path, LONG)
    (tmp_path / "shard-00000.sums").unlink()
    reader = ShardReader(tmp_path)
    before = reader.read(0, 100).tolist()
    path = tmp_path / "shard-00000.bin"
    content = path.read_bytes()
    time.sleep(0.02)  # a clock tick of the file system
    path.write_bytes(content[:-2] + b"\0\0")
    with pytest.raises(ValueError, match=r"shard-00000\.bin: damaged: was written after the run had opened it"):
        reader.read(0, 100)
    path.write_bytes(content)
    assert ShardReader(tmp_path).read(0, 100).tolist() == before


def test_sums_that_an_older_release_left_behind_are_not_compared(tmp_path):
    """It writes a shard again, and knows nothing of sums."""
    old = write(tmp_path, [[1, 2, 3]])
    sums = (tmp_path / "shard-00000.sums").read_bytes()
    reader = write(tmp_path, [[4, 5, 6]])
    (tmp_path / "shard-00000.sums").write_bytes(sums)
    assert old.fingerprint != reader.fingerprint and ShardReader(tmp_path).read(0, 3).tolist() == [4, 5, 6]
    write(tmp_path, [[1, 2, 3]])
    (tmp_path / "shard-00000.sums").write_bytes(sums[:-1])
    with pytest.raises(ValueError, match=r"shard-00000\.sums: damaged: has 23 bytes"):
        ShardReader(tmp_path).read(0, 3)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_opened", functools.cache(token_file._opened.__wrapped__))
    monkeypatch.setattr(token_file.resource, "getrlimit", lambda kind: (32, 32))
    reader = write(tmp_path, random_texts(6), tokens_per_shard=20)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(reader.manifest.shards) > 10
    for start in range(0, reader.num_tokens - 5, 5):
        reader.read(start, start + 5)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 8


@pytest.mark.parametrize("with_sums", [True, False])
def test_beyond_two_gibibytes(tmp_path, with_sums):
    """A sparse file: zeros up to its last block."""
    size, last = 2**31 + 5 * BLOCK_BYTES, np.arange(1, BLOCK_BYTES // 2 + 1, dtype="<u2").tobytes()
    path = tmp_path / "shard-00000.bin"
    with open(path, "wb") as file:
        file.seek(size - BLOCK_BYTES)
        file.write(last)
    digest = b"\x11" * 16
    if with_sums:
        zeros = xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))
        sums = np.full(size // BLOCK_BYTES, zeros, dtype=SUMS_DTYPE)
        sums[-1] = xxhash.xxh3_64_intdigest(last)
        path.with_suffix(".sums").write_bytes(digest + sums.tobytes())
    tokens = TokenFile(path, np.dtype("<u2"), digest.hex())
    assert tokens.read(size // 2 - 2, size // 2).tolist() == [BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2]
    assert tokens.read(2**30 - 1, 2**30 + 1).tolist() == [0, 0], "over 2 GiB"
    with open(path, "r+b") as file:
        file.seek(2**31 + 10)
        file.write(b"\1")
    with pytest.raises(ValueError, match="damaged"):
        tokens.read(2**30 + 20, 2**30 + 21)
    with open(path, "r+b") as file:
        file.truncate(2**31)
    with pytest.raises(ValueError, match="damaged"):
        tokens.read(2**30 + BLOCK_BYTES, 2**30 + BLOCK_BYTES + 3)
