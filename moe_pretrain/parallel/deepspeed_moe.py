"""Marks by which DeepSpeed treats our layers as experts.

DeepSpeed's engine knows experts by one test, ``isinstance(module, deepspeed.moe.layer.MoE)``, and by two attributes of
a parameter, ``allreduce`` and ``group_name``. Its own layers cannot host other routers, so the model stays plain and
carries one parameter-free ``ExpertMarker`` that passes the test. Established by running 0.19.8; see
``tests/contract/test_deepspeed_seam.py``.
"""

import importlib
from datetime import timedelta
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, safe_get_full_grad
from torch import nn

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import float32_parameters, sharded_parameters
from moe_pretrain.parallel.exchange import AllToAll


def init_deepspeed_communication(device_type: str, timeout_seconds: int) -> None:
    """Let DeepSpeed use the process group that exists.

    On a CPU, DeepSpeed would compile a C++ operation here, for an inference collective that training never calls; where
    compiler or ninja are missing it would fail. With no operation declared compatible it compiles nothing.
    """
    deepspeed.ops.__compatible_ops__ = {}
    _import_muon_uncompiled()
    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())  # a GPU is there, but the user asked for the CPU
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), verbose=False, timeout=timedelta(seconds=timeout_seconds)
    )


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, by which its ZeRO asks whether the optimizer is one, with ``torch.compile`` left out.

    Its import wraps a function in ``torch.compile``, which imports TorchInductor: about a second of processor time at
    every rank's start, for a function that nobody calls.
    """
    with mock.patch.object(deepspeed.runtime.compiler, "compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def expert_groups(expert_parallel_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """DeepSpeed's groups: ranks that share one copy of the experts, and ranks that hold the same experts.

    Neighbouring ranks share a copy: 4 ranks at size 2 give [0, 1], [2, 3] of the first kind and [0, 2], [1, 3] of the
    second.
    """
    name = _group_name(expert_parallel_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def _group_name(expert_parallel_size: int) -> str:
    return f"ep_size_{expert_parallel_size}"


class ExpertMarker(MoE):
    """Tells DeepSpeed that the model has experts, and keeps router weights float32 in a bfloat16 engine.

    DeepSpeed casts every parameter to the engine's dtype and then calls ``set_deepspeed_parallelism`` on modules that
    have it, before it builds the optimizer. Restoring float32 there leaves the router in a parameter group of
    its own with an exact float32 weight (defect C23).
    """

    def __init__(self, num_experts: int, expert_parallel_size: int, kept: list[nn.Parameter]):
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // expert_parallel_size
        self.ep_size = expert_parallel_size
        self.expert_group_name = _group_name(expert_parallel_size)
        # A plain list: these parameters belong to the routers, not to this module.
        self._kept = [(parameter, parameter.detach().float().cpu().clone()) for parameter in kept]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed after its cast; the groups exist already."""
        for parameter, value in self._kept:
            parameter.data = value.to(parameter.device)


def prepare_experts(model: DecoderLM, expert_parallel_size: int, overlaps_exchange: bool = False) -> None:
    """Tag expert parameters, give MoE layers their exchange and the model its marker. No-op for a dense model.

    Args:
        model: The model with this rank's experts.
        expert_parallel_size: Ranks over which one copy of the experts is spread.
        overlaps_exchange: See ``MoELayer``.
    """
    layers = model.moe_layers()
    if not layers:
        return
    for layer in layers:
        for parameter in sharded_parameters(layer.experts):
            parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's tag
            parameter.group_name = _group_name(expert_parallel_size)  # type: ignore[attr-defined]
        if expert_parallel_size > 1:
            layer.exchange = AllToAll(expert_groups(expert_parallel_size)[0])
            layer.overlaps_exchange = overlaps_exchange
    model.deepspeed_marker = ExpertMarker(layers[0].kinds.ffn, expert_parallel_size, float32_parameters(model))


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether the parameter differs between the ranks of an expert group."""
    return not getattr(parameter, "allreduce", True)


def full_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Whole gradient of this rank's ``parameter``, between the last backward and the update; collective under ZeRO."""
    return safe_get_full_grad(parameter)


def split_expert_groups(parameter_groups: list[dict]) -> list[dict]:
    """Optimizer groups as DeepSpeed wants them: experts apart from the rest, every group named, none empty."""
    split = split_params_into_different_moe_groups_for_optimizer(parameter_groups, max_group_size=float("inf"))
    return [group for group in split if group["params"]]
