"""``upcycle``: a dense model as a mixture of experts."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from moe_pretrain.checkpoint.manifest import BUFFER
from moe_pretrain.checkpoint.plain import KeptArray, PlainCheckpoint
from moe_pretrain.checkpoint.restore import WeightReader
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.commands.options import Parser, overrides_of, shows
from moe_pretrain.commands.trained_run import add_tokenizer, find_tokenizer
from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.config.trained import open_trained
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.huggingface.check import our_logits, sample_ids
from moe_pretrain.huggingface.folder import HuggingFaceFolder, is_folder
from moe_pretrain.huggingface.tokenizer_files import load_run_tokenizer
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.moe.build import expert_gate, with_expert_width
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.run_folder.provenance import versions
from moe_pretrain.surgery.run_folder import write_run
from moe_pretrain.surgery.upcycle import Variation, build_dense, check_upcycling, dense_config, upcycle
from moe_pretrain.system.files import check_unused

_SHAPE = (
    *("vocab_size", "sequence_length", "hidden_size", "num_layers", "num_heads", "num_key_value_heads", "rope_base"),
    *("norm_epsilon", "tie_embeddings", "qk_norm", "head_size"),
)


def arguments(parser: Parser) -> None:
    """A dense model, a folder, and the mixture as overrides."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a dense run, its checkpoint, or a Llama folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; empty, or not there yet")
    parser.add_overrides("Hydra overrides of the mixture; the shape is the dense model's")
    parser.add_argument("--noise", type=float, default=0.0, metavar="X", help="noise on weights, of their deviation")
    parser.add_argument(
        "--reinitialise", type=float, default=0.0, metavar="SHARE", help="share of hidden units that are drawn anew"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and units drawn anew (default: 0)")
    add_tokenizer(parser)
    parser.add_examples(
        "outputs/tiny-dense outputs/upcycled router=top_k model.moe.num_experts=8",
        "llama-folder outputs/upcycled router=autonomy router.gate_rank=256 model.moe.num_experts=8 --noise=0.01",
    )


def run(options: argparse.Namespace) -> int:
    """Write a run folder with the mixture, and print both losses."""
    check_unused(options.folder)
    variation = Variation(options.noise, options.reinitialise, options.seed)
    source = _open(options)
    overrides = [*source.words, *overrides_of(options), f"run.name={options.folder.name}"]
    if shows(options, overrides):
        return 0
    width, tokenizer = source.width, source.tokenizer
    config, overrides = _solved(overrides, width)
    check_upcycling(config, width)
    source.check(config.model)
    dense = build_dense(dense_config(config.model, width), config.router, source.reader, source.shapes)
    ids = sample_ids(tokenizer, config.model.sequence_length)
    model = upcycle(config, dense, variation, ids, print)
    before, after = _loss(dense, ids), _loss(model, ids)
    place = _write(options.folder, model, config, overrides, tokenizer)
    print(f"loss on {ids[:, 1:].numel()} positions of real text: dense {before:.6f}, mixture {after:.6f} nats/token")
    print(f"written: {place}")
    print(
        f"train it: moe-pretrain train run.name=NAME checkpoint.warm_start={options.folder} {' '.join(overrides[:-1])}"
    )
    return 0


@dataclass(frozen=True)
class _Source:
    """A dense model.

    Attributes:
        reader: Of its weights.
        shapes: Of its weights, by our names.
        words: Overrides by which a model has its shape.
        width: Of its networks.
        tokenizer: Its tokenizer.
        check: Raises ``ConfigError`` for a model in which the weights would be another function.
    """

    reader: WeightReader
    shapes: Mapping[str, Sequence[int]]
    words: list[str]
    width: int
    tokenizer: Tokenizer
    check: Callable[[ModelConfig], None]


def _open(options: argparse.Namespace) -> _Source:
    """The source that the command names.

    Raises:
        ConfigError: It is no dense model.
    """
    source = options.source
    if is_folder(source):
        folder = HuggingFaceFolder(source)
        if not folder.is_dense:
            raise ConfigError(f"SOURCE={source} has experts already: checkpoint.warm_start={source} reads it")
        path = options.tokenizer or source
        length = folder.values.get("max_position_embeddings", 2048)
        words = [*folder.model_words(), f"model.sequence_length={length}", *_tokenizer_words(path)]
        width, tokenizer = folder.values["intermediate_size"], load_run_tokenizer(path, None, None)
        return _Source(folder, folder.shapes, words, width, tokenizer, partial(folder.check, field="SOURCE"))
    trained = open_trained(source, lambda file: None, print)
    name = "blocks.{}.feed_forward.in_weight"
    widths = {tuple(trained.shapes().get(name.format(k), ())) for k in range(trained.config.model.num_layers)}
    if len(widths) != 1 or not (shape := widths.pop()):
        raise ConfigError(f"SOURCE={source} must be dense in every layer, all of one width: router=dense")
    tokenizer, path = find_tokenizer(trained, options.tokenizer)
    model, width = trained.config.model, shape[0] // 2
    if trained.config.router.dense_experts and model.moe.activation_function != SWIGLU:
        raise ConfigError(f"SOURCE={source} has {model.moe.activation_name}, which must be plain swiglu for upcycle")
    words = [f"model.{field}={_word(getattr(model, field))}" for field in _SHAPE]
    words += [f"model.ffn_hidden_size={width}", *_tokenizer_words(path)]
    check = partial(_check_shape, dense=model, source=source)
    return _Source(trained.reader(), trained.shapes(), words, width, tokenizer, check)


def _check_shape(model: ModelConfig, dense: ModelConfig, source: Path) -> None:
    """Raise ``ConfigError`` if weights of ``dense`` would be another function in ``model``, or have no place there."""
    for field in _SHAPE:
        now, then = _word(getattr(model, field)), _word(getattr(dense, field))
        if now != then and field != "sequence_length":
            raise ConfigError(f"model.{field}={now} must be {then}, as SOURCE={source} has it")


def _word(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _tokenizer_words(path: Path) -> list[str]:
    return ["tokenizer=pretrained", f"tokenizer.path={path}"]


def _solved(overrides: list[str], width: int) -> tuple[Config, list[str]]:
    """The configuration, and overrides with the experts' width where none is named: the dense network's."""
    named = {word.partition("=")[0] for word in overrides}
    config = load(overrides)
    if "model.moe.expert_hidden_size" in named:
        return config, overrides
    moe = with_expert_width(config.model.moe, config.router, config.model.hidden_size, width, width)
    words = [f"model.moe.expert_hidden_size={moe.expert_hidden_size}"]
    if expert_gate(moe, config.router) is not None:
        words.append(f"model.moe.expert_width_multiple={moe.expert_width_multiple}")
    overrides = [*overrides[:-1], *words, overrides[-1]]
    return load(overrides), overrides


@torch.no_grad()
def _loss(model: DecoderLM, ids: Tensor) -> float:
    logits = our_logits(model, ids)[:, :-1].double()
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _write(folder: Path, model: DecoderLM, config: Config, overrides: list[str], tokenizer: Tokenizer) -> Path:
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    arrays = [KeptArray(name, "weight", parameter) for name, parameter in model.named_parameters()]
    arrays += [KeptArray(name, BUFFER, buffer) for name, buffer in model.named_buffers()]
    here = replace(config.run, output_dir=str(folder.absolute().parent))
    values: dict[str, Any] = json.loads(json.dumps(to_values(replace(config, run=here))))
    identity = RunIdentity(config=values, tokenizer=tokenizer.fingerprint, versions=versions())
    text = yaml.safe_dump(values, sort_keys=False), "".join(f"{word}\n" for word in overrides)
    state = TrainState(step=0, tokens=0, identity=identity)
    checkpoint = PlainCheckpoint(arrays, shapes, {name: [] for name in shapes}, 0.0, state)
    return write_run(folder, folder, checkpoint, *text)
