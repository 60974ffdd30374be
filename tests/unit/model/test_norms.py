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
def test_a_sum_and_its_norm_in_one_have_the_formulas_values_and_gradients(
    adds: bool, read: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """As on CUDA, against float64: the sum is rounded once, and so are its norm and the gradient of both."""
    monkeypatch.setattr(norms, "_joins_residuals", lambda hidden: True)
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
