"""Foreign token files: Megatron pairs, numpy files and flat ones become the same shards."""

import struct

import numpy as np
import pytest
from helpers.corpora import files

from moe_pretrain.data import TokenizerConfig, TokensCorpusConfig, prepare_corpus
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.documents.document import is_validation
from moe_pretrain.data.documents.token_files import token_rows

DTYPES = {np.uint16: 8, np.int32: 4, np.int64: 5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer file of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"text": "text number {number} {number**3}"}}\n' for number in range(100)))
    made = prepare_corpus(files(path), TokenizerConfig("train", 300, None), folder / "cache", None, 1, None)
    config = TokenizerConfig("pretrained", 0, str(made.train.folder.parent / "tokenizer.json"))
    return config, made.tokenizer.vocab_size, made.tokenizer.end_of_document


def tokens(*paths, flat_dtype="uint16", fraction=0.2, cut="end_of_document", split="hash"):
    return TokensCorpusConfig(
        "tokens", tuple(map(str, paths)), flat_dtype, cut, fraction, split, None, "ignore", "sampled", None, None
    )


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
    corpus = prepare_corpus(tokens(path, flat_dtype=dtype), config, tmp_path / "cache", None, 1, None)
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
    corpus = prepare_corpus(tokens(tmp_path / "a.npy"), config, tmp_path / "cache", None, 1, None)
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
    np.save(folder / "nothing.npy", stream[:0])
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
    for name, dtype in (("wide", "<u4"), ("wider", "<i8"), ("turned", ">u2")):
        (folder / f"{name}.bin").write_bytes(stream.astype(dtype).tobytes())
    return [
        ("outside.npy", f"token 57: id {vocab_size} must be from 0 to {vocab_size - 1}"),
        ("odd.bin", "3 bytes are no whole number of uint16 tokens"),
        ("empty.bin", "is empty"),
        ("nothing.npy", "has no tokens"),
        ("floats.npy", "must be one row of integers, is float64"),
        ("square.npy", "must be one row of integers, is int64 [10, 10]"),
        ("objects.npy", ""),
        ("fake.npy", "has no numpy header, so it is raw tokens: rename it (or link to it) as .bin"),
        ("negative.bin", "token 1: id -5"),
        ("cut.bin", "points outside"),
        ("wide.bin", "set data.flat_dtype=uint32"),
        ("wider.bin", "set data.flat_dtype=int64"),
        ("turned.bin", "as big-endian uint16 they are: turn its bytes around"),
        ("short.bin", "short.idx: damaged"),
        ("magic.bin", "no Megatron index"),
        ("none.bin", "does not exist"),
    ]


def test_bad_files_are_one_line_with_file_and_place(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    for name, words in bad_files(tmp_path, vocab_size, end):
        with pytest.raises(ValueError) as caught:
            prepare_corpus(tokens(tmp_path / name), config, tmp_path / "cache", None, 1, None)
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


def test_a_narrow_file_that_is_read_as_a_wide_type_is_named(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    (tmp_path / "a.bin").write_bytes(flat(random_documents(vocab_size, end), end)[:4000].astype("<u2").tobytes())
    for dtype in ("uint32", "int32", "int64"):
        with pytest.raises(ValueError, match="as uint16 they are: set data.flat_dtype=uint16"):
            prepare_corpus(tokens(tmp_path / "a.bin", flat_dtype=dtype), config, tmp_path / "cache", None, 1, None)


def test_a_type_that_cannot_hold_the_ids_is_refused(tmp_path):
    from moe_pretrain.data.documents.token_files import token_rows

    (tmp_path / "a.bin").write_bytes(np.arange(100, dtype="<u2").tobytes())
    config = tokens(tmp_path / "a.bin")
    (unit,) = sources.plan_units(config)
    with pytest.raises(ValueError, match="data.flat_dtype=uint16 does not hold the tokenizer's ids up to 65536"):
        list(token_rows(unit.pieces, config, 65_537, 0))
    assert len(list(token_rows(unit.pieces, config, 65_536, 50))) == 2


def rewrite_index(path, change):
    """Change the parts of an index, ``(lengths, pointers, document starts)``."""
    data = path.read_bytes()
    sequences, documents = struct.unpack_from("<QQ", data, 18)
    lengths = np.frombuffer(data, "<i4", sequences, 34).copy()
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences).copy()
    starts = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences).copy()
    lengths, pointers, starts = change(lengths, pointers, starts)
    header = data[:18] + struct.pack("<QQ", len(lengths), len(starts))
    path.write_bytes(header + lengths.tobytes() + pointers.tobytes() + starts.tobytes())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda n, p, s: (n, p, s[:10]), "its documents are sequences 0 to 9 of 20"),
        (lambda n, p, s: (n, p, s[1:]), "its documents are sequences 1 to 20 of 20"),
        (lambda n, p, s: (n[:-1], p[:-1], s[:-1]), "tokens are in none of its sequences"),
        (lambda n, p, s: (n[1:], p[1:], s[:-1]), "tokens are in none of its sequences"),
        (lambda n, p, s: (np.where(np.arange(20) == 7, n - 1, n).astype("<i4"), p, s), "1 of the file's"),
        (lambda n, p, s: (n, np.where(np.arange(20) == 7, p - 4, p), s), "two of its sequences share tokens"),
        (lambda n, p, s: (np.append(n, n[-1:]), np.append(p, p[-1:]), np.append(s, 21)), "share tokens"),
    ],
)
def test_an_index_that_is_not_the_whole_file_is_refused(tmp_path, tokenizer, change, words):
    config, vocab_size, end = tokenizer
    documents = [document for document in random_documents(vocab_size, end, 100) if len(document) > 3][:20]
    path = write_megatron(tmp_path / "a", documents, np.int32)
    rewrite_index(tmp_path / "a.idx", change)
    with pytest.raises(ValueError, match=words):
        prepare_corpus(tokens(path), config, tmp_path / "cache", None, 1, None)


def test_sequences_may_lie_in_any_order_and_have_modes(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    documents = [document for document in random_documents(vocab_size, end, 100) if len(document) > 3][:20]
    path = write_megatron(tmp_path / "a", documents, np.int32)
    rewrite_index(tmp_path / "a.idx", lambda n, p, s: (n[::-1], p[::-1], s))
    with open(tmp_path / "a.idx", "ab") as file:
        file.write(bytes(20))  # one mode for each sequence
    assert prepare_corpus(tokens(path), config, tmp_path / "cache", None, 1, None).counts.read == 20


def test_an_index_of_another_name_or_behind_a_dead_link_is_named(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    path = write_megatron(tmp_path / "a", random_documents(vocab_size, end), np.uint16)
    (tmp_path / "a.idx").rename(tmp_path / "a_text_document.idx")
    with pytest.raises(ValueError, match="a.idx is missing, and a_text_document.idx beside it has no .bin"):
        prepare_corpus(tokens(path), config, tmp_path / "cache", None, 1, None)
    (tmp_path / "a.idx").symlink_to("gone.idx")
    with pytest.raises(ValueError, match="a.idx beside it is a link to gone.idx, which does not exist"):
        prepare_corpus(tokens(path), config, tmp_path / "cache", None, 1, None)


def test_packed_documents_come_apart_unless_the_index_alone_decides(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    documents = [document for document in random_documents(vocab_size, end, 100) if len(document)][:60]
    packs = [flat(documents[start : start + 5], end) for start in range(0, 60, 5)]
    packs[3] = packs[3][:-1]  # a pack that is cut at its length has no end of its last document
    path = write_megatron(tmp_path / "a", packs, np.int32)
    lines = []
    corpus = prepare_corpus(tokens(path), config, tmp_path / "cache", None, 1, lines.append)
    found = [*documents_of(corpus.train), *documents_of(corpus.validation)]
    assert sorted(found) == sorted([*document.tolist(), end] for document in documents)
    assert any("packed documents: cut at 48 end-of-document tokens" in line for line in lines)
    whole = prepare_corpus(tokens(path, cut="index"), config, tmp_path / "cache", None, 1, lines.append)
    assert whole.counts.read == 12
    assert "packed documents: 12 Megatron documents" in "\n".join(lines)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    path, documents = tmp_path / "a.bin", random_documents(vocab_size, end)
    flat(documents, end).astype("<u2").tofile(path)
    units = sources.plan_units(tokens(path), 500)
    flat(documents[::-1], end).astype("<u2").tofile(path)
    with pytest.raises(ValueError, match=f"^data.paths: {path}: it was changed while it was read"):
        list(token_rows(units[-1].pieces, tokens(path), vocab_size, end))


@pytest.mark.parametrize("kind", ["flat", "megatron"])
def test_zeros_that_nobody_has_written_are_refused(tmp_path, tokenizer, kind):
    """A memory map that was made too long, or was not filled before its writer died; id 0 does not end documents."""
    _, vocab_size, _ = tokenizer
    end = 7  # of another tokenizer: not 0
    documents = [document + (document == 0) for document in random_documents(vocab_size, end)]
    for number, refused in ((6000, True), (1500, False)):
        if kind == "flat":
            path = tmp_path / f"{number}.bin"
            np.append(flat(documents, end), np.zeros(number)).astype("<u2").tofile(path)
        else:
            path = write_megatron(tmp_path / f"{number}", [*documents, np.zeros(number, int)], np.uint16)
        units = sources.plan_units(tokens(path), 4_000_000)
        pieces = [piece for unit in units for piece in unit.pieces]
        rows = token_rows(tuple(pieces), tokens(path), vocab_size, end)
        if refused:
            with pytest.raises(
                ValueError, match=rf"^data.paths: {path}: token \d+: here and in the 2047 that follow id 0"
            ):
                list(rows)
        else:
            assert len(list(rows)[-1].tokens) == number


def test_files_without_an_end_of_a_document_are_said(tmp_path, tokenizer):
    config, vocab_size, end = tokenizer
    lines = []
    for number in range(40):
        np.full(50, 1 + number % 9 + (1 + number % 9 >= end)).astype("<u2").tofile(tmp_path / f"{number}.bin")
    prepare_corpus(tokens(tmp_path / "*.bin", fraction=0.5), config, tmp_path / "cache", None, 1, lines.append)
    assert any(line.startswith("each of the 40 files is one document: none has <|endoftext|> (id 0)") for line in lines)
    np.array([1, end, 2], "<u2").tofile(tmp_path / "40.bin")
    lines.clear()
    prepare_corpus(tokens(tmp_path / "*.bin", fraction=0.5), config, tmp_path / "cache", None, 1, lines.append)
    assert lines and not any("is one document" in line for line in lines)
