"""A corpus as a list of work units, and a unit as rows: the same cut and the same rows on every machine.

A unit is a run of neighbouring documents. Where it begins and ends follows from the corpus alone, never from
the number of processes, so each can be tokenised anywhere and at any time, and together they are the corpus.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from moe_pretrain.data.documents.builtin import builtin_pieces, builtin_row
from moe_pretrain.data.documents.config import (
    BuiltinCorpusConfig,
    ContentCheck,
    CorpusConfig,
    FilesCorpusConfig,
    HubCorpusConfig,
    LocalCorpusConfig,
    TokensCorpusConfig,
    has_own_split,
)
from moe_pretrain.data.documents.document import CorpusRow, Document, is_validation
from moe_pretrain.data.documents.hub import START, Place, Retries, hub_batches
from moe_pretrain.data.documents.patterns import Matches
from moe_pretrain.data.documents.text_files import FileSlice, corpus_files, cut_file, file_rows, split_piece
from moe_pretrain.data.documents.token_files import cut_token_file, token_files

# Small corpora are cut finely enough for a few processes, large ones into few enough shards for the
# system's limit on mapped files (65,530) and for one resume record each.
_SMALLEST_UNIT_BYTES = 4_000_000
_MOST_UNITS = 2048
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 16_384


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that one process turns into one shard on each side.

    Attributes:
        index: Place in the corpus, from 0.
        pieces: What to read, in order. A streamed corpus has none; its rows come with the unit.
        rows: Rows of a streamed corpus.
        held_out: Whether its documents are, all or none of them; None where the hash of each decides.
        end: Where a streamed corpus stands after them; None for others.
    """

    index: int
    pieces: tuple[FileSlice, ...]
    rows: tuple[CorpusRow, ...]
    end: Place | None = None
    held_out: bool | None = None

    @property
    def size_bytes(self) -> int:
        """About how much there is to read."""
        return sum(piece.size_bytes for piece in self.pieces)


def plan_units(config: CorpusConfig, smallest_bytes: int | None = None) -> list[Unit] | None:
    """The units of a corpus, in order, or None for one that is streamed: see ``stream_units``.

    Args:
        config: The corpus.
        smallest_bytes: About how much text a unit has at least; None for four million bytes.

    Raises:
        ValueError: A file is missing or cannot be read.
    """
    smallest_bytes = smallest_bytes or _SMALLEST_UNIT_BYTES
    if isinstance(config, HubCorpusConfig):
        return None
    if isinstance(config, BuiltinCorpusConfig):
        return _group([[piece] for piece in builtin_pieces()], smallest_bytes)
    files, held_out = local_files(config).files, validation_files(config)
    total_bytes = sum(path.stat().st_size for path in (*files, *held_out))
    unit_bytes = max(smallest_bytes, -(-total_bytes // _MOST_UNITS))
    pieces = [_cut(path, config, unit_bytes) for path in files]
    if not has_own_split(config):
        return _group(pieces, unit_bytes)
    last = [_cut(path, config, unit_bytes) for path in held_out]
    if config.validation_paths is None:
        pieces, last = _split_at_end(pieces, config)
    trained_on = _group(pieces, unit_bytes)
    units = [*trained_on, *_group(last, unit_bytes)]
    return [replace(unit, index=index, held_out=index >= len(trained_on)) for index, unit in enumerate(units)]


def validation_files(config: LocalCorpusConfig) -> list[Path]:
    """The files of ``data.validation_paths``.

    Raises:
        ValueError: As in ``local_files``, or one is trained on too.
    """
    if config.validation_paths is None:
        return []
    try:
        held_out = local_files(replace(config, paths=config.validation_paths)).files
    except ValueError as error:
        raise ValueError(str(error).replace("data.paths", "data.validation_paths", 1)) from None
    trained_on = {(status.st_dev, status.st_ino) for path in local_files(config).files if (status := path.stat())}
    for path in held_out:
        if ((status := path.stat()).st_dev, status.st_ino) in trained_on:
            raise ValueError(f"data.validation_paths: {path} is in data.paths too: it would be trained on")
    return held_out


def _cut(path: Path, config: LocalCorpusConfig, piece_bytes: int) -> list[FileSlice]:
    if isinstance(config, TokensCorpusConfig):
        return cut_token_file(path, config, piece_bytes)
    return cut_file(path, config, piece_bytes)


def _split_at_end(
    files: list[list[FileSlice]], config: LocalCorpusConfig
) -> tuple[list[list[FileSlice]], list[list[FileSlice]]]:
    """Pieces of the first ``1 - validation_fraction`` of the bytes, and of the rest."""
    pieces = [piece for some in files for piece in some]
    total = sum(piece.size_bytes for piece in pieces)
    left = int(total * (1 - config.validation_fraction))
    first: list[FileSlice] = []
    for number, piece in enumerate(pieces):
        if piece.size_bytes > left:
            if isinstance(config, TokensCorpusConfig):
                assert piece.stop is not None
                cut = piece.start + (piece.stop - piece.start) * left // piece.size_bytes
                start: FileSlice | None = replace(piece, stop=cut, size_bytes=left) if cut > piece.start else None
                rest = replace(piece, start=cut, size_bytes=piece.size_bytes - left)
            else:
                start, rest = split_piece(piece, left, config)
            return [[*first, *([start] if start else [])]], [[rest, *pieces[number + 1 :]]]
        first.append(piece)
        left -= piece.size_bytes
    return [first], []


def local_files(config: FilesCorpusConfig | TokensCorpusConfig) -> Matches:
    """The files of a corpus.

    Raises:
        ValueError: One is missing or cannot be read, or a glob pattern matches what is no file.
    """
    return token_files(config) if isinstance(config, TokensCorpusConfig) else corpus_files(config)


def unit_rows(config: CorpusConfig, unit: Unit) -> Iterator[CorpusRow]:
    """The rows of one unit of text.

    Raises:
        ValueError: The source cannot be read; one line that names the place.
    """
    if not unit.pieces:
        yield from unit.rows
    for piece in unit.pieces:
        if isinstance(config, BuiltinCorpusConfig):
            yield builtin_row(piece.name)
        else:
            assert isinstance(config, FilesCorpusConfig)
            yield from file_rows(piece, config)


def stream_units(
    config: HubCorpusConfig,
    start: Place,
    units_done: int,
    unit_bytes: int | None = None,
    retries: Retries | None = None,
) -> Iterator[Unit]:
    """Units of a streamed corpus from where an earlier attempt came to.

    Args:
        config: The corpus.
        start: Where it stood after the units that are done.
        units_done: How many those are.
        unit_bytes: About how much text a unit has; None for four million bytes.
        retries: What to do when the network fails; None for nothing.

    Raises:
        ValueError: The source cannot be read.
    """
    retries = retries or Retries(0.0, lambda line: None)
    batches = hub_batches(config, start, unit_bytes or _SMALLEST_UNIT_BYTES, retries)
    for index, (rows, end) in enumerate(batches, start=units_done):
        yield Unit(index, (), rows, end)


def documents(config: CorpusConfig, retries: Retries | None = None) -> Iterator[Document]:
    """All documents of a corpus, training and validation together, always in the same order.

    A row whose text is empty is no document and is left out. ``retries``: see ``stream_units``.

    Raises:
        ValueError: The source cannot be read; one line that names the file, and the line or
            row in it where there is one. Raised when the iterator reaches the fault.
    """
    units = plan_units(config)
    if units is None:
        assert isinstance(config, HubCorpusConfig)
        rows = (row for unit in stream_units(config, START, 0, 1, retries) for row in unit.rows)
    else:
        rows = (row for unit in units for row in unit_rows(config, unit))
    return (row for row in rows if isinstance(row, Document))


def sample_texts(config: CorpusConfig, max_bytes: int, retries: Retries | None = None) -> Iterator[str]:
    """Training texts for a tokenizer, ``max_bytes`` of them at most, always the same.

    Local files take turns, so a corpus whose first file is large and of one kind does not
    decide the vocabulary alone; other sources give their first documents.
    """
    rows: Iterator[Document]
    if isinstance(config, FilesCorpusConfig):
        files = local_files(config).files
        # 64 files open at once are enough for variety and few enough for any limit on handles.
        every = -(-len(files) // 64)
        if config.validation_split == "end" and config.validation_paths is None:
            rows = (row for row in _training_rows(config) if isinstance(row, Document))
        else:
            rows = _in_turn([file_rows(FileSlice(str(path), 0, None, 0), config) for path in files[::every]])
    else:
        rows = documents(config, retries)
    remaining_bytes = max_bytes
    for document in rows:
        if has_own_split(config) or not is_validation(document.text, config.validation_fraction):
            data = document.text.encode()[:remaining_bytes]
            yield data.decode(errors="ignore")  # the cut may have split a character
            remaining_bytes -= len(data)
            if not remaining_bytes:
                return


def _training_rows(config: CorpusConfig) -> Iterator[CorpusRow]:
    return (row for unit in plan_units(config) or [] if not unit.held_out for row in unit_rows(config, unit))


def content_identity(config: CorpusConfig) -> str:
    """A string that changes when the text behind a configuration does, without reading it.

    The built-in corpus is known by the interpreter's files and their sizes, local files by
    path, size and what ``content_check`` says. A hub dataset is known by its name alone.

    Raises:
        ValueError: A local file is missing or a glob pattern matches nothing, or a file is not the one that
            ``sha256`` means.
    """
    if isinstance(config, BuiltinCorpusConfig):
        return json.dumps([[piece.name, piece.size_bytes] for piece in builtin_pieces()])
    if isinstance(config, HubCorpusConfig):
        return config.name  # and what else its configuration says
    files = local_files(config).files
    if isinstance(config, FilesCorpusConfig) and config.sha256 is not None:
        _check_sha256(files, config.sha256)
    files = [*files, *validation_files(config)]
    if isinstance(config, TokensCorpusConfig):
        files += [index for path in files if (index := path.with_suffix(".idx")).is_file()]
    return json.dumps([[str(path), *_content_sign(path, config.content_check)] for path in files])


def _check_sha256(files: list[Path], expected: tuple[str, ...]) -> None:
    way_out = "data.sha256=null takes any text, whose numbers are then not those of the one that is meant"
    if len(files) != len(expected):
        raise ValueError(f"data.paths: {len(files)} files, data.sha256 means {len(expected)}; {way_out}")
    for path, checksum in zip(files, expected, strict=True):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != checksum.lower():
            raise ValueError(
                f"data.paths: {path} is not the text that data.sha256 means: {path.stat().st_size:,} bytes of sha256 "
                f"{found}, not {checksum}; {way_out}"
            )


def _content_sign(path: Path, check: ContentCheck) -> list[int | str]:
    try:
        status = path.stat()
        if check == "full":
            return [
                status.st_size,
                _hash_of_unchanged(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
            ]
        return [status.st_size, status.st_mtime_ns, _sampled_hash(path, status.st_size)]
    except OSError as error:
        raise ValueError(f"data.paths: {path}: {error.strerror}") from None


@functools.lru_cache(maxsize=4096)
def _hash_of_unchanged(path: Path, size: int, changed_ns: int, status_changed_ns: int) -> str:
    """Hash of a whole file, read once in a process while its times stay as they are."""
    checksum = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum.update(block)
    return checksum.hexdigest()


def _sampled_hash(path: Path, size: int) -> str:
    """Hash of blocks spread evenly over a file, the first and the last among them; of a small file, of all."""
    checksum = xxhash.xxh3_64()
    with open(path, "rb") as file:
        if size <= _SAMPLED_BLOCKS * _BLOCK_BYTES:
            checksum.update(file.read())
        else:
            for number in range(_SAMPLED_BLOCKS):
                file.seek(number * (size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
                checksum.update(file.read(_BLOCK_BYTES))
    return checksum.hexdigest()


def _group(files: list[list[FileSlice]], unit_bytes: int) -> list[Unit]:
    """Neighbouring pieces together until a unit is full."""
    units: list[Unit] = []
    waiting: list[FileSlice] = []
    size = 0
    for piece in (piece for pieces in files for piece in pieces):
        waiting.append(piece)
        size += piece.size_bytes
        if size >= unit_bytes:
            units.append(Unit(len(units), tuple(waiting), ()))
            waiting, size = [], 0
    if waiting:
        units.append(Unit(len(units), tuple(waiting), ()))
    return units


def _in_turn(streams: list[Iterator[CorpusRow]]) -> Iterator[Document]:
    while streams:
        still_open = []
        for stream in streams:
            row = next((row for row in stream if isinstance(row, Document)), None)
            if row is not None:
                yield row
                still_open.append(stream)
        streams = still_open


# ---------------------------------------------------------------- built-in
