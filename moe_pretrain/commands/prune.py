"""``prune``: a run with fewer experts."""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moe_pretrain.checkpoint.manifest import locate, read_manifest
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.checkpoint.train_state import TrainState
from moe_pretrain.commands.options import Parser
from moe_pretrain.commands.trained_run import add_router_files, add_run, open_run
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import TrainedRun
from moe_pretrain.data import MicroBatch, TrainingCorpus
from moe_pretrain.engine.intervals import WEIGHT
from moe_pretrain.inference.loss import validation_loss
from moe_pretrain.run_folder.provenance import read_config, read_overrides
from moe_pretrain.surgery.expert_statistics import measure
from moe_pretrain.surgery.prune import (
    PrunedRun,
    check_method,
    choose_groups,
    pruned_checkpoint,
    pruned_config,
)
from moe_pretrain.surgery.pruning_methods import METHODS
from moe_pretrain.surgery.run_folder import write_run
from moe_pretrain.system.files import check_unused
from moe_pretrain.train.corpora import prepare_corpora, train_loader


def arguments(parser: Parser) -> None:
    """A run, the methods, and how many experts stay."""
    add_run(parser)
    add_router_files(parser)
    parser.add_argument("--experts", type=int, required=True, metavar="N", help="experts of a layer that stay")
    parser.add_argument(
        "--method",
        default="reap",
        metavar="NAMES",
        help=f"one or several of {','.join(METHODS)} (default: reap); each writes a run of its own",
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKPOINT", help="router_norm: an earlier checkpoint, or a run"
    )
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="training rows to look at (default: 64)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="folder of the new runs (default: beside RUN)")
    parser.add_examples(
        "outputs/tiny-top_k --experts=4",
        "outputs/tiny-top_k --experts=4 --method=reap,seer,frequency,random,uncurl,grouping --rows=256",
        "outputs/tiny-top_k --experts=4 --method=router_norm --before=outputs/tiny-top_k/checkpoints/step_00000100",
    )


def run(options: argparse.Namespace) -> int:
    """Write a run for each method, and print the losses."""
    methods = options.method.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"--method={unknown[0]} must be of {', '.join(METHODS)}")
    if options.rows < 1:
        raise ConfigError(f"--rows={options.rows} must be at least 1")
    trained = open_run(options)
    config = pruned_config(trained.config, options.experts)
    name = trained.folder.absolute().name
    folders = {}
    for method in methods:
        check_method(method, trained.config, config, options.before is not None)
        folders[method] = (options.to or trained.folder.parent) / f"{name}-{method}-{options.experts}"
        check_unused(folders[method])
    earlier = _earlier(trained, options.before)
    corpus, _ = prepare_corpora(trained.config, print)
    plan = plan_run(trained.config, 1)
    rows_at_once = plan.batches.micro_batch_size
    model = trained.model()
    sets, shares = corpus.validation_sets(), corpus.shares
    before = validation_loss(model, trained.config, sets, shares, rows_at_once)
    statistics = measure(model, _calibration(trained, corpus, options.rows), trained.config.seed)
    print(f"calibration: {statistics[0].tokens:,} training tokens")
    print(f"{'method':<12} {'experts':>12} {'loss before':>12} {'after':>8}  folder")
    layers = {layer.router.layer: layer for layer in model.moe_layers()}
    for method in methods:
        groups = {
            index: choose_groups(method, layer, found, options.experts, trained.config.seed, earlier.get(index))
            for (index, layer), found in zip(layers.items(), statistics, strict=True)
        }
        pruned = PrunedRun(config, groups)
        state, *texts = _record(trained, options.experts)
        place = write_run(folders[method], trained.folder, pruned_checkpoint(trained, pruned, state), *texts)
        made = TrainedRun(folders[method], config, place, read_manifest(place))
        after = validation_loss(made.model(), config, sets, shares, rows_at_once)
        change = f"{trained.config.model.moe.num_experts} -> {options.experts}"
        print(f"{method:<12} {change:>12} {before:>12.4f} {after:>8.4f}  {folders[method]}", flush=True)
    return 0


def _earlier(trained: TrainedRun, place: Path | None) -> dict[int, Any]:
    """The routers' rows at the checkpoint ``place``, by layer; none without one.

    Raises:
        ConfigError: It is of another model.
    """
    if place is None:
        return {}
    path = locate(place)
    manifest = read_manifest(path)
    if manifest["shapes"] != trained.shapes():
        raise ConfigError(f"--before={place} must be of the same model: its tensors have other shapes")
    reader, found = Reader(path, manifest), {}
    for name, shape in manifest["shapes"].items():
        if name.endswith(".router.weight"):
            found[int(name.split(".")[1])] = reader.read(name, WEIGHT, 0, shape[0] * shape[1]).view(shape)
    if path.resolve() == trained.checkpoint.resolve():
        print(f"--before={place} is the same checkpoint: no norm has changed, and the lower experts stay")
    return found


def _calibration(trained: TrainedRun, corpus: TrainingCorpus, rows: int) -> list[MicroBatch]:
    """The first ``rows`` training rows of the run, or a few more."""
    config, batches = trained.config, plan_run(trained.config, 1).batches
    loader = train_loader(config, batches, corpus)
    found: list[MicroBatch] = []
    for step in range(-(-rows // batches.rows_per_step)):
        loader.reach(step)
        for batch in loader.micro_batches(step):
            if len(found) * batches.micro_batch_size < rows:
                found.append(batch)
    return found


def _record(trained: TrainedRun, experts: int) -> tuple[TrainState, str, str]:
    """State, configuration and words of the pruned run: its own number of experts, so that it goes on with that."""
    values, identity = copy.deepcopy(read_config(trained.folder)), trained.state.identity
    recorded = copy.deepcopy(identity.config)
    recorded["model"]["moe"]["num_experts"] = experts
    state = replace(trained.state, identity=replace(identity, config=recorded), validation_loss=None)
    values["model"]["moe"]["num_experts"] = experts
    words = [word for word in read_overrides(trained.folder) if not word.startswith("model.moe.num_experts=")]
    words.append(f"model.moe.num_experts={experts}")
    return state, yaml.safe_dump(values, sort_keys=False), "".join(f"{word}\n" for word in words)
