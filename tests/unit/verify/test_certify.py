"""The certificate of a routing scheme: what ships passes, the README's example passes, and broken schemes do not."""

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from helpers.builders import SCHEME_WORDS
from helpers.processes import run_on_ranks

from moe_pretrain import cli
from moe_pretrain.commands import certify as certify_command
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run, preflight
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.train.build import train
from moe_pretrain.verify.certificate import certify as certificate
from moe_pretrain.verify.certificate.certify import PROPERTIES, PropertyResult, ask, examine
from moe_pretrain.verify.certificate.conduct_properties import CONDUCT
from moe_pretrain.verify.certificate.configured_properties import CONFIGURED
from moe_pretrain.verify.certificate.dependence_properties import DEPENDENCE
from moe_pretrain.verify.certificate.derivative_properties import DERIVATIVES
from moe_pretrain.verify.certificate.evening_properties import EVENING
from moe_pretrain.verify.certificate.loss_properties import LOSSES
from moe_pretrain.verify.certificate.range_properties import RANGE
from moe_pretrain.verify.certificate.state_properties import STATE as OF_STATE
from moe_pretrain.verify.certificate.subject import Subject
from moe_pretrain.verify.certificate.symmetry_properties import SYMMETRY
from moe_pretrain.verify.verify import verify

# The README shows this file word for word.
EXAMPLE = '''\
"""A cosine router: every expert is a direction, and a token goes to those that point most its way."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import normalize

from moe_pretrain.moe import BalancedRouter, BalancedRouterConfig, BalanceLevel, FixedCountConfig


@dataclass(frozen=True, kw_only=True)
class CosineConfig(FixedCountConfig, BalancedRouterConfig):
    name: Literal["cosine"] = "cosine"
    top_k: int = 2
    temperature: float = 0.1
    load_balance_weight: float = 0.01
    load_balance_level: BalanceLevel = "last_step"
    router_z_weight: float = 0.0

    def build(self, hidden_size, num_experts, layer):
        return CosineRouter(self, hidden_size, num_experts, layer)


class CosineRouter(BalancedRouter):
    def __init__(self, config, hidden_size, num_experts, layer):
        super().__init__(config, num_experts, layer)
        self.top_k, self.temperature = config.top_k, config.temperature
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, hidden, context):
        tokens, experts = normalize(hidden.float(), eps=1e-6), normalize(self.weight, eps=1e-6)
        logits = tokens @ experts.t() / self.temperature
        probs = logits.softmax(dim=1)
        expert = probs.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        weight = probs.gather(1, expert)
        token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(self.top_k)
        return self.route(logits, probs, token, expert.flatten(), weight.flatten(), self.top_k, context)
'''

VARIANT = """\
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig
from moe_pretrain.moe.types import BalanceLevel


@dataclass(frozen=True, kw_only=True)
class VariantConfig(TopKRouterConfig):
    name: Literal["variant"] = "variant"
    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    weights: Literal["renormalised", "raw"] = "raw"
    weight_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    projection_size: int | None = None
    jitter: float = 0.0
    load_balance_weight: float = 0.01
    load_balance_level: BalanceLevel = "last_step"
    router_z_weight: float = 0.001

    def build(self, hidden_size, num_experts, layer):
        return Variant(self, hidden_size, num_experts, layer)


class Variant(TopKRouter):
"""

CAUSALITY = {"causality in training", "causality in evaluation"}
CUTS = {"cut of the batch in training", "cut of the batch in evaluation", "batch of one in evaluation"}
PARITY = "gradient parity with the oracle"
OTHERS = "others"

# What is wrong -> (the methods that do it, the rows that fail; with OTHERS, those at least).
BROKEN = {
    "centres logits over the batch, later tokens included": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits - logits.mean(dim=0)
        """,
        {
            "documents apart in evaluation",
            "documents apart in training",
            "large batch in evaluation",
            "large batch in training",
            *CAUSALITY,
            *CUTS,
            "padding ignored",
            PARITY,
        },
    ),
    "centres in training only": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits - logits.mean(dim=0) if self.training else logits
        """,
        {
            "documents apart in training",
            "evaluation as in training",
            "large batch in training",
            "causality in training",
            "cut of the batch in training",
            "padding ignored",
            PARITY,
        },
    ),
    "routes a token to one expert twice": (
        """
        def select(self, scores, logits):
            return super().select(scores, logits)[:, :1].expand(-1, self.config.top_k)
        """,
        {"conservation of routes", "finite at ties", PARITY},
    ),
    "sorts routes by expert": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            order = routing.expert_index.argsort(stable=True)
            token, expert, weight = routing.token_index, routing.expert_index, routing.weight
            return replace(routing, token_index=token[order], expert_index=expert[order], weight=weight[order])
        """,
        {"conservation of routes", "combine of identity experts", OTHERS},
    ),
    "detaches the weights": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight.detach())
        """,
        {"weights' gradient is a derivative", "router gradient from the LM loss", "router gradient with top_k=1"},
    ),
    "has weights that are always 1": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight / routing.weight.clamp(min=1e-20))
        """,
        {"router gradient from the LM loss", "router gradient with top_k=1"},
    ),
    "always has bfloat16 logits": (
        """
        def logits(self, hidden, context):
            return (hidden.bfloat16() @ self.weight.bfloat16().t()).float()
        """,
        {"float32 routing", PARITY},
    ),
    "has bfloat16 logits in a bfloat16 engine": (
        """
        def logits(self, hidden, context):
            return (hidden @ self.weight.to(hidden.dtype).t()).float()
        """,
        {"float32 routing"},
    ),
    "has bfloat16 weights": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight.bfloat16())
        """,
        {"float32 routing", PARITY},
    ),
    "scales the balance loss by top_k": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] *= self.config.top_k
            return routing
        """,
        {"balance loss at uniform", "balance loss at collapse"},
    ),
    "counts padding": (
        """
        def forward(self, hidden, context):
            return super().forward(hidden, replace(context, token_mask=torch.ones_like(context.token_mask)))
        """,
        {"padding ignored", "conservation of routes", "no text tokens", PARITY},
    ),
    "divides by the number of text tokens": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] /= context.token_mask.sum() / context.token_mask.sum()
            return routing
        """,
        {"no text tokens"},
    ),
    "chooses with Python's random numbers": (
        """
        def select(self, scores, logits):
            return (super().select(scores, logits) + random.randrange(self.num_experts)) % self.num_experts
        """,
        {"determinism", "recompute", OTHERS},
    ),
    "keeps its state in an attribute": (
        """
        def select(self, scores, logits):
            return super().select(scores + getattr(self, "bias", 0.0), logits)

        def after_step(self, use):
            push = (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
            self.bias = getattr(self, "bias", 0.0) + 0.01 * push
        """,
        {"state round trip"},
    ),
    "keeps its state where no attribute shows it": (
        """
        def select(self, scores, logits):
            return super().select(scores + self.__dict__.setdefault("state", {}).get("bias", 0.0), logits)

        def after_step(self, use):
            push = (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
            self.state["bias"] = self.state.get("bias", 0.0) + 0.01 * push
        """,
        {"state round trip"},
    ),
    "moves its state in every forward pass": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, hidden, context):
            self.passes += 1
            return super().forward(hidden, context)
        """,
        {"state round trip"},
    ),
    "has a bfloat16 buffer": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros((), dtype=torch.bfloat16))
        """,
        {"float32 routing"},
    ),
    "divides by the spread of the logits": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits / logits.std(dim=-1, keepdim=True)
        """,
        {"finite at ties", "balance loss at uniform"},
    ),
    "has a loss without coefficient": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["forgotten"] = routing.weight.mean()
            return routing
        """,
        {"aux losses named", OTHERS},
    ),
}

LATER_ROWS = (*RANGE, *CONDUCT, *SYMMETRY, *CONFIGURED, *LOSSES, *OF_STATE, *EVENING, *DEPENDENCE)
NEVER_BLAMED = ("determinism", "experts get their best tokens", *LATER_ROWS)

SMALL = ("engine.device=cpu", "model.num_layers=1", "model.moe.num_experts=6")


def write(folder: Path, source: str) -> str:
    """A router file with ``source``, as the override that chooses it."""
    file = folder / "my_router.py"
    file.write_text(source)
    return f"router_file={file}"


def variant(folder: Path, methods: str) -> str:
    return write(folder, VARIANT + textwrap.indent(textwrap.dedent(methods), "    "))


def failing(rows: Iterable[PropertyResult]) -> dict[str, str]:
    return {row.property: row.detail for row in rows if row.verdict == "FAIL"}


@pytest.mark.parametrize("wrong", BROKEN)
@pytest.mark.fast(
    "counts padding",
)
def test_broken_schemes_are_rejected(wrong: str, tmp_path: Path) -> None:
    methods, expected = BROKEN[wrong]
    found = set(failing(examine(load([variant(tmp_path, methods), *SMALL]))))
    assert found >= expected - {OTHERS}
    # Those that name the same fault once more.
    overlapping = {*DERIVATIVES, *LATER_ROWS, "experts get their best tokens"}
    assert found - overlapping == expected - overlapping or OTHERS in expected


def test_what_is_not_finite_is_said_with_the_parameters_that_made_it_so(tmp_path: Path) -> None:
    learnt_temperature = """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.log_temperature = torch.nn.Parameter(torch.empty(1))
            self.start_values = {**self.start_values, "log_temperature": -2.0}

        def logits(self, hidden, context):
            return super().logits(hidden, context) / self.log_temperature.exp()
    """
    found = ask("finite at ties", Subject(load([variant(tmp_path, learnt_temperature), *SMALL])))
    assert found.verdict == "FAIL"
    assert found.detail == "sure probabilities (parameters times 10,000): a weight is not finite"


NEXT_TOKEN = """
            rows = hidden.unflatten(0, (context.num_sequences, -1))
            hidden = (hidden + torch.cat([rows[:, 1:], rows[:, -1:]], dim=1).flatten(0, 1)) / 2
"""

# One wrong thing in an otherwise sound router -> (the methods that do it, the row that says so).
SUBTLE = {
    "looks ahead from step 1000 on": (
        f"""
        def logits(self, hidden, context):
            if context.step < 1000:
                return super().logits(hidden, context){NEXT_TOKEN}
            return super().logits(hidden, context)
        """,
        "causality in training",
    ),
    "looks ahead in evaluation after many steps": (
        f"""
        def logits(self, hidden, context):
            if self.training or context.step < 300_000:
                return super().logits(hidden, context){NEXT_TOKEN}
            return super().logits(hidden, context)
        """,
        "causality in evaluation",
    ),
    "centres logits over the batch from step 500 on": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits - logits.mean(dim=0) if context.step > 500 else logits
        """,
        "cut of the batch in training",
    ),
    "has a balance loss without gradient": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] = routing.aux["load_balance"].detach()
            return routing
        """,
        "aux losses move the router",
    ),
    "has a constant for a z-loss": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["router_z"] = torch.tensor(1.0)
            return routing
        """,
        "aux losses move the router",
    ),
    "has twice the balance loss's gradient": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            loss = routing.aux["load_balance"]
            routing.aux["load_balance"] = 2 * loss - loss.detach()
            return routing
        """,
        "aux losses move the router",
    ),
    "detaches the second weight": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            first = torch.arange(len(routing.weight)) % 2 == 0
            return replace(routing, weight=torch.where(first, routing.weight, routing.weight.detach()))
        """,
        "weights' gradient is a derivative",
    ),
    "doubles the weights' gradient": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=2 * routing.weight - routing.weight.detach())
        """,
        "weights' gradient is a derivative",
    ),
    "keeps the weights' gradient from its input": (
        """
        def logits(self, hidden, context):
            return super().logits(hidden.detach(), context)
        """,
        "weights' gradient is a derivative",
    ),
    "adds the first token of the row": (
        """
        def logits(self, hidden, context):
            rows = hidden.unflatten(0, (context.num_sequences, -1))
            return super().logits((rows + 0.5 * rows[:, :1]).flatten(0, 1), context)
        """,
        "documents apart in training",
    ),
    "adds a little of the previous token in evaluation": (
        """
        def logits(self, hidden, context):
            rows = hidden.unflatten(0, (context.num_sequences, -1))
            before = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1).flatten(0, 1)
            return super().logits(hidden if self.training else hidden + 1e-3 * before, context)
        """,
        "documents apart in evaluation",
    ),
    "adds a running mean of the row": (
        """
        def logits(self, hidden, context):
            rows = hidden.unflatten(0, (context.num_sequences, -1))
            mean = rows.cumsum(dim=1) / torch.arange(1, rows.shape[1] + 1)[:, None]
            return super().logits(hidden - mean.flatten(0, 1), context)
        """,
        "documents apart in training",
    ),
    "draws noise in evaluation by position": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            if self.training:
                return logits
            return logits + 0.5 * counter_uniform(context.token_position, self.num_experts, 7)
        """,
        "no seed or step in evaluation",
    ),
    "draws noise in evaluation by seed": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            if self.training:
                return logits
            return logits + 0.5 * counter_uniform(torch.arange(len(hidden)) % 12, self.num_experts, context.seed)
        """,
        "no seed or step in evaluation",
    ),
    "cools down in evaluation": (
        """
        def logits(self, hidden, context):
            return super().logits(hidden, context) * (1.0 if self.training else 1 + context.step / 1e5)
        """,
        "no seed or step in evaluation",
    ),
    "drops above a capacity with a floor": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            capacity = max(64, int(2.5 * len(hidden) / self.num_experts))
            kept = kept_within(routing.expert_index, self.num_experts, capacity)
            token, expert, weight = (v[kept] for v in (routing.token_index, routing.expert_index, routing.weight))
            counts = torch.bincount(expert[context.token_mask[token]], minlength=self.num_experts).double()
            use = replace(routing.use, tokens_per_expert=counts)
            routing = replace(routing, token_index=token, expert_index=expert, weight=weight)
            return replace(routing, routes_per_token=None, use=use)
        """,
        "large batch in evaluation",
    ),
    "has weights of zero above a capacity with a floor, in training": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            if not self.training or len(hidden) < 256:
                return routing
            kept = kept_within(routing.expert_index, self.num_experts, int(2.5 * len(hidden) / self.num_experts))
            return replace(routing, weight=routing.weight * kept)
        """,
        "large batch in training",
    ),
    "sharpens in large batches": (
        """
        def logits(self, hidden, context):
            return super().logits(hidden, context) * (1.5 if len(hidden) > 500 else 1.0)
        """,
        "large batch in training",
    ),
    "counts padding in the entropy": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            probs = self.logits(hidden, context).softmax(dim=1)
            entropy = -(probs * probs.log()).sum(dim=1).mean() * context.token_mask.sum()
            return replace(routing, use=replace(routing.use, router_entropy=entropy.detach().double()))
        """,
        "padding ignored",
    ),
    "counts padding in its sums": (
        """
        num_sums = 1

        def sums(self, scores, context):
            return scores.sum()[None].double() if self.training else None
        """,
        "padding ignored",
    ),
    "moves a bias by the counts of its own tokens": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros(self.num_experts))
            self.register_buffer("own", torch.zeros(self.num_experts), persistent=False)

        def select(self, scores, logits):
            chosen = super().select(scores + self.bias, logits)
            if self.training:
                self.own = torch.bincount(chosen.flatten(), minlength=self.num_experts).float()
            return chosen

        def after_step(self, use):
            self.bias += 0.001 * torch.sign(self.own.mean() - self.own)
        """,
        "state alike on ranks",
    ),
    "averages a threshold over its own tokens": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("level", torch.zeros(()))
            self.seen = []

        def select(self, scores, logits):
            self.seen.append(float(scores.std()))
            return super().select(scores, logits)

        def after_step(self, use):
            self.level.fill_(sum(self.seen) / len(self.seen))
            self.seen.clear()
        """,
        "state alike on ranks",
    ),
    "calls its balance loss balance, times num_experts": (
        """
        @property
        def aux_weights(self):
            return {"balance": 0.01}

        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, aux={"balance": routing.aux["load_balance"] * self.num_experts})
        """,
        "balance loss at uniform",
    ),
    "calls half of a balance loss evenness": (
        """
        @property
        def aux_weights(self):
            return {"evenness": 0.01}

        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, aux={"evenness": routing.aux["load_balance"] / 2})
        """,
        "balance loss at collapse",
    ),
    "has a temperature in evaluation": (
        """
        def logits(self, hidden, context):
            return super().logits(hidden, context) / (1 if self.training else 4)
        """,
        "evaluation as in training",
    ),
    "renormalises its weights in evaluation": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            if self.training:
                return routing
            weight = routing.weight.view(-1, 2)
            return replace(routing, weight=(weight / weight.sum(dim=1, keepdim=True)).flatten())
        """,
        "evaluation as in training",
    ),
    "detaches its weights from step 10 on": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight.detach()) if context.step >= 10 else routing
        """,
        "every step and layer",
    ),
    "looks ahead from step 100 to step 500": (
        f"""
        def logits(self, hidden, context):
            if not 100 <= context.step < 500:
                return super().logits(hidden, context){NEXT_TOKEN}
            return super().logits(hidden, context)
        """,
        "every step and layer",
    ),
    "looks ahead in the upper layers of a deep model": (
        f"""
        def logits(self, hidden, context):
            if self.layer < 5:
                return super().logits(hidden, context){NEXT_TOKEN}
            return super().logits(hidden, context)
        """,
        "every step and layer",
    ),
    "has a balance loss with a gradient in the lowest layer alone": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            if self.layer > 0:
                routing.aux["load_balance"] = routing.aux["load_balance"].detach()
            return routing
        """,
        "every step and layer",
    ),
    "reads the mean of its chunk of 64 tokens in long rows": (
        """
        def logits(self, hidden, context):
            if len(hidden) // context.num_sequences >= 64:
                chunks = hidden.unflatten(0, (-1, 64))
                hidden = (chunks + chunks.mean(dim=1, keepdim=True)).flatten(0, 1)
            return super().logits(hidden, context)
        """,
        "long rows",
    ),
    "sharpens above 4096 tokens": (
        """
        def logits(self, hidden, context):
            return super().logits(hidden, context) * (1.5 if len(hidden) > 4096 else 1.0)
        """,
        "long rows",
    ),
    "counts in float16": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            counts = routing.use.tokens_per_expert.half().double()
            return replace(routing, use=replace(routing.use, tokens_per_expert=counts))
        """,
        "long rows",
    ),
    "sums the entropy in bfloat16": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            entropy = routing.use.router_entropy.bfloat16().double()
            return replace(routing, use=replace(routing.use, router_entropy=entropy))
        """,
        "long rows",
    ),
    "knows its place in the row, and forgets what is in the cache": (
        """
        def logits(self, hidden, context):
            place = torch.arange(len(hidden)) % (len(hidden) // context.num_sequences)
            return super().logits(hidden, context) + (place[:, None] + torch.arange(self.num_experts)).sin()
        """,
        "a new token alone",
    ),
    "gives a single token one expert": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            first = torch.arange(len(routing.weight)) % 2 == 0
            return replace(routing, weight=routing.weight * first) if len(hidden) == 1 else routing
        """,
        "a new token alone",
    ),
    "draws the same noise in every layer": (
        """
        def logits(self, hidden, context):
            keys = context.seed, 7, context.step
            noise = counter_uniform(context.token_position, self.num_experts, *keys)
            return super().logits(hidden, context) + (0.1 * noise if self.training else 0.0)
        """,
        "noise",
    ),
    "draws the same noise in every step": (
        """
        def logits(self, hidden, context):
            keys = context.seed, 7, self.layer
            noise = counter_uniform(context.token_position, self.num_experts, *keys)
            return super().logits(hidden, context) + (0.1 * noise if self.training else 0.0)
        """,
        "noise",
    ),
    "draws noise by a position in float32": (
        """
        def logits(self, hidden, context):
            position = context.token_position.float().long()
            noise = counter_uniform(position, self.num_experts, context.seed, 7, context.step, self.layer)
            return super().logits(hidden, context) + (0.1 * noise if self.training else 0.0)
        """,
        "noise",
    ),
    "scales its input in place": (
        """
        def logits(self, hidden, context):
            hidden.data.mul_(1.05)
            return super().logits(hidden, context)
        """,
        "leaves alone what it is given",
    ),
    "marks tokens as padding in place": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            context.token_mask[-1] = False
            return routing
        """,
        "leaves alone what it is given",
    ),
    "sets the seed of everybody": (
        """
        def logits(self, hidden, context):
            torch.manual_seed(context.seed + context.step)
            return super().logits(hidden, context)
        """,
        "leaves alone what it is given",
    ),
    "makes shares of a step's counts in place": (
        """
        def after_step(self, use):
            use.tokens_per_expert.div_(use.tokens_per_expert.sum())
        """,
        "leaves alone what it is given",
    ),
    "shares its bias with all routers": (
        """
        shared = 0.0

        def select(self, scores, logits):
            return super().select(scores + Variant.shared, logits)

        def after_step(self, use):
            push = (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
            Variant.shared = Variant.shared + 0.1 * push
        """,
        "leaves alone what it is given",
    ),
    "balances the first half of each row": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            length = len(hidden) // context.num_sequences
            text = context.token_mask & (torch.arange(len(hidden)) % length < length // 2)
            probs, counts = self.logits(hidden, context).softmax(dim=1), routing.use.tokens_per_expert[None]
            routing.aux["load_balance"] = load_balance_loss(probs, counts, text)
            return routing
        """,
        "losses are means of the text",
    ),
    "has a loss that is a sum": (
        """
        @property
        def aux_weights(self):
            return super().aux_weights | {"confidence": 0.01}

        def own_losses(self, probs, context):
            return {"confidence": (probs.square().sum(dim=1) * context.token_mask).sum()}
        """,
        "losses are means of the text",
    ),
    "does not ask for the global batch's routes": (
        """
        needs_global_routes = False
        """,
        "losses are means of the text",
    ),
    "has a variation of the micro-batch for a loss, and does not say so": (
        """
        @property
        def aux_weights(self):
            return super().aux_weights | {"variation": 0.01}

        def own_losses(self, probs, context):
            return {"variation": (probs * context.token_mask[:, None]).sum(dim=0).var() / context.token_mask.sum() ** 2}
        """,
        "losses are means of the text",
    ),
    "does not square its z-loss": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["router_z"] = routing.aux["router_z"].sqrt()
            return routing
        """,
        "entropy and losses at uniform",
    ),
    "reports the entropy of the chosen experts' weights": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            weight = routing.weight.detach().view(-1, 2)
            weight = weight / weight.sum(dim=1, keepdim=True)
            entropy = -(torch.special.xlogy(weight, weight).sum(dim=1) * context.token_mask).sum().double()
            return replace(routing, use=replace(routing.use, router_entropy=entropy))
        """,
        "entropy and losses at uniform",
    ),
    "has a balance loss for six experts, whatever their number": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] = routing.aux["load_balance"] * (6 / self.num_experts)
            return routing
        """,
        "entropy and losses at uniform",
    ),
    "doubles the coefficients of its losses": (
        """
        @property
        def aux_weights(self):
            return {name: 2 * weight for name, weight in super().aux_weights.items()}
        """,
        "aux losses named",
    ),
    "keeps the balance loss from the layers below": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] = super().forward(hidden.detach(), context).aux["load_balance"]
            return routing
        """,
        "aux losses move the router",
    ),
    "doubles the weights' gradient in a late step": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            doubled = replace(routing, weight=2 * routing.weight - routing.weight.detach())
            return doubled if context.step >= 1000 else routing
        """,
        "weights' gradient is a derivative",
    ),
    "has experts rolled in every second document of a row": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            odd = (0 if context.document_ids is None else context.document_ids) % 2 == torch.ones(len(hidden))
            return torch.where(odd[:, None], logits.roll(1, dims=1), logits)
        """,
        "documents apart in evaluation",
    ),
    "divides by the routes of a step without text": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("share", torch.zeros(self.num_experts))

        def after_step(self, use):
            self.share.copy_(use.tokens_per_expert / use.tokens_per_expert.sum())
        """,
        "no text tokens",
    ),
    "counts steps in 16 bits": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int16))

        def after_step(self, use):
            self.steps += 1
        """,
        "state round trip",
    ),
    "has means for sums": (
        """
        num_sums = 1

        def sums(self, scores, context):
            text = context.token_mask
            return (scores.max(dim=1).values * text).sum()[None].double() / text.sum() if self.training else None
        """,
        "state alike on ranks",
    ),
    "raises the bias of busy experts": (
        """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros(self.num_experts))

        def select(self, scores, logits):
            return super().select(scores + self.bias, logits)

        def after_step(self, use):
            self.bias -= 0.001 * (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
        """,
        "state evens the load",
    ),
    "takes the worst experts": (
        """
        def select(self, scores, logits):
            return super().select(-scores, -logits)
        """,
        "experts get their best tokens",
    ),
    "exchanges the weights of a token": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight.view(-1, 2).flip(1).flatten())
        """,
        "experts get their best tokens",
    ),
}

KEPT_WITHIN = """\
from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.losses import load_balance_loss, router_z_loss
from moe_pretrain.moe.routers.base import router_logits


def kept_within(expert, num_experts, capacity):
    kept = torch.ones(len(expert), dtype=torch.bool)
    for one in range(num_experts):
        kept[(expert == one).nonzero()[capacity:, 0]] = False
    return kept


@dataclass(frozen=True, kw_only=True)
"""


def subtle(folder: Path, methods: str) -> str:
    source = VARIANT.replace("@dataclass(frozen=True, kw_only=True)\n", KEPT_WITHIN, 1)
    return write(folder, source + textwrap.indent(textwrap.dedent(methods), "    "))


@pytest.mark.parametrize("wrong", SUBTLE)
def test_subtly_broken_schemes_are_rejected_by_the_row_that_says_so(wrong: str, tmp_path: Path) -> None:
    methods, row = SUBTLE[wrong]
    found = ask(row, Subject(load([subtle(tmp_path, methods), *SMALL])))
    assert found.verdict == "FAIL", found
    assert not found.detail.startswith("raised "), found


SOUND = """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros(self.num_experts))

        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            if not self.training:
                return logits
            keys = context.seed, 7, context.step, self.layer
            return logits + 0.1 * counter_uniform(context.token_position, self.num_experts, *keys)

        def select(self, scores, logits):
            return super().select(scores + self.bias, logits)

        def after_step(self, use):
            self.bias += 0.01 * (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
"""


# What a configuration says wrongly -> (its members, how the row begins to complain).
MISCOUNTED = {
    "half of the experts per token": (
        """
        @property
        def mean_experts_per_token(self):
            return self.top_k / 2
        """,
        "mean_experts_per_token=1, but every token has 2",
    ),
    "a limit that tokens exceed": (
        """
        @property
        def experts_per_token_limit(self):
            return 1
        """,
        "most_experts_per_token=1, but a batch has 2.00",
    ),
    "a fixed number that is not so": (
        """
        @property
        def fixed_experts_per_token(self):
            return 3
        """,
        "fixed_experts_per_token=3, but tokens have 2 to 2 experts",
    ),
    "a payload that is not there": (
        """
        payload_size = 4
        """,
        "payload_size=4, but 0 numbers travel with a route",
    ),
}


@pytest.mark.parametrize("wrong", MISCOUNTED)
def test_miscounted_costs_are_found(wrong: str, tmp_path: Path) -> None:
    members, complaint = MISCOUNTED[wrong]
    members = textwrap.indent(textwrap.dedent(members), "    ")
    source = VARIANT.replace("    def build(self", members + "\n    def build(self", 1) + "    pass\n"
    row = ask("experts per token as declared", Subject(load([write(tmp_path, source), *SMALL])))
    assert row.verdict == "FAIL" and row.detail.startswith(complaint), row


def test_as_many_experts_as_there_are_is_tried(tmp_path: Path) -> None:
    """A cut that is right with fewer leaves the weakest out with all."""
    methods = """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            if self.config.top_k < self.num_experts:
                return routing
            kept = torch.arange(len(routing.weight)) % self.num_experts != self.num_experts - 1
            token, expert, weight = (v[kept] for v in (routing.token_index, routing.expert_index, routing.weight))
            return replace(routing, token_index=token, expert_index=expert, weight=weight, routes_per_token=None)
        """
    row = ask("experts per token as declared", Subject(load([subtle(tmp_path, methods), *SMALL])))
    assert row.verdict == "FAIL", row


# Right, and unusual: no row may object.
UNUSUAL = {
    "a temperature that falls with the step": """
        evaluation_rule = "temperature 1"

        def logits(self, hidden, context):
            return super().logits(hidden, context) / (1 + 1 / (1 + context.step / 1000) if self.training else 1)
        """,
    "the mean of a document's earlier tokens": """
        reads_earlier_tokens = True

        def logits(self, hidden, context):
            rows = hidden.unflatten(0, (context.num_sequences, -1))
            document = torch.zeros(len(hidden)) if context.document_ids is None else context.document_ids
            document = document.view(rows.shape[:2])
            seen = (document[:, :, None] == document[:, None]).float().tril()
            return super().logits((rows + seen / seen.sum(dim=-1, keepdim=True) @ rows).flatten(0, 1), context)
        """,
    "tables by size that are remembered": """
        def select(self, scores, logits):
            tables = self.__dict__.setdefault("tables", {})
            ones = tables.setdefault(len(scores), torch.ones(len(scores), 1))
            return super().select(scores * ones, logits)
        """,
    "its place in the row, with what is in the cache": """
        numbered_experts = "a place has its experts"

        def logits(self, hidden, context):
            place = context.first_place + torch.arange(len(hidden)) % (len(hidden) // context.num_sequences)
            return super().logits(hidden, context) + (place[:, None] + torch.arange(self.num_experts)).sin()
        """,
    "noise and a bias": SOUND,
    "a running mean of each expert's logits that is taken away": """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.num_sums = self.num_experts
            self.register_buffer("mean", torch.zeros(self.num_experts))

        def logits(self, hidden, context):
            return super().logits(hidden, context) - self.mean

        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            if not self.training:
                return routing
            raw = (self.logits(hidden, context) + self.mean).detach().double() * context.token_mask[:, None]
            return replace(routing, use=replace(routing.use, sums=raw.sum(dim=0)))

        def after_step(self, use):
            if use.tokens:
                self.mean.lerp_((use.sums / use.tokens).float(), 0.1)
        """,
    "noise in the distribution that the balance loss and the entropy are of": """
        def logits(self, hidden, context):
            keys = context.seed, 7, context.step, self.layer
            noise = counter_uniform(context.token_position, self.num_experts, *keys)
            return super().logits(hidden, context) + self.training * noise

        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            quiet = router_logits(hidden, self.weight)
            return replace(routing, aux=routing.aux | {"router_z": router_z_loss(quiet, context.token_mask)})
        """,
    "a bias of each expert that is learnt": """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.prior = torch.nn.Parameter(torch.empty(self.num_experts))
            self.start_values = {**self.start_values, "prior": 0.0}

        def logits(self, hidden, context):
            return super().logits(hidden, context) + self.prior
        """,
    "a bias with momentum": """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros(self.num_experts))
            self.register_buffer("speed", torch.zeros(self.num_experts))

        def select(self, scores, logits):
            return super().select(scores + self.bias, logits)

        def after_step(self, use):
            push = (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
            self.speed.mul_(0.9).add_(push)
            self.bias += 0.0005 * self.speed
        """,
    "a bias that waits for 40 steps": """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bias", torch.zeros(self.num_experts))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def select(self, scores, logits):
            return super().select(scores + self.bias, logits)

        def after_step(self, use):
            push = (use.tokens_per_expert.mean() - use.tokens_per_expert).sign().float()
            self.bias += 0.001 * push * (self.steps >= 40)
            self.steps += 1
        """,
    "a coefficient that falls with its own count of steps": """
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        @property
        def aux_weights(self):
            return super().aux_weights | {"router_z": super().aux_weights["router_z"] * 0.99 ** int(self.steps)}

        def after_step(self, use):
            self.steps += 1
        """,
}


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.fast("earlier tokens", "noise and a bias", "40 steps")
def test_what_is_right_and_unusual_is_not_blamed(unusual: str, tmp_path: Path) -> None:
    subject = Subject(load([subtle(tmp_path, UNUSUAL[unusual]), *SMALL]))
    assert not failing(ask(name, subject) for name in NEVER_BLAMED)


def test_a_sound_scheme_with_noise_and_state_is_certified(tmp_path: Path) -> None:
    rows = {row.property: row for row in examine(load([subtle(tmp_path, SOUND), *SMALL]))}
    assert not failing(rows.values())
    assert rows["evaluation as in training"].detail.startswith("routes in training change with the seed: noise")
    assert rows["state alike on ranks"].detail.startswith("bias: bitwise the same")
    assert rows["aux losses move the router"].verdict == "PASS"
    assert rows["weights' gradient is a derivative"].verdict == "PASS"


@pytest.mark.parametrize(
    ("declaration", "wrong", "verdict", "reason"),
    [
        ('evaluation_rule = "a softer softmax"', "has a temperature in evaluation", "not applicable", "softer softmax"),
        (
            'gradients_by_design = {"weight": "straight through"}',
            "doubles the weights' gradient",
            "not applicable",
            "straight through",
        ),
    ],
)
def test_a_declared_deviation_is_printed_and_no_failure(
    declaration: str, wrong: str, verdict: str, reason: str, tmp_path: Path
) -> None:
    methods, row = SUBTLE[wrong]
    found = ask(row, Subject(load([subtle(tmp_path, declaration + "\n" + textwrap.dedent(methods)), *SMALL])))
    assert found.verdict == verdict and reason in found.detail


def test_distillation_says_what_it_holds_constant() -> None:
    found = ask("aux losses move the router", Subject(load([*SMALL, "router=attentive"])))
    assert found.verdict == "PASS" and "its teacher, the gate, is held constant" in found.detail


COLLAPSE, STATE = "balance loss at collapse", "state round trip"
TRAINING_CAUSALITY = "causality in training"
COMPETING = {TRAINING_CAUSALITY, "cut of the batch in training", "documents apart in training"}

# Overrides -> how some rows' details begin.
SHIPPED: list[tuple[list[str], dict[str, str]]] = [
    *(([f"router={word}"], {}) for word in SCHEME_WORDS),
    (
        ["router.score=sigmoid", "router.jitter=0.1", "router.load_balance_level=sequence"],
        {COLLAPSE: "3.0000 when 2 of"},
    ),
    (
        [
            "router.top_k=1",
            "router.weights=raw",
            "router.load_balance_level=micro_batch",
            "model.moe.num_shared_experts=1",
        ],
        {COLLAPSE: "6.0000 when 1 of 6 experts has", STATE: "after_step moves nothing"},
    ),
    (["router=loss_free", "router.top_k=3"], {COLLAPSE: "2.0000 when 3 of 6", STATE: "expert_bias: "}),
    (["router=quantile", "router.top_k=3"], {COLLAPSE: "2.0000 when 3 of 6", STATE: "expert_bias: "}),
    (["router=expert_threshold", "router.initial_threshold=0.8"], {STATE: "ema_weight, threshold: "}),
    (["router=top_p", "router.target_experts=2", "router.controller_rate=0.01"], {STATE: "threshold: "}),
    (["router=relu", "router.target_experts=1", "router.load_balance_level=sequence"], {STATE: "sparsity_weight: "}),
    (
        ["router=sinkhorn", "router.top_k=1", "router.score=sigmoid", "router.load_balance_weight=0.1"],
        {TRAINING_CAUSALITY: "tokens from position 1 on move earlier routes", STATE: "after_step moves nothing"},
    ),
    (
        ["router=expert_choice", "router.capacity_factor=1.3"],
        {TRAINING_CAUSALITY: "tokens from position 1 on move", STATE: "cutoff_z_scores, thresholds, z_score_steps: "},
    ),
    (
        ["router=top_p", "router.weights=renormalised", "packing.isolate_documents=false"],
        {COLLAPSE: "6.0000 when 1 of"},
    ),
    *(
        (["router=attention_importance", f"router.importance={importance}", *more], {STATE: "scale: "})
        for importance, *more in (
            ("row_max", "router.target_experts=3", "router.controller_rate=0.05", "router.weights=renormalised"),
            ("corrected_row_max", "router.target_experts=3", "router.controller_rate=0.05"),
            ("entropy", "router.complement=true", "router.target_experts=3", "router.controller_rate=0.05"),
            (
                "predictor",
                *("router.predictor_loss_weight=0.1", "router.target_experts=3", "router.controller_rate=0.05"),
            ),
        )
    ),
    (
        ["router=lory", "router.first_segment=own_stop_gradient"],
        {TRAINING_CAUSALITY: "tokens from position 1 on move earlier", PARITY: "1 micro-batches, 9 gradients"},
    ),
    *(
        (
            ["router=top_k", "combine=orthogonal", f"model.moe.combine.form={form}"],
            {PARITY: "2 micro-batches, 9 gradients"},
        )
        for form in ("unit", "magnitudes", "symmetric")
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), SHIPPED, ids=lambda value: " ".join(value))
@pytest.mark.fast(
    "router=expert_choice-",
    "router=smear-",
    "router=dense-",
    "router=loss_free router.top_k=3",
)
def test_what_ships_certifies(overrides: list[str], expected: dict[str, str]) -> None:
    # With six networks the partner of every token of the row on rounding is the zero expert, and its weight is 1.
    # The widths of moce_ir's repeat after four.
    more = ["model.moe.num_experts=8"] if overrides[0] in ("router=moe_plus_plus", "router=moce_ir") else []
    rows = list(examine(load([*SMALL, *overrides, *more])))
    # With so high a threshold hardly a token has an expert: it starts quiet, and is told so.
    quiet = {"loudness at the start"} if "router.initial_threshold=0.8" in overrides else set()
    assert failing(rows).keys() == quiet
    details = {row.property: row.detail for row in rows}
    assert all(details.values())
    for name, beginning in expected.items():
        assert details[name].startswith(beginning)
    noncausal = {row.property for row in rows if row.verdict == "declared non-causal"}
    competes = overrides[0] in ("router=autonomy_expert_choice", "router=expert_choice", "router=sinkhorn")
    is_ahead = overrides[0] == "router=smear" or "router.first_segment=own_stop_gradient" in overrides
    merged_ahead = {"causality in training"} if is_ahead else set()
    assert noncausal == (COMPETING if competes else merged_ahead)
    if overrides != ["router=dense"]:
        assert sum(row.verdict == "PASS" for row in rows) >= 14


def test_schemes_by_layer_are_asked_one_by_one_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("aux losses named", COLLAPSE, STATE, "gradient parity with the oracle")
    monkeypatch.setattr(certificate, "PROPERTIES", {name: PROPERTIES[name] for name in asked})
    layers = "router.layers={0:hash,rest:{router:top_k,top_k:3}}"
    rows = list(examine(load([*SMALL, "model.num_layers=2", "router=by_layer", layers])))
    assert not failing(rows)
    details = {row.property: row.detail for row in rows}
    alone = [f"{place}: {name}" for place in ("0=hash", "rest=top_k") for name in asked]
    assert list(details) == [*alone, *(name for name in asked if name != COLLAPSE)]  # which is asked of one router
    assert details["0=hash: aux losses named"] == "none" and "load_balance" in details["aux losses named"]
    assert details[f"rest=top_k: {COLLAPSE}"].startswith("2.0000 when 3 of 6")
    # Of the model with both, the oracle's gradients are more than those of either scheme's router.
    counts = [int(re.search(r"(\d+) gradients", details[name])[1]) for name in (asked[3], f"0=hash: {asked[3]}")]
    assert counts[0] == counts[1] + 1


def test_received_attention_is_a_declared_leak() -> None:
    overrides = ["router=attention_importance", "router.importance=received", "router.allow_non_causal=true"]
    rows = list(examine(load([*SMALL, *overrides])))
    assert not failing(rows)
    declared = {row.property for row in rows if row.verdict == "declared non-causal"}
    assert declared == {"causality in training", "causality in evaluation"}


def test_a_declared_leak_is_no_failure(tmp_path: Path) -> None:
    methods = """
        causal_in_training = False

        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            text = context.token_mask[:, None]
            return logits - (logits * text).sum(dim=0) / text.sum().clamp(min=1) if self.training else logits
        """
    rows = list(examine(load([variant(tmp_path, methods), *SMALL])))
    assert not failing(rows)
    declared = {row.property for row in rows if row.verdict == "declared non-causal"}
    assert declared == {"causality in training", "cut of the batch in training", "documents apart in training"}


def test_warmup_of_expert_threshold_is_declared() -> None:
    rows = list(examine(load([*SMALL, "router=expert_threshold", "router.warmup_steps=1000"])))
    assert not failing(rows)
    declared = {row.property for row in rows if row.verdict == "declared non-causal"}
    assert declared == {"causality in training", "cut of the batch in training", "documents apart in training"}


def test_an_error_in_one_row_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = variant(tmp_path, "def after_step(self, use):\n    raise KeyError('lost')")
    assert cli.main(["certify", file, *SMALL, "parallel.processes=1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"router=variant ({file.removeprefix('router_file=')}) in 1 layers of 6 experts")
    assert [line for line in lines if "state round trip" in line and "FAIL raised KeyError: 'lost'" in line]
    assert [line for line in lines if "balance loss at uniform" in line and "PASS" in line]
    assert lines[-1].startswith("not certified: ")


@pytest.mark.parametrize(("code", "verdict"), [(0, "PASS"), (1, "FAIL")])
def test_ranks_are_verified_in_workers(
    code: int, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [write(tmp_path, EXAMPLE), *SMALL, "parallel.processes=2", "parallel.expert_parallel_size=2"]
    started: list[tuple[list[str], int]] = []

    def run_workers(arguments: list[str], processes: int) -> int:
        started.append((arguments, processes))
        return code

    monkeypatch.setattr(certify_command, "run_workers", run_workers)
    monkeypatch.setattr(certificate, "examine", lambda config: [PropertyResult("a property", "PASS", "found")])
    assert cli.main(["certify", *overrides]) == code
    assert started == [(["verify", *overrides], 2)]
    *_, row, last = capsys.readouterr().out.splitlines()
    assert f"{verdict} verify on 2 ranks, expert parallel 2" in row
    assert last == ("certified" if code == 0 else "not certified: 1 of 2 properties fail")


@pytest.mark.parametrize(
    ("words", "cores", "ranks"),
    [([], 2, 2), ([], 1, 1), (["parallel.processes=1"], 2, 1), (["model.moe.num_experts=7"], 2, 1)],
)
def test_two_ranks_are_tried_where_they_fit(
    words: list[str], cores: int, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Not on one core, not against the user's own words, and not where two ranks cannot share the experts."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(certify_command, "run_workers", lambda arguments, processes: 0)
    monkeypatch.setattr(certificate, "examine", lambda config: [])
    assert cli.main(["certify", *SMALL, *words]) == 0
    assert ("verify on 2 ranks, expert parallel 2" in capsys.readouterr().out) == (ranks == 2)


def _verify(overrides: list[str]) -> tuple[int, list[str]]:
    said: list[str] = []
    config = load(overrides)
    return verify(config, plan_run(config, 2, ("cpu", "float32")), said.append), said


def test_example_equals_the_oracle_on_two_ranks(tmp_path: Path) -> None:
    overrides = [write(tmp_path, EXAMPLE), *SMALL, "parallel.processes=2", "parallel.expert_parallel_size=2"]
    for code, said in run_on_ranks(_verify, 2, overrides):
        assert code == 0, said


def _train(overrides: list[str]) -> int:
    config = load(overrides)
    return train(config, preflight(config, 1))


def test_example_trains(tmp_path: Path) -> None:
    texts = [json.dumps({"text": f"{number} quick brown foxes jump over the lazy dog"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    overrides = [
        *(write(tmp_path, EXAMPLE), "router.temperature=0.2", *SMALL, "model.hidden_size=16", "model.num_heads=2"),
        *("model.moe.expert_hidden_size=20", "model.ffn_hidden_size=28", "model.sequence_length=16"),
        *("data=files", f"data.paths=[{tmp_path}/a.jsonl]", "data.validation_fraction=0.2"),
        *("tokenizer.vocab_size=260", "model.vocab_size=260"),
        *("batch.global_batch_tokens=64", "budget.tokens=192", "run.prepare_workers=1", "metrics.wandb=off"),
        *("metrics.progress=false", f"run.output_dir={tmp_path}/runs", "evaluation.max_rows=4"),
    ]
    assert run_on_ranks(_train, 1, overrides) == [0]
    values = yaml.safe_load((tmp_path / "runs" / "tiny-cosine" / "config.yaml").read_text())
    assert values["router"]["temperature"] == 0.2 and values["router"]["name"] == "cosine"
    assert values["router_file"] == str(tmp_path / "my_router.py")


def test_fields_come_from_the_file_and_overrides(tmp_path: Path) -> None:
    config = load([write(tmp_path, EXAMPLE), "router.router_z_weight=0.5"])
    assert isinstance(config, Config)
    assert (config.router.name, config.router.temperature, config.router.router_z_weight) == ("cosine", 0.1, 0.5)
    assert config.run.name == "tiny-cosine"
    assert load(["router_file=null"]) == load([])


def test_a_file_may_give_its_fields_ranges(tmp_path: Path) -> None:
    source = EXAMPLE.replace("import torch\n", "import torch\nfrom pydantic import PositiveFloat\n", 1)
    file = write(tmp_path, source.replace("temperature: float", "temperature: PositiveFloat"))
    assert load([file]).router.temperature == 0.1
    with pytest.raises(ConfigError) as caught:
        load([file, "router.temperature=0"])
    assert str(caught.value) == "router.temperature=0 must be positive"


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            ("", ""),
            ["router.temprature=1"],
            "router.temprature=1 is not a field of CosineConfig; did you mean temperature?",
        ),
        (("", ""), ["router.temperature=hot"], "router.temperature='hot': input should be a valid number"),
        (("", ""), ["router.router_z_weight=-2"], "router.router_z_weight=-2 must not be negative"),
        (("router_z_weight: float = 0.0", "router_z_weight: float = -2.0"), [], "router_z_weight=-2.0 must not be neg"),
        (("", ""), ["router.load_balance_level=layer"], "router.load_balance_level='layer': input should be"),
        (("", ""), ["model.moe.num_experts=1"], "router.top_k=2 must be at most model.moe.num_experts=1"),
        (("", ""), ["router=top_k"], "router=top_k and router_file="),
        (("", ""), ["router.name=top_k"], "router.name='top_k': input should be 'cosine'"),
        (("", ""), ["modle=tiny"], "'modle' is not a field of the configuration"),
        (("", ""), ["router_file=nowhere.py"], "router_file=nowhere.py must be a python file that exists"),
        (("import torch", "import torhc"), [], "ModuleNotFoundError: No module named 'torhc'"),
        (("temperature: float = 0.1", "temperature: float"), [], "CosineConfig.temperature must have a default"),
        (('"cosine"', '"top_k"'), [], "CosineConfig.name must not be that of a shipped scheme"),
        (("def build", "def make"), [], "CosineConfig must have build"),
        (("(FixedCountConfig, ", "("), [], "CosineConfig must have check_num_experts"),
        (
            ("class CosineRouter", "@dataclass\nclass Two:\n    name: str\n\n\nclass CosineRouter"),
            [],
            "it has CosineConfig, Two",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, change: tuple[str, str], overrides: list[str], message: str) -> None:
    file = write(tmp_path, EXAMPLE.replace(*change) if change[0] else EXAMPLE)
    with pytest.raises(ConfigError) as caught:
        load([file, *overrides])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_readme_shows_the_example_word_for_word():
    readme = Path(__file__).parents[3] / "moe_pretrain" / "moe" / "README.md"
    assert f"```python\n{EXAMPLE}```" in readme.read_text()


@pytest.mark.parametrize(
    "words",
    [["router=autonomy", "model.init=normal", "model.gate_init=paper"], ["router=top_k", "router.weight_scale=10"]],
)
def test_a_scheme_that_starts_too_quiet_or_too_loud_is_told_so(words: list[str]) -> None:
    """Two factors of 0.02 at a narrow width, and weights that are ten times too large."""
    row = ask("loudness at the start", Subject(load(words)))
    assert row.verdict == "FAIL" and "decides a comparison by itself" in row.detail
