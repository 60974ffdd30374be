"""Imported once by the server that ranks are forked from: shape checks on, slow imports done."""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: ranks share two cores

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("moe_pretrain", "beartype.beartype")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import moe_pretrain.study.verify  # noqa: E402, F401
