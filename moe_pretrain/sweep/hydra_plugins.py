"""Registration of our launcher with Hydra."""

import warnings

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from moe_pretrain.sweep.launcher import ProcessLauncher
from moe_pretrain.sweep.slurm import SlurmLauncher

LAUNCHER = "processes"
"""Its name: ``hydra/launcher=processes``, the default."""
_PLUGINS = "hydra_plugins.moe_pretrain"


def register() -> None:
    """Tell Hydra of the launcher; may be called again."""
    # Our values for submitit_slurm are of the plugin's types, which is what we want.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated against ConfigStore")
    plugins = Plugins.instance()
    for launcher in (ProcessLauncher, SlurmLauncher):
        plugins.register(launcher)
        plugins.class_name_to_class[f"{_PLUGINS}.{launcher.__name__}"] = launcher
    target = {"_target_": f"{_PLUGINS}.{ProcessLauncher.__name__}"}
    ConfigStore.instance().store(LAUNCHER, target, group="hydra/launcher", provider="moe_pretrain")
