"""Corpora and shards made of a few lines."""

from moe_pretrain.data import (
    FilesCorpusConfig,
    HubCorpusConfig,
    ShardReader,
    ShardWriter,
    make_manifest,
    write_manifest,
)
from moe_pretrain.data.shards.reader import Origin


def files(*paths, column="text", fraction=0.5, **changes):
    options = {
        "text_endings": (".txt",),
        "invalid_utf8": "fail",
        "invalid_json": "fail",
        "invalid_text": "fail",
        "content_check": "sampled",
        "sha256": None,
        "near_duplicates": "ignore",
        "validation_split": "hash",
        "validation_paths": None,
        "version": None,
        "licence": None,
    }
    return FilesCorpusConfig(
        source="files",
        paths=tuple(map(str, paths)),
        text_column=column,
        validation_fraction=fraction,
        **(options | changes),
    )


def hub(**changes):
    options = {
        "name": "org/name",
        "files": None,
        "subset": None,
        "split": "train",
        "text_column": "text",
        "max_tokens": None,
    }
    options |= {
        "validation_fraction": 0.5,
        "near_duplicates": "ignore",
        "invalid_utf8": "fail",
        "invalid_text": "fail",
        "version": None,
        "licence": None,
    }
    return HubCorpusConfig(source="hub", **(options | changes))


def write_shards(folder, texts, vocab_size=1000, tokens_per_shard=2**27, end=9):
    """A folder of shards; each is closed by the document that brings it to ``tokens_per_shard``."""
    infos, counts = [], 0
    remaining = list(texts)
    while remaining or not infos:
        writer = ShardWriter(folder, len(infos), vocab_size, end)
        while remaining and writer.num_tokens < tokens_per_shard:
            tokens = remaining.pop(0)
            writer.add(tokens, text_bytes=3 * len(tokens))
        info = writer.close()
        infos += [info] if info else []
        counts = counts + writer.token_counts
        if not infos:
            break
    manifest = make_manifest(folder, infos, counts, end, "print", Origin("a test", "v1", "CC0-1.0"))
    write_manifest(folder, manifest, counts)
    return ShardReader(folder)
