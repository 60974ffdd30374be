"""Comparison of an exported folder with the model that it was made of, by their logits on real text."""

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.huggingface.remote_code.assemble import FILE, model_class
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import RoutingContext

ROWS = 2
MOST_TOKENS = 256
_MOST_LETTERS = 10_000
TOLERANCE = 1e-4
"""Largest difference of two logits that is rounding, in units of the logits' standard deviation.

Sums in another order differ by some 1e-6; a wrong weight, scale or mask by more than 1e-2.
"""
MOST_OTHER_ROUTES = 0.005
"""Share of positions that may be further apart: where two experts score alike, rounding decides who is taken."""


@dataclass(frozen=True)
class LogitCheck:
    """Difference of two models' logits.

    Attributes:
        positions: Positions that were compared.
        largest: Largest difference of a logit, over the positions that agree.
        scale: Standard deviation of the logits.
        apart: Positions that differ by more than rounding.
        same_token: Positions whose most likely next token is the same.
    """

    positions: int
    largest: float
    scale: float
    apart: int
    same_token: int

    @property
    def is_passed(self) -> bool:
        """Whether the models are the same but for rounding."""
        return self.apart <= MOST_OTHER_ROUTES * self.positions

    def describe(self) -> str:
        """One sentence with the figures."""
        apart = (
            f"; {self.apart} of them further apart, where rounding has sent a token to another expert"
            if self.apart
            else ""
        )
        return (
            f"largest difference of a logit {self.largest:.1e} (their standard deviation is {self.scale:.2g}) over "
            f"{self.positions} positions of real text in float32{apart}; the most likely next token is the same at "
            f"{self.same_token} of {self.positions}"
        )


def sample_ids(tokenizer: Tokenizer, sequence_length: int) -> Int[Tensor, "rows tokens"]:
    """Tokens of real text that every machine has: the source of Python's own ``argparse``."""
    length = min(sequence_length, MOST_TOKENS)
    (tokens,) = tokenizer.encode_batch([_sample_text()])
    return torch.tensor(list(tokens)[: ROWS * length]).view(ROWS, length)


def _sample_text() -> str:
    return inspect.getsource(argparse)


def check_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ``ValueError`` unless transformers makes the tokens of ``tokenizer`` with the files in ``folder``."""
    text = _sample_text()[:_MOST_LETTERS]
    with _quiet():
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)(text).input_ids
    ours = [int(token) for token in tokenizer.encode_batch([text])[0]]
    if theirs != ours:
        pairs = zip_longest(ours, theirs)
        place = next(at for at, (own, other) in enumerate(pairs) if own != other)
        raise ValueError(
            f"the exported tokenizer is not that of the run: token {place} of a text is {theirs[place : place + 1]} "
            f"there and {ours[place : place + 1]} here; nothing was written, and --no-check would write it so"
        )


@torch.no_grad()
def our_logits(model: DecoderLM, ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens vocab"]:
    """Logits of the framework's own model, each row one document."""
    rows, length = ids.shape
    positions = torch.arange(length).expand(rows, -1)
    context = RoutingContext.of_rows(ids)
    return model.logits(ids, torch.zeros_like(ids), positions, context)


@torch.no_grad()
def exported_logits(folder: Path, ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens vocab"]:
    """Logits of the folder's model as transformers loads it, in float32.

    Raises:
        ValueError: transformers cannot load it whole.
    """
    with _quiet():
        model, report = _class_of(folder).from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are said below
        )
    if problems := {key: sorted(map(str, found)) for key, found in report.items() if found}:
        raise ValueError(f"{folder} is not what {type(model).__name__} reads: {problems}")
    return model.eval()(input_ids=ids).logits.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and progress bars of transformers."""
    words, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(words)
        if has_bar:
            transformers.logging.enable_progress_bar()


def _class_of(folder: Path) -> Any:
    """The folder's own class from its file, else that of transformers."""
    file = folder / FILE
    return model_class(file.read_text(encoding="utf-8")) if file.is_file() else transformers.AutoModelForCausalLM


def compare_logits(ours: Float[Tensor, "rows tokens vocab"], theirs: Float[Tensor, "rows tokens vocab"]) -> LogitCheck:
    """Compare position by position."""
    difference = (ours - theirs).abs().amax(dim=-1).flatten()
    scale = float(ours.std())
    agrees = difference <= TOLERANCE * scale
    largest = difference[agrees] if agrees.any() else difference
    same = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
    return LogitCheck(len(difference), float(largest.max()), scale, int((~agrees).sum()), int(same.sum()))
