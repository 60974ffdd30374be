"""What a run, a sweep and a report import, late or not, for processes that are forked from this one."""

import importlib

import helpers.rank_preload  # noqa: F401

for late in ("pretrain", "launch", "sweep.multirun", "sweep.job", "study.compare_page", "study.report"):
    importlib.import_module(f"moe_pretrain.{late}")
