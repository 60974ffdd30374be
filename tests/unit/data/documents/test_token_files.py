"""Foreign token files: Megatron pairs, numpy files and flat ones become the same shards."""

import struct

import numpy as np
import pytest
from helpers.corpora import files

from moe_pretrain.data import TokenizerConfig, TokensCorpusConfig, prepare
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.documents.document import is_validation

DTYPES = {np.uint16: 8, np.int32: 4, np.int64: 5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer file of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"text": "text number {number} {number**3}"}}\n' for number in range(100)))
    made = prepare(files(path), TokenizerConfig("train", 300, None), folder / "cache", None, 1, None)
    config = TokenizerConfig("pretrained", 0, str(made.train.folder.parent / "tokenizer.json"))
    return config, made.tokenizer.vocab_size, made.tokenizer.end_of_document


def tokens(*paths, flat_dtype="uint16", fraction=0.2):
    return TokensCorpusConfig("tokens", tuple(map(str, paths)), flat_dtype, fraction, "ignore", None, None)


def random_documents(vocab_size, end, count=300):
    generator = np.random.default_rng(0)
    allowed = np.array([token for token in range(vocab_size) if token != end])
    return [generator.choice(allowed, size=generator.integers(0, 40)) for _ in range(count)]


def write_megatron(stem, documents, dtype, per_sequence=None):
    """As Megatron-LM's IndexedDatasetBuilder does; a document may be several sequences."""
    sequences = [np.array_split(document, 1 + (per_sequence or 0) * (len(document) > 4)) for document in documents]
    starts = np.cumsum([0, *map(len, sequences)])
    flat = [part for parts in sequences for part in parts]
    lengths = np.array([len(part) for part in flat], "<i4")
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum([0, *lengths])[:-1] * itemsize).astype("<i8")
    stem.with_suffix(".bin").write_bytes(b"".join(part.astype(dtype).tobytes() for part in flat))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, DTYPES[dtype], len(flat), len(starts))
    body = lengths.tobytes() + pointers.tobytes() + starts.astype("<i8").tobytes()
    stem.with_suffix(".idx").write_bytes(header + body)
    return stem.with_suffix(".bin")


def documents_of(reader):
    ends = reader.document_ends.tolist()
    return [reader.read(start, end).tolist() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def flat(documents, end):
    return np.concatenate([np.append(document, end) for document in documents])


@pytest.mark.parametrize("kind", ["megatron16", "megatron32", "megatron64 in sequences", "npy", "flat", "flat int32"])
@pytest.mark.parametrize("unit_bytes", [4_000_000, 500])
def test_every_kind_gives_the_same_documents(tmp_path, tokenizer, monkeypatch, kind, unit_bytes):
    config, vocab_size, end = tokenizer
    documents = random_documents(vocab_size, end)
    path, dtype = tmp_path / "a.npy", "uint16"
    if kind == "npy":
        np.save(path, flat(documents, end).astype(np.uint32))
    elif kind.startswith("flat"):
        path, dtype = tmp_path / "a.bin", "int32" if kind == "flat int32" else "uint16"
        path.write_bytes(flat(documents, end).astype(dtype).tobytes())
    elif kind == "megatron16":  # with the end of each document, as Megatron's --append-eod
        path = write_megatron(tmp_path / "a", [np.append(d, end) for d in documents], np.uint16)
    else:
        split = 2 if "sequences" in kind else None
        path = write_megatron(tmp_path / "a", documents, np.int64 if "64" in kind else np.int32, split)
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", unit_bytes)
    assert (len(sources.plan_units(tokens(path, flat_dtype=dtype))) > 5) == (unit_bytes == 500)
    corpus = prepare(tokens(path, flat_dtype=dtype), config, tmp_path / "cache", None, 1, None)
    real = [document for document in documents if len(document)]
    held_out = [is_validation(document, 0.2) for document in real]
    for reader, side in ((corpus.train, False), (corpus.validation, True)):
        assert documents_of(reader) == [
            [*document, end] for document, hold in zip(real, held_out, strict=True) if hold == side
        ]
    assert corpus.counts.read == 300 and corpus.counts.empty == 300 - len(real)


def test_the_last_document_may_have_no_end(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    documents = random_documents(vocab_size, end, 50)
    np.save(tmp_path / "a.npy", flat(documents, end)[:-1].astype(np.uint16))
    corpus = prepare(tokens(tmp_path / "a.npy"), config, tmp_path / "cache", None, 1, None)
    total = sum(len(document) + 1 for document in documents if len(document))
    assert corpus.train.num_tokens + corpus.validation.num_tokens == total


def bad_files(folder, vocab_size, end):
    documents = random_documents(vocab_size, end, 20)
    stream = flat(documents, end).astype(np.int64)
    outside = stream.copy()
    outside[57] = vocab_size
    np.save(folder / "outside.npy", outside)
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "empty.bin").write_bytes(b"")
    np.save(folder / "floats.npy", stream.astype(float))
    np.save(folder / "square.npy", stream[:100].reshape(10, 10))
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    (folder / "fake.npy").write_bytes(b"no numpy")
    negative = [np.array([1, -5, 2])]
    write_megatron(folder / "negative", negative, np.int32)
    write_megatron(folder / "cut", documents, np.int32)
    (folder / "cut.bin").write_bytes((folder / "cut.bin").read_bytes()[:-40])
    write_megatron(folder / "short", documents, np.int32)
    (folder / "short.idx").write_bytes((folder / "short.idx").read_bytes()[:-4])
    write_megatron(folder / "magic", documents, np.int32)
    (folder / "magic.idx").write_bytes(b"X" + (folder / "magic.idx").read_bytes()[1:])
    return [
        ("outside.npy", f"token 57: id {vocab_size} must be from 0 to {vocab_size - 1}"),
        ("odd.bin", "3 bytes are no whole number of uint16 tokens"),
        ("empty.bin", "is empty"),
        ("floats.npy", "must be one row of integers, is float64"),
        ("square.npy", "must be one row of integers, is int64 [10, 10]"),
        ("objects.npy", ""),
        ("fake.npy", ""),
        ("negative.bin", "token 1: id -5"),
        ("cut.bin", "points outside"),
        ("short.bin", "short.idx: damaged"),
        ("magic.bin", "no Megatron index"),
        ("none.bin", "does not exist"),
    ]


def test_bad_files_are_one_line_with_file_and_place(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    for name, words in bad_files(tmp_path, vocab_size, end):
        with pytest.raises(ValueError) as caught:
            prepare(tokens(tmp_path / name), config, tmp_path / "cache", None, 1, None)
        line = str(caught.value)
        assert name in line and words in line and "\n" not in line and len(line) < 500, (name, line)


@pytest.mark.parametrize("words", [[], ["tokenizer=pretrained", "tokenizer.path=x"]])
def test_tokens_need_their_tokenizer(words):
    from moe_pretrain.config.load import load
    from moe_pretrain.config.schema import ConfigError

    overrides = ["data=tokens", "data.paths=[a.npy]", *words]
    if words:
        load(overrides)
    else:
        with pytest.raises(ConfigError, match="tokenizer.kind=train must be pretrained with data=tokens"):
            load(overrides)


def test_flat_tokens_may_be_cut_anywhere():
    from moe_pretrain.data.documents.token_files import _flat_documents

    stream = np.array([1, 2, 0, 3, 0, 0, 4, 5, 6, 0, 7])
    whole = [tokens.tolist() for _, _, tokens in _flat_documents(stream, 0, len(stream), 0)]
    assert whole == [[1, 2, 0], [3, 0], [0], [4, 5, 6, 0], [7]]
    for cut in range(len(stream) + 1):
        parts = [*_flat_documents(stream, 0, cut, 0), *_flat_documents(stream, cut, len(stream), 0)]
        assert [tokens.tolist() for _, _, tokens in parts] == whole, cut
