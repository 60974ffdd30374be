"""Shapes in annotations are checked while tests run; everything is seeded and deterministic."""

import copy
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import pytest
import torch
from helpers import typechecker

# Before anything imports Triton, where it is installed: without a GPU its kernels can only be interpreted.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

typechecker.install()  # before anything of ours is imported
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

from helpers import composition  # noqa: E402  # what it imports is to be checked

composition.install()


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Hydra takes a tenth of a second to compose, and hundreds of tests load the same overrides."""
    from moe_pretrain.config import load as config_loading

    compose = config_loading.compose_values
    composed = functools.cache(lambda overrides: compose(list(overrides)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_loading, "compose_values", lambda overrides: copy.deepcopy(composed(tuple(overrides))))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    typechecker.begin_test()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _log_goes_where_it_went() -> Iterator[None]:
    """Hydra's ``--info`` and sweeps log to the standard error of their test, which is closed after it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


_LONG_FIRST = ("integration", "distributed", "test_certify.py", "test_plan.py", "test_match_budget.py")
"""Folders and files that take longest: begun last, one of them would run alone."""


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    unused: dict[tuple[str, str], bool] = {}
    for item in items:
        if fast := item.get_closest_marker("fast"):
            test, _, case = item.nodeid.partition("[")
            for word in fast.args:
                unused[test, word] = unused.get((test, word), True) and word not in case
            if not any(word in case for word in fast.args):
                item.add_marker(pytest.mark.slow)
    for (test, word), is_so in unused.items():
        if is_so and not any("::" in place for place in config.args):  # whole files were collected
            raise pytest.UsageError(f"{test}: no case has {word!r}, which its marker `fast` names")
    items.sort(key=lambda item: not set(_LONG_FIRST) & set(item.path.parts))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
