"""Annotations are checked while tests run: of every function, its first calls in each test.

All calls of a test would take a third of its time, and those after the first few pass what the first ones passed.
``scripts/test.sh --all`` sets ``CHECK_EVERY_CALL``.
"""

import functools
import os
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
import jaxtyping._decorator
from beartype import BeartypeConf, beartype

# PEP 484: an int may stand where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

FIRST_CALLS = 3
"""Of a function, in one test: training and evaluation, or two layers, or two steps."""
CHECK_EVERY_CALL = "CHECK_EVERY_CALL" in os.environ
_test = [0]
_check_any = jaxtyping._decorator.jaxtyped


def install(at_import: bool = False) -> None:
    """Have what is imported of the package from now on checked.

    Args:
        at_import: Prepare the check of every function at its import, for a process that is forked from, and not at the
            function's first call: a few seconds, for most of the package is never called by a test.
    """
    if not CHECK_EVERY_CALL:
        # Both names: what the hook writes into modules, and what jaxtyping calls for a class and for a property.
        jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = functools.partial(_check_first_calls, at_import=at_import)
    jaxtyping.install_import_hook("moe_pretrain", "helpers.typechecker.check")


def begin_test() -> None:
    """Check every function's next calls again."""
    _test[0] += 1


def _check_first_calls(fn: Any = None, *, typechecker: Any, at_import: bool) -> Any:
    if fn is None:
        return functools.partial(_check_first_calls, typechecker=typechecker, at_import=at_import)
    if not isinstance(fn, FunctionType):
        return _check_any(fn, typechecker=typechecker)
    checked: Callable[..., Any] | None = _check_any(fn, typechecker=typechecker) if at_import else None
    test, left = 0, FIRST_CALLS

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, test, left
        if test != _test[0]:
            test, left = _test[0], FIRST_CALLS
        if not left or sys.is_finalizing():  # then a checker cannot be imported any more
            return fn(*args, **kwargs)
        left -= 1
        if checked is None:
            checked = _check_any(fn, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call
