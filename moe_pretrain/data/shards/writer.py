"""Writing token shards: each file appears under its name only when it is whole and on the disk.

Files are written under a temporary name, flushed to the disk and renamed, so a file with its own name is never
half written, and a folder is complete when its manifest, which is written last, is there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moe_pretrain.data.shards.reader import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    MANIFEST_NAME,
    TOKEN_COUNTS_NAME,
    Manifest,
    Origin,
    ShardInfo,
    entropy_nats,
)
from moe_pretrain.data.shards.token_file import BlockSums
from moe_pretrain.system.files import WholeFile, sync_folder, write_whole

_TOKENS_PER_WRITE = 2**20


class ShardWriter:
    """Writes one shard, one document after the other. ``write_manifest`` makes shards a folder that can be read.

    Args:
        folder: Where to write; made if missing. Files of the same name are replaced.
        number: Number of the shard; the stream is the shards by rising number.
        vocab_size: Number of tokens of the tokenizer.
        end_of_document: Token put after each document.

    Attributes:
        num_tokens: Tokens so far, ends of documents among them.
        num_documents: Documents so far.
        token_counts: int64 [vocab_size], how often each token was written; complete after ``close``.
    """

    def __init__(self, folder: Path, number: int, vocab_size: int, end_of_document: int) -> None:
        if not 0 <= end_of_document < vocab_size:
            raise ValueError(f"end_of_document={end_of_document} must be below vocab_size={vocab_size}")
        folder.mkdir(parents=True, exist_ok=True)
        self.num_tokens = 0
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        self._folder = folder
        self._name = f"shard-{number:05d}"
        self._vocab_size = vocab_size
        self._end_of_document = end_of_document
        self._dtype = _token_dtype(vocab_size)
        self._text_bytes = 0
        self._document_ends: list[int] = []
        self._bin: WholeFile | None = None
        self._sums = BlockSums()
        # Documents not yet written; small documents are far cheaper to handle many at a time.
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._document_ends)

    def add(self, token_ids: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append one document.

        Args:
            token_ids: Tokens of the text, without the end-of-document token.
            text_bytes: Length of the text in UTF-8; 0 where there was no text, only tokens.

        Raises:
            ValueError: A token is not in ``[0, vocab_size)``.
        """
        ids = np.asarray(token_ids)
        end = self._end_of_document
        lowest, highest = (min(ids.min(), end), max(ids.max(), end)) if len(ids) else (end, end)
        if lowest < 0 or highest >= self._vocab_size:
            raise ValueError(
                f"document {self.num_documents}: token ids from {lowest} to {highest} must be from 0 to "
                f"vocab_size-1={self._vocab_size - 1}"
            )
        tokens = np.empty(len(ids) + 1, dtype=self._dtype)
        tokens[:-1] = ids
        tokens[-1] = end
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self.num_tokens += len(tokens)
        self._text_bytes += text_bytes
        self._document_ends.append(self.num_tokens)
        if self._waiting_tokens >= _TOKENS_PER_WRITE:
            self._write_waiting()

    def close(self) -> ShardInfo | None:
        """Put the shard on the disk under its name; None, and no file, if it has no document."""
        if not self._document_ends:
            return None
        self._write_waiting()
        assert self._bin is not None
        self._bin.commit()
        write_whole(self._folder / f"{self._name}.sums", self._sums.content(self._bin.checksum.digest()))
        with WholeFile(self._folder / f"{self._name}.idx") as index:
            index.write(np.array(self._document_ends, dtype=INDEX_DTYPE).tobytes())
        return ShardInfo(
            name=self._name,
            tokens=self.num_tokens,
            documents=self.num_documents,
            text_bytes=self._text_bytes,
            bin_xxh3=self._bin.checksum.hexdigest(),
            idx_xxh3=index.checksum.hexdigest(),
        )

    def abort(self) -> None:
        """Let go of open files after a failure; nothing has appeared under the shard's name."""
        if self._bin is not None:
            self._bin.abandon()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        if self._bin is None:
            self._bin = WholeFile(self._folder / f"{self._name}.bin")
        tokens = np.concatenate(self._waiting)
        self._waiting = []
        for start in range(0, len(tokens), _TOKENS_PER_WRITE):  # one document may be many times as long
            some = tokens[start : start + _TOKENS_PER_WRITE]
            self.token_counts += np.bincount(some, minlength=self._vocab_size)
            content = some.tobytes()
            self._bin.write(content)
            self._sums.add(content)
        self._waiting_tokens = 0


def write_manifest(folder: Path, manifest: Manifest, token_counts: np.ndarray) -> None:
    """Make a folder of finished shards complete.

    Args:
        folder: Where the shards are.
        manifest: From ``make_manifest``.
        token_counts: int64 [vocab_size], over all shards.
    """
    write_whole(folder / TOKEN_COUNTS_NAME, np.asarray(token_counts).astype(INDEX_DTYPE).tobytes())
    # The shards' names must be on the disk before the manifest that vouches for them.
    sync_folder(folder)
    write_whole(folder / MANIFEST_NAME, (json.dumps(asdict(manifest), indent=1) + "\n"))


def make_manifest(
    folder: Path,
    shards: Sequence[ShardInfo],
    token_counts: np.ndarray,
    end_of_document: int,
    tokenizer_fingerprint: str,
    origin: Origin,
) -> Manifest:
    """Manifest of finished shards.

    Args:
        folder: Where they are, for errors.
        shards: In stream order.
        token_counts: int64 [vocab_size], over all shards.
        end_of_document: Token after each document.
        tokenizer_fingerprint: ``Tokenizer.fingerprint``.
        origin: Where the text came from.

    Raises:
        ValueError: There is no shard.
    """
    if not shards:
        raise ValueError(f"{folder}: no document was written")
    vocab_size = len(token_counts)
    return Manifest(
        format_version=FORMAT_VERSION,
        dtype=_token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        end_of_document=end_of_document,
        tokenizer_fingerprint=tokenizer_fingerprint,
        source=origin.source,
        version=origin.version,
        licence=origin.licence,
        shards=tuple(shards),
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        unigram_entropy_nats=entropy_nats(token_counts),
    )


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")
