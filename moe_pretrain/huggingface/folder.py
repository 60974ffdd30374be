"""Weights of a Hugging Face folder under our names: dense Llama and Qwen3, Mixtral, OLMoE, Qwen3-MoE."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.huggingface.tensors import INDEX_FILE
from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.routers.config import RouterConfig

MODEL_CONFIG = "config.json"
_ODD = {
    "deepseek_v3": "compresses keys and values, which this model does not",
    "qwen2": "has biases in its attention, which this model has not",
    "qwen2_moe": "has biases in its attention, which this model has not",
}
_DENSE = ("llama", "mistral", "qwen3")
_EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""Architectures with experts: what they call a layer's feed-forward part, and an expert's gate, up and down."""
_KNOWN = (*_DENSE, *_EXPERTS)
_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "intermediate_size"),
)
_MAPPINGS = ("rope_parameters", "rope_scaling")
"""Fields of rotary positions, those of transformers 5 first."""
_QK_NORM = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "whole"}


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder of a model as transformers writes it."""
    return (path / MODEL_CONFIG).is_file()


class HuggingFaceFolder:
    """A folder whose tensors can be read as intervals of ours, one file open at a time.

    Attributes:
        values: ``config.json``.
        shapes: Shape of every tensor of ours that it holds.
    """

    def __init__(self, path: Path):
        """Read the configuration and the names of all tensors.

        Raises:
            ConfigError: It is no such folder, of another architecture, or its files are damaged.
        """
        self._path = path
        try:
            self.values: dict[str, Any] = json.loads((path / MODEL_CONFIG).read_text(encoding="utf-8"))
            kind, *_ = (self.values[name] for name in ("model_type", *_NEEDED))
            if odd := [name for name in _MAPPINGS if not isinstance(self.values.get(name) or {}, dict)]:
                raise ValueError(f"{odd[0]} is no mapping")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path / MODEL_CONFIG} is no configuration of transformers: {error!r}") from None
        if kind not in _KNOWN:
            why = _ODD.get(kind, "is another architecture")
            raise ConfigError(f"{path} cannot be read: model_type={kind} {why}; {', '.join(_KNOWN)} can")
        self._files = self._list_tensors()
        self._pieces = self._find_pieces(kind)
        used = {name for pieces in self._pieces.values() for name in pieces}
        if left := sorted(name for name in self._files.keys() - used if "rotary_emb" not in name):
            raise ConfigError(f"{path} has {left[0]}, which has no place in this model ({len(left)} such tensors)")
        self.shapes = {name: self._shape_of(name, pieces) for name, pieces in self._pieces.items()}

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts."""
        return self.values["model_type"] in _DENSE

    def model_words(self) -> list[str]:
        """Overrides by which a model has the folder's shape, feed-forward networks aside."""
        words = {**self._shape_of_model(), "ffn_hidden_size": self.values["intermediate_size"]}
        if (head := self._head_size()) * words["num_heads"] != words["hidden_size"]:
            words["head_size"] = head
        return [f"model.{name}={str(value).lower()}" for name, value in words.items()]

    def _shape_of_model(self) -> dict[str, Any]:
        """Fields of a model that decide its function, and the values that they have here."""
        values = self.values
        return {
            "vocab_size": values["vocab_size"],
            "hidden_size": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "num_heads": values["num_attention_heads"],
            "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
            "rope_base": self._rope_base(),
            "norm_epsilon": values["rms_norm_eps"],
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
            "qk_norm": _QK_NORM.get(values["model_type"], "none"),
        }

    def check(self, model: ModelConfig, field: str) -> None:
        """Compare what decides the function of a model beside its weights.

        Args:
            model: A model that is to have these weights.
            field: Field that names the folder, for the message.

        Raises:
            ConfigError: Something differs.
        """
        values = self.values
        for name, value in self._shape_of_model().items():
            if getattr(model, name) != value:
                raise ConfigError(
                    f"model.{name}={getattr(model, name)} must be {value}, as {field}={self._path} has it"
                )
        if (head := self._head_size()) != model.attention_head_size:
            raise ConfigError(f"{model.head_size_name} must be {head}, as {field}={self._path} has it: model.head_size")
        is_windowed = values.get("use_sliding_window", not values["model_type"].startswith("qwen3"))
        window = values.get("sliding_window") if is_windowed else None
        scaling: dict[str, Any] = next(filter(None, map(values.get, _MAPPINGS)), {})
        rope = scaling.get("rope_type") or scaling.get("type", "default")  # as old releases call it
        if model.moe.activation_function != SWIGLU:
            raise ConfigError(f"{model.moe.activation_name} must be plain swiglu, as {field}={self._path} has it")
        odd = {
            "hidden_act": values.get("hidden_act", "silu") != "silu",
            "clip_qkv": values.get("clip_qkv") is not None,
            "sliding_window": window is not None and window < model.sequence_length,
            "rope_type": rope != "default",
        }
        for name, is_odd in odd.items():
            if is_odd:
                raise ConfigError(f"{field}={self._path} has {name}={values.get(name, rope)}, which this model has not")

    def other_routing(self, router: RouterConfig) -> list[str]:
        """Fields by which ``router`` makes another choice of the same logits than the folder's own, in words."""
        values, own = self.values, vars(router)
        if self.is_dense:
            return []
        is_divided = values.get("norm_topk_prob", values["model_type"] == "mixtral")
        theirs = {
            "top_k": values.get("num_experts_per_tok"),
            "score": "softmax",
            "weights": "renormalised" if is_divided else "raw",
        }
        return [
            f"router.{name}={own[name]} (was {then})" for name, then in theirs.items() if own.get(name, then) != then
        ]

    def read(self, tensor: str, kind: str, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)`` of a tensor of ours, float32.

        Raises:
            ConfigError: A file cannot be read, or a number in it is not finite.
        """
        assert kind == WEIGHT
        out, first = torch.empty(length), 0
        for name in self._pieces[tensor]:
            size = math.prod(self._shape(name))
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                out[low - start : high - start] = self._get(name).float().reshape(-1)[low - first : high - first]
            first += size
        if not bool(out.isfinite().all()):
            raise ConfigError(f"{self._path}: a number of {tensor} is not finite")
        return out

    def _head_size(self) -> int:
        """From the shapes: defaults of ``head_dim`` differ between architectures and releases."""
        return self.shapes["blocks.0.attention.out_weight"][1] // int(self.values["num_attention_heads"])

    def _rope_base(self) -> float:
        parameters = self.values.get("rope_parameters") or {}
        return float(parameters.get("rope_theta", self.values.get("rope_theta", 10000.0)))

    def _list_tensors(self) -> dict[str, str]:
        """File of each tensor."""
        index = self._path / INDEX_FILE
        if index.is_file():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index} is no index of tensors: {error!r}") from None
        try:
            with safe_open(self._path / "model.safetensors", framework="pt") as file:
                return dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path} has no model.safetensors that can be read: {error}") from None

    def _find_pieces(self, kind: str) -> dict[str, list[str]]:
        """Names of the tensors of which each of ours is made, in order."""
        pieces = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
        if not self.values.get("tie_word_embeddings", False):
            pieces["head.weight"] = ["lm_head.weight"]
        for layer in range(self.values["num_hidden_layers"]):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            pieces |= {
                f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
                f"{ours}.feed_forward_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
                f"{ours}.attention.qkv_weight": [f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"],
                f"{ours}.attention.out_weight": [f"{theirs}.self_attn.o_proj.weight"],
            }
            if kind in _QK_NORM:
                pieces |= {
                    f"{ours}.attention.query_norm.weight": [f"{theirs}.self_attn.q_norm.weight"],
                    f"{ours}.attention.key_norm.weight": [f"{theirs}.self_attn.k_norm.weight"],
                }
            name, parts = _EXPERTS.get(kind, ("mlp", ("gate_proj", "up_proj", "down_proj")))
            of_layer, (gate, up, down) = f"{ours}.feed_forward", parts
            block = f"{theirs}.{name}"
            if kind in _DENSE or self._is_dense(layer):
                pieces |= {
                    f"{of_layer}.in_weight": [f"{block}.{gate}.weight", f"{block}.{up}.weight"],
                    f"{of_layer}.out_weight": [f"{block}.{down}.weight"],
                }
                continue
            experts = [f"{block}.experts.{expert}" for expert in range(self._num_experts())]
            pieces |= {
                f"{of_layer}.router.weight": [f"{block}.gate.weight"],
                f"{of_layer}.experts.in_weight": [f"{one}.{part}.weight" for one in experts for part in (gate, up)],
                f"{of_layer}.experts.out_weight": [f"{one}.{down}.weight" for one in experts],
            }
        for names in pieces.values():
            for name in names:
                if name not in self._files:
                    raise ConfigError(f"{self._path} lacks the tensor {name}")
        return pieces

    def _is_dense(self, layer: int) -> bool:
        """Whether a layer of a model with experts has none, by Qwen3-MoE's rule."""
        is_listed = layer in (self.values.get("mlp_only_layers") or ())
        return is_listed or (layer + 1) % (self.values.get("decoder_sparse_step") or 1) != 0

    def _shape_of(self, tensor: str, names: Sequence[str]) -> list[int]:
        """Shape of one of ours: pieces one below the other, stacks of experts by expert."""
        shapes = [self._shape(name) for name in names]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ConfigError(f"{self._path}: {names[0]} and its neighbours have shapes that do not fit: {shapes}")
        rows = sum(shape[0] for shape in shapes)
        if ".experts." not in tensor:
            return [rows, *shapes[0][1:]]
        experts = self._num_experts()
        return [experts, rows // experts, *shapes[0][1:]]

    def _num_experts(self) -> int:
        number = self.values.get("num_local_experts") or self.values.get("num_experts")
        if not number:
            raise ConfigError(f"{self._path / MODEL_CONFIG} has no num_experts")
        return int(number)

    def _shape(self, name: str) -> list[int]:
        with self._open(name) as file:
            return list(file.get_slice(name).get_shape())

    def _get(self, name: str) -> Tensor:
        with self._open(name) as file:
            return file.get_tensor(name)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self._path / self._files[name], framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path / self._files[name]} cannot be read: {error}") from None
