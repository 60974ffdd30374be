"""Initialisation of every parameter, in one function."""

import math

import torch
import xxhash
from torch import Tensor, nn

from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.norms import Norm
from moe_pretrain.model.parameter_groups import ParameterRole, base_fan_in, in_latent_width, parameter_roles
from moe_pretrain.moe.experts.activation import activation_size
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.latent import LatentMaps
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.experts.zero_computation import ConstantExpert
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.attentive import QueryKey
from moe_pretrain.moe.routers.base import LinearRouter

REFERENCE_WIDTH = 768
"""Width at which ``model.init=width_aware`` and ``model.init=normal`` are the same: that of GPT-2 and of the smaller
Autonomy-of-Experts model, from which 0.02 comes. A map of a normed input then has outputs of spread
``0.02 * sqrt(768) = 0.554``."""


@torch.no_grad()
def initialise(model: DecoderLM, seed: int) -> None:
    """Fill every parameter of ``model``: RMSNorm weights with 1, all others from a normal distribution of mean 0.

    With ``model.init=mup`` the final norm starts at ``mup_base_width / hidden_size``, which scales the logits.

    ``base_std`` is ``init_std`` with ``model.init=normal`` and ``init_std * sqrt(768 / hidden_size)`` with
    ``width_aware``, so that router logits, gate pre-activations and attention projections of a normed input start with
    the same spread at every width. ``mup`` has a table of its own in ``model/parameter_groups.py``: the same numbers
    at its base shape, and other laws of width, depth and rank. For the other two ``parameter_std`` makes the rest:

    ==============================  ==============================================================================
    parameter                       standard deviation
    ==============================  ==============================================================================
    attention, FFN ``out_weight``   ``base_std / sqrt(2 * num_layers)`` when ``scale_residual_init``, else ``base_std``
    two maps in place of one:       with ``gate_init=variance_preserving`` both ``sqrt(base_std / sqrt(rank))``: their
    ``down_weight, up_weight`` of   product is ``base_std / sqrt(rank)``, so that ``x W_down W_up`` has the spread of
    a factorised gate;              ``x W``; with ``paper`` both ``base_std``, as the Autonomy-of-Experts authors' code
    ``projection, weight`` of a     has it (a gate ``base_std * sqrt(rank)`` times as loud: 0.11 at hidden 96 and rank
    large router                    32, 0.32 at 768 and 256)
    ``query_weight, key_weight``    with ``variance_preserving`` such that queries and keys have unit entries, and
    of attentive gating             scaled scores so a spread of 1 between experts; with ``paper`` both ``base_std``
    cores of a matrix product       such that the rebuilt matrices have the spread of plain ones
    experts of another width        ``in_weight`` such that gate and up have the spread of those at the model's; the
                                    maps to it and back keep the size of what they map, the one back, which writes to
                                    the residual stream, but for ``1 / sqrt(2 * num_layers)``, as ``out_weight`` above;
                                    of normalised outputs it makes what they would have been
    experts that are merged         ``sqrt(num_experts)`` times that of others, so that the network merged evenly of
                                    independent ones starts like one of them
    ``start_stds`` of a router or   what it says, with every ``model.init``
    of a constant expert            (``start_values``: that number, without spread)
    everything else, a router's     ``base_std``
    ``frozen_weights`` too
    ==============================  ==============================================================================

    Each tensor, and each expert's slice of a stacked tensor, has a generator of its own keyed by (seed, parameter
    name, global expert id). So the weights do not depend on the number of ranks, on the expert-parallel
    size or on what else the model contains, and no two experts are alike (defect C30). The draws are
    always made on the CPU, so every device starts from the same weights.
    """
    config, roles = model.config, parameter_roles(model)
    filled: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta or id(parameter) in filled:
                continue
            filled.add(id(parameter))
            full_name = f"{module_name}.{name}"
            if isinstance(module, Norm):
                is_scale = roles[full_name].is_final_norm and config.init == "mup"
                parameter.fill_(config.mup_base_width / config.hidden_size if is_scale else 1.0)
                continue
            if isinstance(module, LatentMaps) and name == "norm_weight":
                parameter.fill_(1.0)
                continue
            if isinstance(module, Router) and name in module.start_values:
                parameter.fill_(module.start_values[name])
                continue
            std = parameter_std(module, name, parameter, roles[full_name], config)
            if isinstance(module, MergedExperts):
                _fill_merged(module, parameter, std, seed, full_name)
            elif isinstance(module, SwiGLUExperts | FactorisedExperts | MatrixProductExperts) and (
                name not in getattr(module, "dense_names", ())
            ):
                for expert_id, expert in zip(module.expert_ids, parameter.unbind(0), strict=True):
                    _fill_normal(expert, std, seed, f"{full_name}/{expert_id}")
            else:
                _fill_normal(parameter, std, seed, full_name)
        if isinstance(module, Router):
            for name in module.frozen_weights:
                buffer = module.get_buffer(name)
                if not buffer.is_meta:
                    std = base_std(config) * (_output_factor(config) if config.init == "mup" else 1.0)
                    _fill_normal(buffer, std, seed, f"{module_name}.{name}")


def _fill_merged(module: MergedExperts, parameter: Tensor, std: float, seed: int, full_name: str) -> None:
    """Fill this rank's inner units of every expert; all are drawn, so that any number of ranks starts alike."""
    axis = parameter.ndim - 2
    units = slice(module.units.start, module.units.stop)
    for expert_id, expert in enumerate(parameter.unbind(axis)):
        whole = torch.empty(module.width, *expert.shape[1:])
        _fill_normal(whole, std * math.sqrt(len(module.expert_ids)), seed, f"{full_name}/{expert_id}")
        expert.copy_(whole[units])


def base_std(config: ModelConfig) -> float:
    """Standard deviation of a matrix that reads the residual stream."""
    return config.init_std if config.init == "normal" else _width_aware_std(config, config.hidden_size)


def _width_aware_std(config: ModelConfig, width: int) -> float:
    return config.init_std * math.sqrt(REFERENCE_WIDTH / width)


def parameter_std(module: nn.Module, name: str, parameter: Tensor, role: ParameterRole, config: ModelConfig) -> float:
    """Standard deviation with which a parameter starts: the table of ``initialise``, or that of ``mup``.

    Args:
        module: That holds the parameter.
        name: Its name in ``module``.
        parameter: Its shape says the rank of a factor.
        role: Its role in the model.
        config: Of the model.
    """
    if isinstance(module, Router | ConstantExpert) and name in module.start_stds:
        return module.start_stds[name]
    if isinstance(module, LatentMaps):
        return _latent_std(module, name, config)
    if config.init == "mup":
        return _mup_std(module, name, parameter, role, config)
    std = base_std(config)
    residual_std = std / math.sqrt(2 * config.num_layers) if config.scale_residual_init else std
    if in_latent_width(module, config):
        std, residual_std = std * math.sqrt(config.hidden_size / config.moe.routed_size(config.hidden_size)), std
    if isinstance(module, MatrixProductExperts):
        return module.start_std(name, residual_std if name.startswith("out") else std)
    if name == "out_weight":
        return residual_std
    if config.gate_init == "paper":
        return std
    if isinstance(module, QueryKey):
        return _query_key_std(module, name, parameter, config)
    rank = _rank(module, name, parameter)
    return std if rank is None else math.sqrt(std / math.sqrt(rank))


def _mup_std(module: nn.Module, name: str, parameter: Tensor, role: ParameterRole, config: ModelConfig) -> float:
    """The table of ``model/parameter_groups.py``."""
    at_base = _width_aware_std(config, config.mup_base_width)
    if role.reads in ("nothing", "fixed"):
        return at_base
    # Of unit entries, however many: experts' gates and ups start alike at every width of theirs.
    base = base_fan_in("hidden" if role.reads == "latent" else role.reads, config)
    spread = math.sqrt(base / parameter.shape[-1])
    if role.writes_residual:
        return at_base * spread * _depth_factor(config)
    # With the experts' own factors, a router has one per expert; a gate of shared experts is one number.
    is_output = name == "gate_weight" or (role.group == "router" and parameter.ndim == 2)
    if isinstance(module, QueryKey):
        output = _output_factor(config) if name == "query_weight" else 1.0
        return _query_key_std(module, name, parameter, config) * output
    if _rank(module, name, parameter) is not None:
        factor = math.sqrt(at_base / math.sqrt(base_fan_in("rank", config))) * spread
        return factor * _output_factor(config) if role.reads == "rank" and is_output else factor
    return at_base * spread * (_output_factor(config) if is_output else 1.0)


def _latent_std(module: LatentMaps, name: str, config: ModelConfig) -> float:
    """Spread of the maps to and from the experts' own width, with every ``model.init``."""
    if name == "in_weight":
        return 1 / math.sqrt(config.hidden_size)  # of a normed input
    size = 1.0
    if module.norm_weight is not None:  # what the experts' outputs would have been, of weights that sum to 1
        is_mup, inner = config.init == "mup", config.moe.expert_hidden_size
        reference = config.mup_base_width if is_mup else config.hidden_size
        std = _width_aware_std(config, reference) if is_mup else base_std(config)
        of_out = base_fan_in("inner", config) if is_mup else inner
        inside = activation_size(std * math.sqrt(reference), config.moe.activation_function)
        size = inside * std * math.sqrt(of_out / module.routes_per_token)
    return size * _depth_factor(config) / math.sqrt(module.out_weight.shape[-1])


def _depth_factor(config: ModelConfig) -> float:
    """Factor of the start of a matrix that writes to the residual stream."""
    layers, by_depth = config.num_layers, 1.0
    if config.init == "mup":
        layers, by_depth = config.mup_base_layers, config.mup_base_layers / config.num_layers
    return by_depth / math.sqrt(2 * layers) if config.scale_residual_init else by_depth


def _output_factor(config: ModelConfig) -> float:
    """Of ``mup``: how much smaller a matrix from the residual stream to a few numbers starts than a hidden one."""
    return math.sqrt(config.mup_base_width / config.hidden_size)


def _rank(module: nn.Module, name: str, parameter: Tensor) -> int | None:
    """Width between two maps that stand in the place of one; None for any other parameter.

    ``down_weight [experts, rank, hidden]`` is the experts' own or a router's, which hands it to them.
    """
    if name == "down_weight" and parameter.ndim == 3:
        return parameter.shape[1]
    if name == "up_weight" and isinstance(module, FactorisedExperts):
        return parameter.shape[2]
    if isinstance(module, LinearRouter) and module.projection is not None:
        if name == "projection":
            return parameter.shape[0]
        if name == "weight":
            return parameter.shape[1]
    return None


def _query_key_std(module: QueryKey, name: str, parameter: Tensor, config: ModelConfig) -> float:
    """Standard deviation that gives queries and keys of unit entries."""
    if name == "query_weight":
        return 1 / math.sqrt(config.hidden_size)  # of a normed input
    std, inner = base_std(config), parameter.shape[1]
    if module.reads == "low_rank":
        size = math.sqrt(std / math.sqrt(inner) * config.hidden_size)  # of x W_down
        if config.init == "mup":
            rank, width = base_fan_in("rank", config), config.mup_base_width
            size = math.sqrt(_width_aware_std(config, width) / math.sqrt(rank) * width)
    else:
        size = activation_size(std * math.sqrt(config.hidden_size), config.moe.activation_function)
    return 1 / (size * math.sqrt(inner))


def _fill_normal(target: Tensor, std: float, seed: int, key: str) -> None:
    """Draw from normal(0, std) with a generator keyed by ``(seed, key)``."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode(), seed=seed) >> 1)
    target.copy_(nn.init.normal_(torch.empty(target.shape), std=std, generator=generator))
