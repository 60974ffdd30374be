"""What is known of a prepared corpus, in few words: kept in checkpoints, so that a resume can say what has changed."""

from typing import Any

from moe_pretrain.data.documents.config import FilesCorpusConfig, TokensCorpusConfig
from moe_pretrain.data.documents.work_units import local_files
from moe_pretrain.data.prepare.mixture import TokenizedMixture
from moe_pretrain.data.prepare.prepare import TokenizedCorpus
from moe_pretrain.data.rows.mixture import DataConfig, MixtureConfig
from moe_pretrain.data.stream.corpus import StreamedCorpus

Facts = dict[str, Any]

_MOST_FILES = 200  # of more files only their number and size are kept
_MOST_NAMED = 3


def corpus_facts(config: DataConfig, corpus: TokenizedCorpus | TokenizedMixture | StreamedCorpus) -> Facts:
    """What decides and describes the tokens: plain values under a few names, ready for JSON.

    A mixture has one entry per source under ``sources``. A stream has none: its own state says what changed.
    """
    if isinstance(corpus, StreamedCorpus):
        return {}
    if isinstance(corpus, TokenizedMixture):
        assert isinstance(config, MixtureConfig)
        return {"sources": {name: corpus_facts(config.sources[name], one) for name, one in corpus.sources.items()}}
    manifest = corpus.train.manifest
    facts: Facts = {
        "fingerprint": corpus.fingerprint,
        "source": manifest.source,
        "version": manifest.version,
        "tokenizer": corpus.tokenizer.fingerprint,
        "vocabulary": manifest.vocab_size,
        "training documents": corpus.train.num_documents,
        "validation documents": corpus.validation.num_documents,
        "training tokens": corpus.train.num_tokens,
        "validation tokens": corpus.validation.num_tokens,
    }
    if isinstance(config, FilesCorpusConfig | TokensCorpusConfig):
        sizes = {str(path): path.stat().st_size for path in local_files(config).files}
        facts |= {"source files": len(sizes), "bytes of source files": sum(sizes.values())}
        if len(sizes) <= _MOST_FILES:
            facts["files"] = sizes
    return facts


def explain_change(then: Facts, now: Facts) -> str:
    """What differs between the facts of two corpora, in one line.

    Args:
        then: What ``corpus_facts`` gave when a checkpoint was made.
        now: What it gives now, of a corpus with another fingerprint.
    """
    if not then:
        return "what it was is not recorded"
    if "sources" in then or "sources" in now:
        return _explain_sources(then.get("sources", {}), now.get("sources", {}))
    changes = [
        f"{name} {_worded(then.get(name))} then, {_worded(now.get(name))} now"
        for name in now
        if name not in ("fingerprint", "files") and then.get(name) != now.get(name)
    ]
    changes += _explain_files(then.get("files", {}), now.get("files", {}))
    return "; ".join(changes) or "other text, in as many documents and tokens"


def _explain_sources(then: dict[str, Facts], now: dict[str, Facts]) -> str:
    changes = [f"source {name} is new" for name in now.keys() - then.keys()]
    changes += [f"source {name} is gone" for name in then.keys() - now.keys()]
    for name in then.keys() & now.keys():
        if then[name].get("fingerprint") != now[name]["fingerprint"]:
            changes.append(f"source {name}: {explain_change(then[name], now[name])}")
    return "; ".join(sorted(changes))


def _explain_files(then: dict[str, int], now: dict[str, int]) -> list[str]:
    if not then or not now:
        return []  # there were too many to keep
    found = [f"{path} is new" for path in now if path not in then]
    found += [f"{path} is gone" for path in then if path not in now]
    found += [
        f"{path} had {then[path]:,} bytes, has {size:,}" for path, size in now.items() if then.get(path, size) != size
    ]
    more = [f"and {len(found) - _MOST_NAMED} more files"] if len(found) > _MOST_NAMED else []
    return [*found[:_MOST_NAMED], *more]


def _worded(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
