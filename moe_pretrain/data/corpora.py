"""Where text comes from: the built-in corpus, local files, or a Hugging Face dataset.

Every source yields the same thing, ``Document``, in an order that depends on the source alone. A
document goes to validation or to training by a hash of its own text, so two copies of one text
never stand on both sides, and adding documents moves none of the others.
"""

import glob
import gzip
import io
import json
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import xxhash


@dataclass(frozen=True)
class BuiltinCorpusConfig:
    """Real text that every machine has: the running interpreter's own sources and manual.

    Attributes:
        source: The word that chooses this corpus.
        validation_fraction: Share of documents held out, in (0, 1).
    """

    source: Literal["builtin"]
    validation_fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)


@dataclass(frozen=True)
class FilesCorpusConfig:
    """Local files: text, lines of JSON, parquet.

    Attributes:
        source: The word that chooses this corpus.
        paths: Files or glob patterns (``**`` descends). ``.txt`` is one document per file,
            ``.jsonl``, ``.ndjson`` and ``.json`` (one object per line) one per line,
            ``.parquet`` one per row; all but parquet may also end in ``.gz``.
        text_column: Column of the text; text files have none and ignore it.
        validation_fraction: Share of documents held out, in (0, 1).
    """

    source: Literal["files"]
    paths: tuple[str, ...]
    text_column: str
    validation_fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if not self.paths:
            raise ValueError("data.paths must list at least one file or glob pattern")


@dataclass(frozen=True)
class HubCorpusConfig:
    """A Hugging Face dataset, streamed: nothing but the rows that are used is downloaded.

    Attributes:
        source: The word that chooses this corpus.
        name: Dataset name, for example ``HuggingFaceFW/fineweb-edu``.
        subset: Configuration of the dataset, or None for its default.
        split: Split to read; our own validation documents are held out of it.
        text_column: Column of the text.
        max_tokens: Training tokens to take, or None for as many as the run needs.
        validation_fraction: Share of documents held out, in (0, 1).
    """

    source: Literal["hub"]
    name: str
    subset: str | None
    split: str
    text_column: str
    max_tokens: int | None
    validation_fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.max_tokens={self.max_tokens} must be at least 1, or null")


CorpusConfig = BuiltinCorpusConfig | FilesCorpusConfig | HubCorpusConfig


@dataclass(frozen=True)
class Document:
    """One text and where it stands.

    Attributes:
        identity: Place of the text, for people: ``path:line``, ``path#row`` or a name.
        text: The text itself, never empty, always encodable as UTF-8.
    """

    identity: str
    text: str


def documents(config: CorpusConfig) -> Iterator[Document]:
    """All documents of a corpus, training and validation together, always in the same order.

    A row whose text is empty is no document and is left out.

    Raises:
        ValueError: The source cannot be read; one line that names the file, and the line or
            row in it where there is one. Raised when the iterator reaches the fault.
    """
    if isinstance(config, BuiltinCorpusConfig):
        rows = _builtin_documents()
    elif isinstance(config, FilesCorpusConfig):
        rows = (row for path in _matching_files(config) for row in _file_documents(path, config))
    else:
        rows = _hub_documents(config)
    return _checked(rows)


def sample_texts(config: CorpusConfig, max_bytes: int) -> Iterator[str]:
    """Training texts for a tokenizer, ``max_bytes`` of them at most, always the same.

    Local files take turns, so a corpus whose first file is large and of one kind does not
    decide the vocabulary alone; other sources give their first documents.
    """
    if isinstance(config, FilesCorpusConfig):
        files = _matching_files(config)
        # 64 files open at once are enough for variety and few enough for any limit on handles.
        every = -(-len(files) // 64)
        rows = _checked(_in_turn([_file_documents(path, config) for path in files[::every]]))
    else:
        rows = documents(config)
    remaining_bytes = max_bytes
    for document in rows:
        if not is_validation(document.text, config.validation_fraction):
            data = document.text.encode()[:remaining_bytes]
            yield data.decode(errors="ignore")  # the cut may have split a character
            remaining_bytes -= len(data)
            if not remaining_bytes:
                return


def is_validation(text: str, validation_fraction: float) -> bool:
    """Whether a document is held out: its 64-bit hash falls in the first part of the range."""
    return xxhash.xxh3_64_intdigest(text.encode()) < validation_fraction * 2.0**64


def content_identity(config: CorpusConfig) -> str:
    """A string that changes when the text behind a configuration does, without reading it.

    The built-in corpus is known by the interpreter's files and their sizes, local files by
    path, size and time of change. A hub dataset is known by its name alone.

    Raises:
        ValueError: A local file is missing or a glob pattern matches nothing.
    """
    if isinstance(config, BuiltinCorpusConfig):
        root = _standard_library()
        sizes = [[name, (root / name).stat().st_size] for name in _standard_library_files()]
        return json.dumps([sizes, sorted(map(len, topics.values()))])
    if isinstance(config, FilesCorpusConfig):
        stats = [(path, path.stat()) for path in _matching_files(config)]
        return json.dumps([[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats])
    return config.name


def describe(config: CorpusConfig) -> str:
    """A few words on where the text comes from, for the manifest and for progress lines."""
    if isinstance(config, BuiltinCorpusConfig):
        return "built-in: Python standard library sources and manual topics"
    if isinstance(config, FilesCorpusConfig):
        return "files: " + ", ".join(config.paths)
    return f"hub: {config.name} {config.subset or 'default'} {config.split}"


def require_network(what: str, instead: str) -> None:
    """Ask the Hugging Face hub for a sign of life, once, within ten seconds.

    The hub's own clients try again for half a minute and then show forty lines.

    Args:
        what: The setting that needs the hub, for the error line.
        instead: What the user can do without it.

    Raises:
        ValueError: The hub does not answer.
    """
    import datasets

    hub = datasets.config.HF_ENDPOINT
    request = urllib.request.Request(hub, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever its status
    except OSError as error:
        reason = one_line(getattr(error, "reason", error))
        raise ValueError(f"{what} cannot be reached: {hub}: {reason}; {instead}") from None


def one_line(reason: object) -> str:
    """The text of an error without line breaks, cut at 200 characters."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _check_fraction(validation_fraction: float) -> None:
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"data.validation_fraction={validation_fraction} must be between 0 and 1, exclusive")


def _checked(rows: Iterator[Document]) -> Iterator[Document]:
    """Leave out empty texts; refuse text that has no UTF-8 form (a lone surrogate in JSON)."""
    for document in rows:
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{document.identity}: text is not valid UTF-8: {one_line(error)}") from None
        if document.text:
            yield document


def _in_turn(streams: list[Iterator[Document]]) -> Iterator[Document]:
    while streams:
        still_open = []
        for stream in streams:
            document = next(stream, None)
            if document is not None:
                yield document
                still_open.append(stream)
        streams = still_open


# ---------------------------------------------------------------- built-in

_LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",  # its topics are documents of their own: the same text must not come twice
}


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _standard_library_files() -> list[str]:
    """Paths relative to the library, sorted; ``_sysconfigdata`` differs between builds."""
    root = _standard_library()
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    return sorted(
        name.as_posix()
        for name in names
        if not _LEFT_OUT_FOLDERS.intersection(name.parts) and not name.name.startswith("_sysconfigdata")
    )


def _builtin_documents() -> Iterator[Document]:
    for name in _standard_library_files():
        try:
            text = (_standard_library() / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few sources are in another encoding
        yield Document(f"builtin:{name}", text)
    for name in sorted(topics):
        yield Document(f"builtin:pydoc_data.topics/{name}", topics[name])


# ---------------------------------------------------------------- files

_ENDINGS = (
    ".txt",
    ".txt.gz",
    ".json",
    ".json.gz",
    ".jsonl",
    ".jsonl.gz",
    ".ndjson",
    ".ndjson.gz",
    ".parquet",
)


def _matching_files(config: FilesCorpusConfig) -> list[Path]:
    """Absolute paths in the order of ``data.paths``, a pattern's matches sorted, none twice."""
    found: dict[Path, None] = {}
    for pattern in config.paths:
        if Path(pattern).is_file():
            matches = [pattern]
        elif glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
            matches = [match for match in matches if Path(match).is_file()]
            if not matches:
                raise ValueError(f"data.paths: pattern {pattern} matches no file")
        elif Path(pattern).is_dir():
            raise ValueError(f"data.paths: {pattern} is a folder, write a pattern: {pattern}/*.txt")
        else:
            raise ValueError(f"data.paths: {pattern} does not exist")
        found.update((Path(match).absolute(), None) for match in matches)
    for path in found:
        if not path.name.lower().endswith(_ENDINGS):
            raise ValueError(f"data.paths: {path}: name must end in one of {' '.join(_ENDINGS)}")
    return list(found)


def _file_documents(path: Path, config: FilesCorpusConfig) -> Iterator[Document]:
    """Documents of one file. Whatever goes wrong becomes one line that names the place.

    Text and lines of JSON are read here and not by ``datasets`` (5.2): its json reader fixes the
    type of a column from the first part of a file and then turns numbers and dates into strings
    without a word, it never names the line of a fault, and it decodes ``.gz`` by the locale.
    """
    name = path.name.lower()
    place = str(path)
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if name.endswith((".txt", ".txt.gz")):
            with _open_bytes(path) as file:
                yield Document(place, file.read().decode())
        elif name.endswith(".parquet"):
            for number, row in enumerate(_parquet_rows(path, config.text_column), start=1):
                place = f"{path}#{number}"
                yield Document(place, _text_of(row, config.text_column))
        else:
            with _open_bytes(path) as lines:
                for number, line in enumerate(lines, start=1):
                    place = f"{path}:{number}"
                    if line.strip():
                        yield Document(place, _text_of(_parse_object(line.decode()), config.text_column))
    except Exception as error:  # pyarrow, gzip and datasets each have their own
        raise ValueError(f"data.paths: {place}: {one_line(error)}") from None


def _open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    # Imported here, as transformers is in tokenizer.py: each takes a second or two, and a run
    # whose shards are ready needs neither.
    import datasets

    # Its loggers would put a line of their own before each of our errors.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    def stream(columns: list[str] | None) -> Iterator[dict[str, Any]]:
        files = {"train": [glob.escape(str(path))]}
        return iter(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=columns))

    _text_of(next(stream(None)), column)  # says which columns there are when this one is missing
    yield from stream([column])


def _parse_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"each line must be one JSON object, got {one_line(line)}")
    return row


def _text_of(row: dict[str, Any], column: str) -> str:
    if column not in row:
        names = ", ".join(map(str, row))
        raise ValueError(f"no column {column!r} (data.text_column), there is: {names}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} must be a string, got {one_line(repr(text))}")
    return text


# ---------------------------------------------------------------- hub


def _hub_documents(config: HubCorpusConfig) -> Iterator[Document]:
    require_network(f"data=hub data.name={config.name}", "use data=builtin or data=files")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        stream = datasets.load_dataset(config.name, config.subset, split=config.split, streaming=True)
        for number, row in enumerate(stream, start=1):
            text = _text_of(row, config.text_column)
            yield Document(f"{config.name}#{number}", text)
    except Exception as error:
        raise ValueError(
            f"data=hub data.name={config.name} data.subset={config.subset} data.split={config.split}: {one_line(error)}"
        ) from None
