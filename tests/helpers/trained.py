"""Folders of runs with one checkpoint, made without training: random weights, and routers' state after two steps."""

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
import yaml

from helpers.builders import random_batches, tiny
from moe_pretrain.checkpoint.manifest import BUFFER, folder_name
from moe_pretrain.checkpoint.plain import KeptArray, PlainCheckpoint, write_plain
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.data.tokenizer.train import train_tokenizer
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, step_uses

MOMENTS = ["exp_avg", "exp_avg_sq"]
VOCABULARY = 300


@functools.cache
def tokenizer_in(folder: Path) -> Path:
    """A small tokenizer, made once in ``folder``."""
    file = folder / "tokenizer.json"
    train_tokenizer((topics[name] for name in sorted(topics)[:8]), VOCABULARY, file)
    return file


def tiny_run(home: Path, name: str, *overrides: str, step: int = 2, seed: int = 0) -> Path:
    """The folder ``home/name`` of a run that has one checkpoint of ``step``; called again it gets another."""
    tokenizer = tokenizer_in(home)
    config = tiny(
        f"model.vocab_size={VOCABULARY}",
        "model.sequence_length=40",
        "batch.global_batch_tokens=640",
        "budget.tokens=1920",
        f"tokenizer.path={tokenizer}",
        f"run.output_dir={home}",
        f"run.name={name}",
        *overrides,
    )
    folder = home / name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_values(config)))))
    save_model(folder, model_of(config, seed), config, step)
    return folder


def model_of(config: Config, seed: int = 0) -> DecoderLM:
    """A model whose norms are not 1 and whose routers have moved their state for two steps."""
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("router.logit_bias", "router.bias")):  # starts at 0
                parameter.uniform_(-1, 1)
    for step, batches in enumerate(random_batches(config, 1)[:2]):
        context = routing_context(batches[0], seed, step)
        batch = batches[0]
        with torch.no_grad():
            uses = model.train()(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context).uses
        for layer, use in zip(model.moe_layers(), step_uses(uses) if uses else [], strict=True):
            layer.router.after_step(use)
    return model.eval()


def save_model(folder: Path, model: DecoderLM, config: Config, step: int) -> Path:
    """Write a checkpoint of ``model`` into a run's folder."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    arrays = []
    for name, parameter in model.named_parameters():
        arrays += [KeptArray(name, kind, torch.full_like(parameter, 0.5 + step)) for kind in MOMENTS]
        arrays.append(KeptArray(name, "weight", parameter.detach()))
    arrays += [KeptArray(name, BUFFER, buffer) for name, buffer in model.named_buffers()]
    identity = RunIdentity(
        config=json.loads(json.dumps(to_values(config))),
        tokenizer=load_tokenizer_file(Path(str(config.tokenizer.path))).fingerprint,
        versions={"moe_pretrain": "0"},
    )
    target = folder / "checkpoints" / folder_name(step)
    target.parent.mkdir(exist_ok=True)
    state = TrainState(step=step, tokens=step * 640, identity=identity)
    write_plain(target, PlainCheckpoint(arrays, shapes, dict.fromkeys(shapes, MOMENTS), float(step), state))
    return target
