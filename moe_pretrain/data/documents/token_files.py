"""Files that already hold tokens: Megatron ``.bin`` with ``.idx``, numpy ``.npy``, flat ``.bin``.

They are copied into our shards: documents found, ids checked, checksums made, validation held out, like any corpus.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_pretrain.data.documents.config import TokensCorpusConfig
from moe_pretrain.data.documents.document import LeftOut, TokenDocument
from moe_pretrain.data.documents.patterns import Matches, match_files
from moe_pretrain.data.documents.text_files import FileSlice
from moe_pretrain.system.files import FileIdentity
from moe_pretrain.system.words import one_line

TOKEN_ENDINGS = (".bin", ".npy")
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Codes of Megatron-LM's integer types; 6 and 7 are floats.
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_TOKENS_PER_SCAN = 2**22
_NUMPY_MAGIC = b"\x93NUMPY"
# Types that flat files are written in; the second and third hold ids that fit into the first with zeros between them.
_FLAT_DTYPES = ("<u2", "<u4", "<i8", ">u2", ">u4", ">i8")
_HOLE_TOKENS = 2**11  # so many zeros in a row are no text: a memory map that was not filled, rows of padding
_TOKENS_PER_SAMPLE = 2**14  # at each of three places, to see whether ids are ids


@dataclass(frozen=True)
class _Megatron:
    """A Megatron index: documents are runs of sequences, sequences are ranges of the ``.bin`` file."""

    tokens: np.ndarray
    lengths: np.ndarray
    pointers: np.ndarray
    document_starts: np.ndarray

    def document(self, number: int) -> tuple[int, np.ndarray]:
        """Offset of its first token in the file, and its tokens."""
        first, stop = self.document_starts[number : number + 2].tolist()
        spans = [(self.pointers[i] // self.tokens.itemsize, self.lengths[i]) for i in range(first, stop)]
        parts = [self.tokens[start : start + length] for start, length in spans]
        offset = int(spans[0][0]) if spans else 0
        return offset, parts[0] if len(parts) == 1 else np.concatenate([*parts, self.tokens[:0]])


def token_files(config: TokensCorpusConfig) -> Matches:
    """The files of a corpus of tokens: see ``match_files``."""
    return match_files(config.paths, TOKEN_ENDINGS)


def cut_token_file(path: Path, config: TokensCorpusConfig, piece_bytes: int) -> list[FileSlice]:
    """The pieces of one file: ranges of documents (Megatron) or of tokens.

    Raises:
        ValueError: The file or its index cannot be read.
    """
    with _Named(path):
        identity = FileIdentity.of(path.stat())
        source = _open(path, config)
        if isinstance(source, _Megatron):
            item_bytes = source.tokens.itemsize
            first_sequences = source.document_starts[:-1]
            where = np.append(source.pointers, source.tokens.nbytes)[first_sequences]
            size, count = source.tokens.nbytes, len(first_sequences)
            cuts = np.searchsorted(where, np.arange(piece_bytes, size, piece_bytes)).tolist()
        else:
            item_bytes = source.itemsize
            size, count = source.nbytes, len(source)
            cuts = list(range(piece_bytes // item_bytes, count, max(1, piece_bytes // item_bytes)))
        edges = sorted({0, *cuts, count})
        share = size // max(1, len(edges) - 1)
        return [FileSlice(str(path), one, two, share, identity) for one, two in zip(edges, edges[1:], strict=False)]


def token_rows(
    pieces: tuple[FileSlice, ...], config: TokensCorpusConfig, vocab_size: int, end_of_document: int
) -> Iterator[TokenDocument | LeftOut]:
    """Documents of some pieces, without the end-of-document tokens that the files may have.

    Raises:
        ValueError: A file cannot be read, or a token is outside the vocabulary; names file and offset.
    """
    for piece in pieces:
        path = Path(piece.name)
        with _Named(path):
            source = _open(path, config)
            assert piece.stop is not None
            found: Iterator[tuple[int, int, np.ndarray]]
            if isinstance(source, _Megatron):
                found = ((number, *source.document(number)) for number in range(piece.start, piece.stop))
            else:
                if path.suffix.lower() != ".npy":
                    _check_flat_dtype(path, config.flat_dtype, vocab_size)
                found = _flat_documents(source, piece.start, piece.stop, end_of_document)
            for number, offset, tokens in found:
                packed = isinstance(source, _Megatron) and bool(np.any(tokens[:-1] == end_of_document))
                if packed and config.megatron_documents == "end_of_document":
                    yield from _unpacked(f"{path}#{number}", offset, tokens, vocab_size, end_of_document)
                    continue
                if len(tokens) and tokens[-1] == end_of_document:
                    tokens = tokens[:-1]
                _check_tokens(tokens, offset, vocab_size)
                identity = f"{path}#{number}"
                yield TokenDocument(identity, tokens, packed) if len(tokens) else LeftOut(identity, "empty")
            piece.check_unchanged()


def _unpacked(
    identity: str, offset: int, tokens: np.ndarray, vocab_size: int, end_of_document: int
) -> Iterator[TokenDocument | LeftOut]:
    """The documents of a Megatron document that has ends of documents inside."""
    for number, start, document in _flat_documents(tokens, 0, len(tokens), end_of_document):
        is_last = start + len(document) == len(tokens)
        document = document[:-1] if document[-1] == end_of_document else document
        _check_tokens(document, offset + start, vocab_size)
        place = f"{identity}+{number}"
        yield TokenDocument(place, document, not is_last) if len(document) else LeftOut(place, "empty")


class _Named:
    """Whatever goes wrong inside becomes one line that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception):
            raise ValueError(f"data.paths: {self._path}: {one_line(error)}") from None


def _open(path: Path, config: TokensCorpusConfig) -> np.ndarray | _Megatron:
    index = path.with_suffix(".idx")
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            if file.read(len(_NUMPY_MAGIC)) != _NUMPY_MAGIC:
                raise ValueError(
                    "has no numpy header, so it is raw tokens: rename it (or link to it) as .bin and say their type, "
                    "data.flat_dtype=uint16 or uint32"
                )
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(f"must be one row of integers, is {tokens.dtype} {list(tokens.shape)}")
        if not len(tokens):
            raise ValueError("the file has no tokens: leave it out of data.paths")
        return np.asarray(tokens)
    if index.is_file():
        return _open_megatron(path, index)
    if index.is_symlink():
        raise ValueError(f"{index.name} beside it is a link to {index.readlink()}, which does not exist")
    if strangers := [other for other in path.parent.glob("*.idx") if not other.with_suffix(".bin").exists()]:
        raise ValueError(
            f"{index.name} is missing, and {min(strangers).name} beside it has no .bin: a Megatron index must have its "
            "file's name; rename it, or move it away if these are flat tokens"
        )
    return _map(path, np.dtype(config.flat_dtype).newbyteorder("<"))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{size} bytes are no whole number of {dtype.name} tokens (data.flat_dtype)")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _open_megatron(path: Path, index: Path) -> _Megatron:
    data = index.read_bytes()
    header = len(_MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
    if len(data) < header or not data.startswith(_MEGATRON_MAGIC):
        raise ValueError(f"{index.name} beside it is no Megatron index (MMIDIDX)")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", data, len(_MEGATRON_MAGIC))
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise ValueError(
            f"{index.name}: version {version} and type code {code}, this program reads version 1, integers"
        )
    size = header + 12 * sequences + 8 * documents
    # One byte more for each sequence: the modes of Megatron's multimodal data.
    if len(data) not in (size, size + sequences) or documents < 2:
        raise ValueError(f"{index.name}: damaged: {len(data)} bytes for {sequences} sequences, {documents} documents")
    lengths = np.frombuffer(data, "<i4", sequences, header)
    pointers = np.frombuffer(data, "<i8", sequences, header + 4 * sequences)
    starts = np.frombuffer(data, "<i8", documents, header + 12 * sequences)
    tokens = _map(path, np.dtype(_MEGATRON_DTYPES[code]))
    ends = pointers + lengths.astype(np.int64) * tokens.itemsize
    if (
        np.any(np.diff(starts) < 0)
        or starts[0] < 0
        or starts[-1] > sequences
        or np.any(lengths < 0)
        or np.any(pointers < 0)
        or np.any(pointers % tokens.itemsize)
        or np.any(ends > tokens.nbytes)
    ):
        raise ValueError(f"{index.name}: damaged: it points outside the file's {len(tokens)} tokens")
    if starts[0] != 0 or starts[-1] != sequences:
        raise ValueError(
            f"{index.name}: its documents are sequences {starts[0]} to {starts[-1]} of {sequences}: the others would "
            "be left out"
        )
    order = np.argsort(pointers, kind="stable")
    edges = np.append(np.append(0, ends[order]), tokens.nbytes)
    gaps = np.append(pointers[order], tokens.nbytes) - edges[:-1]
    if np.any(gaps < 0):
        raise ValueError(f"{index.name}: two of its sequences share tokens: it is not this file's index")
    if missing := int(gaps.sum()) // tokens.itemsize:
        raise ValueError(
            f"{index.name}: {missing} of the file's {len(tokens)} tokens are in none of its sequences: it is not this "
            "file's index, or one of the two was cut short"
        )
    return _Megatron(tokens, lengths, pointers, starts)


def _flat_documents(
    tokens: np.ndarray, start: int, stop: int, end_of_document: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """``(number, offset, tokens)`` of the documents that begin in ``[start, stop)``; their numbers are offsets."""
    begin = start
    if start and tokens[start - 1] != end_of_document:
        begin = _next_end(tokens, start, end_of_document)
    while begin < stop:
        end = _next_end(tokens, begin, end_of_document)
        yield begin, begin, tokens[begin:end]
        begin = end


def _next_end(tokens: np.ndarray, start: int, end_of_document: int) -> int:
    """Offset after the next end-of-document token, or the end of the file."""
    size = 256
    while start < len(tokens):
        found = np.flatnonzero(tokens[start : start + size] == end_of_document)
        if found.size:
            return start + int(found[0]) + 1
        start, size = start + size, min(2 * size, _TOKENS_PER_SCAN)
    return len(tokens)


def _check_flat_dtype(path: Path, flat_dtype: str, vocab_size: int) -> None:
    """Refuse a type that the file was not written in, as far as a sample of its values shows that.

    Read as a wider type, ids give numbers far above any vocabulary; read as a narrower one, they have zeros between
    them. So if the file gives ids as a wider type too, that is its type.

    Raises:
        ValueError: It is another type, or one that does not hold the tokenizer's ids.
    """
    if vocab_size > np.iinfo(flat_dtype).max + 1:
        raise ValueError(f"data.flat_dtype={flat_dtype} does not hold the tokenizer's ids up to {vocab_size - 1}")
    fitting = [np.dtype(code) for code in _FLAT_DTYPES if _are_ids(path, np.dtype(code), vocab_size)]
    said = np.dtype(flat_dtype).newbyteorder("<")
    wider = [dtype for dtype in fitting if dtype.itemsize > said.itemsize and dtype.byteorder != ">"]
    if wider:
        raise ValueError(
            f"data.flat_dtype={flat_dtype}: as {wider[-1].name} its numbers are ids of the tokenizer, so as "
            f"{flat_dtype} they have zeros between them: set data.flat_dtype={wider[-1].name}"
        )
    if fitting and not _are_ids(path, said, vocab_size):
        other = fitting[0]
        way = "turn its bytes around" if other.byteorder == ">" else f"set data.flat_dtype={other.name}"
        order = "big-endian " if other.byteorder == ">" else ""
        raise ValueError(
            f"data.flat_dtype={flat_dtype}: some of its numbers are no ids of the tokenizer (0 to {vocab_size - 1}), "
            f"as {order}{other.name} they are: {way}"
        )


def _are_ids(path: Path, dtype: np.dtype, vocab_size: int) -> bool:
    """Whether a sample of the file, read as a type, is ids below ``vocab_size`` and not zeros alone."""
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        return False
    tokens = np.memmap(path, dtype=dtype, mode="r")
    last = max(0, len(tokens) - _TOKENS_PER_SAMPLE)
    sample = np.concatenate([tokens[start : start + _TOKENS_PER_SAMPLE] for start in (0, last // 2, last)])
    return bool(sample.min() >= 0 and sample.max() < vocab_size and sample.any())


def _check_tokens(tokens: np.ndarray, offset: int, vocab_size: int) -> None:
    """Refuse tokens that are no ids, or that nobody has written.

    Raises:
        ValueError: There are some.
    """
    blocks = tokens[: len(tokens) // _HOLE_TOKENS * _HOLE_TOKENS].reshape(-1, _HOLE_TOKENS).any(axis=1)
    if not blocks.all():
        start = offset + int(np.flatnonzero(~blocks)[0]) * _HOLE_TOKENS
        raise ValueError(
            f"token {start}: here and in the {_HOLE_TOKENS - 1} that follow id 0 stands: padding, or a file that was "
            "not written to its end; cut these tokens off"
        )
    if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
        place = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
        raise ValueError(
            f"token {offset + place}: id {tokens[place]} must be from 0 to {vocab_size - 1}, the tokenizer's last"
        )
