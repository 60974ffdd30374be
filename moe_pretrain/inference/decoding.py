"""Choice of the next token from logits: greedy or drawn, and self-contrast between two passes of one model."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.inference.cached_decoder import CachedDecoder
from moe_pretrain.model.decoder import DecoderLM


@dataclass(frozen=True)
class Sampling:
    """Rule by which a token is drawn.

    Attributes:
        temperature: Divides the logits, >= 0; 0 takes the most likely token.
        top_k: Most likely tokens among which is drawn, >= 1; None for all.
        top_p: The shortest list of most likely tokens with at least this mass is drawn from, in (0, 1].
        seed: Of the draws.
    """

    temperature: float
    top_k: int | None
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature={self.temperature} must be at least 0; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p={self.top_p} must be in (0, 1]")


@dataclass(frozen=True)
class SelfContrast:
    """Settings of self-contrast decoding (SCMoE).

    Attributes:
        alpha: Tokens with less than this share of the strong pass's largest probability are left out, in (0, 1].
        beta: Strength of the contrast, >= 0; 0 leaves the strong pass alone.
        weak_ranks: Ranks of the experts of the weak pass, from 0; the paper's is the second-best expert alone.
    """

    alpha: float
    beta: float
    weak_ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"--alpha={self.alpha} must be in (0, 1]")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ConfigError(f"--beta={self.beta} must be at least 0")
        if len(set(self.weak_ranks)) != len(self.weak_ranks) or not self.weak_ranks or min(self.weak_ranks) < 0:
            raise ConfigError("--weak-ranks must be different ranks from 1 on, such as 2 or 3,4")


def contrast(
    strong: Float[Tensor, "... vocab"], weak: Float[Tensor, "... vocab"], alpha: float, beta: float
) -> Float[Tensor, "... vocab"]:
    """``(1 + beta) strong - beta weak`` where ``strong >= log alpha + max strong``, else minus infinity.

    Source:
        SCMoE (Shi et al. 2024, arXiv:2405.14507), eq. 1-6. A temperature divides both before this, as in its code.
    """
    kept = strong >= math.log(alpha) + strong.amax(dim=-1, keepdim=True)
    return ((1 + beta) * strong - beta * weak).masked_fill(~kept, -math.inf)


def filtered(logits: Float[Tensor, "... vocab"], top_k: int | None, top_p: float) -> Float[Tensor, "... vocab"]:
    """Logits with all but the candidates at minus infinity; of equal ones the lower id is the likelier."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = logits.gather(-1, order)
    probs = ordered.softmax(dim=-1)
    # Mass before each token: it is a candidate while that has not reached the limit.
    kept = probs.cumsum(dim=-1) - probs < top_p
    kept[..., 0] = True
    if top_k is not None:
        kept[..., top_k:] = False
    return torch.full_like(logits, -math.inf).scatter(-1, order, ordered.masked_fill(~kept, -math.inf))


class Generator:
    """Next tokens for a batch of texts, one step at a time.

    Args:
        model: In evaluation.
        batch: Texts.
        capacity: Most tokens of a text, its prompt among them.
        sampling: How tokens are drawn.
        self_contrast: Contrast with a weak pass; None for the model alone.

    Raises:
        ConfigError: The model has no weak pass.
    """

    def __init__(
        self, model: DecoderLM, batch: int, capacity: int, sampling: Sampling, self_contrast: SelfContrast | None = None
    ):
        self._sampling, self._self_contrast = sampling, self_contrast
        self._strong = CachedDecoder(model, batch, capacity)
        self._weak = None
        if self_contrast is not None:
            _check_weak_pass(model, self_contrast)
            self._weak = CachedDecoder(model, batch, capacity, self_contrast.weak_ranks)
        self._random = torch.Generator().manual_seed(sampling.seed)

    def next(self, ids: Int[Tensor, "batch new"]) -> Int[Tensor, "batch 1"]:
        """Append ``ids`` to the texts and choose the token that follows each."""
        logits = self.logits(ids)
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        probs = filtered(logits, self._sampling.top_k, self._sampling.top_p).softmax(dim=-1)
        # Drawn on the CPU, so that a seed means the same on every device.
        return torch.multinomial(probs.cpu(), 1, generator=self._random).to(ids.device)

    def logits(self, ids: Int[Tensor, "batch new"]) -> Float[Tensor, "batch vocab"]:
        """Append ``ids``; logits of the token that follows, over the temperature and with the contrast."""
        scale = 1 / self._sampling.temperature if self._sampling.temperature else 1.0
        strong = self._strong.feed(ids)[:, -1] * scale
        if self._weak is None or self._self_contrast is None:
            return strong
        weak = self._weak.feed(ids)[:, -1] * scale
        return contrast(strong, weak, self._self_contrast.alpha, self._self_contrast.beta)


def _check_weak_pass(model: DecoderLM, settings: SelfContrast) -> None:
    layers = model.moe_layers()
    if not layers:
        raise ConfigError("decode=self_contrast needs a model with routed experts: this one has none to contrast")
    experts = layers[0].kinds.total
    if experts == 1 or max(settings.weak_ranks) >= experts:
        raise ConfigError(
            f"--weak-ranks={','.join(str(rank + 1) for rank in settings.weak_ranks)} must be at most the {experts} "
            "experts of a layer, of which there must be two"
        )
    probe = torch.zeros(1, 1, dtype=torch.int64, device=model.embedding.weight.device)
    try:
        CachedDecoder(model, 1, 1, settings.weak_ranks).feed(probe)
    except ValueError as error:
        raise ConfigError(f"decode=self_contrast: {error}") from None
