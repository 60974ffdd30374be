"""What a run, a sweep and a report import, late or not, for processes that are forked from this one."""

import gc
import importlib
import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: programs share two cores

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
OURS = (
    "train.build",
    "parallel.launcher",
    "sweep.multirun",
    "sweep.running_job",
    "analysis.compare.page",
    "analysis.report",
)
THEIRS = (
    "torch.distributed.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)
for late in (*(f"moe_pretrain.{name}" for name in OURS), *THEIRS):
    importlib.import_module(late)

from moe_pretrain.config.load import load  # noqa: E402

load(["model.num_layers=2"])  # Hydra's parser and what pydantic builds on first use
gc.freeze()
