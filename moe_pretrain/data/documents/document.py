"""One document, how it is read from a line of text, and which side of the split it falls on."""

import functools
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from moe_pretrain.data.documents.config import TextPolicy, Utf8Policy
from moe_pretrain.system.words import one_line

_BYTE_ORDER_MARK = "\ufeff"
WAY_PAST_UTF8 = "; data.invalid_utf8=replace or skip goes on past it"


@dataclass(frozen=True)
class Document:
    """One text and where it stands.

    Attributes:
        identity: Place of the text, for people: ``path:line``, ``path#row`` or a name.
        text: The text itself, never empty, always encodable as UTF-8.
        repaired: Whether bytes that are not UTF-8 were replaced in it.
    """

    identity: str
    text: str
    repaired: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A row of the source that is no document.

    Attributes:
        identity: As in ``Document``.
        reason: Why; the counts are kept under these words.
    """

    identity: str
    reason: Literal["empty", "invalid_utf8", "invalid_json", "invalid_text", "table"]


@dataclass(frozen=True)
class TokenDocument:
    """A document of a corpus that is tokens already.

    Attributes:
        identity: As in ``Document``.
        tokens: Integers [tokens], without an end-of-document token at the end, never empty.
        packed: Whether it shared a Megatron document with the next, or is one with ends of documents inside.
    """

    identity: str
    tokens: np.ndarray
    packed: bool = False


CorpusRow = Document | TokenDocument | LeftOut


def is_validation(content: str | np.ndarray, validation_fraction: float) -> bool:
    """Whether a document is held out: the 64-bit hash of its text (or tokens) falls in the first part of the range."""
    data = content.encode() if isinstance(content, str) else content.astype("<u4").tobytes()
    return xxhash.xxh3_64_intdigest(data) < validation_fraction * 2.0**64


def text_of(row: dict[str, object], column: str) -> str:
    """The text of one row of a table.

    Raises:
        ValueError: There is no such column, or it does not hold a string.
    """
    if column not in row:
        names = ", ".join(map(str, row))
        raise ValueError(f"no column {column!r} (data.text_column), there is: {names}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} must be a string, got {one_line(repr(text))}")
    return text


def row_of(
    identity: str, row: dict[str, object], column: str, on_text: TextPolicy, on_utf8: Utf8Policy, repaired: bool = False
) -> CorpusRow:
    """One row of a table as a row of the corpus.

    Raises:
        ValueError: As in ``text_of``, if ``on_text`` is ``fail``, and as in ``checked_text``.
    """
    try:
        text = text_of(row, column)
    except ValueError as error:
        if on_text == "fail":
            raise ValueError(f"{error}; data.invalid_text=skip leaves such rows out and counts them") from None
        return LeftOut(identity, "invalid_text")
    return checked_text(identity, text.removeprefix(_BYTE_ORDER_MARK), on_utf8, repaired)


def parse_object(line: str, column: str) -> dict[str, object]:
    """One line of JSON.

    Args:
        line: The line.
        column: A name that it may have once.

    Raises:
        ValueError: It is not one JSON object, or an object in it has the column twice.
    """
    # Of several the reader takes the last, silently. The hook costs time, and is for lines with the name in them twice.
    hook = functools.partial(_once, column) if line.count(f'"{column}"') > 1 else None
    try:
        row = json.loads(line, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise ValueError(f"broken JSON: {one_line(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"each line must be one JSON object, got {one_line(line)}")
    return row


def _once(column: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    if sum(name == column for name, _ in pairs) > 1:
        raise ValueError(f"{column!r} stands there more than once")
    return dict(pairs)


def checked_text(identity: str, text: str, policy: Utf8Policy, repaired: bool = False) -> CorpusRow:
    """A text as a row: empty ones are left out, those without a UTF-8 form are treated by ``policy``.

    Raises:
        ValueError: The text has a lone surrogate (JSON can write one) and the policy is ``fail``.
    """
    if not text:
        return LeftOut(identity, "empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if policy == "fail":
            raise ValueError(f"text is not valid UTF-8: {one_line(error)}{WAY_PAST_UTF8}") from None
        if policy == "skip":
            return LeftOut(identity, "invalid_utf8")
        text, repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    return Document(identity, text, repaired)
