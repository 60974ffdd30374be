"""The oracle: a training step as one readable program in one process, to which every fast path is compared.

float32, all experts local, plain loops over documents and experts, no DeepSpeed, no autograd function of ours. It
shares the initialisation and the layout of the weights with the model, and nothing else: it reads parameters, it never
calls the modules that hold them. The one exception is a router that it has no formula for: then it takes the router's
own float32 ``Routing`` and checks everything around it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, MicroBatch
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.attention import Attention
from moe_pretrain.model.block import Block
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.counter_noise import counter_uniform, start_noise
from moe_pretrain.moe.experts.config import MatrixProductConfig
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import (
    POOLED_LEVELS,
    AttentionStatistic,
    ExpertShard,
    ExpertStart,
    RoutingContext,
    StepUse,
    float32_parameters,
)
from moe_pretrain.verify.oracle_optimizers import Update, norms_by_part, rate_scale, update_of
from moe_pretrain.verify.oracle_parts import (
    combine_outputs,
    narrow,
    norm_heads,
    proxy_norms,
    rms_norm,
    rotate,
    run_expert,
    run_merged,
    run_shared,
    score,
    statistic_of_matrices,
    swiglu,
    widen,
)
from moe_pretrain.verify.oracle_routers import FORMULAS

SHARED_DROPOUT_STREAM = 9


@dataclass(frozen=True)
class StepRecord:
    """Everything that must not depend on how a step was computed.

    Attributes:
        loss: Cross-entropy per counted token of the global batch.
        aux: Each aux loss, unweighted, mean over MoE layers.
        gradients: Gradient of every parameter before clipping, experts stacked over all global ids.
        gradient_norm: Global norm of them.
        gradient_norms: The same of each part of the model: router, experts, rest.
        weights: float32 weights after the update.
        tokens_per_expert: Routes of text tokens ``[moe_layers, experts]``.
    """

    loss: float
    aux: dict[str, float]
    gradients: dict[str, Tensor]
    gradient_norm: float
    gradient_norms: Mapping[str, float]
    weights: dict[str, Tensor]
    tokens_per_expert: Tensor


@dataclass(frozen=True)
class _Rows:
    """The global batch: all rows of all micro-batches of all ranks, and where the cuts between them were.

    ``attention`` is the statistic ``[rows, sequence]`` that the router of the layer at hand wants, ``carried`` what the
    router of the MoE layer below hands to it, ``[tokens, experts]``, and ``pass_index`` the pass over them.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    position_ids: Tensor
    row_positions: Tensor
    rows_per_micro_batch: list[int]
    attention: Tensor | None = None
    carried: Tensor | None = None
    pass_index: int = 0


@dataclass(frozen=True)
class _Layer:
    """One MoE layer's result: hidden states, aux losses, routes of text tokens per expert, the scheme's own sums.

    ``carried`` is for the router of the next MoE layer.
    """

    hidden: Tensor
    aux: dict[str, Tensor]
    tokens_per_expert: Tensor
    sums: Tensor
    carried: Tensor | None


class Oracle:
    """Trains ``config`` from its initial weights, one global batch per call."""

    def __init__(
        self,
        config: Config,
        num_steps: int,
        dtype: Dtype = "float32",
        change_model: Callable[[DecoderLM], None] | None = None,
    ):
        """Start from the weights that every run of ``config`` starts from.

        Args:
            config: What the run under test uses; its topology does not matter here.
            num_steps: Steps of the run, for the learning-rate schedule.
            dtype: The run's. bfloat16 rounds the initial weights, which is what such a run's float32 master weights
                start from; every computation stays float32.
            change_model: Edits the initial weights.
        """
        self.config, self.num_steps = config, num_steps
        self.update = update_of(config.optimizer.name)
        self.model = DecoderLM(config.model, config.router, ExpertShard(0, 1))
        initialise(self.model, config.seed)
        if change_model is not None:
            change_model(self.model)
        if dtype == "bfloat16":
            kept = {id(parameter) for parameter in float32_parameters(self.model)}
            for parameter in self.model.parameters():
                if id(parameter) not in kept:
                    parameter.data = parameter.data.bfloat16().float()
        self.weights = dict(self.model.named_parameters())
        self._last_routes: dict[int, Tensor] = {}  # by layer; for the balance loss of load_balance_level=last_step
        roles = parameter_roles(self.model)
        self.moments = {
            name: {moment: torch.zeros_like(weight) for moment in config.optimizer.state(roles[name]).moments}
            for name, weight in self.weights.items()
        }

    def run(self, steps: Sequence[Sequence[MicroBatch]]) -> list[StepRecord]:
        """``step`` for each of ``steps``, from the first on."""
        return [self.step(number, micro_batches) for number, micro_batches in enumerate(steps)]

    def step(self, step: int, micro_batches: Sequence[MicroBatch]) -> StepRecord:
        """One optimizer step on the global batch that ``micro_batches``, in any order, make up."""
        rows = _join(micro_batches)
        weight = self.config.router.two_pass_weight
        passes = [self._trunk(step, rows, index) for index in range(1 if weight is None else 2)]
        losses = [self._cross_entropy(hidden, rows.labels) for hidden, _ in passes]
        layers = [_mean_of_passes(of_layer) for of_layer in zip(*(own for _, own in passes), strict=True)]
        loss, total = torch.stack(losses).mean(), torch.stack(losses).sum()
        weighted: dict[str, list[tuple[float, Tensor]]] = {}
        for module, of_module in zip(self.model.moe_layers(), layers, strict=True):
            for name, value in of_module.aux.items():
                weighted.setdefault(name, []).append((module.router.aux_weights[name], value))
                total = total + weighted[name][-1][0] * value / len(layers)
        aux = {}
        for name, own in weighted.items():  # of layers that differ: by their coefficients, if they have any
            shares = torch.tensor([share for share, _ in own])
            shares = shares if shares.any() else torch.ones_like(shares)
            aux[name] = (torch.stack([value for _, value in own]) * shares).sum() / shares.sum()
        if weight is not None:
            aux["consistency"] = self._divergence(passes[0][0], passes[1][0], rows.document_ids >= 0)
            total = total + weight * aux["consistency"]
        gradients = torch.autograd.grad(total, list(self.weights.values()), allow_unused=True)
        by_name = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True)
        }
        self._drop_shared(step, by_name)
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in by_name.values()))
        self._update(step, by_name, norm)
        text_tokens = int((rows.document_ids >= 0).sum())
        mean = sum(float(layer.tokens_per_expert.sum()) for layer in layers) / max(1, len(layers) * text_tokens)
        for layer, result in zip(self.model.moe_layers(), layers, strict=True):
            self._last_routes[layer.router.layer] = result.tokens_per_expert
            started = layer.router.after_step(StepUse(result.tokens_per_expert, text_tokens, mean, result.sums))
            if started is not None:
                self._start_expert(layer, started)
        return StepRecord(
            loss.item(),
            {name: value.item() for name, value in aux.items()},
            by_name,
            norm,
            norms_by_part(by_name),
            {name: weight.detach().clone() for name, weight in self.weights.items()},
            torch.stack([layer.tokens_per_expert for layer in layers]) if layers else torch.zeros(0, 0),
        )

    @torch.no_grad()
    def logits(self, micro_batch: MicroBatch) -> Tensor:
        """Next-token logits ``[batch, sequence, vocab]`` in evaluation."""
        self.model.eval()
        hidden, _ = self._trunk(0, _join([micro_batch]))
        self.model.train()
        return hidden @ self.model.head_weight.T

    def _trunk(self, step: int, rows: _Rows, pass_index: int = 0) -> tuple[Tensor, list[_Layer]]:
        """Hidden states after the last norm, and every MoE layer's result."""
        rows = replace(rows, pass_index=pass_index)
        epsilon = self.config.model.norm_epsilon
        hidden = self.model.embedding.weight[rows.input_ids]
        layers: list[_Layer] = []
        for block in self.model.blocks:
            assert isinstance(block, Block)
            normed = rms_norm(hidden, block.attention_norm.weight, epsilon)
            router = block.feed_forward.router if isinstance(block.feed_forward, MoELayer) else None
            wanted = None if router is None else router.attention_statistic
            attended, statistic = self._attention(normed, block.attention, rows, wanted)
            hidden = hidden + attended
            normed = rms_norm(hidden, block.feed_forward_norm.weight, epsilon)
            if isinstance(block.feed_forward, MoELayer):
                seen = replace(rows, attention=statistic, carried=layers[-1].carried if layers else None)
                layer = self._moe(normed.flatten(0, 1), block.feed_forward, step, seen)
                layers.append(layer)
                hidden = hidden + layer.hidden.view_as(hidden)
            else:
                weights = block.feed_forward
                hidden = hidden + swiglu(normed, weights.in_weight, weights.out_weight)
        return rms_norm(hidden, self.model.norm.weight, epsilon), layers

    def _attention(
        self, normed: Tensor, attention: Attention, rows: _Rows, wanted: AttentionStatistic | None
    ) -> tuple[Tensor, Tensor | None]:
        """Explicit softmax over the earlier positions of the same document, one head at a time.

        Also the statistic of it that the layer's router wants, ``[rows, sequence]``.
        """
        model = self.config.model
        size, shared = model.attention_head_size, model.num_heads // model.num_key_value_heads
        num_query, num_key = model.num_heads * size, model.num_key_value_heads * size
        epsilon = model.norm_epsilon
        projected = normed @ attention.qkv_weight.T
        output, statistics = [], []
        for row, documents, positions in zip(projected, rows.document_ids, rows.position_ids, strict=True):
            query, key, value = row.split([num_query, num_key, num_key], dim=-1)
            query, key = (
                norm_heads(model.qk_norm, part, None if norm is None else norm.weight, size, epsilon)
                for part, norm in ((query, attention.query_norm), (key, attention.key_norm))
            )
            heads, matrices = [], []
            for head in range(model.num_heads):
                of_query = slice(head * size, (head + 1) * size)
                of_key = slice(head // shared * size, (head // shared + 1) * size)
                turned_query = rotate(query[:, of_query], positions, model.rope_base)
                turned_key = rotate(key[:, of_key], positions, model.rope_base)
                scores = turned_query @ turned_key.T / math.sqrt(size)
                earlier = torch.ones_like(scores, dtype=torch.bool).tril()
                visible = earlier & (documents[:, None] == documents[None, :])
                matrices.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1))
                heads.append(matrices[-1] @ value[:, of_key])
            output.append(torch.cat(heads, dim=-1))
            if wanted is not None:
                statistics.append(statistic_of_matrices(wanted, matrices, documents))
        return torch.stack(output) @ attention.out_weight.T, torch.stack(statistics) if statistics else None

    def _moe(self, hidden: Tensor, layer: MoELayer, step: int, rows: _Rows) -> _Layer:
        """Loop over experts; aux losses are means over the text tokens of each cut, weighted by its share."""
        text = (rows.document_ids >= 0).flatten()
        length, moe = rows.document_ids.shape[1], self.config.model.moe
        # Only the micro-batch level, and a scheme in which tokens compete, look at how the batch was cut.
        level = self.config.router.of_layer(layer.router.layer).balance_level
        by_cut = level == "micro_batch" or layer.router.losses_depend_on_cut
        by_cut = by_cut or (layer.router.training and not layer.router.causal_in_training)
        cuts = rows.rows_per_micro_batch if by_cut else [len(rows.row_positions)]
        global_routes = None
        if level == "last_step" and layer.router.training:
            global_routes = self._last_routes.get(layer.router.layer)
        if level in POOLED_LEVELS and global_routes is None:
            global_routes = self._routes_of_cuts(hidden, layer, step, rows, cuts)
        output = torch.zeros_like(hidden)
        counts = torch.zeros(layer.kinds.total, dtype=torch.float64)
        sums = torch.zeros(layer.router.num_sums, dtype=torch.float64)
        aux: dict[str, Tensor] = {}
        carried: list[Tensor] = []
        first_row = 0
        for num_rows in cuts:
            part = slice(first_row * length, (first_row + num_rows) * length)
            context = _context(self.config, rows, step, first_row, num_rows, global_routes, layer)
            router = layer.router
            if (formula := FORMULAS.get(type(router))) is not None:
                last_routes = self._last_routes.get(router.layer)
                routed, weight, cut_aux = formula(hidden[part], router, context, last_routes)
            else:
                routed, weight, cut_aux, cut_sums, cut_carried = self._routing(hidden[part], router, context)
                sums += cut_sums
                carried += [] if cut_carried is None else [cut_carried]
            if isinstance(layer.experts, MergedExperts):
                counts += (weight.detach().double() * text[part, None]).sum(dim=0)
                merged = run_merged(layer.experts, hidden[part], weight, moe)
                output = output.index_add(0, torch.arange(part.start, part.stop), merged)
                first_row += num_rows
                continue
            inputs = narrow(layer.latent, hidden[part])
            results = torch.zeros(layer.kinds.total, *inputs.shape)
            for expert in range(layer.kinds.total):
                tokens = routed[:, expert].nonzero()[:, 0]
                counts[expert] += float(text[part][tokens].sum())
                result = run_expert(layer, expert, inputs[tokens], moe)
                results = results.index_put((torch.tensor(expert), tokens), result)
            of_part = combine_outputs(self.config.model.moe.combine, results, weight, routed)
            output = output.index_add(0, torch.arange(part.start, part.stop), widen(layer.latent, of_part))
            share = float(text[part].sum()) / float(text.sum())
            for name, value in cut_aux.items():
                aux[name] = aux.get(name, torch.zeros(())) + share * value
            first_row += num_rows
        if layer.shared_experts is not None:
            output = output + run_shared(layer.shared_experts, hidden, moe)
        return _Layer(output, aux, counts, sums, torch.cat(carried) if carried else None)

    @torch.no_grad()
    def _routes_of_cuts(
        self, hidden: Tensor, layer: MoELayer, step: int, rows: _Rows, cuts: Sequence[int]
    ) -> Tensor | None:
        """Routes per expert of the global batch where a router sees it in several cuts, else None."""
        if len(cuts) == 1:
            return None
        total = torch.zeros(layer.kinds.total, dtype=torch.float64)
        length, first_row = rows.document_ids.shape[1], 0
        for num_rows in cuts:
            context = _context(self.config, rows, step, first_row, num_rows, total, layer)
            part = slice(first_row * length, (first_row + num_rows) * length)
            total += layer.router(hidden[part], context).use.tokens_per_expert
            first_row += num_rows
        return total

    def _routing(
        self, hidden: Tensor, router: Router, context: RoutingContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """The same from the router's own decision, for schemes without a formula; its own sums, and ``carried``."""
        routing = router(hidden, context).exact()
        routes = (routing.token_index, routing.expert_index)
        empty = torch.zeros(hidden.shape[0], self.config.model.moe.kinds.total)
        return (
            empty.bool().index_put(routes, torch.tensor(True)),
            empty.index_put(routes, routing.weight),
            routing.aux,
            torch.zeros(router.num_sums, dtype=torch.float64) if routing.use.sums is None else routing.use.sums,
            routing.carried,
        )

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean over counted positions, from all logits at once."""
        counted = labels != IGNORE_INDEX
        log_probs = (hidden[counted] @ self.model.head_weight.T).log_softmax(dim=-1)
        return -log_probs.gather(1, labels[counted][:, None]).sum() / counted.sum().clamp(min=1)

    def _divergence(self, first: Tensor, second: Tensor, text: Tensor) -> Tensor:
        """Mean over text of ``(KL(p1 || p2) + KL(p2 || p1)) / 2``, from all logits at once."""
        logs = [(hidden[text] @ self.model.head_weight.T).log_softmax(dim=-1) for hidden in (first, second)]
        ways = [(one.exp() * (one - other)).sum(dim=-1) for one, other in (logs, logs[::-1])]
        return (ways[0] + ways[1]).sum() / 2 / text.sum().clamp(min=1)

    def _drop_shared(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Zero the gradients of cores that experts share in the layers that this step leaves alone."""
        experts = self.config.model.moe.experts
        if not isinstance(experts, MatrixProductConfig):
            return
        for index, block in enumerate(self.model.blocks):
            keys = (self.config.seed, SHARED_DROPOUT_STREAM, step, index)
            drawn = float(counter_uniform(torch.zeros(1, dtype=torch.int64), 1, *keys))
            if drawn < experts.shared_gradient_dropout and isinstance(block.feed_forward, MoELayer):
                for name in ("gate", "up", "out"):
                    gradients[f"blocks.{index}.feed_forward.experts.{name}_shared"].zero_()

    @torch.no_grad()
    def _start_expert(self, layer: MoELayer, start: ExpertStart) -> None:
        """Weights of an expert that has come into use, and nothing known of its slot to the optimizer."""
        prefix = f"blocks.{layer.router.layer}.feed_forward."
        for number, (name, weight) in enumerate(layer.experts.named_parameters()):
            if start.sources is not None:
                mean = torch.stack([weight[expert] for expert in start.sources.nonzero()[:, 0].tolist()]).mean(dim=0)
                noise = start_noise(mean.shape, self.config.seed, start.key, layer.router.layer, number)
                weight[start.slot] = mean + start.noise * mean.norm() / math.sqrt(mean.numel()) * noise
            for moment in self.moments[f"{prefix}experts.{name}"].values():
                moment[start.slot] = 0
        for name in start.router_rows:
            for moment in self.moments[f"{prefix}router.{name}"].values():
                moment[start.slot] = 0

    @torch.no_grad()
    def _update(self, step: int, gradients: dict[str, Tensor], norm: float) -> None:
        """Clip by the global norm, then the optimizer's own formula."""
        config, clipping = self.config.optimizer, self.config.engine.gradient_clipping
        scale = min(1.0, clipping / (norm + 1e-6)) if clipping else 1.0
        rate = config.learning_rate * self.config.schedule.factor(step, self.num_steps)
        for name, weight in self.weights.items():
            own = rate_scale(self.config, name, weight)
            gradient = gradients[name] * scale
            self.update(Update(self.config, name, weight, gradient, self.moments[name], rate, own, step + 1))


def _mean_of_passes(layers: Sequence[_Layer]) -> _Layer:
    """One MoE layer over several passes, the hidden states those of the first."""
    aux = {name: torch.stack([layer.aux[name] for layer in layers]).mean() for name in layers[0].aux}
    counts, sums = (
        torch.stack([getattr(layer, name) for layer in layers]).mean(dim=0) for name in ("tokens_per_expert", "sums")
    )
    return _Layer(layers[0].hidden, aux, counts, sums, layers[0].carried)


def _join(micro_batches: Sequence[MicroBatch]) -> _Rows:
    parts = ("input_ids", "labels", "document_ids", "position_ids", "row_positions")
    joined: dict[str, Any] = {part: torch.cat([getattr(batch, part) for batch in micro_batches]) for part in parts}
    return _Rows(**joined, rows_per_micro_batch=[len(batch.row_positions) for batch in micro_batches])


def _context(
    config: Config,
    rows: _Rows,
    step: int,
    first_row: int,
    num_rows: int,
    global_routes: Tensor | None,
    layer: MoELayer,
) -> RoutingContext:
    """Facts that routers may know of ``num_rows`` rows: the global batch unless ``global_routes`` is given."""
    part = slice(first_row, first_row + num_rows)
    length = rows.document_ids.shape[1]
    return RoutingContext(
        token_mask=(rows.document_ids[part] >= 0).flatten(),
        token_position=(rows.row_positions[part, None] * length + torch.arange(length)).flatten(),
        num_sequences=num_rows,
        seed=config.seed,
        step=step,
        sum_over_global_batch=lambda layer, counts: counts if global_routes is None else global_routes,
        global_tokens=int((rows.document_ids >= 0).sum()),
        token_ids=rows.input_ids[part].flatten(),
        document_ids=rows.document_ids[part].flatten(),
        attention=None if rows.attention is None else rows.attention[part].flatten(),
        score_routes=partial(score, layer, config.model.moe) if layer.router.needs_expert_scores else None,
        proxy_norms=partial(proxy_norms, layer) if layer.router.needs_proxy_norms and layer.router.training else None,
        carried=None if rows.carried is None else rows.carried[first_row * length : (first_row + num_rows) * length],
        pass_index=rows.pass_index,
    )
