"""The optimizers, one file each: a configuration class that says its state and builds it.

A new one is such a file, ``configs/optimizer/NAME.yaml``, its update as a formula in ``verify/oracle_optimizers.py``
and a test. Nothing else names an optimizer.
"""

import importlib
import pkgutil

from moe_pretrain.engine.optimizers.base import OptimizerConfig, OptimizerState, build_optimizer, set_learning_rate

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OptimizerConfig", "OptimizerState", "build_optimizer", "set_learning_rate"]
