"""The measured time of the parts of MoE layers (``moe.parts``) as numbers of a validation row.

They stand for the whole model, ``moe/PART_microseconds_per_token``: the time that a part takes one rank for one token
in one layer, forward, mean over layers and ranks. Not a number per layer: the layers of a model do the same work.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch.distributed as dist

from moe_pretrain.moe.part_timer import PARTS, Part
from moe_pretrain.run_folder.metrics_file import Row


def part_time_row(batches: Sequence[Mapping[Part, float]]) -> Row:
    """Reduce what every rank's ``PartClock`` has measured; every rank must call it.

    The median over batches leaves out what was slow once: the first ones warm up, and a machine is disturbed at times.

    Args:
        batches: Seconds of each part per token and layer, of each batch of this rank.

    Returns:
        Microseconds of every part; nothing for a model without MoE layers.
    """
    own = {name: median(batch[name] for batch in batches) for name in PARTS} if batches else {}
    everywhere: list[dict[Part, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return {_key(name): 1e6 * fmean(rank[name] for rank in everywhere) for name in own}


def read_part_times(row: Mapping[str, Any]) -> dict[Part, float]:
    """Microseconds of every part from a validation row; empty where they were not measured."""
    found = {name: row[_key(name)] for name in PARTS if row.get(_key(name)) is not None}
    return found if len(found) == len(PARTS) else {}


def _key(name: Part) -> str:
    return f"moe/{name}_microseconds_per_token"
