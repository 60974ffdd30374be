"""The framework's own model as the harness asks for one: log-likelihoods of texts, and greedy or drawn texts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.inference.cached_decoder import CachedDecoder
from moe_pretrain.inference.harness.text_generation import GenerationOptions, TextBatch, options_of
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import RoutingContext
from moe_pretrain.parallel.sharing import ALONE, Sharing

Item = TypeVar("Item")


class Scored(NamedTuple):
    """A text and how much of it is to be predicted.

    Attributes:
        ids: Its tokens.
        targets: The last so many are predicted, at least 1 and fewer than all.
    """

    ids: list[int]
    targets: int


class HarnessModel(TemplateLM):
    """The model and its tokenizer for the harness.

    The rules are those of the harness's own ``hf`` model on the exported run: a text without a context begins after the
    token that ends documents, contexts that are too long lose their beginning, and long texts are predicted in windows
    of the training length. To the harness this is one process: every rank is given all requests, does its part of the
    batches, and has all results. Batches do not depend on the number of ranks.

    Args:
        model: In evaluation.
        tokenizer: Of the model.
        batch_tokens: Tokens of a batch, padding included; a longer text is a batch by itself.
        sharing: This rank's part.
    """

    def __init__(self, model: DecoderLM, tokenizer: Tokenizer, batch_tokens: int, sharing: Sharing = ALONE):
        super().__init__()
        self._model, self._tokens, self._batch_tokens, self._sharing = model, tokenizer, batch_tokens, sharing
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokens.end_of_document

    @property
    def max_length(self) -> int:
        """Tokens of a row in training."""
        return self._model.config.sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; as in training, none that is not in it."""
        return [int(token) for token in self._tokens.encode_batch([string])[0]]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, nats, in windows that predict each token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append(Scored(context + continuation, len(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scores(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each context, up to the first stop sequence."""
        options: dict[str, GenerationOptions] = {}
        prompts: list[tuple[str, list[int]]] = []
        for request in requests:
            context, asked = request.args
            key = json.dumps(asked, sort_keys=True, default=str)
            if key not in options:
                options[key] = options_of(asked, self.max_length)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append((key, ids[-(self.max_length - options[key].max_tokens) :]))
        batches = []
        for key, own in options.items():
            mine = [at for at, (other, _) in enumerate(prompts) if other == key]
            lengths = [len(prompts[at][1]) + own.max_tokens for at in mine]
            batches += [(key, [mine[each] for each in batch]) for batch in _batches(lengths, self._batch_tokens)]
        texts: dict[int, str] = {}
        for number, found in self._in_turn(batches):
            texts |= self._generate(number, *found, options, prompts) if found else self._generate_nothing()
        return self._in_order(texts, len(requests))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for (_, continuation), context_ids, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise ConfigError(
                    f"a task asks for the likelihood of {continuation[:40]!r}, of {len(ids)} tokens: it must have 1 to "
                    f"{self.max_length}, the length that the model was trained on"
                )
            texts.append(Scored((context_ids + ids)[-(self.max_length + 1) :], len(ids)))
        return self._scores(texts)

    def _scores(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Of each text the log-probability of its targets, and whether each of them is the most likely token."""
        batches = _batches([len(text.ids) - 1 for text in texts], self._batch_tokens)
        found: dict[int, tuple[float, bool]] = {}
        for _, batch in self._in_turn(batches):
            # One that has nothing left goes with those whose experts it holds.
            of_batch = self._score([texts[at] for at in batch] if batch else [Scored([self.eot_token_id] * 2, 1)])
            found |= dict(zip(batch or [], of_batch, strict=False))
        return self._in_order(found, len(texts))

    @torch.no_grad()
    def _score(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        """One batch, padded at the end: what comes later changes nothing before it."""
        longest = max(len(text.ids) - 1 for text in texts)
        rows = [text.ids[:-1] + [self.eot_token_id] * (longest + 1 - len(text.ids)) for text in texts]
        ids = torch.tensor(rows, device=self._device)
        place = torch.arange(longest, device=self._device).expand_as(ids)
        lengths = torch.tensor([len(text.ids) - 1 for text in texts], device=self._device)[:, None]
        documents = torch.where(place < lengths, 0, -1)
        context = RoutingContext(
            token_mask=(documents == 0).flatten(),
            token_position=place.flatten(),
            num_sequences=len(texts),
            seed=0,
            step=0,
            token_ids=ids.flatten(),
            document_ids=documents.flatten(),
        )
        # For attention a row is one document: faster, and the same.
        hidden = self._model.final_hidden(ids, torch.zeros_like(ids), place, context)
        predicting = (place >= lengths - torch.tensor([[text.targets] for text in texts], device=self._device)) & (
            place < lengths
        )
        targets = torch.tensor([token for text in texts for token in text.ids[-text.targets :]], device=self._device)
        scores, is_greedy = self._of_targets(hidden[predicting], targets)
        counts = [text.targets for text in texts]
        return [
            (float(own.sum()), bool(greedy.all()))
            for own, greedy in zip(scores.split(counts), is_greedy.split(counts), strict=True)
        ]

    def _of_targets(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, float64, and whether it is the most likely token; a chunk at a time."""
        scores, greedy = [], []
        chunk = self._model.config.cross_entropy_chunk_tokens
        for own, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            log_probs = functional.linear(own, self._model.head_weight).float().log_softmax(dim=-1)
            scores.append(log_probs.gather(1, wanted[:, None])[:, 0].double())
            greedy.append(log_probs.argmax(dim=-1) == wanted)
        return torch.cat(scores), torch.cat(greedy)

    def _generate(
        self,
        number: int,
        key: str,
        members: Sequence[int],
        options: dict[str, GenerationOptions],
        prompts: Sequence[tuple[str, list[int]]],
    ) -> dict[int, str]:
        """Texts of one batch; while others are at work, passes that they wait for."""
        batch = TextBatch(self._model, self._tokens, [prompts[at][1] for at in members], options[key], seed=number)
        while self._sharing.any_works(not batch.is_done):
            if batch.is_done:
                self._pass_by()
            else:
                batch.step()
        return dict(zip(members, batch.texts(), strict=True))

    def _generate_nothing(self) -> dict[int, str]:
        while self._sharing.any_works(False):
            self._pass_by()
        return {}

    def _pass_by(self) -> None:
        CachedDecoder(self._model, 1, 1).feed(torch.tensor([[self.eot_token_id]], device=self._device))

    def _in_turn(self, batches: Sequence[Item]) -> Iterator[tuple[int, Item | None]]:
        """This rank's batches with their numbers, None where others have one more."""
        size = self._sharing.size
        for first in range(0, len(batches), size):
            self._sharing.between()
            number = first + self._sharing.rank
            if number < len(batches):
                yield number, batches[number]
            elif self._sharing.in_step:
                yield number, None

    def _in_order(self, own: dict[int, Item], count: int) -> list[Item]:
        """Results of all ranks in the order of the requests."""
        found = {at: result for of_rank in self._sharing.gather(own) for at, result in of_rank.items()}
        return [found[at] for at in range(count)]


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Members of each batch, the longest first, so that little is padding; those of one length in their order."""
    batches: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[at]
        batches[-1].append(at)
    return batches
