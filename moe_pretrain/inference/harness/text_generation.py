"""Texts that follow contexts of different lengths, as many at a time as a batch holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.inference.decoding import Generator, Sampling
from moe_pretrain.model.decoder import DecoderLM

_DEFAULT_TOKENS = 256
"""The harness's own, for tasks that name no number."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most new tokens; the first that is there counts, as in the harness."""


@dataclass(frozen=True)
class GenerationOptions:
    """``generation_kwargs`` of a task.

    Attributes:
        until: Texts before which the answer ends.
        max_tokens: Most new tokens.
        temperature: 0 takes the most likely token.
        top_k: See ``Sampling``.
        top_p: See ``Sampling``.
    """

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float


def options_of(asked: Mapping[str, Any], length: int) -> GenerationOptions:
    """Read ``generation_kwargs``.

    Raises:
        ConfigError: There is something that this model does not do, or no room for a context.
    """
    known = {*_LIMITS, "until", "do_sample", "temperature", "top_k", "top_p"}
    if strange := sorted(asked.keys() - known):
        raise ConfigError(
            f"a task's generation_kwargs.{strange[0]}={asked[strange[0]]} is not known here; known: "
            f"{', '.join(sorted(known))}"
        )
    limit = next((int(asked[name]) for name in _LIMITS if asked.get(name) is not None), _DEFAULT_TOKENS)
    if not 0 < limit < length:
        raise ConfigError(
            f"a task's generation_kwargs.max_gen_toks={limit} must be 1 to {length - 1}: the model was trained on rows "
            f"of {length} tokens, which must hold the context too"
        )
    until = asked.get("until") or []
    temperature = float(asked.get("temperature") or 0.0)
    is_drawn = bool(asked.get("do_sample", temperature > 0))
    return GenerationOptions(
        until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_tokens=limit,
        temperature=temperature or 1.0 if is_drawn else 0.0,
        top_k=asked.get("top_k") or None,
        top_p=float(asked.get("top_p") or 1.0),
    )


class TextBatch:
    """Texts that grow together, one token at a time; a context that is longer than another's is fed meanwhile.

    Args:
        model: In evaluation.
        tokenizer: Of the model.
        prompts: Tokens of the contexts, each at least one.
        options: When to stop, and how to draw.
        seed: Of the draws.

    Attributes:
        is_done: Whether every text has ended.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        options: GenerationOptions,
        seed: int,
    ):
        self._tokenizer, self._options, self._prompts = tokenizer, options, prompts
        self._device = model.embedding.weight.device
        sampling = Sampling(options.temperature, options.top_k, options.top_p, seed)
        capacity = max(map(len, prompts)) + options.max_tokens
        self._generator = Generator(model, len(prompts), capacity, sampling)
        self._new: list[list[int]] = [[] for _ in prompts]
        self._has_ended = [False] * len(prompts)
        self._fed = 0
        self._next = torch.tensor([prompt[: min(map(len, prompts))] for prompt in prompts], device=self._device)

    @property
    def is_done(self) -> bool:
        """Whether every text has ended."""
        return all(self._has_ended)

    def step(self) -> None:
        """Append one token to every text."""
        chosen = self._generator.next(self._next)[:, 0].tolist()
        self._fed += self._next.shape[1]
        for at, prompt in enumerate(self._prompts):
            if self._fed < len(prompt):
                chosen[at] = prompt[self._fed]
            elif not self._has_ended[at]:
                self._append(at, chosen[at])
        self._next = torch.tensor(chosen, device=self._device)[:, None]

    def _append(self, at: int, token: int) -> None:
        own = self._new[at]
        if token == self._tokenizer.end_of_document:
            self._has_ended[at] = True
            return
        own.append(token)
        text = self._tokenizer.decode(own) if self._options.until else ""
        is_full = len(own) == self._options.max_tokens
        self._has_ended[at] = is_full or any(stop in text for stop in self._options.until)

    def texts(self) -> list[str]:
        """Texts that followed the contexts, up to the first stop sequence."""
        found = []
        for own in self._new:
            text = self._tokenizer.decode(own)
            for stop in self._options.until:
                text = text.split(stop)[0]
            found.append(text)
        return found
