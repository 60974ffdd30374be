"""Documents that are evaluated on and trained on: of one source of a mixture in another, of an evaluation set in any.

Within a source they are found while it is tokenised, whatever it is used for; between sources the shards are read once
for each mixture or set, and what is found is kept in the cache:

across-HASH/NAME/found.json   how many documents of the source; of an evaluation set, without NAME
across-HASH/NAME/validation   the validation side of a source without them, if its ``near_duplicates`` is ``drop``
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from moe_pretrain.data.documents.config import CorpusConfig
from moe_pretrain.data.prepare import cache
from moe_pretrain.data.prepare.attempt import DOCUMENT_BYTES_FILE
from moe_pretrain.data.prepare.progress_line import SteadyLine
from moe_pretrain.data.prepare.tokenized_corpus import TokenizedCorpus
from moe_pretrain.data.shards.near_duplicates import HeldOutDocuments
from moe_pretrain.data.shards.reader import Origin, ShardReader, is_complete
from moe_pretrain.data.shards.unit_shards import SIDES
from moe_pretrain.data.shards.writer import ShardWriter, make_manifest, write_manifest
from moe_pretrain.system.files import sync_folder, write_whole
from moe_pretrain.system.words import one_line

_FOUND_FILE = "found.json"
_NO_SOURCE = ""  # an evaluation set may have a source's name, and is looked for in that source too


@dataclass(frozen=True)
class FoundElsewhere:
    """Held-out documents of one source that other sources train on.

    Attributes:
        near: All of them, the same or nearly the same.
        exact: Those of which another source has the same.
        dropped: Whether they are left out of the validation side.
    """

    near: int
    exact: int
    dropped: bool


def look_across(
    sources: Mapping[str, TokenizedCorpus],
    configs: Mapping[str, CorpusConfig],
    cache_dir: Path,
    report: Callable[[str], None],
) -> tuple[dict[str, TokenizedCorpus], dict[str, FoundElsewhere]]:
    """Look for the held-out documents of each source in the training sides of the others.

    Args:
        sources: The prepared sources by name.
        configs: Their configurations; ``near_duplicates`` of the source that holds a document out says what is done.
        cache_dir: Folder of prepared corpora.
        report: Called with progress lines.

    Returns:
        The sources, those that drop documents without them; and what was found, by source.

    Raises:
        ValueError: Nothing is left of a validation side, or a source was prepared by a release that does not know how
            long its documents are; one line.
    """
    facts = [(name, one.fingerprint, configs[name].near_duplicates) for name, one in sorted(sources.items())]
    folder = _folder(cache_dir, facts)

    def write(partial: Path) -> None:
        exact, found = _look_up(
            {name: (source.validation, configs[name].near_duplicates != "ignore") for name, source in sources.items()},
            {name: source.train for name, source in sources.items()},
            report,
        )
        for name, source in sources.items():
            dropped = configs[name].near_duplicates == "drop"
            _write_found(partial / name, FoundElsewhere(int(found[name].sum()), int(exact[name].sum()), dropped))
            if dropped and found[name].any():
                _write_validation(partial / name / SIDES[1], source, found[name], name)

    _build(folder, list(sources), write, report)
    whole = {name: _without(source, folder / name / SIDES[1]) for name, source in sources.items()}
    return whole, {name: _read_found(folder / name) for name in sources}


def look_in_training(
    evaluated_on: ShardReader,
    training: Mapping[str, ShardReader],
    near: bool,
    cache_dir: Path,
    report: Callable[[str], None],
) -> FoundElsewhere:
    """Look for the documents of an evaluation set in the training sides of a corpus; they are counted, and stay.

    Args:
        evaluated_on: The set.
        training: The training sides by source.
        near: Whether near duplicates are looked for too.
        cache_dir: Folder of prepared corpora.
        report: Called with progress lines.
    """
    facts = [evaluated_on.fingerprint, sorted((one, reader.fingerprint) for one, reader in training.items()), near]
    folder = _folder(cache_dir, facts)

    def write(partial: Path) -> None:
        exact, found = _look_up({_NO_SOURCE: (evaluated_on, near)}, training, report)
        counts = FoundElsewhere(int(found[_NO_SOURCE].sum()), int(exact[_NO_SOURCE].sum()), False)
        _write_found(partial, counts)

    _build(folder, [_NO_SOURCE], write, report)
    return _read_found(folder)


def describe(found: Mapping[str, FoundElsewhere]) -> str:
    """Findings between the sources of a mixture in a clause, which says so too where there are none."""
    clauses = []
    for name, one in found.items():
        if one.near:
            what = "left out" if one.dropped else f"kept (data.sources.{name}.near_duplicates=drop leaves them out)"
            clauses.append(f"{one.near:,} of {name} ({one.exact:,} exact), {what}")
    return (
        f"other sources train on held-out documents: {'; '.join(clauses)}"
        if clauses
        else "no source trains on what another holds out"
    )


def _folder(cache_dir: Path, facts: Sequence[object]) -> Path:
    return cache_dir / f"across-{xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())}"


def _build(folder: Path, names: Sequence[str], write: Callable[[Path], None], report: Callable[[str], None]) -> None:
    """Have the folder written by one process, unless it is there with what was found of each of ``names``.

    Raises:
        ValueError: It cannot be written; one line.
    """

    def is_there() -> bool:
        return all((folder / name / _FOUND_FILE).is_file() for name in names)

    if is_there():
        return
    with cache.locked(folder, report):
        if not is_there():
            partial = cache.partial_folder(folder)
            shutil.rmtree(partial, ignore_errors=True)
            try:
                write(partial)
                shutil.rmtree(folder, ignore_errors=True)  # somebody removed a part of it
                partial.rename(folder)
                sync_folder(folder.parent)
            except OSError as error:
                raise ValueError(f"{partial}: {error.strerror}; the same command begins it again") from None


def _write_found(folder: Path, found: FoundElsewhere) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _FOUND_FILE, json.dumps(dataclasses.asdict(found)).encode())


def _read_found(folder: Path) -> FoundElsewhere:
    path = folder / _FOUND_FILE
    try:
        return FoundElsewhere(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}; delete it to write it again") from None


def _look_up(
    evaluated_on: Mapping[str, tuple[ShardReader, bool]],
    training: Mapping[str, ShardReader],
    report: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Look for documents in the training sides of other names than their own.

    Args:
        evaluated_on: Documents by name, each with whether near duplicates are looked for too.
        training: Training sides by name.
        report: Called with progress lines.

    Returns:
        By name, bool [documents] of those that are trained on, and of those that are exactly or nearly.
    """
    exact = {name: np.zeros(reader.num_documents, bool) for name, (reader, _) in evaluated_on.items()}
    found = {name: np.zeros(reader.num_documents, bool) for name, (reader, _) in evaluated_on.items()}
    # One index for each name, not one of all: a document may be looked up nearly for one and exactly for another.
    held_out = {name: HeldOutDocuments(_documents(reader), near) for name, (reader, near) in evaluated_on.items()}
    total = sum(reader.num_documents for reader in training.values())
    line, done = SteadyLine(report), 0
    for trained_on, reader in training.items():
        for tokens in _documents(reader):
            for name in held_out.keys() - {trained_on}:
                exactly, nearly = held_out[name].find(tokens)
                exact[name][exactly] = found[name][nearly] = True
            done += 1
            line.say(f"looking for documents that are evaluated on: {done:,} of {total:,} training documents")
    return exact, found


def _write_validation(folder: Path, source: TokenizedCorpus, dropped: np.ndarray, name: str) -> None:
    """The validation side of a source without some of its documents."""
    reader, manifest = source.validation, source.validation.manifest
    lengths = reader.folder / DOCUMENT_BYTES_FILE
    if not lengths.is_file():
        raise ValueError(
            f"{reader.folder.parent}: was prepared by an earlier release, and data.sources.{name}.near_duplicates=drop "
            "needs the lengths of its documents; delete the folder to write it again"
        )
    if dropped.all():
        raise ValueError(
            f"data.sources.{name}.near_duplicates=drop leaves no validation document: other sources train on the same "
            f"or nearly the same of all {len(dropped)}; count keeps them"
        )
    text_bytes = np.fromfile(lengths, np.uint64).tolist()
    writer = ShardWriter(folder, 0, manifest.vocab_size, manifest.end_of_document)
    for tokens, size, drop in zip(_documents(reader), text_bytes, dropped, strict=True):
        if not drop:
            writer.add(tokens, size)
    shard = writer.close()
    assert shard is not None
    origin = Origin(manifest.source, manifest.version, manifest.licence)
    counts = writer.token_counts
    kept = make_manifest(folder, [shard], counts, manifest.end_of_document, manifest.tokenizer_fingerprint, origin)
    write_manifest(folder, kept, counts)


def _without(source: TokenizedCorpus, folder: Path) -> TokenizedCorpus:
    if not is_complete(folder):
        return source
    validation = ShardReader(folder)
    validation.verify()
    return source.with_validation(validation)


def _documents(reader: ShardReader) -> Iterator[np.ndarray]:
    """Tokens of each document without its end."""
    start = 0
    for end in reader.document_ends.tolist():
        yield reader.read(start, end - 1)
        start = end
