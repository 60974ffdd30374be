"""Token shards: the tokens of a corpus on disk, written once, read as one long stream.

A folder holds
    shard-00000.bin   tokens, little-endian uint16 (vocabularies up to 65,536) or uint32
    shard-00000.sums  checksums of the blocks of the tokens: see ``token_file``
    shard-00000.idx   uint64, for each document the offset in the shard where it ends, in tokens
    token-counts.bin  uint64 [vocab_size], how often each token occurs in all shards
    manifest.json     sizes, checksums, tokenizer, totals; written last, so it makes the folder whole

Every document ends with the end-of-document token and lies in one shard. ``shard_writer`` writes them.

Axis names:
    tokens      tokens of the stream, over all shards
    documents   documents of the stream, over all shards
"""

import bisect
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe_pretrain.data.shards.token_file import BlockSums, TokenFile, damaged
from moe_pretrain.system.words import one_line

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TOKEN_COUNTS_NAME = "token-counts.bin"
INDEX_DTYPE = np.dtype("<u8")
_COUNTED_AT_ONCE = 2**24


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
class Origin:
    """Origin of the text, for the manifest: in words, not for any decision."""

    source: str
    version: str | None
    licence: str | None


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        format_version: Version of this layout.
        dtype: ``uint16`` or ``uint32``.
        vocab_size: Every token is below it.
        end_of_document: Token after each document.
        tokenizer_fingerprint: ``Tokenizer.fingerprint`` of the tokenizer used.
        source: Where the text came from, in words.
        version: Version of the corpus, in words, or None where nobody said.
        licence: Licence of the corpus, in words, or None where nobody said.
        shards: The shards in stream order.
        tokens: Sum over the shards.
        documents: Sum over the shards.
        text_bytes: Sum over the shards.
        unigram_entropy_nats: Entropy of the token frequencies, nats per token.
    """

    format_version: int
    dtype: str
    vocab_size: int
    end_of_document: int
    tokenizer_fingerprint: str
    source: str
    version: str | None
    licence: str | None
    shards: tuple[ShardInfo, ...]
    tokens: int
    documents: int
    text_bytes: int
    unigram_entropy_nats: float


class ShardReader:
    """Reads a folder of shards as one stream.

    Args:
        folder: A folder that ``write_manifest`` completed.
        manifest: What to read in a folder that is not complete; None for its own manifest.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
        num_tokens: Tokens of the stream.
        num_documents: Documents of the stream.
        text_bytes: Bytes of UTF-8 text behind the stream.
        document_ends: int64 [documents], the stream offset after each document's last token.

    Raises:
        ValueError: No manifest, a manifest that makes no sense, or a file that is missing or
            has another size than the manifest says. Tokens are checked when they are read, all by ``verify``.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or _read_manifest(folder)
        self.num_tokens = self.manifest.tokens
        self.num_documents = self.manifest.documents
        self.text_bytes = self.manifest.text_bytes
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        for shard in self.manifest.shards:
            _check_size(folder / f"{shard.name}.bin", shard.tokens * self._dtype.itemsize)
            _check_size(folder / f"{shard.name}.idx", shard.documents * INDEX_DTYPE.itemsize)
        # Shard i holds the stream's tokens [starts[i], starts[i + 1]).
        tokens_per_shard = (shard.tokens for shard in self.manifest.shards)
        self._starts = list(itertools.accumulate(tokens_per_shard, initial=0))
        self._shard_starts = np.array(self._starts)
        self._tokens = [
            TokenFile(folder / f"{shard.name}.bin", self._dtype, shard.bin_xxh3) for shard in self.manifest.shards
        ]
        self.document_ends = np.concatenate(
            [
                _read_index(folder / f"{shard.name}.idx", shard) + start
                for shard, start in zip(self.manifest.shards, self._starts[:-1], strict=True)
            ]
        )

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
            uint16 or uint32 [stop - start], read-only where one shard holds it all.

        Raises:
            ValueError: The range is not inside the stream, or a shard is not what was written.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) must be inside [0, {self.num_tokens})")
        shard = bisect.bisect_right(self._starts, start) - 1
        shard = min(shard, len(self._tokens) - 1)  # start == num_tokens: an empty read
        parts = []
        while True:
            shard_start, shard_stop = self._starts[shard], self._starts[shard + 1]
            parts.append(self._tokens[shard].read(start - shard_start, min(stop, shard_stop) - shard_start))
            if stop <= shard_stop:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            start = shard_stop
            shard += 1

    def read_rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Rows of tokens that begin at ``starts`` [batch] of the stream.

        Returns:
            uint16 or uint32 [batch, length], a copy.

        Raises:
            ValueError: A row is not inside the stream, or a shard is not what was written.
        """
        rows = np.empty((len(starts), length), dtype=self._dtype)
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        for index, (start, shard) in enumerate(zip(starts.tolist(), shards.tolist(), strict=True)):
            if 0 <= start and start + length <= self._starts[min(shard + 1, len(self._tokens))]:
                offset = start - self._starts[shard]
                rows[index] = self._tokens[shard].read(offset, offset + length)
            else:  # over the end of a shard, or of the stream
                rows[index] = self.read(start, start + length)
        return rows

    def token_counts(self) -> np.ndarray:
        """Occurrences of each token in the stream, int64 [vocab_size].

        Read from the file beside the manifest; where an earlier release left none, or it does not agree with the
        manifest, all tokens are counted.
        """
        path = self.folder / TOKEN_COUNTS_NAME
        if path.is_file():
            size = INDEX_DTYPE.itemsize * self.manifest.vocab_size
            content = path.read_bytes()[:size]
            counts = np.frombuffer(content, INDEX_DTYPE, len(content) // INDEX_DTYPE.itemsize).astype(np.int64)
            is_whole = len(content) == size and counts.sum() == self.num_tokens
            if is_whole and math.isclose(entropy_nats(counts), self.manifest.unigram_entropy_nats, rel_tol=1e-9):
                return counts
        counts = np.zeros(self.manifest.vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, _COUNTED_AT_ONCE):
            tokens = self.read(start, min(start + _COUNTED_AT_ONCE, self.num_tokens))
            counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            ValueError: Files differ from the manifest; the line names the first.
        """
        complaints = []
        for shard in self.manifest.shards:
            path, sums = self.folder / f"{shard.name}.bin", BlockSums()
            for one, found, expected in (
                (path, _checksum(path, sums.add), shard.bin_xxh3),
                (path.with_suffix(".idx"), _checksum(path.with_suffix(".idx")), shard.idx_xxh3),
            ):
                if found != expected:
                    complaints.append(damaged(one, f"xxh3 is {found}, {MANIFEST_NAME} says {expected}"))
            if not sums.agree_with(path, shard.bin_xxh3):
                complaints.append(damaged(path.with_suffix(".sums"), f"xxh3 of blocks are not those of {path.name}"))
        if complaints:
            more = f" ({len(complaints) - 1} more files are damaged)" if len(complaints) > 1 else ""
            raise ValueError(f"{complaints[0]}{more}")


def entropy_nats(counts: np.ndarray) -> float:
    """Entropy of the frequencies that ``counts`` say, nats."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def is_complete(folder: Path) -> bool:
    """Whether the folder's shards were written to the end."""
    return (folder / MANIFEST_NAME).is_file()


def _checksum(path: Path, add: Callable[[bytes], None] = lambda block: None) -> str:
    checksum = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum.update(block)
            add(block)
    return checksum.hexdigest()


def _read_index(path: Path, shard: ShardInfo) -> np.ndarray:
    content = path.read_bytes()
    if (found := xxhash.xxh3_128_hexdigest(content)) != shard.idx_xxh3:
        raise damaged(path, f"xxh3 is {found}, {MANIFEST_NAME} says {shard.idx_xxh3}")
    ends = np.frombuffer(content, INDEX_DTYPE).astype(np.int64)
    if not ends.size or ends[-1] != shard.tokens or ends[0] < 1 or np.any(ends[1:] <= ends[:-1]):
        raise damaged(path, f"the document ends do not rise to the shard's {shard.tokens} tokens")
    return ends


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise damaged(path, f"it is missing, {MANIFEST_NAME} lists it")
    found_bytes = path.stat().st_size
    if found_bytes != expected_bytes:
        raise damaged(path, f"has {found_bytes} bytes, {MANIFEST_NAME} says {expected_bytes}")


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
        raise damaged(path, one_line(error)) from None
    return manifest
