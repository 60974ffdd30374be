"""Models of equal size: what is solved is the nearest there is, and the numbers are those of modules really built."""

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers.builders import SCHEME_WORDS

from moe_pretrain.cli import main
from moe_pretrain.config.load import load
from moe_pretrain.config.match_budget import describe_match, measures
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.config.validate import validate
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.build import expected_ffn_experts, expert_width
from moe_pretrain.moe.routers.dense import DenseConfig
from moe_pretrain.moe.types import ExpertShard

MEASURES = ["total_params", "active_params", "flops_per_token"]
MULTIPLES = [2, 8, 64]


def words_of(router: str, seed: str) -> list[str]:
    """A model of odd sizes with ``router`` as shipped."""
    draw = random.Random(f"{router} {seed}")
    heads = draw.choice([2, 4])
    words = [
        f"router={router}",
        "model.vocab_size=4096",
        f"model.sequence_length={draw.choice([16, 48])}",
        f"model.num_layers={draw.randint(1, 4)}",
        f"model.num_heads={heads}",
        f"model.hidden_size={heads * 2 * draw.randint(20, 60)}",
        f"model.moe.num_experts={draw.choice([6, 8, 16])}",
        f"model.moe.expert_hidden_size={draw.randint(150, 400)}",
        f"model.moe.num_shared_experts={draw.randint(0, 2)}",
        f"model.moe.every_k_layers={draw.randint(1, 2)}",
        f"model.tie_embeddings={draw.choice(['true', 'false'])}",
        f"budget.multiple={draw.choice(MULTIPLES)}",
        "batch.global_batch_tokens=768",
    ]
    if "autonomy" in router or "low_rank" in router:
        words.append(f"router.gate_rank={draw.randint(4, 30)}")
    if router == "lory":
        words.append("router.segment_tokens=4")
    if router == "moce_ir":
        words.append("experts=swiglu")  # its own repeat after four
    return words


def built_parameters(config: Config) -> dict[str, float]:
    """Total and active parameters of the module itself, experts of a layer shared out evenly."""
    with torch.device("meta"):
        model = DecoderLM(config.model, config.router, ExpertShard())
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for layer in model.moe_layers() for p in layer.experts.parameters())
    if isinstance(config.router, DenseConfig):
        return {"total_params": total, "active_params": total}
    used = expected_ffn_experts(config.model.moe, config.router)
    active = total - experts + used * experts / config.model.moe.num_experts
    for layer in model.moe_layers():
        asked = max(0.0, config.router.scored_experts(config.model.moe.num_experts) - used)
        if asked:  # the first layers of experts that are asked and not used
            out = layer.experts.out_weight
            active += asked * 2 * out.shape[1] * out.shape[2]
    return {"total_params": total, "active_params": active}


def neighbours(config: Config) -> list[Config]:
    """The same model with routed experts a multiple wider and narrower, found by trying widths one by one."""
    moe, multiple = config.model.moe, config.budget.multiple
    hidden, now = config.model.hidden_size, expert_width(moe, config.router, config.model.hidden_size)
    found = []
    for wanted in (now - multiple, now + multiple):
        for full in range(max(1, moe.expert_hidden_size - 3 * multiple), moe.expert_hidden_size + 3 * multiple + 1):
            other = replace(moe, expert_hidden_size=full, expert_width_multiple=multiple)
            if expert_width(other, config.router, hidden) == wanted:
                found.append(replace(config, model=replace(config.model, moe=other)))
                break
    return found


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("router", SCHEME_WORDS)
@pytest.mark.fast("total_params", "top_k-", "autonomy-")
def test_the_solved_width_is_the_nearest_multiple(router: str, measure: str):
    words = words_of(router, measure)
    plain = load(words)
    try:
        config = load([*words, f"budget.match={measure}"])
    except ConfigError as error:
        # Only where a scheme asks so many experts that even the narrowest cost too much.
        assert router in ("attentive_dense", "thor") and "comes to" in str(error), error
        return
    reference = load([words[0].replace(router, "top_k"), *[w for w in words[1:] if not w.startswith("router.")]])
    target = measures(model_size(reference.model, reference.router))[measure]
    size = measures(model_size(config.model, config.router))
    assert config.budget.matched.reference[measure] == target
    assert built_parameters(config) == pytest.approx({name: size[name] for name in MEASURES[:2]}, rel=1e-12)
    off = abs(size[measure] - target)
    others = neighbours(config)
    width = expert_width(config.model.moe, config.router, config.model.hidden_size)
    assert len(others) == 1 + (width > config.budget.multiple)
    for other in others:
        assert off <= abs(measures(model_size(other.model, other.router))[measure] - target)
    assert width % config.budget.multiple == 0 or config.model == plain.model
    # Nothing else has changed.
    kept = replace(
        config.model.moe,
        expert_hidden_size=plain.model.moe.expert_hidden_size,
        expert_width_multiple=plain.model.moe.expert_width_multiple,
    )
    assert replace(config, model=replace(config.model, moe=kept), budget=plain.budget) == replace(
        plain, budget=plain.budget
    )
    printed = "\n".join(describe_match(config.model, config.router, config.budget))
    assert f"{size[measure]:,.0f}, reference {target:>20,.0f}: {size[measure] / target - 1:+.3%}, matched" in printed


@pytest.mark.parametrize("rank", [64, 128, 256, 400, 512])
@pytest.mark.parametrize("multiple", [2, 8])
def test_equal_parameters_of_autonomy_are_equation_5(rank: int, multiple: int):
    """Width (3 d d_ffn - d_low d) / (d_low + 2 d); our reference has a router besides, a row of d for each expert."""
    words = ["model=700m", "router=autonomy", f"router.gate_rank={rank}"]
    config = load([*words, "budget.match=total_params", f"budget.multiple={multiple}"])
    d, d_ffn = 768, 3072
    exact = Fraction(3 * d * d_ffn - rank * d, rank + 2 * d)
    of_router = Fraction(d, rank + 2 * d)
    width = expert_width(config.model.moe, config.router, d)
    assert width == round((exact + of_router) / multiple) * multiple
    assert abs(width - exact) <= multiple / 2 + 1


def test_number_of_experts_and_k_are_solved():
    reference = 'budget.reference=["router=top_k","router.top_k=5"]'
    k = load(["router=hash", "budget.match=flops_per_token", "budget.solve=top_k", reference])
    assert k.router.top_k == 5 and k.budget.matched.field == "router.top_k" and k.budget.matched.before == 2
    words = ["router=autonomy", "budget.match=total_params", "budget.solve=num_experts"]
    more = 'budget.reference=["model.moe.num_experts=24"]'
    for multiple in (1, 4, 5):
        config = load([*words, more, f"budget.multiple={multiple}"])
        target = config.budget.matched.reference["total_params"]
        sizes = {}
        for number in range(multiple, 64, multiple):
            moe = replace(config.model.moe, num_experts=number)
            if number >= config.router.top_k:
                sizes[number] = model_size(replace(config.model, moe=moe), config.router).total_parameters
        assert config.model.moe.num_experts == min(sizes, key=lambda number: abs(sizes[number] - target))


def test_a_model_that_has_the_size_already_stays_as_it_is():
    words = ["model.moe.expert_hidden_size=250", "budget.multiple=64"]
    for router in ("top_k", "top_p"):
        config = load([*words, f"router={router}", "budget.match=active_params"])
        assert config.model == load([*words, f"router={router}"]).model
        assert "as it was" in describe_match(config.model, config.router, config.budget)[0]


def test_a_saved_configuration_is_not_solved_again():
    config = load(["router=autonomy", "budget.match=active_params"])
    assert config.model.moe.expert_hidden_size != 256
    assert validate(to_values(config)) == config


def test_a_router_of_a_file_is_matched(tmp_path: Path):
    file = tmp_path / "wide.py"
    file.write_text(
        """
from dataclasses import dataclass
from typing import Literal
from moe_pretrain.moe.routers.hash import HashConfig, HashRouter

@dataclass(frozen=True, kw_only=True)
class WideConfig:
    name: Literal["wide"] = "wide"
    mean_experts_per_token: float = 3.0
    def check_num_experts(self, num_experts): pass
    def build(self, hidden_size, num_experts, layer):
        hashed = HashConfig(name="hash", top_k=3, table="random", weights="equal", weight_scale=1.0)
        return HashRouter(hashed, hidden_size, num_experts, layer)
"""
    )
    words = [f"router_file={file}", "router.mean_experts_per_token=4", "budget.match=active_params"]
    config = load(words)
    # Twice the experts of the reference's two, at half the width.
    assert config.model.moe.expert_hidden_size == 128 and config.router_file == str(file)
    assert model_size(config.model, config.router).active_parameters == pytest.approx(1578112, rel=0.01)
    # The reference has none of the file's fields, and may have another model.
    other = load([*words, 'budget.reference=["model.moe.expert_hidden_size=512"]'])
    assert other.model.moe.expert_hidden_size == 256


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["router=attentive_dense", "model.moe.expert_hidden_size=40", "budget.multiple=64"],
            "expert_hidden_size=64 comes to",
        ),
        (["router=top_p", "budget.solve=top_k"], "must be expert_width with router=top_p, which has no router.top_k"),
        (["router=dense", "budget.solve=num_experts"], "router=dense, which has no experts"),
        (["router=top_p", "budget.solve=num_experts"], "grows with the number of experts by a row of the router only"),
        (
            ["router.top_k=1", "router.weights=raw", "budget.solve=top_k", "budget.match=total_params"],
            "does not depend",
        ),
        (["router=autonomy", "budget.match=flops"], "'total_params', 'active_params' or 'flops_per_token'"),
        (["router=autonomy", 'budget.reference=["seed=3"]'], "'seed=3' must be an override of model or router"),
        (["router=autonomy", 'budget.reference=["router=topk"]'], "router=topk is not a choice"),
        (
            ["router=autonomy", 'budget.reference=["router.top_k=9"]'],
            "budget.reference: router.top_k=9 must be at most",
        ),
        (["router=autonomy", "budget.multiple=0"], "budget.multiple=0 must be at least 1"),
        (["budget.match=null", "budget.matched={field: a, before: 1, reference: {}}"], "budget.match fills it in"),
    ],
)
def test_what_cannot_be_matched_is_one_line(words: list[str], complaint: str):
    match = [] if any(word.startswith("budget.match=") for word in words) else ["budget.match=active_params"]
    if words[-1] == "budget.match=total_params":
        words = [*words, "model.moe.expert_hidden_size=64", 'budget.reference=["model.moe.expert_hidden_size=128"]']
    with pytest.raises(ConfigError) as caught:
        load([*words, *match])
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_plan_prints_the_choice_and_what_is_not_matched(capsys: pytest.CaptureFixture[str]):
    words = ["model=700m", "router=autonomy", "router.gate_rank=256", "budget.match=active_params"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    config = load(words)
    size = model_size(config.model, config.router)
    assert f"model.moe.expert_hidden_size={config.model.moe.expert_hidden_size} instead of 3072, experts" in out
    (matched,) = [line for line in out.splitlines() if line.endswith(", matched")]
    assert f"{size.active_parameters:,.0f}" in matched and "active_params" in matched
    assert out.count("not matched") == 2
