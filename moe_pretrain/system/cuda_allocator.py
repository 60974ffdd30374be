"""Setting of torch's CUDA allocator. Nothing is imported here: torch reads the variable when it first sees a GPU."""

import os

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow() -> None:
    """Let CUDA's caching allocator grow its segments, unless the environment says something about it.

    Under expert parallelism, and with every router of no fixed k, sizes change with every micro-batch: segments of
    fixed sizes fragment.
    """
    if not any(name in os.environ for name in _VARIABLES):
        os.environ[_VARIABLES[0]] = "expandable_segments:True"
