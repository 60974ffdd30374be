"""Token shards: the tokens of a corpus on disk, written once, read as one long memory-mapped stream.

A folder holds
    shard-00000.bin   tokens, little-endian uint16 (vocabularies up to 65,536) or uint32
    shard-00000.idx   uint64, for each document the offset in the shard where it ends, in tokens
    manifest.json     sizes, checksums, tokenizer, totals; written last, so it makes the folder whole

Every document ends with the end-of-document token and lies in one shard. Files are written under a
temporary name, flushed to the disk and renamed, so a file with its own name is never half written.

Axis names:
    tokens      tokens of the stream, over all shards
    documents   documents of the stream, over all shards
"""

import bisect
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_TOKENS_PER_SHARD = 2**27  # 256 or 512 MiB
_TOKENS_PER_WRITE = 2**20
_INDEX_DTYPE = np.dtype("<u8")


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest.

    Attributes:
        name: File name without its ending.
        tokens: Tokens, end-of-document tokens among them.
        documents: Documents.
        text_bytes: Bytes of the UTF-8 text behind the tokens.
        bin_xxh3: xxh3-128 of the ``.bin`` file, hexadecimal.
        idx_xxh3: xxh3-128 of the ``.idx`` file, hexadecimal.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    bin_xxh3: str
    idx_xxh3: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        format_version: Version of this layout.
        dtype: ``uint16`` or ``uint32``.
        vocab_size: Every token is below it.
        end_of_document: Token after each document.
        tokenizer_fingerprint: ``Tokenizer.fingerprint`` of the tokenizer used.
        source: Where the text came from, in words.
        shards: The shards in stream order.
        tokens: Sum over the shards.
        documents: Sum over the shards.
        text_bytes: Sum over the shards.
        unigram_entropy_nats: Entropy of the token frequencies, nats per token: the loss of a
            model that knows them and nothing else.
    """

    format_version: int
    dtype: str
    vocab_size: int
    end_of_document: int
    tokenizer_fingerprint: str
    source: str
    shards: tuple[ShardInfo, ...]
    tokens: int
    documents: int
    text_bytes: int
    unigram_entropy_nats: float


class ShardWriter:
    """Writes a folder of shards, one document after the other.

    Args:
        folder: Where to write; made if missing. A folder without a manifest is taken to be the
            rest of an interrupted write and written over.
        vocab_size: Number of tokens of the tokenizer.
        end_of_document: Token put after each document.
        tokenizer_fingerprint: ``Tokenizer.fingerprint``.
        source: Where the text comes from, in words.
        tokens_per_shard: A shard is closed by the first document that brings it there.

    Raises:
        ValueError: The folder already holds a complete set of shards.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        end_of_document: int,
        tokenizer_fingerprint: str,
        source: str,
        tokens_per_shard: int = _TOKENS_PER_SHARD,
    ) -> None:
        if (folder / MANIFEST_NAME).exists():
            raise ValueError(f"{folder} already holds complete token shards")
        if not 0 <= end_of_document < vocab_size:
            raise ValueError(f"end_of_document={end_of_document} must be below vocab_size={vocab_size}")
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("shard-*"):
            left_over.unlink()
        self.num_tokens = 0
        self.num_documents = 0
        self._folder = folder
        self._vocab_size = vocab_size
        self._end_of_document = end_of_document
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._source = source
        self._tokens_per_shard = tokens_per_shard
        self._dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self._token_counts = np.zeros(vocab_size, dtype=np.int64)
        self._shards: list[ShardInfo] = []
        self._shard: _OpenShard | None = None
        # Documents not yet written; small documents are far cheaper to handle many at a time.
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0

    def add(self, token_ids: Sequence[int], text_bytes: int) -> None:
        """Append one document.

        Args:
            token_ids: Tokens of the text, without the end-of-document token.
            text_bytes: Length of the text in UTF-8.

        Raises:
            ValueError: A token is not in ``[0, vocab_size)``.
        """
        tokens = np.empty(len(token_ids) + 1, dtype=np.int64)
        tokens[:-1] = token_ids
        tokens[-1] = self._end_of_document
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(
                f"document {self.num_documents}: token ids from {tokens.min()} to "
                f"{tokens.max()} must be from 0 to vocab_size-1={self._vocab_size - 1}"
            )
        if self._shard is None:
            self._shard = _OpenShard(self._folder, f"shard-{len(self._shards):05d}")
        self._shard.end_document(len(tokens), text_bytes)
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self.num_tokens += len(tokens)
        self.num_documents += 1
        shard_is_full = self._shard.tokens >= self._tokens_per_shard
        if shard_is_full or self._waiting_tokens >= _TOKENS_PER_WRITE:
            self._write_waiting()
        if shard_is_full:
            self._close_shard()

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest, which makes the folder complete.

        Raises:
            ValueError: Nothing was added.
        """
        if not self.num_documents:
            raise ValueError(f"{self._folder}: no document was written")
        if self._shard is not None:
            self._write_waiting()
            self._close_shard()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            vocab_size=self._vocab_size,
            end_of_document=self._end_of_document,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            source=self._source,
            shards=tuple(self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            text_bytes=sum(shard.text_bytes for shard in self._shards),
            unigram_entropy_nats=_entropy_nats(self._token_counts),
        )
        # The shards' names must be on the disk before the manifest that vouches for them.
        _sync_folder(self._folder)
        with _DurableFile(self._folder / MANIFEST_NAME) as file:
            file.write((json.dumps(asdict(manifest), indent=1) + "\n").encode())
        _sync_folder(self._folder)
        return manifest

    def abort(self) -> None:
        """Let go of open files after a failure; the folder stays without a manifest."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None

    def _write_waiting(self) -> None:
        assert self._shard is not None
        tokens = np.concatenate(self._waiting)
        self._token_counts += np.bincount(tokens, minlength=self._vocab_size)
        self._shard.write(tokens.astype(self._dtype).tobytes())
        self._waiting = []
        self._waiting_tokens = 0

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.close())
        self._shard = None


class ShardReader:
    """Reads a folder of shards as one stream, memory-mapped.

    Args:
        folder: A folder that ``ShardWriter.close`` completed.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
        num_tokens: Tokens of the stream.
        num_documents: Documents of the stream.
        text_bytes: Bytes of UTF-8 text behind the stream.
        document_ends: int64 [documents], the stream offset after each document's last token.

    Raises:
        ValueError: No manifest, a manifest that makes no sense, or a file that is missing or
            has another size than the manifest says. Contents are checked by ``verify``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.num_tokens = self.manifest.tokens
        self.num_documents = self.manifest.documents
        self.text_bytes = self.manifest.text_bytes
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        for shard in self.manifest.shards:
            _check_size(folder / f"{shard.name}.bin", shard.tokens * self._dtype.itemsize)
            _check_size(folder / f"{shard.name}.idx", shard.documents * _INDEX_DTYPE.itemsize)
        # Shard i holds the stream's tokens [starts[i], starts[i + 1]).
        tokens_per_shard = (shard.tokens for shard in self.manifest.shards)
        self._starts = list(itertools.accumulate(tokens_per_shard, initial=0))
        # As plain arrays over the mapped files: slicing np.memmap itself is ten times slower.
        self._tokens = [
            np.asarray(np.memmap(folder / f"{shard.name}.bin", dtype=self._dtype, mode="r"))
            for shard in self.manifest.shards
        ]
        self.document_ends = np.concatenate(
            [
                np.fromfile(folder / f"{shard.name}.idx", _INDEX_DTYPE).astype(np.int64) + start
                for shard, start in zip(self.manifest.shards, self._starts[:-1], strict=True)
            ]
        )
        ends = self.document_ends
        if ends[-1] != self.num_tokens or ends[0] < 1 or np.any(ends[1:] <= ends[:-1]):
            raise ValueError(f"{folder}: the .idx files do not rise to the {self.num_tokens} tokens")

    @property
    def fingerprint(self) -> str:
        """Hash of the contents: equal for equal tokens, whatever the folder and the source text."""
        manifest = self.manifest
        facts = [
            manifest.dtype,
            manifest.vocab_size,
            manifest.end_of_document,
            manifest.tokenizer_fingerprint,
            *((shard.tokens, shard.bin_xxh3, shard.idx_xxh3) for shard in manifest.shards),
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)`` of the stream.

        Returns:
            uint16 or uint32 [stop - start]; a read-only view of the file where one shard holds
            it all.

        Raises:
            ValueError: The range is not inside the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) must be inside [0, {self.num_tokens})")
        shard = bisect.bisect_right(self._starts, start) - 1
        shard = min(shard, len(self._tokens) - 1)  # start == num_tokens: an empty read
        parts = []
        while True:
            shard_start, shard_stop = self._starts[shard], self._starts[shard + 1]
            parts.append(self._tokens[shard][start - shard_start : stop - shard_start])
            if stop <= shard_stop:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            start = shard_stop
            shard += 1

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            ValueError: A file differs from the manifest; the line names the file.
        """
        for shard in self.manifest.shards:
            for ending, expected in (("bin", shard.bin_xxh3), ("idx", shard.idx_xxh3)):
                path = self.folder / f"{shard.name}.{ending}"
                found = _checksum(path)
                if found != expected:
                    raise ValueError(f"{path}: damaged: xxh3 is {found}, {MANIFEST_NAME} says {expected}")


def is_complete(folder: Path) -> bool:
    """Whether the folder's shards were written to the end."""
    return (folder / MANIFEST_NAME).is_file()


class _DurableFile:
    """A file that appears under its name only when it is whole and on the disk.

    Attributes:
        checksum: xxh3-128 of the bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit
        self.checksum = xxhash.xxh3_128()

    def __enter__(self) -> "_DurableFile":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.abandon()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.checksum.update(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._path)

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _OpenShard:
    """The shard being written: tokens go to the disk as they come, document ends at the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tokens = 0
        self._folder = folder
        self._name = name
        self._text_bytes = 0
        self._document_ends: list[int] = []
        self._bin = _DurableFile(folder / f"{name}.bin")

    def end_document(self, num_tokens: int, text_bytes: int) -> None:
        self.tokens += num_tokens
        self._text_bytes += text_bytes
        self._document_ends.append(self.tokens)

    def write(self, data: bytes) -> None:
        self._bin.write(data)

    def close(self) -> ShardInfo:
        self._bin.commit()
        with _DurableFile(self._folder / f"{self._name}.idx") as index:
            index.write(np.array(self._document_ends, dtype=_INDEX_DTYPE).tobytes())
        return ShardInfo(
            name=self._name,
            tokens=self.tokens,
            documents=len(self._document_ends),
            text_bytes=self._text_bytes,
            bin_xxh3=self._bin.checksum.hexdigest(),
            idx_xxh3=index.checksum.hexdigest(),
        )

    def abandon(self) -> None:
        self._bin.abandon()


def _entropy_nats(counts: np.ndarray) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum.update(block)
    return checksum.hexdigest()


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing, {MANIFEST_NAME} lists it")
    found_bytes = path.stat().st_size
    if found_bytes != expected_bytes:
        raise ValueError(f"{path}: damaged: has {found_bytes} bytes, {MANIFEST_NAME} says {expected_bytes}")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST_NAME}: no token shards, or not complete")
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version={version}, this program reads {FORMAT_VERSION}")
        shards = tuple(ShardInfo(**shard) for shard in fields.pop("shards"))
        manifest = Manifest(**fields, shards=shards)
        sums = [
            sum(shard.tokens for shard in shards),
            sum(shard.documents for shard in shards),
            sum(shard.text_bytes for shard in shards),
        ]
        if sums != [manifest.tokens, manifest.documents, manifest.text_bytes] or not sums[1]:
            raise ValueError("the totals are not the sums over the shards")
        if manifest.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype={manifest.dtype!r} must be uint16 or uint32")
        if not math.isfinite(manifest.unigram_entropy_nats):
            raise ValueError(f"unigram_entropy_nats={manifest.unigram_entropy_nats}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    return manifest
