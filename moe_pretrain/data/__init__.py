"""Text in, micro-batches out. ``prepare_corpus`` makes token shards, ``TrainLoader`` reads them.

``prepare_corpus`` is the package's door: it finds a corpus' shards in the cache or writes them. Everything
behind it is a pure function of the shards, a seed and a position.

What needs torch is imported when it is first asked for: the processes that tokenise start without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_pretrain.data.corpus import TrainingCorpus
from moe_pretrain.data.corpus_changes import explain_change
from moe_pretrain.data.documents.config import (
    BuiltinCorpusConfig,
    CorpusConfig,
    FilesCorpusConfig,
    HubCorpusConfig,
    TokensCorpusConfig,
)
from moe_pretrain.data.prepare.mixture import RunLength, check_mixture, prepare_mixture
from moe_pretrain.data.prepare.prepare_corpus import (
    check_evaluation_set,
    check_prepared,
    prepare_corpus,
    prepare_evaluation_set,
    prepared_tokens,
)
from moe_pretrain.data.rows.mixture import DataConfig, MixedShards, MixtureConfig
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.shards.writer import ShardWriter, make_manifest, write_manifest
from moe_pretrain.data.stream.config import StreamingConfig
from moe_pretrain.data.stream.corpus import open_stream
from moe_pretrain.data.tokenizer.tokenizer import TokenizerConfig

if TYPE_CHECKING:
    from moe_pretrain.data.loader import TrainLoader
    from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, MicroBatch, wrap_to_int64
    from moe_pretrain.data.rows.packing import count_rows
    from moe_pretrain.data.validation import ValidationText, examine_validation, validation_batches, validation_rows

__all__ = [
    "IGNORE_INDEX",
    "BuiltinCorpusConfig",
    "CorpusConfig",
    "DataConfig",
    "FilesCorpusConfig",
    "HubCorpusConfig",
    "MicroBatch",
    "MixedShards",
    "MixtureConfig",
    "RunLength",
    "ShardReader",
    "ShardWriter",
    "StreamingConfig",
    "TokensCorpusConfig",
    "TokenizerConfig",
    "TrainLoader",
    "TrainingCorpus",
    "ValidationText",
    "check_evaluation_set",
    "check_mixture",
    "check_prepared",
    "count_rows",
    "examine_validation",
    "explain_change",
    "make_manifest",
    "open_stream",
    "prepare_corpus",
    "prepare_evaluation_set",
    "prepare_mixture",
    "prepared_tokens",
    "validation_batches",
    "validation_rows",
    "wrap_to_int64",
    "write_manifest",
]

_WITH_TORCH = {
    "IGNORE_INDEX": "rows.micro_batch",
    "MicroBatch": "rows.micro_batch",
    "TrainLoader": "loader",
    "count_rows": "rows.packing",
    "ValidationText": "validation",
    "examine_validation": "validation",
    "validation_batches": "validation",
    "validation_rows": "validation",
    "wrap_to_int64": "rows.micro_batch",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
