"""Loss of a model on documents of any corpus: nats per token, and bits per byte that compare across tokenizers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import RoutingContext


@dataclass(frozen=True)
class CorpusLoss:
    """Loss over the documents of a corpus.

    Attributes:
        nats: Sum over all predicted tokens.
        tokens: Predicted tokens: all of a document but its first, and the end of the document.
        text_bytes: UTF-8 bytes of the documents.
        documents: Documents with at least one token.
    """

    nats: float
    tokens: int
    text_bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """Of a token; infinite where it leaves a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits by which the model encodes a byte of the text, the first token of each document aside."""
        return self.nats / math.log(2) / max(self.text_bytes, 1)


def check_likelihood(model: DecoderLM, name: str) -> str:
    """The rule that routing goes by where that is not the rule of training; else empty.

    Args:
        model: The model; without storage it does as well.
        name: Name of its scheme.

    Raises:
        ConfigError: The scheme has no likelihood of a next token.
    """
    if not all(layer.router.causal_in_evaluation for layer in model.moe_layers()):
        raise ConfigError(
            f"router={name}: a token's experts depend on later tokens in evaluation too, so that its loss is not that "
            "of a language model"
        )
    return model.evaluation_rule


@torch.no_grad()
def corpus_loss(
    model: DecoderLM, tokenizer: Tokenizer, texts: Iterable[str], say: Callable[[int], None] = lambda documents: None
) -> CorpusLoss:
    """Loss of every document by itself, in windows of the model's length that overlap by half.

    Every token is predicted once, from at least half a window of its document where that has so much before it.

    Args:
        model: In evaluation.
        tokenizer: Of the model.
        texts: Documents.
        say: Hears the number of documents so far, after each.
    """
    length = model.config.sequence_length
    nats, tokens, size, documents = 0.0, 0, 0, 0
    for text in texts:
        ids = [int(token) for token in tokenizer.encode_batch([text])[0]]
        if not ids:
            continue
        ids.append(tokenizer.end_of_document)
        documents, size = documents + 1, size + len(text.encode())
        predicted = 0  # targets so far are ids[1 : predicted + 1]
        first = 0
        while predicted < len(ids) - 1:
            window = ids[first : first + length + 1]
            losses = _window_losses(model, window)[predicted - first :]
            nats, tokens = nats + float(losses.double().sum()), tokens + len(losses)
            predicted += len(losses)
            first += max(length // 2, 1)
        say(documents)
    return CorpusLoss(nats, tokens, size, documents)


def _window_losses(model: DecoderLM, window: list[int]) -> torch.Tensor:
    """Nats of ``window[1:]``, each from those before it."""
    device = model.embedding.weight.device
    ids = torch.tensor([window[:-1]], device=device)
    context = RoutingContext.of_rows(ids)
    places = torch.arange(ids.shape[1], device=device)[None]
    logits = model.logits(ids, torch.zeros_like(ids), places, context)[0]
    return functional.cross_entropy(logits, torch.tensor(window[1:], device=device), reduction="none")
