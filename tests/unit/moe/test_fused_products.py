"""Experts with the activation inside the products, held to torch's path with quack's products in plain loops.

The kernels run on a Hopper or Blackwell GPU alone (``tests/gpu``). Here it is what goes in and what is made of what
comes out.
"""

import functools
import sys
from collections.abc import Callable
from importlib import util
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import quack_reference
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run, preflight
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.engine import engine as engine_module
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe import kernels
from moe_pretrain.moe.experts import fused_products
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.experts.fused_products import check_fused_products, run_fused_swiglu_experts
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts, check_fused_experts, run_swiglu_experts
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import ExpertShard

CPU = torch.device("cpu")
PLAIN = functools.partial(run_swiglu_experts, activation=SWIGLU)


def plain_products(patch: pytest.MonkeyPatch) -> ModuleType:
    """``quack.gemm_interface`` in plain loops."""
    module = ModuleType("quack.gemm_interface")
    for name in ("gemm", "gemm_gated", "gemm_dgated"):
        setattr(module, name, getattr(quack_reference, name))
    patch.setitem(sys.modules, "quack", ModuleType("quack"))
    patch.setitem(sys.modules, "quack.gemm_interface", module)
    return module


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The products, which a test may break."""
    return plain_products(monkeypatch)


def test_the_check_passes_where_products_are_as_documented(products: ModuleType):
    check_fused_products(24, 40, CPU, PLAIN)


def not_interleaved(module: ModuleType) -> None:
    gated = module.gemm_gated
    module.gemm_gated = lambda *args, concat_layout, **words: gated(*args, **words)


def unscaled(module: ModuleType) -> None:
    dgated = module.gemm_dgated
    module.gemm_dgated = lambda *args, colvec_scale, **words: dgated(
        *args, colvec_scale=torch.ones_like(colvec_scale), **words
    )


def scaled_dot(module: ModuleType) -> None:
    dgated = module.gemm_dgated

    def broken(*args: Any, colvec_scale: Tensor, **words: Any) -> tuple[Tensor, Tensor, Tensor]:
        before, act, dot = dgated(*args, colvec_scale=colvec_scale, **words)
        return before, act, dot * colvec_scale

    module.gemm_dgated = broken


def halves_swapped(module: ModuleType) -> None:
    plain = module.gemm

    def broken(*args: Any, **words: Any) -> Tensor:
        found = plain(*args, **words)
        if "out" in words.get("concat_layout", ()):
            found.copy_(torch.cat(found.chunk(2, dim=-1)[::-1], dim=-1))
        return found

    module.gemm = broken


def unwritten(module: ModuleType) -> None:
    plain = module.gemm

    def broken(*args: Any, **words: Any) -> Tensor:
        found = plain(*args, **words)
        if "cu_seqlens_k" in words:
            found[2] = 1e-5  # far below what a norm over all experts would show
        return found

    module.gemm = broken


def refusing(module: ModuleType) -> None:
    def broken(*args: Any, **words: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    module.gemm = broken


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (not_interleaved, "output of its experts is"),
        (unscaled, "gradient of rows of its experts is"),
        (scaled_dot, "of routes of its experts is"),
        (halves_swapped, "of in_weight of its experts is"),
        (unwritten, "of in_weight is not 0 for an expert without rows"),
        (refusing, r"its kernels do not run here \(RuntimeError: no kernel image is available\)$"),
    ],
)
def test_a_kernel_that_is_wrong_on_this_gpu_is_refused(
    products: ModuleType, broken: Callable[[ModuleType], None], said: str
):
    broken(products)
    with pytest.raises(ValueError, match=rf"^engine.kernels=quack must be auto or torch: {said}"):
        check_fused_products(24, 40, CPU, PLAIN)


def test_experts_take_the_kernels_that_a_model_is_told(products: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Also the experts of several widths; without rows nothing is launched."""
    config = load(["model=tiny", "experts=unequal", "tokenizer=pretrained", "tokenizer.path=unused"])
    model = DecoderLM(config.model, config.router, ExpertShard())
    stacks = [module for module in model.modules() if isinstance(module, SwiGLUExperts)]
    assert {stack.kernels for stack in stacks} == {"torch"}
    model.use_kernels("quack")
    assert {stack.kernels for stack in stacks} == {"quack"}
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "moe_pretrain.moe.experts.swiglu.check_fused_products",
        lambda hidden, width, *rest: asked.append((hidden, width)),
    )
    check_fused_experts(model, CPU)
    assert asked == sorted({tuple(stack.out_weight.shape[1:]) for stack in stacks}) and len(asked) > 1

    stack = stacks[0].bfloat16()
    torch.nn.init.normal_(stack.in_weight), torch.nn.init.normal_(stack.out_weight)
    hidden, experts = stack.in_weight.shape[2], len(stack.in_weight)
    called = []
    run = lambda *args: called.append(args) or run_fused_swiglu_experts(*args)  # noqa: E731
    monkeypatch.setattr("moe_pretrain.moe.experts.swiglu.run_fused_swiglu_experts", run)
    for tokens in (3, 0):
        index = torch.arange(tokens)
        order = ExpertRowLayout(index, index[:, None], True, torch.tensor([tokens, *[0] * (experts - 1)]))
        rows, weight = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens)
        ours = stack(rows, weight, order)
        plain = run_swiglu_experts(rows, weight, stack.in_weight, stack.out_weight, order, SWIGLU)
        assert (ours - plain).norm() <= 0.02 * plain.norm()
    assert len(called) == 1


WORDS = ["model=tiny", "tokenizer=pretrained", "tokenizer.path=unused", "engine.kernels=quack", "engine.device=cpu"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["router=dense"], "router=dense sends no token to an expert"),
        (["router=smear"], "router=smear sends no token to an expert"),
        (["router=autonomy"], "experts of router=autonomy have factorised gates"),
        (["experts=matrix_product"], "experts=matrix_product rebuilds its matrices"),
        (
            ["model.moe.activation=gpt_oss", "model.moe.activation_limit=7"],
            "model.moe.activation=gpt_oss with model.moe.activation_limit=7.0 is not SwiGLU",
        ),
    ],
)
def test_experts_that_have_no_such_kernels_are_refused(words: list[str], reason: str):
    """Also where a run is planned that is to be somewhere else."""
    config = load([*WORDS, "engine.dtype=bfloat16", *words])
    with pytest.raises(ValueError, match=f"^engine.kernels=quack must be auto or torch: {reason}$"):
        plan_run(config, 1)


def test_float32_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_pretrain.config.preflight.resolve_kernels", lambda asked, device: asked)
    with pytest.raises(ValueError, match="^engine.kernels=quack must be auto or torch with engine.dtype=float32: not"):
        preflight(load([*WORDS, "engine.dtype=float32"]), 1)


TRAINED = [
    *("model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.vocab_size=97"),
    *("model.sequence_length=16", "model.moe.num_experts=4", "model.moe.expert_hidden_size=24", "metrics.wandb=off"),
    *("batch.global_batch_tokens=64", "batch.micro_batch_size=2", "tokenizer=pretrained", "tokenizer.path=unused"),
    *("budget=tiny", "engine.device=cpu", "engine.dtype=bfloat16", "engine.zero_stage=1"),
]


def steps_of_engines() -> list[list[float]]:
    """Losses and gradient norms of three steps by torch's experts and by fused products; what a wrong one is told."""
    config, found = load(TRAINED), []
    with pytest.MonkeyPatch.context() as patch:
        module = plain_products(patch)
        for decided in ("torch", "quack"):
            patch.setattr(engine_module, "resolve_kernels", lambda asked, device, taken=decided: taken)
            engine = build_engine(config)
            results = [engine.step(step, random_batches(engine, step)) for step in range(3)]
            found.append([value for result in results for value in (result.loss, result.gradient_norm)])
        halves_swapped(module)
        with pytest.raises(ValueError, match="engine.kernels=quack must be auto or torch: of in_weight"):
            build_engine(config)
    return found


def test_an_engine_trains_with_them_and_compares_them_first():
    ((plain, fused),) = run_on_ranks(steps_of_engines, 1)
    assert fused == pytest.approx(plain, rel=0.01) and fused != plain


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_lacks", lambda package, device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="for Hopper and Blackwell, and this GPU is of compute capability 8$"):
        kernels.resolve_kernels("quack", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.resolve_kernels("quack", "cuda") == "quack"


@pytest.mark.skipif(util.find_spec("quack") is None, reason="quack-kernels is not installed: pip install .[quack]")
@pytest.mark.parametrize("name", ["gemm", "gemm_gated", "gemm_dgated"])
def test_plain_loops_are_quacks_own_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    """Every call of a forward and a backward pass."""
    from quack import gemm_interface

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    ours = getattr(quack_reference, name)
    monkeypatch.setattr(
        quack_reference, name, lambda *args, **words: calls.append((args, words)) or ours(*args, **words)
    )
    plain_products(monkeypatch)
    check_fused_products(24, 40, CPU, PLAIN)
    assert calls
    reference = getattr(gemm_interface, f"{name}_ref")
    for args, words in calls:
        out = words.get("out")
        found = ours(*args, **{**words, "out": torch.empty_like(out)} if out is not None else words)
        kept = {key: value for key, value in words.items() if key not in ("tuned", "dynamic_scheduler", "out")}
        scale = kept.pop("colvec_scale", None)
        kept.pop("colvec_reduce", None)
        if "out" in kept.get("concat_layout", ()):  # the reference allocates it with the other axis contiguous
            kept.pop("concat_layout")
            found = quack_reference.interleaved(found)
        expected = reference(*(arg.detach() for arg in args), **kept)
        end = int(words.get("cu_seqlens_m", torch.tensor([0]))[-1])
        pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found[:2], expected, strict=True))
        for value, other in pairs:
            factor = 1.0 if scale is None else scale[:, None]
            if "cu_seqlens_m" in words:
                value, other = value[:end], (other * factor)[:end]
            assert (value.float() - other.float()).norm() <= 0.01 * other.float().norm()


def test_refusals_name_the_option():
    assert fused_products._REFUSED.startswith("engine.kernels=quack ")
    with pytest.raises(ConfigError):
        load([*WORDS, "engine.kernels=sonic"])
