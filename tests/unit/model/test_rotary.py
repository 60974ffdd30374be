"""Angles and rotations, which bfloat16 cannot hold."""

import numpy as np
import pytest
import torch

from moe_pretrain.model.rotary import apply_rotary, rotary_table, rotated_projection


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
