"""Checks of tasks without importing the harness, which takes seconds and may not be installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moe_pretrain.config.schema import ConfigError

_ENDS = (".yaml", ".yml")


def is_task_file(word: str) -> bool:
    """Whether ``word`` names a file and not a task of the harness."""
    return word.endswith(_ENDS) or "/" in word


def check_tasks(field: str, words: Sequence[str]) -> None:
    """Refuse tasks before anything is loaded, as far as that can be told so early.

    Args:
        field: Option or field that names them.
        words: Task files and names of tasks of the harness.

    Raises:
        ConfigError: The extra is not installed, or a file is not there.
    """
    if words and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{field}={','.join(words)} needs EleutherAI's lm-evaluation-harness, which is not installed: "
            'pip install "moe_pretrain[evaluate]"'
        )
    for word in words:
        if not word:
            raise ConfigError(f"{field} must name tasks of the harness or task files, without empty names between them")
        if is_task_file(word) and not Path(word).is_file():
            raise ConfigError(f"{field}={word} must be a task file that exists")
