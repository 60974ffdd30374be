"""What a checkpoint says of the run that wrote it, and what of it must be so in a run that goes on from it."""

from pathlib import Path
from typing import Any

from moe_pretrain import data
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.run_folder.provenance import versions
from moe_pretrain.train.compatibility import changes
from moe_pretrain.train.corpora import Corpus


class Identity:
    """A run's configuration and corpus, as its checkpoints keep them."""

    def __init__(self, config: Config, corpus: Corpus, world_size: int):
        self._config, self._corpus, self._world_size = config, corpus, world_size
        self._corpus_facts = data.corpus_facts(config.data, corpus)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "corpus_fingerprint": self._corpus.fingerprint,
            "corpus_facts": self._corpus_facts,
            "tokenizer": self._corpus.tokenizer.fingerprint,
            "config": to_values(self._config),
            "world_size": self._world_size,
            "versions": versions(),
        }

    def refuse_changes(self, state: dict[str, Any], path: Path) -> list[str]:
        """Compare with the state of the checkpoint at ``path``, which this run is to resume.

        Returns:
            What has changed and may, in words.

        Raises:
            ConfigError: Something has changed that must stay the same.
        """
        found = changes(state["config"], to_values(self._config))
        if found.refused:
            raise ConfigError(
                f"{', '.join(found.refused)}, with which {path} was made; choose another run.name to start anew"
                + (f" (these differ too, and may: {', '.join(found.allowed)})" if found.allowed else "")
            )
        if state["corpus_fingerprint"] != self._corpus.fingerprint:
            raise ConfigError(
                f"data: the corpus has changed since {path} was made: "
                f"{data.explain_change(state.get('corpus_facts', {}), self._corpus_facts)}; choose another run.name to "
                "start anew"
            )
        return found.allowed

    def refuse_tokenizer(self, state: dict[str, Any], path: Path) -> None:
        """Raise if the checkpoint at ``path``, whose weights this run is to begin with, is of another tokenizer."""
        tokenizer = state.get("tokenizer")
        if tokenizer != self._corpus.tokenizer.fingerprint:
            raise ConfigError(
                f"checkpoint.warm_start={path} must be of this run's tokenizer {self._corpus.tokenizer.fingerprint}; "
                f"it is of {tokenizer or 'an unknown one'}"
            )
