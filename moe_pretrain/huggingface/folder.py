"""Weights of a Hugging Face folder under the names that they have here: dense Llama models, and Mixtral."""

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

MODEL_CONFIG = "config.json"
_NORMED = "normalises queries and keys, which this model does not"
_ODD = {
    "olmoe": _NORMED,
    "qwen3": _NORMED,
    "qwen3_moe": _NORMED,
    "deepseek_v3": "compresses keys and values, which this model does not",
    "qwen2": "has biases in its attention, which this model has not",
    "qwen2_moe": "has biases in its attention and a gate on shared experts, which this model has not",
}
_DENSE, _MIXTRAL = ("llama", "mistral"), "mixtral"


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
            kind = self.values["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path / MODEL_CONFIG} is no configuration of transformers: {error!r}") from None
        if kind not in (*_DENSE, _MIXTRAL):
            why = _ODD.get(kind, "is another architecture")
            raise ConfigError(f"{path} cannot be read: model_type={kind} {why}; {', '.join((*_DENSE, _MIXTRAL))} can")
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
        values = self.values
        words = {
            "vocab_size": values["vocab_size"],
            "hidden_size": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "num_heads": values["num_attention_heads"],
            "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
            "rope_base": self._rope_base(),
            "norm_epsilon": values["rms_norm_eps"],
            "tie_embeddings": str(bool(values.get("tie_word_embeddings", False))).lower(),
            "ffn_hidden_size": values["intermediate_size"],
        }
        return [f"model.{name}={value}" for name, value in words.items()]

    def check(self, model: ModelConfig, field: str) -> None:
        """Compare what decides the function of a model beside its weights.

        Args:
            model: A model that is to have these weights.
            field: Field that names the folder, for the message.

        Raises:
            ConfigError: Something differs.
        """
        values = self.values
        wanted = {
            "num_heads": values["num_attention_heads"],
            "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
            "num_layers": values["num_hidden_layers"],
            "hidden_size": values["hidden_size"],
            "vocab_size": values["vocab_size"],
            "rope_base": self._rope_base(),
            "norm_epsilon": values["rms_norm_eps"],
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        }
        for name, value in wanted.items():
            if getattr(model, name) != value:
                raise ConfigError(
                    f"model.{name}={getattr(model, name)} must be {value}, as {field}={self._path} has it"
                )
        head = values.get("head_dim") or model.head_size
        window = values.get("sliding_window")
        rope = (values.get("rope_parameters") or values.get("rope_scaling") or {}).get("rope_type", "default")
        odd = {
            "hidden_act": values.get("hidden_act", "silu") != "silu",
            "head_dim": head != model.head_size,
            "sliding_window": window is not None and window < model.sequence_length,
            "rope_type": rope != "default",
        }
        for name, is_odd in odd.items():
            if is_odd:
                raise ConfigError(f"{field}={self._path} has {name}={values.get(name, rope)}, which this model has not")

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

    def _rope_base(self) -> float:
        parameters = self.values.get("rope_parameters") or {}
        return float(parameters.get("rope_theta", self.values.get("rope_theta", 10000.0)))

    def _list_tensors(self) -> dict[str, str]:
        """File of each tensor."""
        index = self._path / INDEX_FILE
        if index.is_file():
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
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
            if kind in _DENSE:
                gate, up, down = (f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
                pieces |= {f"{ours}.feed_forward.in_weight": [gate, up], f"{ours}.feed_forward.out_weight": [down]}
                continue
            block, experts = f"{theirs}.block_sparse_moe", range(self.values["num_local_experts"])
            pieces |= {
                f"{ours}.feed_forward.router.weight": [f"{block}.gate.weight"],
                f"{ours}.feed_forward.experts.in_weight": [
                    f"{block}.experts.{expert}.{part}.weight" for expert in experts for part in ("w1", "w3")
                ],
                f"{ours}.feed_forward.experts.out_weight": [
                    f"{block}.experts.{expert}.w2.weight" for expert in experts
                ],
            }
        for names in pieces.values():
            for name in names:
                if name not in self._files:
                    raise ConfigError(f"{self._path} lacks the tensor {name}")
        return pieces

    def _shape_of(self, tensor: str, names: Sequence[str]) -> list[int]:
        """Shape of one of ours: pieces one below the other, stacks of experts by expert."""
        shapes = [self._shape(name) for name in names]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ConfigError(f"{self._path}: {names[0]} and its neighbours have shapes that do not fit: {shapes}")
        rows = sum(shape[0] for shape in shapes)
        if ".experts." not in tensor:
            return [rows, *shapes[0][1:]]
        experts = self.values["num_local_experts"]
        return [experts, rows // experts, *shapes[0][1:]]

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
