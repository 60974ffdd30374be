"""Initialisation of every parameter, in one function."""

import math

import torch
import xxhash
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.layers import RMSNorm
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts


@torch.no_grad()
def initialise(model: DecoderLM, seed: int) -> None:
    """Fill every parameter of ``model``.

    ==========================  =====================================================
    parameter                   distribution
    ==========================  =====================================================
    RMSNorm weights             1
    attention, FFN ``out``      normal(0, init_std / sqrt(2 * num_layers)) when
                                ``scale_residual_init``, else normal(0, init_std)
    everything else             normal(0, init_std)
    ==========================  =====================================================

    Each tensor, and each expert's slice of a stacked tensor, has a generator of its own keyed by (seed, parameter
    name, global expert id). So the weights do not depend on the number of ranks, on the expert-parallel
    size or on what else the model contains, and no two experts are alike (defect C30). The draws are
    always made on the CPU, so every device starts from the same weights.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers) if model.config.scale_residual_init else std
    filled: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta or id(parameter) in filled:
                continue
            filled.add(id(parameter))
            full_name = f"{module_name}.{name}"
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
                continue
            scale = residual_std if name == "out_weight" else std
            if isinstance(module, SwiGLUExperts | FactorisedExperts):
                for expert_id, expert in zip(module.expert_ids, parameter.unbind(0), strict=True):
                    _fill_normal(expert, scale, seed, f"{full_name}/{expert_id}")
            else:
                _fill_normal(parameter, scale, seed, full_name)


def _fill_normal(target: Tensor, std: float, seed: int, key: str) -> None:
    """Draw from normal(0, std) with a generator keyed by ``(seed, key)``."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode(), seed=seed) >> 1)
    target.copy_(nn.init.normal_(torch.empty(target.shape), std=std, generator=generator))
