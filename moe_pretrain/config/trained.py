"""A trained run: its configuration and one of its checkpoints, for commands that go on after training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.manifest import MANIFEST
from moe_pretrain.checkpoint.restore import Reader, load_model
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.config.load import read_run
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.run_folder.paths import CHECKPOINTS, CONFIG_FILE


@dataclass(frozen=True)
class TrainedRun:
    """A run and one of its checkpoints, verified.

    Attributes:
        folder: Folder of the run.
        config: Configuration of the run.
        checkpoint: Folder of the checkpoint.
        manifest: Its manifest.
    """

    folder: Path
    config: Config
    checkpoint: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> TrainState:
        """State of the run at the checkpoint."""
        return store.train_state(self.manifest)

    def reader(self) -> Reader:
        """Reader of any part of any of its tensors."""
        return Reader(self.checkpoint, self.manifest)

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter."""
        return self.manifest["shapes"]

    def meta_model(self) -> DecoderLM:
        """The model without storage."""
        return meta_model(self.config.model, self.config.router)

    def model(self, device: str = "cpu") -> DecoderLM:
        """The whole model in float32, in evaluation.

        Raises:
            CheckpointError: The checkpoint is not of this model.
        """
        model = DecoderLM(self.config.model, self.config.router, ExpertShard())
        load_model(model, self.checkpoint, self.manifest)
        return model.to(torch.device(device)).eval()


def open_trained(
    place: Path, choose_router_file: Callable[[str | None], str | None], warn: Callable[[str], None]
) -> TrainedRun:
    """Open ``place``: the folder of a run, of which the newest good checkpoint is taken, or one of its checkpoints.

    Args:
        place: ``OUTPUT_DIR/RUN_NAME`` or ``OUTPUT_DIR/RUN_NAME/checkpoints/STEP``.
        choose_router_file: See ``read_run``.
        warn: Hears of newer checkpoints that are damaged.

    Raises:
        ConfigError: There is no such run.
        CheckpointError: It has no good checkpoint.
    """
    if (place / MANIFEST).exists():
        folder = place.absolute().parent.parent
        if not (folder / CONFIG_FILE).exists():
            raise ConfigError(f"{place} must lie in its run's folder: {folder} has no {CONFIG_FILE}")
        return TrainedRun(folder, read_run(folder, choose_router_file), place, store.read_manifest(place))
    config = read_run(place, choose_router_file)
    found = store.newest(place / CHECKPOINTS, warn)
    if found is None:
        raise store.CheckpointError(f"{place / CHECKPOINTS} has no good checkpoint")
    return TrainedRun(place, config, *found)
