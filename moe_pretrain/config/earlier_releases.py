"""Values that runs of earlier releases have recorded, with the fields and names of today."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from moe_pretrain.model.parameter_groups import GROUP_NAMES

RENAMED = {"batch.total_tokens": "budget.tokens"}
"""Fields by their names in earlier releases."""
BEFORE = {
    "run.report": True,
    "model.init": "normal",
    "model.gate_init": "paper",
    "model.head_size": None,
    "model.qk_norm": "none",
    "model.moe.experts": {"name": "swiglu"},
    "model.moe.combine": {"name": "sum"},
    "model.moe.shared_expert_gate": False,
    "model.moe.activation": "swiglu",
    "model.moe.activation_limit": None,
    "model.moe.latent_size": None,
    "model.moe.latent_norm": False,
    "model.mup_base_width": 128,
    "model.mup_base_layers": 4,
    "optimizer.name": "adamw",
    "optimizer.groups": {name: {"lr_scale": 1.0} for name in GROUP_NAMES},
    "tokenizer.end_of_document": None,
    "tokenizer.max_unknown": 1.0,
    "metrics.collapse_ratio": 1.25,
    "evaluation.tasks": {"names": [], "every_steps": None, "max_documents": None},
}
"""Fields that earlier releases did not have, with what they did."""
BEFORE_OF_CORPORA: dict[str, dict[str, Any]] = {
    "builtin": {"near_duplicates": "ignore"},
    "files": {
        "validation_split": "hash",
        "validation_paths": None,
        "near_duplicates": "ignore",
        "sha256": None,
        "invalid_text": "fail",
        "content_check": "sampled",
    },
    "hub": {"near_duplicates": "ignore", "invalid_utf8": "fail", "invalid_text": "fail"},
    "tokens": {
        "megatron_documents": "index",
        "validation_split": "hash",
        "validation_paths": None,
        "near_duplicates": "ignore",
        "content_check": "sampled",
    },
}
"""The same of a corpus by its source, wherever it stands: as data, in a mixture, as an evaluation set."""
_IGNORED_COST = {
    "k_means",
    "hash",
    "relu",
    "expert_choice",
    "expert_threshold",
    "sinkhorn",
    "thor",
    "random",
    "uniform",
}
"""Routers that did not heed ``model.moe.experts.balance=cost``, which stood there by default, before releases that know
``parallel.overlap_exchange``: such a run evened routes, or nothing."""


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Values that a run has recorded, with the fields that did not exist then, and renamed ones by their new names."""
    for old, new in RENAMED.items():
        part, _, field = old.partition(".")
        if field in values.get(part, {}):
            part_now, _, field_now = new.partition(".")
            values[part_now].setdefault(field_now, values[part].pop(field))
    say_what_was_balanced(values)
    for name, value in BEFORE.items():
        *parts, field = name.split(".")
        part_of: dict[str, Any] = values
        for each in parts:
            part_of = part_of[each]
        part_of.setdefault(field, deepcopy(value))
    for _, corpus in corpora_of(values):
        for field, value in BEFORE_OF_CORPORA.get(corpus["source"], {}).items():
            corpus.setdefault(field, value)
    return values


def say_what_was_balanced(values: dict[str, Any]) -> None:
    """Put ``balance=routes`` where a run of before had experts of several widths and nothing that heeded their cost."""
    router, experts = values["router"], values["model"]["moe"].get("experts", {})
    if "overlap_exchange" in values["parallel"] or experts.get("balance") != "cost":
        return
    if router["name"] in _IGNORED_COST or router.get("load_balance_weight") == 0:
        experts["balance"] = "routes"


def corpora_of(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every corpus in resolved values, with its place: what is trained on, sources of a mixture, evaluation sets."""
    corpus = values["data"]
    trained_on = {"data": corpus}
    if corpus["source"] == "mixture":
        trained_on = {f"data.sources.{name}": source for name, source in corpus["sources"].items()}
    sets = {f"evaluation.sets.{name}": source for name, source in values["evaluation"]["sets"].items()}
    return list((trained_on | sets).items())
