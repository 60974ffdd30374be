"""One step's result to one metrics row."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

from moe_pretrain.engine.step_result import StepResult
from moe_pretrain.metrics.throughput import Window, model_flops_utilization
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.part_timer import PARTS, LayerPart
from moe_pretrain.moe.routers.base import even_load
from moe_pretrain.run_folder.metrics_file import MetricsRow


def train_row(
    result: StepResult,
    model: DecoderLM,
    window: Window,
    learning_rate: float,
    flops_per_token: float,
    num_devices: int,
    peak_flops: float | None,
) -> MetricsRow:
    """Named numbers of one logged step: losses, speed, and statistics of every MoE layer.

    Args:
        result: The step.
        model: For the norms of the router weights.
        window: Speed since the last row.
        learning_rate: Of the step, in the optimizer's unit.
        flops_per_token: Model FLOPs of training one token; active parameters only.
        num_devices: Ranks.
        peak_flops: FLOP/s of one device, or None where it is not known (CPU): then there is no MFU.
    """
    row: MetricsRow = {
        "train/loss": result.loss,
        "train/aux_loss": result.aux_loss,
        "train/gradient_norm": result.gradient_norm,
        **{f"train/gradient_norm_{part}": norm for part, norm in result.gradient_norms.items()},
        "train/learning_rate": learning_rate,
        "train/tokens_per_second": window.tokens_per_second,
        "train/step_seconds": window.step_seconds,
        "train/data_wait_share": window.data_wait_share,
        "train/flops_per_token": flops_per_token,
    }
    if peak_flops is not None:
        row["train/model_flops_utilization"] = model_flops_utilization(
            flops_per_token, window.tokens_per_second, num_devices, peak_flops
        )
    if torch.cuda.is_available():
        row["train/peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    for name, value in result.aux.items():
        row[f"aux/{name}_loss"] = value
        row[f"aux/{name}_weight"] = result.aux_weights[name]
    uses = result.layer_uses()
    for index, layer in enumerate(model.moe_layers()):
        routes = result.tokens_per_expert[index]
        share = routes / routes.sum().clamp(min=1)
        prefix = f"moe/layer_{layer.router.layer:02d}"
        row[f"{prefix}/load_max_over_mean"] = float(share.max() * layer.kinds.total)
        row[f"{prefix}/router_entropy"] = result.router_entropy[index]
        dead = routes == 0
        if (free := layer.router.free_slots) is not None:
            dead &= ~free.cpu()
        row[f"{prefix}/dead_experts"] = float(dead.sum())
        row[f"{prefix}/dropped_share"] = result.dropped_share[index]
        row[f"{prefix}/experts_per_token"] = float(routes[: layer.kinds.ffn].sum()) / max(result.tokens, 1.0)
        if layer.kinds.costs:
            row[f"{prefix}/mean_route_cost"] = float((share * torch.tensor(layer.kinds.costs)).sum())
        if layer.router.balanced_costs:
            even = even_load(routes.sum().clamp(min=1), layer.kinds.total, layer.router.balanced_costs)
            row[f"{prefix}/load_max_over_even_cost"] = float((routes / even).max())
        if layer.kinds.zero_computation:
            row[f"{prefix}/zero_computation_share"] = float(share[layer.kinds.ffn :].sum())
        row[f"{prefix}/router_weight_norm"] = layer.router.weight_norm()
        row[f"{prefix}/expert_share"] = share.tolist()
        row |= {f"{prefix}/{name}": value for name, value in layer.router.metrics(uses[index]).items()}
    return row


def evaluation_row(loss: float, bytes_per_token: float | None) -> MetricsRow:
    """Validation loss in nats per token, perplexity, and bits per byte, which compares across tokenizers.

    Args:
        loss: Nats per token.
        bytes_per_token: Of the text behind the tokens; None for tokens that came without text, and then there are no
            bits per byte.
    """
    row = {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        row["validation/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return row


def mixed_evaluation_row(
    losses: Mapping[str, float], bytes_per_token: Mapping[str, float | None], shares: Mapping[str, float]
) -> MetricsRow:
    """``evaluation_row`` of text in which source s has the share ``shares[s]`` of the tokens; shares add up to 1."""
    known = {name: value for name, value in bytes_per_token.items() if value is not None}
    return evaluation_row(
        sum(share * losses[name] for name, share in shares.items()),
        sum(share * known[name] for name, share in shares.items()) if shares.keys() <= known.keys() else None,
    )


def part_time_row(batches: Sequence[Mapping[LayerPart, float]]) -> MetricsRow:
    """Reduce what every rank's ``PartClock`` has measured; every rank must call it.

    The median over batches leaves out what was slow once: the first ones warm up, and a machine is disturbed at times.

    Args:
        batches: Seconds of each part per token and layer, of each batch of this rank.

    Returns:
        Microseconds of every part; nothing for a model without MoE layers.
    """
    own = {name: median(batch[name] for batch in batches) for name in PARTS} if batches else {}
    everywhere: list[dict[LayerPart, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return {_key(name): 1e6 * fmean(rank[name] for rank in everywhere) for name in own}


def read_part_times(row: Mapping[str, Any]) -> dict[LayerPart, float]:
    """Microseconds of every part from a validation row; empty where they were not measured."""
    found = {name: row[_key(name)] for name in PARTS if row.get(_key(name)) is not None}
    return found if len(found) == len(PARTS) else {}


def _key(name: LayerPart) -> str:
    return f"moe/{name}_microseconds_per_token"
