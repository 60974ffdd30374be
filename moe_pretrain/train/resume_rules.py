"""Rules of resuming: the facts of a run that its checkpoints keep, and which of them must stay as they were."""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_pretrain import data
from moe_pretrain.checkpoint.manifest import CheckpointError, complete_names, open_manifest, train_state
from moe_pretrain.checkpoint.store import RunIdentity, TrainState
from moe_pretrain.config.earlier_releases import say_what_was_balanced
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.run_folder.paths import CHECKPOINTS
from moe_pretrain.run_folder.provenance import versions

_MUST_STAY = (
    "model",
    "router",
    "data",
    "tokenizer",
    "packing",
    "seed",
    "batch.global_batch_tokens",
    "optimizer.name",
    "optimizer.trainable",
    "checkpoint.warm_start",
    "checkpoint.branch_from",
)
"""Parts that decide the meaning of the weights, or the tokens that a step reads."""
_MUST_STAY_IF_ELASTIC = ("batch.micro_batch_size",)
"""With ``engine.determinism=elastic`` then and now: it decides the order of sums, and so the bits of the run."""
_MAY_DIFFER = ("model.recompute", "model.cross_entropy_chunk_tokens")
"""Exceptions within them: they change speed and memory, not the run."""
_ROW_POLICIES = ("invalid_text", "invalid_json", "invalid_utf8")
"""Policies for rows that are no text. One that was ``fail`` may change: no row that was read until then met it."""
_HEADS = ("model.num_heads", "model.num_key_value_heads")
_FUNCTION = (
    *("model.rope_base", "model.norm_epsilon", "model.moe.activation", "model.moe.activation_limit"),
    *("model.moe.combine", "model.moe.experts.pattern", "model.moe.experts.input_scale"),
    *("model.moe.experts.num_zero", "model.moe.experts.num_copy"),
)
"""Fields that no shape of a weight shows; ``_HEADS`` neither, but there is no reason to change those."""
_WHEN_ABSENT: dict[str, Callable[[Any], bool]] = {
    "model.init": lambda now: now != "mup",
    "model.gate_init": lambda now: True,
    "model.head_size": lambda now: now is None,
    "model.qk_norm": lambda now: now == "none",
    "model.mup_base_width": lambda now: True,
    "model.mup_base_layers": lambda now: True,
    "model.moe.combine": lambda now: now == {"name": "sum"},
    "model.moe.experts": lambda now: now == {"name": "swiglu"},
    "model.moe.shared_expert_gate": lambda now: now is False,
    "model.moe.activation": lambda now: now == "swiglu",
    "model.moe.activation_limit": lambda now: now is None,
    "model.moe.latent_size": lambda now: now is None,
    "model.moe.latent_norm": lambda now: now is False,
    "router.bias": lambda now: now is False,
    "router.logit_cap": lambda now: now is None,
    "router.entropy_weight": lambda now: now == 0,
    "router.expert_router_coupling_weight": lambda now: now == 0,
    "router.expert_router_coupling_alpha": lambda now: True,
    "checkpoint.branch_from": lambda now: now is None,
    "parallel.overlap_exchange": lambda now: True,
    "engine.kernels": lambda now: True,
    "optimizer.groups": lambda now: all(rate == {"lr_scale": 1.0} for rate in now.values()),
    "evaluation.tasks": lambda now: not now["names"],
}
"""Fields that a run from before they existed goes on without, and which of their values are no news to it.

``init`` and ``gate_init`` act in step 0 alone, but for ``mup``, which scales rates.
"""
_ONLY_WHEN_ABSENT = {
    "model.init": "normal or width_aware",
    "model.head_size": "null",
    "model.qk_norm": "none",
    "model.moe.combine": "{'name': 'sum'}",
    "model.moe.experts": "{'name': 'swiglu'}",
    "model.moe.shared_expert_gate": "false",
    "model.moe.activation": "swiglu",
    "model.moe.activation_limit": "null",
    "model.moe.latent_size": "null",
    "model.moe.latent_norm": "false",
    "router.bias": "false",
    "router.logit_cap": "null",
    "router.entropy_weight": "0",
    "router.expert_router_coupling_weight": "0",
    "checkpoint.branch_from": "null",
}
"""Those of them that are refused with any other value -> the values that they may have."""
_KINDS = (
    "data.source",
    "tokenizer.kind",
    "router.name",
    "model.moe.combine.name",
    "model.moe.experts.name",
    "optimizer.name",
    "schedule.name",
)
"""Fields that decide which fields their part has: where such a one differs, the others of the part are no news."""
_RESOLVED = ("device", "dtype", "zero_stage", "kernels")
"""Fields of the engine that may be ``auto``."""
_ABSENT = object()
_ANOTHER_NAME = "choose another run.name to start anew"


class ResumeRules:
    """Compares a run with the checkpoints that it is to go on from.

    Attributes:
        identity: This run, as its own checkpoints keep it.
    """

    def __init__(self, config: Config, corpus: data.TrainingCorpus, engine: TrainEngine):
        self.identity = RunIdentity(
            config=json.loads(json.dumps(to_values(config))),
            corpus_fingerprint=corpus.fingerprint,
            corpus_facts=corpus.facts(config.data),
            tokenizer=corpus.tokenizer.fingerprint,
            world_size=engine.mesh.world_size,
            versions=versions(),
            resolved={name: getattr(engine.config, name) for name in _RESOLVED},
        )

    def refuse_changes(self, state: TrainState, path: Path, is_branch: bool = False) -> list[str]:
        """Compare with the checkpoint at ``path``, which this run is to resume, or to branch off from.

        Returns:
            Differences that may be, in words.

        Raises:
            ConfigError: Something has changed that must stay the same.
        """
        then, now = state.identity, self.identity
        way_out = "a branch keeps them" if is_branch else _ANOTHER_NAME
        if not then.config or state.token_hash is None:
            raise ConfigError(
                f"{path} cannot be resumed: it records no configuration or no token hash, as no run writes it; "
                f"{way_out}"
            )
        found = changes(then.config, now.config, is_branch)
        found.check(path, way_out)
        if then.corpus_fingerprint != now.corpus_fingerprint:
            raise ConfigError(
                f"data: the corpus has changed since {path} was made: "
                f"{_explained(then.corpus_facts, now.corpus_facts)}; {way_out}"
            )
        tokens = state.step * now.config["batch"]["global_batch_tokens"]
        if state.tokens not in (None, tokens):
            raise ConfigError(f"{path} cannot be resumed: state.tokens={state.tokens} must be {tokens} after its steps")
        return found.allowed

    def refuse_weights(self, state: TrainState, path: Path) -> list[str]:
        """Compare with the checkpoint at ``path``, whose weights this run is to begin with.

        Returns:
            Differences that make another function of the same weights, in words.

        Raises:
            ConfigError: It is of another tokenizer, or its heads are cut in another way.
        """
        then, now = state.identity.tokenizer, self.identity.tokenizer
        if then != now:
            raise ConfigError(
                f"checkpoint.warm_start={path} must be of this run's tokenizer {now}; "
                f"it is of {then or 'an unknown one'}"
            )
        found = []
        models = {"model": state.identity.config.get("model")}, {"model": self.identity.config["model"]}
        for name, (before, after) in _differences("", *models).items():
            if before is not _ABSENT and name in _HEADS:
                raise ConfigError(
                    f"{name}={_word(after)} must be {_word(before)}, as checkpoint.warm_start={path} has it"
                )
            if before is not _ABSENT and _is_within(name, _FUNCTION):
                found.append(f"{name}={_word(after)} (was {_word(before)})")
        return found


@dataclass(frozen=True)
class Changes:
    """Differences between two resolved configurations.

    Attributes:
        refused: Fields that must stay as they were: ``NAME=NOW must stay THEN``.
        allowed: Fields that may differ, and do: ``NAME=NOW (was THEN)``.
    """

    refused: list[str]
    allowed: list[str]

    def check(self, path: Path, way_out: str) -> None:
        """Raise ``ConfigError`` if the checkpoint ``path`` was made with something that must stay."""
        if self.refused:
            raise ConfigError(
                f"{', '.join(self.refused)}, with which {path} was made; {way_out}"
                + (f" (these differ too, and may: {', '.join(self.allowed)})" if self.allowed else "")
            )


def check_resume(config: Config) -> None:
    """Refuse settings that the run's newest checkpoint was not made with, before a corpus is prepared for them.

    A checkpoint that cannot be read or has no settings is left to the resume, which may pass it over; so is one that is
    to be set aside (``checkpoint.resume=restart``) where none is good.

    Raises:
        ConfigError: Something has changed that must stay the same.
    """
    if config.checkpoint.resume == "restart":
        return
    with suppress(CheckpointError):
        for newest in complete_names(config.run.folder / CHECKPOINTS)[:1]:
            if then := train_state(open_manifest(newest)).identity.config:
                changes(then, to_values(config)).check(newest, _ANOTHER_NAME)


def changes(then: dict[str, Any], now: dict[str, Any], is_branch: bool = False) -> Changes:
    """Compare the configuration in a checkpoint with the one that goes on from it, in a run of its own if a branch.

    A field that only one of them has comes from another release: it is allowed and said, since nothing that was decided
    then is contradicted.
    """
    found = Changes([], [])
    then = deepcopy(then)
    with suppress(KeyError, TypeError, AttributeError):  # of a checkpoint whose configuration is damaged
        say_what_was_balanced(then)
    elastic = all(_engine(config).get("determinism") == "elastic" for config in (then, now))
    kept = (*_MUST_STAY, *_MUST_STAY_IF_ELASTIC) if elastic else _MUST_STAY
    differences = _differences("", then, json.loads(json.dumps(now)))
    of_another_kind = tuple(kind.rpartition(".")[0] for kind in _KINDS if kind in differences)
    for name, (before, after) in differences.items():
        if is_branch and _is_within(name, _BEGINNINGS):
            continue
        if _is_within(name, _SILENT) or (_is_within(name, of_another_kind) and name not in _KINDS):
            continue
        is_policy_unused = name.rpartition(".")[2] in _ROW_POLICIES and before == "fail"
        must_stay = _is_within(name, kept) and not _is_within(name, _MAY_DIFFER) and not is_policy_unused
        if before is _ABSENT and name in _WHEN_ABSENT and _WHEN_ABSENT[name](after):
            continue
        if before is _ABSENT and name in _ONLY_WHEN_ABSENT:
            found.refused.append(f"{name}={after} must stay {_ONLY_WHEN_ABSENT[name]}")
        elif before is _ABSENT or after is _ABSENT:
            absent = "not known then" if before is _ABSENT else f"was {_word(before)}, no longer exists"
            found.allowed.append(f"{name}={_word(after)} ({absent})" if after is not _ABSENT else f"{name} ({absent})")
        elif must_stay:
            found.refused.append(f"{name}={_word(after)} must stay {_word(before)}")
        else:
            found.allowed.append(f"{name}={_word(after)} (was {_word(before)})")
    return found


def _engine(config: dict[str, Any]) -> dict[str, Any]:
    engine = config.get("engine")
    return engine if isinstance(engine, dict) else {}


def _explained(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Differences of two corpora, of which the first is described by a file that may hold anything."""
    try:
        return data.explain_change(then, now)
    except (AttributeError, TypeError, ValueError, KeyError):
        return "what it was is not readable"


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def _differences(name: str, then: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(then.keys() | now.keys()):
            inner = f"{name}.{key}" if name else key
            found.update(_differences(inner, then.get(key, _ABSENT), now.get(key, _ABSENT)))
        return found
    return {} if then == now else {name: (then, now)}


_BEGINNINGS = ("checkpoint.warm_start", "checkpoint.branch_from")
"""Beginnings of the run that a branch leaves, which are not the branch's."""
_SILENT = ("run", "sweep", "metrics", "fault", "checkpoint.resume")
"""Parts whose changes are no news to training."""
