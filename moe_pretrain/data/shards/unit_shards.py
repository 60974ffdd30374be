"""One work unit to one training and one validation shard, with a record that says it is done.

The record is written last: a unit with a record is never done again, one without is done from its start. Since a
unit's contents follow from the corpus alone, so does everything written here.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_pretrain.data.documents.config import CorpusConfig, TokensCorpusConfig
from moe_pretrain.data.documents.document import CorpusRow, Document, LeftOut, TokenDocument, is_validation
from moe_pretrain.data.documents.hub import Place
from moe_pretrain.data.documents.token_files import token_rows
from moe_pretrain.data.documents.work_units import Unit, unit_rows
from moe_pretrain.data.shards.near_duplicates import HeldOutDocuments, Sketcher, read_sketches
from moe_pretrain.data.shards.reader import INDEX_DTYPE, ShardInfo
from moe_pretrain.data.shards.writer import ShardWriter
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.system.files import write_whole
from moe_pretrain.system.words import one_line

SIDES = ("train", "validation")
UNITS = "units"  # folder of the records, beside those of the sides
_BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at once: enough for all its threads


@dataclass(frozen=True)
class Counts:
    """Documents in and out; ``read`` is the sum of those that follow it up to ``validation``.

    Attributes:
        read: Rows of the source.
        empty: Left out because their text is empty.
        invalid_utf8: Left out because their text is not UTF-8.
        invalid_json: Left out because their line is no JSON object.
        invalid_text: Left out because they have no text: none at all, null, a list, a number.
        table: Left out of the built-in corpus because they are tables.
        duplicate: Left out of the validation side because training has the same or nearly the same; in a stream, left
            out of the training side because the validation set has.
        train: Documents to train on.
        validation: Documents held out.
        repaired: Of the last two, those in which bytes that are not UTF-8 were replaced.
        near_duplicates: Of ``validation`` and ``duplicate``, those of which training has the same or nearly the same;
            in a stream, of ``train`` and ``duplicate``, those of which the validation set has.
        exact_duplicates: Of these, those of which training has the same.
        packed: Ends of documents inside Megatron documents, at which these were cut; or documents that have any, where
            the index alone decides.
        unknown: Tokens of ``train`` and ``validation`` that stand for what the tokenizer does not know, and characters
            that it leaves out for want of such a token.
    """

    read: int
    empty: int
    invalid_utf8: int
    invalid_json: int
    invalid_text: int
    table: int
    duplicate: int
    train: int
    validation: int
    repaired: int
    near_duplicates: int
    exact_duplicates: int
    packed: int
    unknown: int

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(one + two for one, two in zip(mine, theirs, strict=True)))

    def describe_left_out(self) -> str:
        """Rows of the source that are on no side, by reason, with a plus before each; nothing where there are none."""
        reasons = {
            "empty": self.empty,
            "not UTF-8": self.invalid_utf8,
            "not JSON": self.invalid_json,
            "without a text": self.invalid_text,
            "tables": self.table,
            "on both sides, exactly or nearly": self.duplicate,
        }
        return "".join(f" + {number:,} {words}" for words, number in reasons.items() if number)


NOTHING = Counts(*(0 for _ in dataclasses.fields(Counts)))


@dataclass(frozen=True)
class UnitRecord:
    """Record of one finished unit.

    Attributes:
        index: The unit's.
        shards: Shard of each of ``SIDES``; None where no document fell on that side.
        counts: Documents in and out.
        limited: Whether the unit was cut short, because the corpus had enough tokens.
        end: Where a streamed source stood after it; None for others.
    """

    index: int
    shards: tuple[ShardInfo | None, ShardInfo | None]
    counts: Counts
    limited: bool
    end: Place | None

    @property
    def train_tokens(self) -> int:
        """Tokens on the training side."""
        return self.shards[0].tokens if self.shards[0] else 0


# Tokens and bytes of text since the last call.
Tick = Callable[[int, int], None]


def write_unit(
    folder: Path,
    config: CorpusConfig,
    validation_fraction: float,
    unit: Unit,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    tick: Tick,
    sketch: bool = False,
    held_out: HeldOutDocuments | None = None,
) -> UnitRecord:
    """Tokenise one unit.

    Args:
        folder: Folder of the corpus being prepared.
        config: The corpus.
        validation_fraction: Share of documents held out, in [0, 1).
        unit: The unit.
        tokenizer: The tokenizer.
        max_tokens: Stop with the document that brings the training side there; None for no end.
        tick: Called after every batch of documents.
        sketch: Whether to write sketches of the documents: see ``near_duplicates``.
        held_out: Where documents to train on are looked up, to be counted or left out; None to look up none.

    Raises:
        ValueError: The source cannot be used.
        OSError: The disk is full.
    """
    train, validation = (
        ShardWriter(folder / side, unit.index, tokenizer.vocab_size, tokenizer.end_of_document) for side in SIDES
    )
    sketchers = [Sketcher(config.near_duplicates != "ignore") for _ in SIDES] if sketch else []
    counted = {field.name: 0 for field in dataclasses.fields(Counts)}
    limited = False
    try:
        for batch in _batches(_rows(config, unit, tokenizer)):
            texts = [row.text for row in batch if isinstance(row, Document)]
            before = train.num_tokens + validation.num_tokens
            tokens = iter(tokenizer.encode_batch(texts))
            counted["unknown"] += tokenizer.count_left_out(texts)
            for row in batch:
                counted["read"] += 1
                if isinstance(row, LeftOut):
                    counted[row.reason] += 1
                    continue
                ids = row.tokens if isinstance(row, TokenDocument) else np.asarray(next(tokens))
                text_bytes = 0 if isinstance(row, TokenDocument) else len(row.text.encode())
                counted["packed"] += isinstance(row, TokenDocument) and row.packed
                to_validation = is_held_out(row, unit, validation_fraction)
                if held_out is not None and not to_validation:
                    exact, near = held_out.find(ids)
                    counted["exact_duplicates"] += bool(exact)
                    counted["near_duplicates"] += bool(near)
                    if near and config.near_duplicates == "drop":
                        counted["duplicate"] += 1
                        continue
                (validation if to_validation else train).add(ids, text_bytes)
                if sketch:
                    sketchers[to_validation].add(ids, text_bytes)
                counted["repaired"] += isinstance(row, Document) and row.repaired
                limited = max_tokens is not None and train.num_tokens >= max_tokens
                if limited:
                    break
            tick(train.num_tokens + validation.num_tokens - before, sum(map(len, texts)))
            if limited:
                break
        counted |= {"train": train.num_documents, "validation": validation.num_documents}
        shards = (train.close(), validation.close())
        if tokenizer.unknown is not None:
            counted["unknown"] += sum(int(side.token_counts[tokenizer.unknown]) for side in (train, validation))
    finally:
        train.abort()
        validation.abort()
    record = UnitRecord(unit.index, shards, Counts(**counted), limited, unit.end)
    (folder / UNITS).mkdir(exist_ok=True)
    for side, sketcher in zip(SIDES, sketchers, strict=False):
        _write_sketches(folder, unit.index, side, sketcher.sketches())
    write_whole(folder / UNITS / f"unit-{unit.index:05d}.counts", zlib.compress(train.token_counts.tobytes(), 1))
    write_whole(record_path(folder, unit.index), json.dumps(dataclasses.asdict(record)).encode())
    return record


def is_held_out(document: Document | TokenDocument, unit: Unit, validation_fraction: float) -> bool:
    """Whether a document of a unit is on the validation side."""
    if validation_fraction and unit.held_out is not None:
        return unit.held_out
    content = document.tokens if isinstance(document, TokenDocument) else document.text
    return is_validation(content, validation_fraction)


def held_out_documents(
    config: CorpusConfig, units: Iterable[Unit], tokenizer: Tokenizer, alive: Callable[[], None]
) -> Iterator[np.ndarray]:
    """Tokens of the documents of some units that are on the validation side, without ends of documents.

    Args:
        config: The corpus.
        units: The units.
        tokenizer: The tokenizer.
        alive: Called for every row; raises if nobody wants them any more.

    Raises:
        ValueError: The source cannot be used.
    """
    for unit in units:
        for row in _rows(config, unit, tokenizer):
            alive()
            if isinstance(row, LeftOut) or not is_held_out(row, unit, config.validation_fraction):
                continue
            yield row.tokens if isinstance(row, TokenDocument) else np.asarray(tokenizer.encode_batch([row.text])[0])


def drop_from_validation(
    folder: Path, record: UnitRecord, dropped: np.ndarray, exact: int, vocab_size: int, end_of_document: int
) -> UnitRecord:
    """Write a unit's validation shard again without some of its documents.

    Shard, sketches and record are replaced in this order: of a unit that was cut off in between, the shard has not the
    size that the record says, and it is tokenised again.

    Args:
        folder: Folder of the corpus being prepared.
        record: The unit's.
        dropped: bool [documents] of the shard, at least one of them.
        exact: How many of them are exact duplicates.
        vocab_size: The tokenizer's.
        end_of_document: The tokenizer's.

    Returns:
        The record that took the place of ``record``.
    """
    shard, side = record.shards[1], SIDES[1]
    assert shard is not None
    sketches = read_unit_sketches(folder, record.index, side)
    dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
    tokens = np.fromfile(folder / side / f"{shard.name}.bin", dtype)
    ends = np.fromfile(folder / side / f"{shard.name}.idx", INDEX_DTYPE).astype(np.int64)
    writer = ShardWriter(folder / side, record.index, vocab_size, end_of_document)
    for document, sketch, drop in zip(np.split(tokens, ends[:-1]), sketches, dropped, strict=True):
        if not drop:
            writer.add(document[:-1], int(sketch["text_bytes"]))
    if (rest := writer.close()) is None:
        forget_shards(folder, record.index, (side,))
    _write_sketches(folder, record.index, side, sketches[~dropped])
    number = int(dropped.sum())
    counts = dataclasses.replace(
        record.counts,
        validation=record.counts.validation - number,
        duplicate=number,
        near_duplicates=number,
        exact_duplicates=exact,
    )
    record = dataclasses.replace(record, shards=(record.shards[0], rest), counts=counts)
    write_whole(record_path(folder, record.index), json.dumps(dataclasses.asdict(record)).encode())
    return record


def read_unit_sketches(folder: Path, index: int, side: str) -> np.ndarray:
    """``near_duplicates.SKETCH_DTYPE`` [documents] of one side of a unit."""
    return read_sketches(_sketches_path(folder, index, side))


def _write_sketches(folder: Path, index: int, side: str, sketches: np.ndarray) -> None:
    write_whole(_sketches_path(folder, index, side), sketches.tobytes())


def _sketches_path(folder: Path, index: int, side: str) -> Path:
    return folder / UNITS / f"unit-{index:05d}.{side}.sketches"


def read_records(folder: Path) -> dict[int, UnitRecord]:
    """The records of the units that are done."""
    records = [read_record(path) for path in (folder / UNITS).glob("unit-*.json")]
    return {record.index: record for record in records if record is not None}


def record_path(folder: Path, index: int) -> Path:
    """Path of a unit's record once the unit is done."""
    return folder / UNITS / f"unit-{index:05d}.json"


def read_record(path: Path) -> UnitRecord | None:
    """One record; None where there is none, or a damaged one, whose unit is done again."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        train, validation = (ShardInfo(**shard) if shard else None for shard in values["shards"])
        end = Place(**values["end"]) if values.get("end") else None
        return UnitRecord(values["index"], (train, validation), Counts(**values["counts"]), values["limited"], end)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def shard_is_whole(folder: Path, side: str, shard: ShardInfo | None, token_bytes: int) -> bool:
    """Whether a shard that a record lists is there; a machine that lost power may keep one without the other.

    One that is written again has its record before its files: the index is the last of them.
    """
    if shard is None:
        return True
    sizes = {"bin": shard.tokens * token_bytes, "idx": shard.documents * INDEX_DTYPE.itemsize}
    try:
        return all((folder / side / f"{shard.name}.{end}").stat().st_size == size for end, size in sizes.items())
    except FileNotFoundError:
        return False


def read_token_counts(folder: Path, index: int) -> np.ndarray:
    """int64 [vocab_size], how often each token stands in a unit's training shard.

    Raises:
        ValueError: They are damaged.
    """
    path = folder / UNITS / f"unit-{index:05d}.counts"
    try:
        return np.frombuffer(zlib.decompress(path.read_bytes()), dtype=np.int64)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}; delete {folder} to write it again") from None


def forget_unit(folder: Path, index: int) -> None:
    """Undo a unit: the record first, so that there is never a record without its shards."""
    record_path(folder, index).unlink(missing_ok=True)
    (folder / UNITS / f"unit-{index:05d}.counts").unlink(missing_ok=True)
    for side in SIDES:
        _sketches_path(folder, index, side).unlink(missing_ok=True)
    forget_shards(folder, index, SIDES)


def forget_shards(folder: Path, index: int, sides: tuple[str, ...]) -> None:
    """Remove a unit's shards of some sides."""
    for side in sides:
        for ending in ("bin", "sums", "idx"):
            (folder / side / f"shard-{index:05d}.{ending}").unlink(missing_ok=True)


def _rows(config: CorpusConfig, unit: Unit, tokenizer: Tokenizer) -> Iterator[CorpusRow]:
    if isinstance(config, TokensCorpusConfig):
        return token_rows(unit.pieces, config, tokenizer.vocab_size, tokenizer.end_of_document)
    return unit_rows(config, unit)


def _batches(rows: Iterator[CorpusRow]) -> Iterator[list[CorpusRow]]:
    batch: list[CorpusRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text) if isinstance(row, Document) else 1
        characters += len(row.tokens) if isinstance(row, TokenDocument) else 0
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
