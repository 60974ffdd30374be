"""The certificate of a routing scheme: what ships passes, the README's example passes, and broken schemes do not."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_pretrain import cli
from moe_pretrain.config import Config, ConfigError, config_folder, load
from moe_pretrain.study.certify import Row, examine

# The README shows this file word for word.
EXAMPLE = '''\
"""A cosine router: every expert is a direction, and a token goes to the two that point most its way."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from moe_pretrain.moe.routers.linear import LinearRouter, LinearRouterConfig
from moe_pretrain.moe.types import BalanceLevel


@dataclass(frozen=True, kw_only=True)
class CosineConfig(LinearRouterConfig):
    name: Literal["cosine"] = "cosine"
    temperature: float = 0.1
    jitter: float = 0.0
    load_balance_weight: float = 0.01
    load_balance_level: BalanceLevel = "global_batch"
    router_z_weight: float = 0.0

    mean_experts_per_token: ClassVar[float] = 2.0

    def check_num_experts(self, num_experts):
        if num_experts < 2:
            raise ValueError(f"model.moe.num_experts={num_experts} must be at least 2 for router=cosine")

    def build(self, hidden_size, num_experts, layer):
        return CosineRouter(self, hidden_size, num_experts, layer)


class CosineRouter(LinearRouter):
    def __init__(self, config, hidden_size, num_experts, layer):
        super().__init__(config, hidden_size, num_experts, layer)
        self.temperature = config.temperature

    def forward(self, hidden, context):
        tokens, experts = normalize(hidden.float(), eps=1e-6), normalize(self.weight, eps=1e-6)
        logits = tokens @ experts.t() / self.temperature
        probs = logits.softmax(dim=1)
        expert = probs.sort(dim=1, descending=True, stable=True).indices[:, :2]
        weight = probs.gather(1, expert)
        token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(2)
        return self.route(logits, probs, token, expert.flatten(), weight.flatten(), 2, context)
'''

VARIANT = '''\
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
    jitter: float = 0.0
    load_balance_weight: float = 0.01
    load_balance_level: BalanceLevel = "global_batch"
    router_z_weight: float = 0.001

    def build(self, hidden_size, num_experts, layer):
        return Variant(self, hidden_size, num_experts, layer)


class Variant(TopKRouter):
'''

CAUSALITY = {"causality in training", "causality in evaluation"}
CUTS = {"cut of the batch in training", "cut of the batch in evaluation", "batch of one in evaluation"}
PARITY = "gradient parity with the oracle"

# What is wrong -> (the methods that do it, the rows that fail).
BROKEN = {
    "centres logits over the batch, later tokens included": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits - logits.mean(dim=0)
        """,
        {*CAUSALITY, *CUTS, "padding ignored", PARITY},
    ),
    "centres in training only": (
        """
        def logits(self, hidden, context):
            logits = super().logits(hidden, context)
            return logits - logits.mean(dim=0) if self.training else logits
        """,
        {"causality in training", "cut of the batch in training", "padding ignored", PARITY},
    ),
    "routes a token to one expert twice": (
        """
        def select(self, scores):
            return super().select(scores)[:, :1].expand(-1, self.config.top_k)
        """,
        {"conservation of routes", "balance loss at collapse", "finite at ties", PARITY},
    ),
    "sorts routes by expert": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            order = routing.expert_index.argsort(stable=True)
            token, expert, weight = routing.token_index, routing.expert_index, routing.weight
            return replace(routing, token_index=token[order], expert_index=expert[order], weight=weight[order])
        """,
        {"conservation of routes"},
    ),
    "detaches the weights": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight.detach())
        """,
        {"router gradient from the LM loss", "router gradient with top_k=1"},
    ),
    "has weights of 1": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            return replace(routing, weight=routing.weight / routing.weight.detach())
        """,
        {},
    ),
    "always has bfloat16 logits": (
        """
        def logits(self, hidden, context):
            return (hidden.bfloat16() @ self.weight.bfloat16().t()).float()
        """,
        {"float32 routing"},
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
        {"float32 routing"},
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
        {"padding ignored", "conservation of routes", "no text tokens"},
    ),
    "divides by the number of text tokens": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["load_balance"] = routing.aux["load_balance"] * (context.token_mask.sum() / context.token_mask.sum())
            return routing
        """,
        {"no text tokens"},
    ),
    "chooses with Python's random numbers": (
        """
        def select(self, scores):
            return (super().select(scores) + random.randrange(self.num_experts)) % self.num_experts
        """,
        {"determinism", "recompute"},
    ),
    "keeps its state in an attribute": (
        """
        def select(self, scores):
            return super().select(scores + getattr(self, "bias", 0.0))

        def after_step(self, tokens_per_expert, tokens):
            self.bias = getattr(self, "bias", 0.0) - 0.01 * tokens_per_expert.sub(tokens_per_expert.mean()).sign().float()
        """,
        {"state round trip"},
    ),
    "keeps its state where no attribute shows it": (
        """
        def select(self, scores):
            return super().select(scores + self.__dict__.setdefault("hidden", {}).get("bias", 0.0))

        def after_step(self, tokens_per_expert, tokens):
            push = tokens_per_expert.sub(tokens_per_expert.mean()).sign().float()
            self.hidden["bias"] = self.hidden.get("bias", 0.0) - 0.01 * push
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
        {"finite at ties"},
    ),
    "has a loss without coefficient": (
        """
        def forward(self, hidden, context):
            routing = super().forward(hidden, context)
            routing.aux["forgotten"] = routing.weight.mean()
            return routing
        """,
        {"aux losses named"},
    ),
}


def scheme(folder: Path, source: str, *overrides: str) -> Config:
    """A tiny configuration with the router of a file that holds ``source``."""
    file = folder / "scheme.py"
    file.write_text(source)
    return load([f"router_file={file}", "engine.device=cpu", "model.moe.num_experts=6", *overrides])


def variant(folder: Path, methods: str) -> Config:
    return scheme(folder, VARIANT + textwrap.indent(textwrap.dedent(methods), "    "))


def failing(rows: list[Row]) -> dict[str, str]:
    return {row.property: row.detail for row in rows if row.verdict == "FAIL"}


@pytest.mark.parametrize("wrong", BROKEN)
def test_broken_schemes_are_rejected(wrong: str, tmp_path: Path) -> None:
    methods, expected = BROKEN[wrong]
    found = failing(examine(variant(tmp_path, methods)))
    print(found)
    assert set(found) == expected
