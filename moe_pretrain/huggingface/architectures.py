"""Choice of the transformers class that a model is exported as.

A class fits if it computes what the model computes. OLMoE and Qwen3-MoE normalise queries and keys, and no weights make
a norm the identity: with ``model.qk_norm`` a model can only be one of these, without it none of them. DeepSeek-V3
compresses keys and normalises what it compresses them to, which no model of ours does.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from moe_pretrain.checkpoint.manifest import BUFFER
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.huggingface import layout
from moe_pretrain.huggingface.expert_values import expert_values
from moe_pretrain.huggingface.remote_code.assemble import FILE, assemble, model_class, schemes
from moe_pretrain.huggingface.tensors import ExportedTensor
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.moe.build import expert_gate, expert_width, is_lowest
from moe_pretrain.moe.combine import OrthogonalConfig
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.types import float32_parameters

UNUSED_WIDTH = 16
"""Width of the shared expert of zeros that Qwen2-MoE gets where the model has none, since it cannot be without."""

_EQUAL_WEIGHTS = ("hash", "random", "uniform")
"""Schemes that may give a token's experts one weight, and name them in an order of their own."""
_KNOWN_FIELDS = {
    *("vocab_size", "sequence_length", "num_layers", "hidden_size", "num_heads", "num_key_value_heads", "norm_epsilon"),
    *("head_size", "qk_norm"),
    *("ffn_hidden_size", "rope_base", "tie_embeddings", "moe", "num_experts", "expert_hidden_size", "combine"),
    *("num_shared_experts", "shared_expert_hidden_size", "every_k_layers", "num_leading_dense_layers", "gate_rank"),
    *("experts", "activation", "activation_limit", "shared_expert_gate", "latent_size", "latent_norm"),
    # They decide how a model starts and how it is trained, not what it computes.
    *("name", "init", "init_std", "mup_base_width", "mup_base_layers", "gate_init", "scale_residual_init"),
    *("cross_entropy_chunk_tokens", "recompute", "expert_width_multiple"),
}


@dataclass(frozen=True)
class Architecture:
    """A model as transformers sees it.

    Attributes:
        name: Name of the class.
        config: Values of ``config.json``.
        tensors: All tensors, in the order of the model.
        modelling_file: Source of the class where the folder must bring it; None where transformers has it.
        note: A sentence about how the model became one of that class; empty where nothing is to say.
    """

    name: str
    config: dict[str, Any]
    tensors: list[ExportedTensor]
    modelling_file: str | None = None
    note: str = ""


def choose(config: Config, model: DecoderLM) -> Architecture:
    """The class of transformers that computes the same, else remote code.

    Args:
        config: Configuration of the run.
        model: Its model, without storage.

    Raises:
        ConfigError: The scheme cannot be exported; the line says why.
    """
    _refuse_what_is_not_known(config)
    _refuse_what_cannot_generate(config, model)
    return _of_transformers(config) or _remote(config, model)


def _of_transformers(config: Config) -> Architecture | None:
    """One of its own classes; None where none computes the same."""
    norm, widths, fields = config.model.qk_norm, layout.dense_widths(config), _fields(config)
    if config.model.moe.activation_function != SWIGLU or config.model.moe.latent_size is not None:
        return None
    if len(set(widths)) == 1 and widths[0] and norm != "whole":
        return _dense(config)
    if fields is None:
        return None
    if fields["name"] == "top_k" and fields["score"] == "softmax" and fields["weight_scale"] == 1:
        has_only_routed = not any(widths) and not config.model.moe.shared_width
        if norm == "whole":
            has_plain_heads = config.model.attention_width == config.model.hidden_size
            return _olmoe(config, fields) if has_only_routed and has_plain_heads else None
        if fields["weights"] == "renormalised" and has_only_routed and norm == "none":
            return _mixtral(config)
        if norm == "none" or not config.model.moe.shared_width:
            return _qwen_moe(config, fields)
    if fields["score"] == "sigmoid" and norm != "whole" and _fits_glm4_moe(config.model, widths):
        return _glm4_moe(config, fields)
    return None


def _refuse_what_cannot_generate(config: Config, model: DecoderLM) -> None:
    routers = [layer.router for layer in model.moe_layers()]
    if not all(router.causal_in_evaluation for router in routers):
        raise ConfigError(
            f"router={config.router.name} cannot be exported: in evaluation a token's experts depend on later tokens, "
            "which do not exist yet when text is generated"
        )
    names = {scheme.name for scheme in config.router.parts().values()}
    if isinstance(config.model.moe.combine, OrthogonalConfig) and config.model.moe.combine.form != "symmetric":
        for name in sorted(names & set(_EQUAL_WEIGHTS)):
            raise ConfigError(
                f"combine=orthogonal with router={name} cannot be exported: a token's weights are equal, "
                "and the order in which it makes its outputs orthogonal is not kept; model.moe.combine.form=symmetric "
                "has none"
            )
    for name in sorted(names - schemes().keys()) if routers else ():
        raise ConfigError(
            f"router={name} cannot be exported: it has no inference form yet; one file in "
            "moe_pretrain/huggingface/remote_code/routers is it"
        )


def _refuse_what_is_not_known(config: Config) -> None:
    """Refuse fields of the model that this file has never heard of, unless they are off."""
    model = config.model
    if config.router.dense_experts and model.moe.activation_function != SWIGLU:
        raise ConfigError(f"{model.moe.activation_name} cannot be exported yet with router={config.router.name}")
    for prefix, part in (("model", model), ("model.moe", model.moe)):
        for name, value in vars(part).items():
            if name not in _KNOWN_FIELDS and value:
                raise ConfigError(f"{prefix}.{name}={value} cannot be exported yet: no class of transformers has it")


def _fields(config: Config) -> dict[str, Any] | None:
    """Fields of a router that is top-k of one linear map over full experts, as the classes have it; else None."""
    fields = asdict(config.router)  # type: ignore[call-overload]  # every scheme is a dataclass
    if config.model.moe.combine.name != "sum" or config.model.moe.experts.name != "swiglu":
        return None
    if expert_gate(config.model.moe, config.router) is not None or "projection_size" not in fields:
        return None
    is_plain = fields["projection_size"] is None and fields["num_groups"] == 1
    is_plain = is_plain and not fields["bias"] and fields["logit_cap"] is None
    return fields if is_plain and fields["name"] in ("top_k", "loss_free", "quantile") else None


def _fits_glm4_moe(model: ModelConfig, widths: list[int]) -> bool:
    """Whether dense layers come first, and shared experts are as wide as so many routed ones."""
    leading = model.moe.num_leading_dense_layers
    is_leading = all(bool(width) == (layer < leading) for layer, width in enumerate(widths))
    has_plain_ones = model.moe.shared_width > 0 and not model.moe.shared_expert_gate
    return is_leading and has_plain_ones and model.moe.shared_width % model.moe.expert_hidden_size == 0


def _dense(config: Config) -> Architecture:
    width, tensors = layout.dense_widths(config)[0], _mixtures(config, _routed)
    if config.model.qk_norm == "head":
        values = _common(config, transformers.Qwen3Config, intermediate_size=width, use_sliding_window=False)
        return Architecture("Qwen3ForCausalLM", values, tensors)
    values = _common(config, transformers.LlamaConfig, intermediate_size=width, mlp_bias=False)
    return Architecture("LlamaForCausalLM", values, tensors)


def _olmoe(config: Config, fields: dict[str, Any]) -> Architecture:
    moe = config.model.moe
    values = _common(
        config,
        transformers.OlmoeConfig,
        intermediate_size=moe.expert_hidden_size,
        num_experts=moe.num_experts,
        num_experts_per_tok=fields["top_k"],
        norm_topk_prob=fields["weights"] == "renormalised",
        clip_qkv=None,
    )
    return Architecture("OlmoeForCausalLM", values, _mixtures(config, _routed))


def _mixtral(config: Config) -> Architecture:
    moe = config.model.moe
    values = _common(
        config,
        transformers.MixtralConfig,
        intermediate_size=moe.expert_hidden_size,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=asdict(config.router)["top_k"],  # type: ignore[call-overload]
        sliding_window=None,
    )

    def mixture(config: Config, layer: int, prefix: str) -> Iterator[ExportedTensor]:
        yield layout.router(config, layer, f"{prefix}.gate.weight")
        yield from layout.experts(config, layer, f"{prefix}.experts", ("w1", "w3", "w2"))

    return Architecture("MixtralForCausalLM", values, _mixtures(config, mixture, "block_sparse_moe"))


def _qwen_moe(config: Config, fields: dict[str, Any]) -> Architecture:
    """Qwen3-MoE with norms of queries and keys, else Qwen2-MoE, which has a shared expert."""
    moe, widths = config.model.moe, layout.dense_widths(config)
    values = {
        "intermediate_size": max(*widths, config.model.ffn_hidden_size),
        "moe_intermediate_size": moe.expert_hidden_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": fields["top_k"],
        "norm_topk_prob": fields["weights"] == "renormalised",
        "mlp_only_layers": [layer for layer, width in enumerate(widths) if width],
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
    if config.model.qk_norm == "head":
        values = _common(config, transformers.Qwen3MoeConfig, **values)
        return Architecture("Qwen3MoeForCausalLM", values, _mixtures(config, _routed))
    own = {"shared_expert_intermediate_size": moe.shared_width or UNUSED_WIDTH, "qkv_bias": False}
    values = _common(config, transformers.Qwen2MoeConfig, **values, **own)
    note = (
        "Its shared experts have a gate in this class: its weights are 0, so that it is 1/2, and the experts' last "
        "matrix is doubled, which is exact."
        if moe.shared_width
        else f"This class cannot be without a shared expert: it has one of width {UNUSED_WIDTH} whose weights are 0."
    )
    note = "" if moe.shared_expert_gate else note
    return Architecture("Qwen2MoeForCausalLM", values, _mixtures(config, _qwen2_mixture), note=note)


def _qwen2_mixture(config: Config, layer: int, prefix: str) -> Iterator[ExportedTensor]:
    hidden = config.model.hidden_size
    yield from _routed(config, layer, prefix)
    is_gated, shared = config.model.moe.shared_expert_gate, f"blocks.{layer}.feed_forward.shared_experts"
    gate = f"{shared}.gate_weight" if is_gated else None
    yield ExportedTensor(f"{prefix}.shared_expert_gate.weight", [1, hidden], gate)
    if config.model.moe.shared_width:
        yield from layout.shared(config, layer, f"{prefix}.shared_expert", 1.0 if is_gated else 2.0)
        return
    for name, shape in (
        ("gate", [UNUSED_WIDTH, hidden]),
        ("up", [UNUSED_WIDTH, hidden]),
        ("down", [hidden, UNUSED_WIDTH]),
    ):
        yield ExportedTensor(f"{prefix}.shared_expert.{name}_proj.weight", shape, None)


def _glm4_moe(config: Config, fields: dict[str, Any]) -> Architecture:
    moe = config.model.moe
    values = _common(
        config,
        transformers.Glm4MoeConfig,
        intermediate_size=config.model.ffn_hidden_size,
        moe_intermediate_size=moe.expert_hidden_size,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.shared_width // moe.expert_hidden_size,
        num_experts_per_tok=fields["top_k"],
        norm_topk_prob=fields["weights"] == "renormalised",
        routed_scaling_factor=fields["weight_scale"],
        n_group=1,
        topk_group=1,
        first_k_dense_replace=moe.num_leading_dense_layers,
        num_nextn_predict_layers=0,
        use_qk_norm=config.model.qk_norm == "head",
    )
    values["partial_rotary_factor"] = 1.0  # of this class alone the default is another

    def mixture(config: Config, layer: int, prefix: str) -> Iterator[ExportedTensor]:
        yield from _routed(config, layer, prefix)
        bias = None if fields["name"] == "top_k" else f"blocks.{layer}.feed_forward.router.expert_bias"
        yield ExportedTensor(
            *(f"{prefix}.gate.e_score_correction_bias", [moe.num_experts], bias), kind=BUFFER, is_rounded=False
        )
        yield from layout.shared(config, layer, f"{prefix}.shared_experts", 1.0)

    return Architecture("Glm4MoeForCausalLM", values, _mixtures(config, mixture))


def _routed(config: Config, layer: int, prefix: str) -> Iterator[ExportedTensor]:
    """Router and experts as most classes call them."""
    yield layout.router(config, layer, f"{prefix}.gate.weight")
    yield from layout.experts(config, layer, f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"))


def _mixtures(
    config: Config, mixture: Callable[[Config, int, str], Iterator[ExportedTensor]], name: str = "mlp"
) -> list[ExportedTensor]:
    """All tensors of a model whose layers are dense or ``mixture``, and are called ``name``."""
    widths = layout.dense_widths(config)

    def feed_forward(layer: int) -> Iterator[ExportedTensor]:
        make = layout.dense if widths[layer] else mixture
        return make(config, layer, f"model.layers.{layer}.{name}")

    return [*layout.ends(config), *layout.layers(config, feed_forward)]


def _common(config: Config, kind: type[transformers.PretrainedConfig], **values: Any) -> dict[str, Any]:
    """``config.json`` of a class of transformers; every value that it reads, whatever its default in a release."""
    model = config.model
    return {
        "model_type": kind.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.attention_head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        # Transformers 5 reads the parameters, earlier releases the base alone.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rope_base,
            "partial_rotary_factor": 1.0,
        },
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **values,
    }


def _remote(config: Config, model: DecoderLM) -> Architecture:
    """The model as it is, tensor by tensor, and the source of a class that runs it."""
    shape, moe, router = config.model, config.model.moe, config.router
    widths, rank = layout.dense_widths(config), expert_gate(config.model.moe, config.router)
    has_experts = not all(widths)
    values = {
        "model_type": "moe_pretrain",
        "architectures": ["MoePretrainForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{FILE.removesuffix('.py')}.MoePretrainConfig",
            "AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.MoePretrainForCausalLM",
        },
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.attention_head_size,
        "qk_norm": shape.qk_norm,
        "max_position_embeddings": shape.sequence_length,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tie_embeddings,
        "dense_widths": widths,
        **(expert_values(config) if has_experts else {}),
        "expert_width": expert_width(moe, router, shape.hidden_size) if has_experts else 0,
        "shared_expert_width": moe.shared_width if has_experts else 0,
        "shared_expert_gate": moe.shared_expert_gate,
        "activation": asdict(moe.activation_function) | {"limit": moe.activation_limit} if has_experts else None,
        "gate_rank": rank if has_experts else None,
        "latent_size": moe.latent_size,
        "latent_norm": moe.latent_norm,
        "experts_own_down": moe.gate_rank is not None,
        "router": _router_values(config) if has_experts else None,
    }
    own = moe.experts.name
    networks = own if own in ("unequal", "matrix_product") else "swiglu" if rank is None else "factorised"
    pieces: tuple[str, ...] = (networks, *(["zero_computation"] if moe.kinds.zero_computation else []))
    if router.merges_experts:
        pieces = ()
    names = list(dict.fromkeys(scheme.name for scheme in router.parts().values()))
    is_by_layer = len(router.parts()) > 1
    source = assemble(names, pieces, moe.combine.name, is_by_layer) if has_experts else assemble(())
    return Architecture("MoePretrainForCausalLM", values, list(_as_they_are(model, source, values)), source)


def _router_values(config: Config) -> dict[str, Any]:
    """Settings of the scheme; of several those of each layer, and whether it has what the layer below may carry."""
    model, router = config.model, config.router
    if len(router.parts()) == 1:
        (scheme,) = router.parts().values()
        return asdict(scheme)  # type: ignore[call-overload]  # every scheme is a dataclass
    of_layer = [
        {**asdict(router.of_layer(layer)), "is_lowest": is_lowest(model.moe, router, layer)}  # type: ignore[call-overload]
        if model.moe.is_moe_layer(layer)
        else None
        for layer in range(model.num_layers)
    ]
    return {"name": router.name, "of_layer": of_layer}


def _as_they_are(model: DecoderLM, source: str, values: dict[str, Any]) -> Iterator[ExportedTensor]:
    """Every parameter, and those of the routers' buffers that evaluation reads, under their own names."""
    kind = model_class(source)
    with torch.device("meta"):
        theirs = kind(kind.config_class(**values))
    parameters = dict(model.named_parameters())
    exact = {id(parameter) for parameter in float32_parameters(model)}
    for name, tensor in theirs.state_dict().items():
        shape = list(tensor.shape)
        source = name.replace(".experts.constants.", ".zero_computation.constants.")
        if source in parameters:
            yield ExportedTensor(name, shape, source, is_rounded=id(parameters[source]) not in exact)
        elif name != "head.weight":  # else it is the embedding
            yield ExportedTensor(name, shape, name, kind=BUFFER, dtype=tensor.dtype, is_rounded=False)
