"""Coordinate check: how the size of activations, and of what training makes of them, grows with the model's shape.

A parameterisation under which a learning rate transfers keeps both the same at every width, from the first steps on
(Yang et al. 2022, arXiv:2203.03466, appendix D.1).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batch
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss, routing_context
from moe_pretrain.engine.optimizers import build_optimizer, set_learning_rate
from moe_pretrain.engine.optimizers.base import whole_fragments
from moe_pretrain.model.block import Block
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import ExpertShard, Routing, step_uses

QUANTITIES = ("attention", "MoE layer", "residual stream", "logits", "router logits", "sum of weights")
"""Outputs of the attention and of the routed experts of the last block, the stream after it, the logit of each token's
label, and of the last router its logits (of linear routers) and the sum of each token's route weights."""


class PlainTraining:
    """A model and its optimizer in one process and float32, without DeepSpeed: for measurements of many small runs.

    Clipping, optimizer and rates by group are those of the configuration; whole batches, no schedule.
    """

    def __init__(self, config: Config, seed: int = 0):
        self._config, self._seed = config, seed
        self.model = DecoderLM(config.model, config.router, ExpertShard())
        initialise(self.model, seed)
        self._optimizer = build_optimizer(self.model, config.optimizer)
        self._optimizer.own(whole_fragments(self.model))
        self._step = 0

    def step(self, batch: MicroBatch, rate: float) -> float:
        """One optimizer step at the learning rate ``rate``; the mean cross-entropy of the batch before it."""
        counts = GlobalCounts(batch.num_valid_labels(), int((batch.document_ids >= 0).sum()))
        context = routing_context(batch, self._seed, self._step, lambda layer, routes: routes, counts.tokens)
        self.model.train()
        output = self.model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        routers = [layer.router for layer in self.model.moe_layers()]
        micro_batch_loss(output, self.model.aux_weights, counts.tokens, counts).backward()
        if self._config.engine.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.engine.gradient_clipping)
        set_learning_rate(self._optimizer.param_groups, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for router, use in zip(routers, step_uses(output.uses) if routers else [], strict=True):
            router.after_step(use)
        self._step += 1
        return float(output.loss_sum.detach()) / max(1, counts.labels)

    @torch.no_grad()
    def activations(self, batch: MicroBatch, start: DecoderLM) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The ``QUANTITIES`` on ``batch``, in training mode; those that the model has.

        Args:
            batch: What goes through the model.
            start: The model as it was before the first step.

        Returns:
            Of each quantity its values, and for the logits of model and router also those that the matrices of
            ``start`` make of today's activations; None for the others.
        """
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        handles = []

        def watch(module: nn.Module, name: str, value: Callable[[Any], Tensor]) -> None:
            def note(module: nn.Module, inputs: object, output: Any) -> None:
                found[name] = value(output).clone(), None

            handles.append(module.register_forward_hook(note))

        tokens = batch.input_ids.numel()
        context = routing_context(batch, self._seed, self._step, lambda layer, routes: routes, tokens)
        last, first = self.model.blocks[-1], start.blocks[-1]
        assert isinstance(last, Block) and isinstance(first, Block)
        watch(last.attention, "attention", lambda output: output[0])
        watch(self.model.norm, "residual stream", lambda output: output[0])
        if isinstance(last.feed_forward, MoELayer):
            assert isinstance(first.feed_forward, MoELayer)
            watch(last.feed_forward, "MoE layer", lambda output: output.hidden)
            router, first_router = last.feed_forward.router, first.feed_forward.router

            def note_router(module: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
                routing = routing.exact()
                sums = torch.zeros(tokens).index_add(0, routing.token_index, routing.weight)
                found["sum of weights"] = sums, None
                logits, as_before = router.logits(*inputs), first_router.logits(*inputs)
                if logits is not None:
                    found["router logits"] = logits, as_before

            handles.append(router.register_forward_hook(note_router))
        self.model.train()
        try:
            logits = self.model.logits(batch.input_ids, batch.document_ids, batch.position_ids, context)
        finally:
            for handle in handles:
                handle.remove()
        stream = found["residual stream"][0]
        labels = batch.labels.clamp(min=0)[..., None]
        as_before = functional.linear(start.norm(stream, None)[1], start.head_weight)
        found["logits"] = logits.gather(-1, labels), as_before.gather(-1, labels)
        return found


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares of one quantity over the recorded steps.

    Attributes:
        size: Of the quantity itself.
        change: Of what training has made of it: its difference from what it was before the first step. For the logits
            of model and router that part which the change of their own matrices makes.
    """

    size: list[float]
    change: list[float]


def coordinates(
    config: Config, steps: Sequence[int], rate: float, rows: int = 8, seed: int = 0
) -> dict[str, Coordinates]:
    """Train on one batch of random tokens at a constant rate, and record each of ``QUANTITIES`` on it.

    Args:
        config: Model, router and optimizer; the batch has rows of ``model.sequence_length``.
        steps: Numbers of updates after which to record, ascending, the first of them 0.
        rate: Learning rate.
        rows: Rows of the batch.
        seed: Of the weights; the tokens are always the same.
    """
    batch = random_batch(config, rows)
    run = PlainTraining(config, seed)
    first_model = copy.deepcopy(run.model)
    found: dict[str, Coordinates] = {}
    start: dict[str, Tensor] = {}
    for step in range(steps[-1] + 1):
        if step in steps:
            for name, (values, as_before) in run.activations(batch, first_model).items():
                before = start.setdefault(name, values) if as_before is None else as_before
                each = found.setdefault(name, Coordinates([], []))
                each.size.append(_rms(values))
                each.change.append(_rms(values - before))
        if step < steps[-1]:
            run.step(batch, rate)
    return found


def random_batch(config: Config, rows: int) -> MicroBatch:
    """Uniformly random tokens, one document a row."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, (rows, config.model.sequence_length + 1))
    return build_micro_batch(tokens, np.zeros(tokens.shape, dtype=bool), np.arange(rows), True)


def growth(shapes: Sequence[float], sizes: Sequence[float]) -> float:
    """Exponent of the power law ``size ~ shape ** exponent`` that fits best; NaN where a size is 0."""
    if min(sizes) <= 0:
        return math.nan
    return float(np.polyfit(np.log(shapes), np.log(sizes), 1)[0])


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.double().square().mean()))
