"""A run folder of its own for a checkpoint that no training has written."""

from pathlib import Path

from moe_pretrain.checkpoint.manifest import folder_name
from moe_pretrain.checkpoint.plain import PlainCheckpoint, write_plain
from moe_pretrain.run_folder.paths import CHECKPOINTS, CONFIG_FILE, OVERRIDES_FILE
from moe_pretrain.system.files import whole_folder, write_whole


def write_run(
    folder: Path,
    like: Path,
    checkpoint: PlainCheckpoint,
    config: str | None = None,
    overrides: str | None = None,
) -> Path:
    """Write a run folder with one checkpoint, whole or not at all; the checkpoint's place.

    Args:
        folder: The folder; empty, or not there yet.
        like: Folder of the run whose configuration and words the new one has, unless they are given.
        checkpoint: Contents of the checkpoint.
        config: Text of ``config.yaml``.
        overrides: Text of ``overrides.txt``.

    Raises:
        ValueError: Something is in ``folder``.
    """
    target = Path(CHECKPOINTS) / folder_name(checkpoint.state.step)
    with whole_folder(folder) as work:
        for name, text in ((CONFIG_FILE, config), (OVERRIDES_FILE, overrides)):
            if text is not None:
                write_whole(work / name, text)
            elif (like / name).exists():
                write_whole(work / name, (like / name).read_bytes())
        (work / CHECKPOINTS).mkdir()
        write_plain(work / target, checkpoint)
    return folder / target
