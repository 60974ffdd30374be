"""Norms of the residual stream, alone and of a sum."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_pretrain.model import norms
from moe_pretrain.model.norms import ResidualNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", ["both", "sum", "norm"])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("on_cuda", [True, False])
def test_a_sum_and_its_norm_in_one_have_the_formulas_values_and_gradients(
    on_cuda: bool, adds: bool, read: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Against float64: the sum is rounded once, and so are its norm and, on CUDA, the gradient of both."""
    monkeypatch.setattr(norms, "_is_one_kernel", lambda rows: on_cuda)
    norm = ResidualNorm(24, 1e-3)
    norm.weight.data = (0.5 + torch.rand(24)).to(dtype)
    leaves = [torch.randn(2, 300, 24).to(dtype).requires_grad_() for _ in range(1 + adds)]
    leaves[0].data[0, 0] *= 1e-3  # a row with nothing but epsilon under its root
    weights = torch.randn(2, 2, 300, 24).to(dtype)
    weights[{"sum": 1, "norm": 0}.get(read, slice(0, 0))] = 0

    def gradients(outputs: tuple[Tensor, Tensor], weights: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        parts = zip(outputs, weights, strict=True)
        wanted = [output for name, output in zip(("sum", "norm"), parts, strict=True) if read in ("both", name)]
        return torch.autograd.grad(sum((out * own).sum() for out, own in wanted), leaves, allow_unused=read == "sum")

    found = norm(*leaves, *([] if adds else [None]))
    exact = [leaf.detach().double().requires_grad_() for leaf in (*leaves, norm.weight)]
    total = sum(exact[:-1])
    expected = total, functional.rms_norm(total, (24,), exact[-1], 1e-3)
    assert torch.equal(found[0], sum(leaves))
    ours = [*found, *gradients(found, weights, [*leaves, norm.weight])]
    theirs = [*expected, *gradients(expected, weights.double(), exact)]
    for value, reference in zip(ours, theirs, strict=True):
        assert (value is None) == (reference is None)
        if value is not None:
            assert value.dtype == dtype and value.shape == reference.shape
            error = (value.double() - reference).norm() / reference.norm()
            assert error < (2**-8 if dtype == torch.bfloat16 else 1e-6), float(error)
    if adds:
        assert torch.equal(*ours[2:4]), "both parts of a sum have its gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [True, False])
def test_on_a_cpu_the_gradients_are_autograds_to_the_bit(adds: bool, dtype: torch.dtype):
    """Runs of before go on with the same numbers; the stream's own gradient is there first, as in a model."""
    norm = ResidualNorm(24, 1e-5).to(dtype)
    norm.weight.data = (0.5 + torch.rand(24)).to(dtype)
    hidden, delta, *upstream = torch.randn(4, 2, 30, 24).to(dtype).unbind()
    found = []
    for is_joined in (True, False):
        leaves = [part.clone().requires_grad_() for part in ((hidden, delta) if adds else (hidden,))]
        parts = [leaf * 1 for leaf in leaves]
        if is_joined:
            total, normed = norm(parts[0], parts[1] if adds else None)
        else:
            total = sum(parts[1:], parts[0])
            normed = functional.rms_norm(total, (24,), norm.weight, 1e-5)
        norm.weight.grad = None
        torch.autograd.backward([total * 1, normed], list(upstream))
        found.append([total, normed, norm.weight.grad, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
