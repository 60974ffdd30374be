"""Facts of a prepared corpus, few words kept in checkpoints, so that a resume can say what has changed."""

from typing import Any

from moe_pretrain.data.documents.config import FilesCorpusConfig, TokensCorpusConfig
from moe_pretrain.data.documents.work_units import local_files
from moe_pretrain.data.rows.mixture import DataConfig

Facts = dict[str, Any]

_MOST_FILES = 200  # of more files only their number and size are kept
_MOST_NAMED = 3


def source_file_facts(config: DataConfig) -> Facts:
    """Number and sizes of the files that a corpus is made of; nothing for a corpus that is not made of files."""
    if not isinstance(config, FilesCorpusConfig | TokensCorpusConfig):
        return {}
    sizes = {str(path): path.stat().st_size for path in local_files(config).files}
    facts: Facts = {"source files": len(sizes), "bytes of source files": sum(sizes.values())}
    return {**facts, "files": sizes} if len(sizes) <= _MOST_FILES else facts


def explain_change(then: Facts, now: Facts) -> str:
    """Differences between the facts of two corpora, in one line.

    Args:
        then: Facts of the corpus when a checkpoint was made; empty where there are none.
        now: Facts of the corpus now, which has another fingerprint.
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
