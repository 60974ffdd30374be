"""Row of the certificate on the start: a scheme that begins quieter than others loses to them for that alone."""

import functools
from collections.abc import Callable
from dataclasses import replace

from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.moe.combine import SumConfig
from moe_pretrain.moe.experts.config import SwiGLUConfig
from moe_pretrain.verify.certificate.subject import NotApplicable, Subject, require
from moe_pretrain.verify.start_loudness import StartLoudness, start_loudness

LOUDEST = 4.0
"""Largest factor between a scheme and plain top-2 at the start.

Raw weights keep a third of the mass at the least (a factor of 3 at most); the two factors of 0.02 that cost
Autonomy-of-Experts 0.25 nats in 150 steps at width 96 make it 7 times too quiet.
"""
WIDEST_EXPERT = 256
"""Largest inner width of an expert here, for the time of this row: 0.29 of top_k is 0.34 at four times the width."""
LARGEST_MATRIX = 2**26
"""Most elements of one stacked matrix of a layer's experts: many wide ones would take the memory of a real run."""


def _starts_as_loud(subject: Subject) -> str:
    """Output of the MoE layers and gradient of their experts at step 0, as shares of top-2's in the same model.

    Of all rows only this one keeps the model's own width, on which the loudness of an initialisation depends.
    """
    model, router = subject.unshrunk.model, subject.unshrunk.router
    if model.moe.num_experts < 2:
        raise NotApplicable("with one expert there is no other scheme to be as loud as")
    fitting = max(8, LARGEST_MATRIX // (model.moe.num_experts * model.hidden_size) // 8 * 8)
    moe = replace(model.moe, expert_hidden_size=min(model.moe.expert_hidden_size, WIDEST_EXPERT, fitting))
    model = replace(model, moe=moe)
    ours = start_loudness(model, router, subject.config.seed)
    plain_moe = replace(moe, gate_rank=None, latent_size=None, latent_norm=False)
    plain_moe = replace(plain_moe, combine=SumConfig("sum"), experts=SwiGLUConfig())
    plain = _of_top_2(replace(model, moe=plain_moe), subject.config.seed)
    ratios = {
        "output": ours.output / plain.output,
        "experts' gradient": ours.expert_gradient / plain.expert_gradient,
    }
    found = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    found += f" of top_k's; weights add up to {ours.weight_sum:.2f} over {ours.experts_per_token:.2f} experts"
    if model.moe.kinds.zero_computation:
        raise NotApplicable(
            f"{found}: a copy adds the normed token itself, a constant a vector as large, by definition"
        )
    for name, ratio in ratios.items():
        require(
            1 / LOUDEST < ratio < LOUDEST,
            f"{found}: a factor of {max(ratio, 1 / max(ratio, 1e-9)):.1f} in {name} decides a comparison by itself; "
            "see model.init, model.gate_init and the scheme's weights",
        )
    return found


@functools.cache
def _of_top_2(model: ModelConfig, seed: int) -> StartLoudness:
    return start_loudness(model, load(["router=top_k"]).router, seed)


START: dict[str, Callable[[Subject], str]] = {"loudness at the start": _starts_as_loud}
"""Name of the row -> the question behind it."""
