"""Muon against torch's own, each matrix given to that as a parameter; what is refused; what it costs."""

import pytest
import torch
from helpers.builders import WITH_ALL_PARTS, tiny
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from moe_pretrain.config.preflight import preflight
from moe_pretrain.engine.newton_schulz import COEFFICIENTS, newton_schulz, newton_schulz_flops
from moe_pretrain.engine.optimizers import build_optimizer, set_learning_rate
from moe_pretrain.engine.optimizers.base import whole_fragments
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.plan.local_parameters import local_parameters

MUON = (*WITH_ALL_PARTS, "optimizer=muon", "optimizer.weight_decay=0.3")


def unfused(name: str, parameter: torch.Tensor, kind: str = "swiglu") -> dict[str, torch.Tensor]:
    """The parameter as checkpoints of separate projections and experts would have it."""
    place = name.rpartition(".")[2]
    if ".experts." in name and kind == "merged":  # [width, 2, experts, hidden] and [width, experts, hidden]
        parts = parameter.unbind(1) if place == "in_weight" else [parameter.transpose(0, 2)]
        return {
            f"{name}.{expert}.{index}": part[:, expert]
            for index, part in enumerate(parts)
            for expert in range(parameter.shape[-2])
        }
    if ".experts." in name and kind == "matrix_product":
        cores = [parameter] if place.endswith("_shared") else list(parameter)
        return {
            f"{name}.{expert}.0": torch.stack([
                torch.stack([core[bond, row].flatten() for row in range(core.shape[1])]) for bond in range(len(core))
            ]).flatten(0, 1)
            for expert, core in enumerate(cores)
        }  # fmt: skip
    experts = dict(enumerate(parameter)) if ".experts." in name else {0: parameter}
    sizes = {"qkv_weight": [24, 12, 12], "in_weight": [20, 20] if ".experts." in name else None}
    found = {}
    for expert, matrix in experts.items():
        rows = sizes.get(place) if matrix.ndim == 2 else None
        if rows is None and name.endswith("in_weight"):
            rows = [len(matrix) // 2] * 2
        for index, part in enumerate(matrix.split(rows) if rows else [matrix]):
            found[f"{name}.{expert}.{index}"] = part
    return found


@pytest.mark.parametrize(
    "kind,words,of_experts",
    [
        ("swiglu", (), 2 * 8 * 3),
        ("merged", ("router=lory", "router.segment_tokens=3"), 2 * 8 * 3),
        # 24 and 20 have few factors for five cores: those at an end are vectors, but for the last of gate and up.
        ("matrix_product", ("experts=matrix_product",), 2 * (8 * (3 + 3 + 2) + 3)),
    ],
)
def test_every_matrix_moves_as_torch_moves_it(
    kind: str, words: tuple[str, ...], of_experts: int, monkeypatch: pytest.MonkeyPatch
):
    """Query, key, value, gate, up and each expert as parameters of ``torch.optim.Muon``; the rest as AdamW's."""
    # It rounds to bfloat16, by which two right answers would differ by a part in a hundred.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    config = tiny(*MUON, "optimizer.groups.experts.lr_scale=0.5", *words)
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=0)
    prepare_experts(model, 1)
    roles = parameter_roles(model)
    names = [
        name
        for name, role in roles.items()
        if role.group in ("attention", "ffn", "experts") and not name.endswith(("_core_0", "out_core_4"))
    ]
    theirs = {
        key: nn.Parameter(part.clone())
        for name, parameter in model.named_parameters()
        for key, part in (unfused(name, parameter.data, kind) if name in names else {name: parameter.data}).items()
    }
    is_matrix = {key: any(key.startswith(name + ".") for name in names) for key in theirs}
    assert sum(is_matrix.values()) == 3 * 4 + 3 + 2 * 3 + of_experts  # attention, dense, shared
    decay = config.optimizer.weight_decay
    reference = [
        torch.optim.Muon([p for key, p in theirs.items() if is_matrix[key] and (".experts." in key) == of_experts],
                         lr=1e-2 * scale, weight_decay=decay / scale, adjust_lr_fn="match_rms_adamw")
        for of_experts, scale in ((False, 1.0), (True, 0.5))
    ]  # fmt: skip
    others = [(key, p) for key, p in theirs.items() if not is_matrix[key]]
    for of_experts, is_decayed in ((False, True), (False, False), (True, True)):
        own = [p for key, p in others if (".experts." in key, p.ndim > 1) == (of_experts, is_decayed)]
        scale = 0.5 if of_experts else 1.0
        facts = {"lr": 1e-2 * scale, "betas": (0.9, 0.95), "eps": 1e-4}
        reference += [torch.optim.AdamW(own, weight_decay=decay / scale if is_decayed else 0.0, **facts)] if own else []
    optimizer = build_optimizer(model, config.optimizer)
    optimizer.own(whole_fragments(model))
    set_learning_rate(optimizer.param_groups, 1e-2)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            parts = unfused(name, parameter.grad, kind) if name in names else {name: parameter.grad}
            for key, part in parts.items():
                theirs[key].grad = part.clone()
        for each in (optimizer, *reference):
            each.step()
    for name, parameter in model.named_parameters():
        parts = unfused(name, parameter.data, kind) if name in names else {name: parameter.data}
        for key, part in parts.items():
            assert torch.allclose(part, theirs[key].data, atol=2e-6, rtol=2e-5), key


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 7, 7)])
def test_a_stack_in_bfloat16_is_torch_s_matrices(shape: tuple[int, ...]):
    stack = torch.randn(shape)
    stack[0] *= 1e-3  # each is divided by its own norm
    ours = newton_schulz(stack.bfloat16())
    for matrix, own in zip(stack, ours, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7)
        torch.testing.assert_close(own, theirs, atol=0.02, rtol=0.02)
    assert not newton_schulz(torch.zeros(shape)).any()


def test_flops_are_those_of_its_products():
    from torch.utils.flop_counter import FlopCounterMode

    for rows, columns in ((5, 9), (9, 5)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(3, rows, columns))
        assert counter.get_total_flops() == 3 * newton_schulz_flops(rows, columns)


def test_plan_counts_one_moment_for_matrices_and_the_flops_of_updates():
    adamw, muon = tiny(*WITH_ALL_PARTS), tiny(*MUON)
    model = DecoderLM(muon.model, muon.router, ExpertShard())
    matrices = [p.numel() for name, p in model.named_parameters() if parameter_roles(model)[name].rows]
    before, after = local_parameters(adamw), local_parameters(muon)
    assert before.moment_bytes + before.expert_moment_bytes - after.moment_bytes - after.expert_moment_bytes == 4 * sum(
        matrices
    )
    extra = muon.size.training_flops_per_token - adamw.size.training_flops_per_token
    per_expert = 2 * newton_schulz_flops(20, 24) + newton_schulz_flops(24, 20)
    assert extra * muon.batch.global_batch_tokens > 16 * per_expert and adamw.size.update_flops_per_token == 0


@pytest.mark.parametrize(
    "words,line",
    [
        (("optimizer.trainable=routers",), "^optimizer.trainable=routers must be all with optimizer.name=muon"),
        (("engine.zero_stage=3",), "^engine.zero_stage=3 must be 0, 1 or 2"),
        (("optimizer.momentum=1",), "^optimizer.momentum=1"),
    ],
)
def test_what_it_cannot_do_is_one_line(words: tuple[str, ...], line: str):
    with pytest.raises(ValueError, match=line) as error:
        preflight(tiny("optimizer=muon", *words), 1)
    assert "\n" not in str(error.value)
