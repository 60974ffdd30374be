"""Imported once by the server that ranks are forked from: shape checks on, slow imports done."""

import gc
import importlib
import logging
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: ranks share two cores

from helpers import typechecker  # noqa: E402

typechecker.install(at_import=True)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

warnings.simplefilter("ignore")
# What the files of the ranks' functions import, and what DeepSpeed and torch import late, in the middle of the first
# engine: seconds, in every rank.
for late in (
    "pytest",
    "helpers.engines",
    "moe_pretrain.cli",
    "moe_pretrain.plan.plan",
    "moe_pretrain.train.build",
    "moe_pretrain.verify.certificate.certify",
    "moe_pretrain.verify.verify",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
):
    importlib.import_module(late)

from helpers import composition  # noqa: E402
from moe_pretrain.config.compose import compose_values  # noqa: E402

composition.install()
compose_values([])
gc.freeze()  # some DeepSpeed constructors collect garbage a dozen times
