"""``engine.kernels``: whose kernels a run takes, and liger's held to torch's wherever liger-kernel is installed."""

from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from helpers.cuda_branches import Waits
from helpers.engines import build_engine
from helpers.interpreter import as_compiled
from helpers.processes import run_on_ranks
from torch import Tensor
from torch.nn import functional

from moe_pretrain import cli
from moe_pretrain.config.load import load
from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, MicroBatch
from moe_pretrain.engine import engine as engine_module
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model import cross_entropy, norms
from moe_pretrain.model.cross_entropy import chunked_cross_entropy
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe import kernels
from moe_pretrain.moe.experts import swiglu
from moe_pretrain.moe.experts.activation import SWIGLU, gated
from moe_pretrain.moe.kernels import (
    KernelChoice,
    liger_added_norm,
    liger_cross_entropy_,
    liger_rms_norm,
    liger_swiglu,
    priced_kernels,
    resolve_kernels,
)
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.train.resume_rules import changes

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say that a version of liger-kernel is installed, or None, with or without triton."""

    def make(version: str | None, triton: bool = True) -> None:
        def read(name: str) -> str:
            if version is None or name != "liger-kernel":
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(kernels.metadata, "version", read)
        monkeypatch.setattr(kernels.util, "find_spec", lambda name: object() if triton else None)

    return make


@pytest.mark.parametrize(
    ("asked", "device", "version", "taken"),
    [
        ("auto", "cuda", "0.8.5", "liger"),
        ("auto", "cuda", None, "torch"),
        ("auto", "cuda", "0.8.4", "torch"),
        ("auto", "cpu", "0.8.5", "torch"),
        ("liger", "cuda", "0.8.12.dev20261027", "liger"),
        ("torch", "cuda", "0.8.5", "torch"),
        ("torch", "cpu", None, "torch"),
    ],
)
def test_auto_is_ligers_on_a_gpu_where_they_are_installed(
    installed: Callable[..., None], asked: KernelChoice, device: str, version: str | None, taken: str
):
    installed(version)
    assert resolve_kernels(asked, device) == taken


@pytest.mark.parametrize(
    ("asked", "device", "version", "priced"),
    [
        ("auto", "cuda", "0.8.5", "liger"),
        ("auto", "cuda", None, "torch"),
        ("liger", "cuda", None, "liger"),
        ("liger", "cpu", "0.8.5", "torch"),
        ("torch", "cuda", "0.8.5", "torch"),
    ],
)
def test_a_plan_prices_what_the_run_would_take(
    installed: Callable[..., None], asked: KernelChoice, device: str, version: str | None, priced: str
):
    """Asked by name it is priced where it is not installed: runs are planned elsewhere."""
    installed(version)
    assert priced_kernels(asked, device) == priced


@pytest.mark.parametrize(
    ("device", "version", "triton", "reason"),
    [
        ("cpu", "0.8.5", True, "its kernels run on CUDA, and this run is on the CPU"),
        ("cuda", None, True, r"liger-kernel is not installed \(pip install 'moe_pretrain\[kernels\]'\)"),
        ("cuda", "0.8.4", True, "liger-kernel 0.8.4 is installed, and its kernels are called as those of 0.8.5 to"),
        ("cuda", "0.9.0", True, "liger-kernel 0.9.0 is installed"),
        ("cuda", "0.8.5", False, "liger-kernel is installed without triton"),
    ],
)
def test_kernels_that_cannot_run_are_refused(
    installed: Callable[..., None], device: str, version: str | None, triton: bool, reason: str
):
    installed(version, triton)
    with pytest.raises(ValueError, match=rf"^engine.kernels=liger must be auto or torch: {reason}"):
        resolve_kernels("liger", device)
    assert resolve_kernels("auto", device) == "torch"


def test_a_run_is_refused_before_it_starts(
    installed: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    installed("0.8.5")
    words = ["engine.device=cpu", "engine.kernels=liger", f"run.output_dir={tmp_path}", "run.name=refused"]
    assert cli.main(["train", *words]) == cli.USAGE_CODE
    assert "engine.kernels=liger must be auto or torch: its kernels run on CUDA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SMALL = [
    *("model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.vocab_size=97"),
    *("model.sequence_length=16", "model.moe.num_experts=4", "model.moe.expert_hidden_size=24", "model.init_std=0.2"),
    *("model.ffn_hidden_size=40", "model.moe.num_leading_dense_layers=1", "model.moe.num_shared_experts=1"),
    *("model.qk_norm=head", "tokenizer=pretrained", "tokenizer.path=unused", "metrics.wandb=off", "budget=tiny"),
    *("engine.device=cpu", "engine.dtype=float32", "model.cross_entropy_chunk_tokens=12"),
]


def kernels_of_engines() -> list[list[str]]:
    """What an engine's configuration records and its parts take: as it decides here, and where it decides otherwise."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for decided in (None, "liger"):
            if decided is not None:
                patch.setattr(engine_module, "resolve_kernels", lambda asked, device: "liger")
            engine = build_engine(load(SMALL))
            model, (dense, routed) = engine.model, engine.model.blocks
            shared = [module for module in routed.feed_forward.modules() if isinstance(module, swiglu.SwiGLU)]
            norms = (model.norm, dense.attention_norm, dense.attention.query_norm)
            parts = (model, *norms, dense.feed_forward, *shared)
            found.append([engine.config.kernels, *(part.kernels for part in parts)])
    return found


def test_an_engine_takes_what_was_decided_and_records_it():
    assert run_on_ranks(kernels_of_engines, 1) == [[["torch"] * 7, ["liger"] * 7]]


def test_a_run_may_go_on_with_other_kernels():
    """And one from before there was a choice goes on without a word."""
    then, now = {"engine": {"kernels": "torch"}}, {"engine": {"kernels": "liger"}}
    assert changes(then, now).allowed == ["engine.kernels=liger (was torch)"] and not changes(then, now).refused
    assert changes({"engine": {}}, now) == changes(now, now)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU if there is one, else the CPU and Triton's interpreter, which ``conftest`` has switched on."""
    for package in ("liger_kernel", "triton"):
        if util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install .[kernels]; on a CPU also triton")
    if torch.cuda.is_available():
        return "cuda"
    as_compiled(monkeypatch)
    return "cpu"


def rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape).to(device, dtype).requires_grad_()


def assert_same(
    ours: Callable[..., Tensor], ligers: Callable[..., Tensor], leaves: list[Tensor], factor: Tensor | None = None
) -> None:
    """Values and gradients of two functions, which round to the dtype of each result once or twice."""
    found, expected = ([], [])
    for function, values in ((ligers, found), (ours, expected)):
        output = function(*leaves)
        given = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        values += [output, *torch.autograd.grad(output, leaves, given if factor is None else factor)]
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape and value.dtype == reference.dtype
        # torch rounds between operations too, a bfloat16 to 8 bits each time.
        rounding = 2**-7 if leaves[0].dtype == torch.bfloat16 else 2e-6
        error, size = (value.double() - reference.double()).norm(), reference.double().norm()
        assert error <= rounding * size, f"{error / size:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 64), (1, 1), (0, 48)])
def test_the_norm_is_torchs(device: str, shape: tuple[int, ...], dtype: torch.dtype):
    hidden = rows(*shape, dtype=dtype, device=device)
    if len(hidden):
        with torch.no_grad():
            hidden[-1] = 0  # a row of padding has nothing but epsilon under the root
            hidden[0] *= 1000
    weight = rows(shape[-1], dtype=dtype, device=device)
    assert_same(
        lambda x, w: functional.rms_norm(x, w.shape, w, EPSILON),
        lambda x, w: liger_rms_norm(x, w, EPSILON),
        [hidden, weight],
    )
    with torch.no_grad():  # and in bfloat16 rounded once
        wide = functional.rms_norm(hidden.float(), weight.shape, weight.float(), EPSILON).to(dtype)
        assert dtype == torch.float32 or (liger_rms_norm(hidden, weight, EPSILON) != wide).sum() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_sum_is_torchs(device: str, dtype: torch.dtype):
    """The sum, its norm, and gradients of both at once."""
    hidden, delta = (rows(2, 5, 64, dtype=dtype, device=device) for _ in range(2))
    weight = rows(64, dtype=dtype, device=device)

    def both(norm: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *leaves: torch.stack(norm(*leaves))

    def torchs(x: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x + d, functional.rms_norm(x + d, w.shape, w, EPSILON)

    assert_same(both(torchs), both(lambda *leaves: liger_added_norm(*leaves, EPSILON)), [hidden, delta, weight])


@pytest.mark.slow
def test_the_norm_of_many_short_rows_is_torchs(device: str):
    """From 32,768 rows of up to 256 on another kernel takes several at once: norms of heads."""
    hidden, weight = (rows(*shape, dtype=torch.float32, device=device) for shape in ((2**15 + 3, 8), (8,)))
    assert_same(
        lambda x, w: functional.rms_norm(x, w.shape, w, EPSILON),
        lambda x, w: liger_rms_norm(x, w, EPSILON),
        [hidden, weight],
    )


def test_a_gradient_that_others_hold_is_left_as_it_is(device: str):
    hidden, weight = (rows(*shape, dtype=torch.float32, device=device) for shape in ((3, 8), (8,)))
    given = torch.randn(3, 8, device=device)
    before = given.clone()
    liger_rms_norm(hidden, weight, EPSILON).backward(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 38), (2, 5, 64), (1, 2), (0, 48)])
def test_swiglu_is_torchs(device: str, shape: tuple[int, ...], dtype: torch.dtype):
    before = rows(*shape, dtype=dtype, device=device)
    assert_same(lambda x: gated(x, SWIGLU), liger_swiglu, [before])
    if len(before):  # gate and up are told apart, and what is saved stays as it was
        kept = before.detach().clone()
        gate, up = kept.chunk(2, dim=-1)
        assert not torch.allclose(liger_swiglu(before), functional.silu(up) * gate, rtol=0.1)
        assert torch.equal(before, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize(("tokens", "vocab", "counts"), [(11, 97, "some"), (9, 128, "all"), (5, 33, "none")])
def test_the_loss_and_its_gradients_are_torchs(
    device: str, tokens: int, vocab: int, counts: str, chunk: int, dtype: torch.dtype
):
    """Odd sizes, chunks that do not divide, positions that do not count, and a factor of the loss."""
    hidden, weight = (rows(size, 16, dtype=dtype, device=device) for size in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[0], labels[1] = 0, vocab - 1
    labels[{"some": slice(None, None, 3), "all": slice(0, 0), "none": slice(None)}[counts]] = IGNORE_INDEX

    def loss(name: kernels.Kernels) -> Callable[..., Tensor]:
        return lambda x, w: chunked_cross_entropy(x, w, labels, chunk, name)

    assert_same(loss("torch"), loss("liger"), [hidden, weight], torch.tensor(0.37, device=device))
    with torch.no_grad():
        torch.testing.assert_close(loss("liger")(hidden, weight), loss("torch")(hidden, weight))


def test_labels_without_a_logit_are_refused_as_on_torchs_path(monkeypatch: pytest.MonkeyPatch):
    """Before any kernel: liger's reads beside the row."""
    monkeypatch.setattr(cross_entropy, "liger_cross_entropy_", lambda *args: pytest.fail("its kernel ran"))
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([6, 7, 1])
    told = []
    for name in ("torch", "liger"):
        with pytest.raises(RuntimeError) as error:
            chunked_cross_entropy(hidden, weight, labels, 3, name)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_no_positions_have_no_loss(device: str):
    logits, labels = torch.zeros(0, 7, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert liger_cross_entropy_(logits, labels, IGNORE_INDEX, True).shape == (0, 1)


def test_the_loss_of_a_vocabulary_of_several_blocks_is_torchs_and_its_gradient_takes_the_logits_place(device: str):
    """Beyond 32,768 entries the kernel goes through a row in parts; large logits overflow in none of them."""
    logits = 40 * torch.randn(3, 2**15 + 5, device=device)
    labels = torch.tensor([2**15 + 4, IGNORE_INDEX, 17], device=device)
    kept = logits.clone().requires_grad_()
    expected = functional.cross_entropy(kept, labels, ignore_index=IGNORE_INDEX, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), kept)
    terms = liger_cross_entropy_(logits, labels, IGNORE_INDEX, True)
    torch.testing.assert_close(terms[:, 0], expected.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(logits, gradient, rtol=1e-4, atol=1e-7)


def test_what_is_not_finite_comes_out_as_such(device: str):
    logits = torch.zeros(2, 7, device=device)
    logits[1, 3] = torch.nan
    terms = liger_cross_entropy_(logits, torch.tensor([1, 2], device=device), IGNORE_INDEX, True)
    assert terms[0].isfinite().all() and terms[1].isnan().all()


def test_a_model_has_the_same_loss_and_gradients(device: str, monkeypatch: pytest.MonkeyPatch):
    """Each of the three kernels runs where it should: in a dense layer, a shared expert, every norm and every chunk."""
    config = load(SMALL)
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, 0)
    model.to(device)
    ids = torch.randint(0, 97, (2, 16), device=device)
    labels, documents = ids.roll(-1, 1), torch.zeros_like(ids)
    labels[:, -1] = IGNORE_INDEX
    places = torch.arange(16, device=device).expand(2, -1)
    calls = {"norm": 0, "added norm": 0, "swiglu": 0, "loss": 0}

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(norms, "liger_rms_norm", counted("norm", liger_rms_norm))
    monkeypatch.setattr(norms, "liger_added_norm", counted("added norm", liger_added_norm))
    monkeypatch.setattr(cross_entropy, "liger_cross_entropy_", counted("loss", liger_cross_entropy_))
    monkeypatch.setattr(swiglu, "liger_swiglu", counted("swiglu", liger_swiglu))

    def numbers() -> dict[str, Tensor]:
        batch = MicroBatch(ids, labels, documents, places, torch.arange(2), 0)
        context = routing_context(batch, 0, 0, lambda layer, counts: counts.clone(), ids.numel())
        output = model(ids, labels, documents, places, context)
        model.zero_grad()
        output.loss_sum.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": output.loss_sum.detach(), **gradients}

    expected = numbers()
    assert not any(calls.values())
    model.use_kernels("liger")
    found = numbers()
    # Norms of queries and of keys in two layers, and the first; those after a sum in two layers; 32 positions by 12.
    assert calls == {"norm": 5, "added norm": 4, "swiglu": 2, "loss": 3}
    assert found.keys() == expected.keys() and expected["blocks.0.attention.query_norm.weight"].any()
    for name, value in expected.items():
        error, size = (found[name] - value).norm(), value.norm()
        assert error <= 1e-5 * size, f"{name}: {error / size:.2e}"


def test_the_host_waits_for_no_kernel(device: str):
    """Nothing is read from the device, forward or backward; what the interpreter copies is no part of it."""
    hidden, weight = (rows(size, 16, dtype=torch.bfloat16, device=device) for size in (9, 33))
    labels = torch.arange(9, device=device)
    with Waits() as waits:
        normed = liger_rms_norm(hidden, weight[0], EPSILON)
        inner = liger_swiglu(torch.cat([normed, normed], dim=1))
        chunked_cross_entropy(inner, weight, labels, 4, "liger").backward()
    assert hidden.grad is not None and hidden.grad.any()
    assert {name for name, _ in waits.found} <= {"cpu"}
