"""Local files to documents, whole or a piece of one: text, lines of JSON, parquet.

A piece is decided by the file alone, so several processes can read one file: lines of JSON are cut by bytes
(a line belongs to the piece in which it begins), parquet by row groups; text and gzip are never cut.
"""

import dataclasses
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_pretrain.data.documents.config import LINES_ENDINGS, FilesCorpusConfig, Utf8Policy
from moe_pretrain.data.documents.document import (
    WAY_PAST_UTF8,
    CorpusRow,
    LeftOut,
    checked_text,
    parse_object,
    row_of,
)
from moe_pretrain.data.documents.patterns import Matches, match_files
from moe_pretrain.system.files import FileIdentity
from moe_pretrain.system.words import one_line

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# At the start of a file, and where a line begins: there it was the start of one that was appended to another.
_MARKS = re.compile(b"^(?:\xef\xbb\xbf)+", re.MULTILINE)
_HOLE = bytes(512)  # what a file system gives for a block that a crash kept from the disk


@dataclass(frozen=True)
class FileSlice:
    """A part of one named thing that holds documents.

    Attributes:
        name: Path, or the name of a built-in document.
        start: First byte (lines of JSON), row group (parquet) or token (token files).
        stop: One past the last, or None for the end.
        size_bytes: About how much there is to read: progress and the cutting of work need no more.
        identity: The file as it was when it was cut, which it must still be when it has been read: half of an old text
            and half of a new one is neither. None for what no program writes to.
    """

    name: str
    start: int
    stop: int | None
    size_bytes: int
    identity: FileIdentity | None = None

    def check_unchanged(self) -> None:
        """Raise ValueError if the file is not what it was when it was cut."""
        if self.identity is not None and FileIdentity.of(Path(self.name).stat()) != self.identity:
            raise ValueError("it was changed while it was read; start again when no program writes to it")


def corpus_files(config: FilesCorpusConfig) -> Matches:
    """The files of a corpus: see ``match_files``."""
    plain = (*config.text_endings, *LINES_ENDINGS)
    return match_files(config.paths, (*plain, *(f"{ending}.gz" for ending in plain), ".parquet"))


def cut_file(path: Path, config: FilesCorpusConfig, piece_bytes: int) -> list[FileSlice]:
    """The pieces of one file, each of about ``piece_bytes``.

    Raises:
        ValueError: The file cannot be read.
    """
    name, identity = path.name.lower(), FileIdentity.of(path.stat())
    whole = FileSlice(str(path), 0, None, identity.size, identity)
    if whole.size_bytes <= piece_bytes or name.endswith((*config.text_endings, ".gz")):
        return [whole]
    if name.endswith(".parquet"):
        return _cut_parquet(whole, piece_bytes)
    return [
        dataclasses.replace(whole, start=start, stop=stop, size_bytes=stop - start)
        for start in range(0, whole.size_bytes, piece_bytes)
        for stop in (min(start + piece_bytes, whole.size_bytes),)
    ]


def split_piece(piece: FileSlice, size_bytes: int, config: FilesCorpusConfig) -> tuple[FileSlice | None, FileSlice]:
    """A piece in two, the first of about ``size_bytes``; all of it in the second where it cannot be cut there.

    A line belongs to the part in which it begins. A text file comes apart between two characters.
    """
    path = Path(piece.name)
    name = path.name.lower()
    if size_bytes <= 0 or name.endswith((".gz", ".parquet")):
        return None, piece
    cut = piece.start + size_bytes
    if name.endswith(config.text_endings):
        with open(path, "rb") as file:
            file.seek(cut)
            cut += next((index for index, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)
    return (
        dataclasses.replace(piece, stop=cut, size_bytes=cut - piece.start),
        dataclasses.replace(piece, start=cut, size_bytes=piece.size_bytes - (cut - piece.start)),
    )


def file_rows(piece: FileSlice, config: FilesCorpusConfig) -> Iterator[CorpusRow]:
    """Rows of one piece. Whatever goes wrong becomes one line that names the place.

    Text and lines of JSON are read here and not by ``datasets`` (5.2): its json reader fixes the
    type of a column from the first part of a file and then turns numbers and dates into strings
    without a word, it never names the line of a fault, and it decodes ``.gz`` by the locale.

    Raises:
        ValueError: The file cannot be read, or holds what ``config`` says to fail on.
    """
    path = Path(piece.name)
    name = path.name.lower()
    place, found = str(path), False
    try:
        if path.stat().st_size == 0 and not name.endswith(config.text_endings):  # an empty text is a text
            raise ValueError("the file is empty")
        if name.removesuffix(".gz").endswith(config.text_endings):
            with _open_bytes(path) as file:
                file.seek(piece.start)
                data, found = file.read() if piece.stop is None else file.read(piece.stop - piece.start), True
                yield _decoded(place, _MARKS.sub(b"", data), config.invalid_utf8)
        elif name.endswith(".parquet"):
            for number, value in _parquet_values(path, config.text_column, piece):
                place, found = f"{path}#{number}", True
                yield _value_row(place, value, config)
        else:
            for offset, number, line in _lines(path, piece):
                place = f"{path}:{number}" if number else f"{path} at byte {offset}"
                if line.strip():
                    found = True
                    yield _json_row(place, line, config)
        if not found and (piece.start, piece.stop) == (0, None):
            place = str(path)
            raise ValueError("the file has no rows: leave it out of data.paths")
        piece.check_unchanged()
    except Exception as error:  # pyarrow and gzip each have their own
        reason = one_line(error)
        try:
            piece.check_unchanged()  # what explains everything else comes first
            if place.startswith(f"{path} at byte "):
                place = f"{path}:{_line_number(path, int(place.rpartition(' ')[2]))}"
        except (OSError, ValueError) as change:
            place, reason = str(path), one_line(change)
        raise ValueError(f"data.paths: {place}: {reason}") from None


def _decoded(place: str, data: bytes, policy: Utf8Policy) -> CorpusRow:
    if 4 * data.count(0) > len(data) or _HOLE in data:
        if policy == "fail":
            raise ValueError(
                f"text is mostly zero bytes: it is UTF-16, no text, or was never written to the disk{WAY_PAST_UTF8}"
            )
        return LeftOut(place, "invalid_utf8")
    text, repaired = _decode(data, policy)
    return LeftOut(place, "invalid_utf8") if text is None else checked_text(place, text, policy, repaired)


def _json_row(place: str, line: bytes, config: FilesCorpusConfig) -> CorpusRow:
    text, repaired = _decode(line, config.invalid_utf8)
    if text is None:
        return LeftOut(place, "invalid_utf8")
    try:
        row = parse_object(text, config.text_column)
    except ValueError as error:
        if config.invalid_json == "fail":
            raise ValueError(f"{error}; data.invalid_json=skip leaves such lines out and counts them") from None
        return LeftOut(place, "invalid_json")
    return row_of(place, row, config.text_column, config.invalid_text, config.invalid_utf8, repaired)


def _decode(data: bytes, policy: Utf8Policy) -> tuple[str | None, bool]:
    """The text, None if it is to be left out; and whether it was repaired."""
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        if policy == "fail":
            raise ValueError(f"{one_line(error)}{WAY_PAST_UTF8}") from None
    return (None, False) if policy == "skip" else (data.decode(errors="replace"), True)


def _value_row(place: str, value: object, config: FilesCorpusConfig) -> CorpusRow:
    """A parquet value: strings arrive as bytes, for pyarrow itself does not say where they are broken."""
    if isinstance(value, bytes):
        return _decoded(place, value.removeprefix(_BYTE_ORDER_MARK), config.invalid_utf8)
    return row_of(place, {config.text_column: value}, config.text_column, config.invalid_text, config.invalid_utf8)


def _open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _lines(path: Path, piece: FileSlice) -> Iterator[tuple[int, int, bytes]]:
    """``(offset, number, line)`` of the lines that begin in the piece; 0 where the number is not known."""
    with _open_bytes(path) as file:
        offset, number = 0, 1
        if piece.start:
            # Up to the end of the line that begins before the piece; none is cut if one ends just there.
            file.seek(piece.start - 1)
            offset = piece.start - 1 + len(file.readline())
            number = 0
        for line in file:
            if piece.stop is not None and offset >= piece.stop:
                return
            start, offset = offset, offset + len(line)
            yield start, number, _MARKS.sub(b"", line)
            number += 1 if number else 0


def _line_number(path: Path, offset: int) -> int:
    """Number of the line that begins at a byte; only a fault asks for it."""
    lines, remaining = 1, offset
    with open(path, "rb") as file:
        while remaining > 0 and (block := file.read(min(2**22, remaining))):
            lines += block.count(b"\n")
            remaining -= len(block)
    return lines


def _cut_parquet(whole: FileSlice, piece_bytes: int) -> list[FileSlice]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(whole.name).metadata
        sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    except Exception as error:
        raise ValueError(f"data.paths: {whole.name}: {one_line(error)}") from None
    pieces: list[FileSlice] = []
    first, size = 0, 0
    for index, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= piece_bytes or index == len(sizes) - 1:
            pieces.append(dataclasses.replace(whole, start=first, stop=index + 1, size_bytes=size))
            first, size = index + 1, 0
    return pieces


def _parquet_values(path: Path, column: str, piece: FileSlice) -> Iterator[tuple[int, object]]:
    """``(row number from 1, value)``."""
    import pyarrow.parquet  # here and not above: it takes a while, and shards that are ready need none of it

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"no column {column!r} (data.text_column), there is: {', '.join(names)}")
        if names.count(column) > 1:
            raise ValueError(f"column {column!r} (data.text_column) stands there more than once")
        stop = file.metadata.num_row_groups if piece.stop is None else piece.stop
        number = 1 + sum(file.metadata.row_group(index).num_rows for index in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[column], use_threads=False):
            values = batch.column(0)
            if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
                values = values.cast(pyarrow.large_binary())
            for value in values.to_pylist():
                yield number, value
                number += 1
