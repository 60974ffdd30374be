"""Export of a run as a folder that transformers loads: written beside its place, checked, then given its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import TrainedRun
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.huggingface.architectures import Architecture, choose
from moe_pretrain.huggingface.card import model_card
from moe_pretrain.huggingface.check import check_tokens, compare_logits, exported_logits, our_logits, sample_ids
from moe_pretrain.huggingface.remote_code.assemble import FILE
from moe_pretrain.huggingface.tensors import write_tensors
from moe_pretrain.huggingface.tokenizer_files import write_tokenizer
from moe_pretrain.system.files import whole_folder, write_json, write_whole

ExportDtype = Literal["float32", "bfloat16"]


def export(
    run: TrainedRun,
    folder: Path,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    dtype: ExportDtype,
    shard_bytes: int,
    is_checked: bool,
    say: Callable[[str], None],
) -> None:
    """Write ``run`` into ``folder``; at any error nothing is left.

    Writing takes the memory of one shard. The check takes that of the model: ours first, then the exported one.

    Args:
        run: The run.
        folder: Target; empty, or not there yet.
        tokenizer: Tokenizer of the run.
        tokenizer_path: Where it lies.
        dtype: Type of the weights; routers that are float32 in training stay so.
        shard_bytes: Largest size of a file of weights, unless one tensor is larger.
        is_checked: Compare the logits of the result with the framework's own.
        say: Prints a line.

    Raises:
        ConfigError: The scheme cannot be exported.
        CheckpointError: The checkpoint is not of this model.
        ValueError: The folder is not empty, or the logits differ.
    """
    architecture = choose(run.config, run.meta_model())
    _check_shapes(run, architecture)
    with whole_folder(folder) as work:
        _write(run, work, architecture, tokenizer, tokenizer_path, dtype, shard_bytes)
        verdict = "not made"
        if is_checked:
            verdict = _checked(run, work, tokenizer, dtype)
            say(f"check: {verdict}")
        write_whole(work / "README.md", model_card(run, architecture, dtype, verdict))
    how = "remote code, trust_remote_code=True" if architecture.modelling_file else "transformers' own class"
    say(f"written: {folder}, {architecture.name} ({how}), step {run.state.step:,} of {run.config.run.name}, {dtype}")


def _check_shapes(run: TrainedRun, architecture: Architecture) -> None:
    """Refuse a checkpoint that has not the tensors of its configuration, before anything is written."""
    wanted = {name: list(parameter.shape) for name, parameter in run.meta_model().named_parameters()}
    if wanted != run.shapes():
        odd = sorted(name for name in wanted.keys() | run.shapes().keys() if wanted.get(name) != run.shapes().get(name))
        raise ConfigError(
            f"{run.checkpoint} is not of this configuration: {odd[0]} is {run.shapes().get(odd[0])}, must be "
            f"{wanted.get(odd[0])}"
        )
    left = run.shapes().keys() - {tensor.source for tensor in architecture.tensors}
    assert not left, f"{architecture.name} leaves out {sorted(left)}"


def _write(
    run: TrainedRun,
    folder: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    dtype: ExportDtype,
    shard_bytes: int,
) -> None:
    end = tokenizer.end_of_document
    own = {"architectures": [architecture.name], "dtype": dtype, "bos_token_id": None, "eos_token_id": end}
    own["pad_token_id"] = None  # transformers would keep that token's embedding from training; OLMoE's default is 1
    values = architecture.config | own
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    if architecture.modelling_file is not None:
        write_whole(folder / FILE, architecture.modelling_file)
    write_tokenizer(folder, tokenizer_path, tokenizer, run.config.model.sequence_length)
    write_tensors(folder, architecture.tensors, run.reader(), getattr(torch, dtype), shard_bytes)


@torch.no_grad()
def _checked(run: TrainedRun, folder: Path, tokenizer: Tokenizer, dtype: ExportDtype) -> str:
    """The comparison in one sentence.

    Raises:
        ValueError: The logits differ by more than rounding, or a text's tokens at all.
    """
    check_tokens(folder, tokenizer)
    ids = sample_ids(tokenizer, run.config.model.sequence_length)
    model = run.model()
    if dtype == "bfloat16":
        exact = {tensor.source for tensor in choose(run.config, run.meta_model()).tensors if not tensor.is_rounded}
        for name, parameter in model.named_parameters():
            if name not in exact:
                parameter.copy_(parameter.bfloat16())
    ours = our_logits(model, ids)
    del model
    found = compare_logits(ours, exported_logits(folder, ids))
    if not found.is_passed:
        raise ValueError(f"the exported model is not that of the run: {found.describe()}; nothing was written")
    return found.describe()
