"""Sums and angles that bfloat16 cannot hold: positions, rotations, gradients of the head and of the embedding."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_pretrain.model import layers
from moe_pretrain.model.layers import (
    IGNORE_INDEX,
    ResidualNorm,
    apply_rotary,
    chunked_cross_entropy,
    embed,
    rotary_table,
    rotated_projection,
    two_pass_losses,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", ["both", "sum", "norm"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_sum_and_its_norm_in_one_have_the_formulas_values_and_gradients(
    adds: bool, read: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """As on CUDA, against float64: the sum is rounded once, and so are its norm and the gradient of both."""
    monkeypatch.setattr(layers, "_joins_residuals", lambda hidden: True)
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


@pytest.mark.parametrize("last", [300, 8191])
def test_neighbouring_positions_keep_apart_at_any_distance(last: int):
    """bfloat16 knows no odd position above 256."""
    positions = torch.arange(last - 40, last + 1)[None]
    cosine, sine = rotary_table(positions, 16, 10_000.0)
    angle = positions[0].numpy()[:, None] * 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(cosine[0, 0].numpy(), np.cos(angle), atol=2e-3)
    np.testing.assert_allclose(sine[0, 0].numpy(), np.sin(angle), atol=2e-3)
    assert (cosine[0, 0, 1:] != cosine[0, 0, :-1]).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_and_its_gradient_are_those_of_the_formula_to_the_bit(dtype: torch.dtype):
    """In place and with the rotation back for a gradient, heads taken out of a wider projection."""
    table = rotary_table(torch.arange(9).expand(2, -1), 16, 10_000.0)
    heads = torch.randn(2, 9, 5, 16).to(dtype)[:, :, :3].transpose(1, 2).requires_grad_()
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = table
    formula = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(dtype)
    upstream = torch.randn(2, 3, 9, 16).to(dtype)
    found = apply_rotary(heads, table)
    assert torch.equal(found, formula)
    for value, expected in zip(*(torch.autograd.grad(out, heads, upstream) for out in (found, formula)), strict=True):
        assert torch.equal(value, expected)


def test_bfloat16_heads_are_rotated_in_float32_and_rounded_once():
    heads = torch.randn(2, 3, 64, 16).bfloat16()
    table = rotary_table(torch.arange(500, 564).expand(2, -1), 16, 10_000.0)
    rotated = apply_rotary(heads, table)
    cosine, sine = (part.double() for part in table)
    first, second = heads.double().chunk(2, dim=-1)
    exact = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    assert rotated.dtype == torch.bfloat16
    different = rotated != exact.to(torch.bfloat16)
    assert different.float().mean() < 1e-3, "of float32's rounding before that to bfloat16"


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
    """512 chunks with one target: in bfloat16 the sum stands still once it is 256 times a chunk's part."""
    tokens, vocab, width = 4096, 4, 8
    hidden = (torch.rand(tokens, width) + 0.5).bfloat16()
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)
    chunked_cross_entropy(hidden, weight, labels, 8).backward()
    exact = torch.zeros(vocab, width, requires_grad=True)
    functional.cross_entropy(hidden.float() @ exact.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=5e-3, atol=0)


def test_the_embeddings_gradient_of_a_frequent_token_is_summed_in_float32():
    """In bfloat16 on the CPU it was 6% short for a token in every tenth position."""
    vocab, width = 16, 8
    ids = torch.randint(0, 2, (4, 1000)) * 3
    upstream = (torch.rand(4, 1000, width) + 0.5).bfloat16()
    weight = torch.randn(vocab, width).bfloat16().requires_grad_()
    embed(ids, weight).backward(upstream)
    exact = torch.zeros(vocab, width, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), upstream.double().flatten(0, 1))
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), exact, rtol=2**-8, atol=0)


def test_float32_embeddings_keep_their_bits():
    ids, upstream = torch.randint(0, 5, (3, 70)), torch.randn(3, 70, 8)
    grads = []
    for look_up in (embed, functional.embedding):
        weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = look_up(ids, weight)
        output.backward(upstream)
        grads.append((output.detach(), weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_rotated_at_once_is_its_parts_rotated_bit_for_bit(dtype: torch.dtype) -> None:
    """Queries, keys and values, and the gradient of the projection, with heads that share keys."""
    sizes, head = [4 * 6, 2 * 6, 2 * 6], 6
    table = rotary_table(torch.arange(7).expand(3, -1), head, 10_000.0)
    projected = torch.randn(3, 7, sum(sizes)).to(dtype).requires_grad_()
    query, key, value = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in projected.split(sizes, dim=-1))
    expected = apply_rotary(query, table), apply_rotary(key, table), value
    upstream = [torch.randn_like(part) for part in expected]
    found = rotated_projection(projected, table, sizes, head)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads = [torch.autograd.grad(parts, projected, upstream)[0] for parts in (found, expected)]
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("wrong", [7, -1, -99])
def test_labels_without_a_logit_are_refused(wrong: int):
    """One too many, and negative ones that are not the one that means "not counted"."""
    hidden, weight, labels = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, IGNORE_INDEX, 3, 2])
    text = torch.ones(5, dtype=torch.bool)
    assert chunked_cross_entropy(hidden, weight, labels, 2).isfinite()
    assert two_pass_losses(hidden, hidden, weight, labels, text, 8)[0].isfinite()
    labels[3] = wrong
    refused = "labels must be ids below the vocabulary's size, 7, or IGNORE_INDEX=-100"
    with pytest.raises(RuntimeError, match=refused):
        chunked_cross_entropy(hidden, weight, labels, 2)
    with pytest.raises(RuntimeError, match=refused):
        two_pass_losses(hidden, hidden, weight, labels, text, 8)
