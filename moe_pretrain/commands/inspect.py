"""``inspect``: what a checkpoint holds, and whether it is whole."""

import argparse
from pathlib import Path

from moe_pretrain.checkpoint.inspection import inspect
from moe_pretrain.checkpoint.manifest import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from moe_pretrain.commands.options import Parser

DAMAGED_CODE = 1


def arguments(parser: Parser) -> None:
    """A checkpoint's folder."""
    parser.add_argument("folder", metavar="CHECKPOINT", type=Path, help="RUN_FOLDER/checkpoints/STEP")
    parser.add_examples("outputs/tiny-top_k/checkpoints/step_00000100")


def run(options: argparse.Namespace) -> int:
    """Describe a checkpoint and verify it; 1 if it is damaged or refused."""
    try:
        for line in inspect(options.folder):
            print(line)
    except UnreadableCheckpoint:
        raise
    except CheckpointError as error:
        verdict = "DAMAGED" if isinstance(error, DamagedCheckpoint) else "REFUSED"
        print(f"{verdict}: {' '.join(str(error).split())}")
        return DAMAGED_CODE
    return 0
