"""Imported once by the server that ranks are forked from: shape checks on, slow imports done."""

import gc
import importlib
import logging
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: ranks share two cores

from jaxtyping import install_import_hook  # noqa: E402

import helpers.typechecker  # noqa: E402, F401  # the hook below looks it up by name

install_import_hook("moe_pretrain", "helpers.typechecker.check")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

warnings.simplefilter("ignore")
# What DeepSpeed and torch import late, in the middle of the first engine: seconds, in every rank.
for late in (
    "moe_pretrain.verify.verify",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
):
    importlib.import_module(late)
gc.freeze()  # some DeepSpeed constructors collect garbage a dozen times
