"""Corpora by configuration, and the facts that are known of one without reading it."""

import platform
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

Utf8Policy = Literal["fail", "replace", "skip"]
JsonPolicy = Literal["fail", "skip"]
TextPolicy = Literal["fail", "skip"]
ContentCheck = Literal["sampled", "full"]
DuplicatePolicy = Literal["drop", "count", "ignore"]
LINES_ENDINGS = (".json", ".jsonl", ".ndjson")
_LOADERS = ("arrow", "csv", "json", "parquet", "text")  # names of no dataset: what `datasets` reads files with
TABLE_ENDINGS = (*LINES_ENDINGS, ".parquet", ".gz")
HeldOut = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class BuiltinCorpusConfig:
    """Real text that every machine has: the running interpreter's own sources and manual.

    Attributes:
        source: The word that chooses this corpus.
        validation_fraction: Share of documents held out, in (0, 1).
        near_duplicates: Held-out documents of which training has the same or nearly the same text: ``drop`` takes them
            out of the validation set and counts them, ``count`` counts them, ``ignore`` counts equal ones alone. In a
            stream, where the validation set is fixed first, the documents to train on are taken out or counted.
    """

    source: Literal["builtin"]
    validation_fraction: HeldOut
    near_duplicates: DuplicatePolicy


@dataclass(frozen=True)
class FilesCorpusConfig:
    """Local files: text, lines of JSON, parquet.

    Attributes:
        source: The word that chooses this corpus.
        paths: Files or glob patterns (``**`` descends). ``.jsonl``, ``.ndjson`` and ``.json`` (one
            object per line) hold one document per line, ``.parquet`` one per row, text files are one
            each; all but parquet may also end in ``.gz``.
        text_endings: Endings of the names of text files, for example ``.txt`` and ``.py``.
        text_column: Column of the text; text files have none and ignore it.
        validation_fraction: Share of documents held out, in (0, 1).
        validation_split: Which ones: those whose ``hash`` says so, or the ``end`` of the corpus.
        validation_paths: Files or patterns that are held out, and nothing else; None for a split of ``paths``.
        near_duplicates: As in ``BuiltinCorpusConfig``.
        invalid_utf8: A text that is not UTF-8: ``fail`` names it and stops, ``replace`` puts
            U+FFFD where it is broken, ``skip`` leaves the document out. The last two are counted. A file or value that
            is mostly zero bytes has nothing to repair, and ``replace`` leaves it out.
        invalid_json: A line that is no JSON object: ``fail`` names it and stops, ``skip`` leaves
            it out and counts it.
        invalid_text: A row without a text, or whose text is null, a list or a number: ``fail`` names it and stops,
            ``skip`` leaves it out and counts it.
        content_check: Sign by which a changed file is noticed beside its size: ``sampled`` takes the time of change
            and a hash of 64 blocks, ``full`` a hash of all, which reads the files at every start.
        sha256: SHA-256 that each file of ``paths`` must have, in order, as ``sha256sum`` prints it: of a yardstick
            whose numbers are for one text. None for any files.
        version: Version of the corpus, in words, for the manifest; or None.
        licence: Licence of the corpus, in words, for the manifest; or None.
    """

    source: Literal["files"]
    paths: tuple[str, ...]
    text_endings: tuple[str, ...]
    text_column: str
    validation_fraction: HeldOut
    validation_split: Literal["hash", "end"]
    validation_paths: tuple[str, ...] | None
    near_duplicates: DuplicatePolicy
    invalid_utf8: Utf8Policy
    invalid_json: JsonPolicy
    invalid_text: TextPolicy
    content_check: ContentCheck
    sha256: tuple[str, ...] | None
    version: str | None
    licence: str | None

    def __post_init__(self) -> None:
        _check_paths(self.paths)
        for ending in self.text_endings:
            if not ending.startswith(".") or ending != ending.lower() or ending in TABLE_ENDINGS:
                raise ValueError(
                    f"data.text_endings: {ending!r} must begin with a point, be in small letters and be none of "
                    f"{' '.join(TABLE_ENDINGS)}"
                )


@dataclass(frozen=True)
class HubCorpusConfig:
    """A Hugging Face dataset, streamed: nothing but the rows that are used is downloaded.

    Attributes:
        source: The word that chooses this corpus.
        name: Dataset name, for example ``HuggingFaceFW/fineweb-edu``; with ``files`` one of the
            loaders in ``datasets``: ``json``, ``parquet``, ``csv``, ``text``, ``arrow``.
        files: Addresses that ``datasets`` reads: ``https://``, ``hf://``, ``file://``, patterns where
            the server can list its files; None for the dataset's own.
        subset: Configuration of the dataset, or None for its default.
        split: Split to read; our own validation documents are held out of it.
        text_column: Column of the text.
        max_tokens: Training tokens to take, or None for as many as the run needs.
        validation_fraction: Share of documents held out, in (0, 1).
        near_duplicates: As in ``BuiltinCorpusConfig``.
        invalid_utf8: As in ``FilesCorpusConfig``.
        invalid_text: As in ``FilesCorpusConfig``.
        version: Branch, tag or commit of the dataset's repository, or None for its newest.
        licence: Licence of the corpus, in words, for the manifest; or None.
    """

    source: Literal["hub"]
    name: str
    files: tuple[str, ...] | None
    subset: str | None
    split: str
    text_column: str
    max_tokens: PositiveInt | None
    validation_fraction: HeldOut
    near_duplicates: DuplicatePolicy
    invalid_utf8: Utf8Policy
    invalid_text: TextPolicy
    version: str | None
    licence: str | None

    def __post_init__(self) -> None:
        if self.name in _LOADERS and not self.files:
            raise ValueError(f"data.files={self.files} must list at least one file with data.name={self.name}")


@dataclass(frozen=True)
class TokensCorpusConfig:
    """Local files that already hold tokens; ``tokenizer`` must be the one that made them.

    Attributes:
        source: The word that chooses this corpus.
        paths: Files or glob patterns. ``.bin`` with an ``.idx`` of the same name beside it is
            Megatron's indexed data set; ``.npy`` and other ``.bin`` files are one row of tokens,
            in which the tokenizer's end-of-document token ends each document.
        flat_dtype: Type of the tokens in a ``.bin`` file without an index, little-endian.
        megatron_documents: End of a document in a Megatron file: each ``end_of_document`` token, as in flat files, so
            that packed documents come apart; or the ``index`` alone, which keeps packs whole.
        validation_fraction: Share of documents held out, in (0, 1).
        validation_split: As in ``FilesCorpusConfig``.
        validation_paths: As in ``FilesCorpusConfig``.
        near_duplicates: As in ``BuiltinCorpusConfig``.
        content_check: As in ``FilesCorpusConfig``.
        version: Version of the corpus, in words, for the manifest; or None.
        licence: Licence of the corpus, in words, for the manifest; or None.
    """

    source: Literal["tokens"]
    paths: tuple[str, ...]
    flat_dtype: Literal["uint16", "uint32", "int32", "int64"]
    megatron_documents: Literal["end_of_document", "index"]
    validation_fraction: HeldOut
    validation_split: Literal["hash", "end"]
    validation_paths: tuple[str, ...] | None
    near_duplicates: DuplicatePolicy
    content_check: ContentCheck
    version: str | None
    licence: str | None

    def __post_init__(self) -> None:
        _check_paths(self.paths)


LocalCorpusConfig = FilesCorpusConfig | TokensCorpusConfig
CorpusConfig = BuiltinCorpusConfig | FilesCorpusConfig | HubCorpusConfig | TokensCorpusConfig


def describe(config: CorpusConfig) -> str:
    """A few words on where the text comes from, for the manifest and for progress lines."""
    if isinstance(config, BuiltinCorpusConfig):
        return "built-in: Python standard library sources and manual topics"
    if isinstance(config, FilesCorpusConfig):
        return "files: " + ", ".join(config.paths)
    if isinstance(config, TokensCorpusConfig):
        return "tokens: " + ", ".join(config.paths)
    return f"hub: {config.name} {config.subset or 'default'} {config.split}"


def version_and_licence(config: CorpusConfig) -> tuple[str | None, str | None]:
    """Version and licence of the corpus, for the manifest, beside its source."""
    if isinstance(config, BuiltinCorpusConfig):
        return f"Python {platform.python_version()}", "PSF-2.0"
    return config.version, config.licence


def _check_paths(paths: tuple[str, ...]) -> None:
    if not paths:
        raise ValueError("data.paths must list at least one file or glob pattern")


def has_own_split(config: CorpusConfig) -> bool:
    """Whether files or places decide what is held out, and not the hash of each document."""
    return isinstance(config, LocalCorpusConfig) and (
        config.validation_paths is not None or config.validation_split == "end"
    )


def what_splits(config: CorpusConfig) -> tuple[str, str]:
    """The field that decides what is held out, and what to do where it leaves a side empty."""
    fraction = f"data.validation_fraction={config.validation_fraction}"
    if not has_own_split(config):
        return fraction, "take another fraction, or more documents"
    assert isinstance(config, LocalCorpusConfig)
    if config.validation_paths is not None:
        return f"data.validation_paths={list(config.validation_paths)}", "name other files"
    return (
        f"{fraction} data.validation_split=end",
        "name what is held out in data.validation_paths, for gzip files and groups of parquet's rows are not cut",
    )


def can_be_on_both_sides(config: CorpusConfig) -> bool:
    """Whether documents are to be looked for on both sides: nearly equal ones where asked for, equal ones always.

    Where the hash of a text decides its side, equal ones are on the same anyway.
    """
    return config.near_duplicates != "ignore" or has_own_split(config)
