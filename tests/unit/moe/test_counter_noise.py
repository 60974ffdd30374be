"""Noise is a pure function of what it is for."""

import torch

from moe_pretrain.moe.counter_noise import counter_uniform

POSITIONS = torch.arange(4096)


def test_depends_on_the_position_not_on_the_cut() -> None:
    whole = counter_uniform(POSITIONS, 6, 3, 1, 2)
    cut = [counter_uniform(part, 6, 3, 1, 2) for part in POSITIONS.split([1, 1000, 3095])]
    assert torch.equal(whole, torch.cat(cut))
    shuffled = torch.randperm(len(POSITIONS))
    assert torch.equal(whole[shuffled], counter_uniform(POSITIONS[shuffled], 6, 3, 1, 2))
    assert torch.equal(whole[:, :4], counter_uniform(POSITIONS, 4, 3, 1, 2))


def test_every_key_and_their_order_matter() -> None:
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (1, 0, 2, 3), (0, 1, 2)]
    draws = [counter_uniform(POSITIONS, 6, *key).flatten() for key in keys]
    for first in range(len(keys)):
        for second in range(first):
            # Independent draws of 24 bits: correlation 0 within 5 / sqrt(n).
            pair = torch.stack([draws[first], draws[second]])
            assert abs(pair.corrcoef()[0, 1]) < 5 / len(draws[0]) ** 0.5, (keys[first], keys[second])


def test_is_uniform() -> None:
    draw = counter_uniform(POSITIONS, 64, 7)
    count = draw.numel()
    assert draw.dtype == torch.float32 and draw.min() >= 0 and draw.max() < 1
    # 5 standard errors each.
    assert abs(draw.double().mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(draw.double().var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    in_bin = torch.bincount((draw * 64).long().flatten(), minlength=64).double()
    chi_squared = ((in_bin - count / 64) ** 2 / (count / 64)).sum()
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5
    assert (draw == 0).sum() < 2 and draw.unique().numel() > 0.98 * count  # 24 bits: few coincidences


def test_neighbours_are_independent() -> None:
    draw = counter_uniform(POSITIONS, 64, 7).double()
    bound = 5 / draw.numel() ** 0.5
    for first, second in ((draw[1:], draw[:-1]), (draw[:, 1:], draw[:, :-1])):
        assert abs(torch.stack([first.flatten(), second.flatten()]).corrcoef()[0, 1]) < bound


def test_far_positions_and_large_seeds() -> None:
    """Positions of a long run: beyond 32 bits nothing repeats."""
    near = counter_uniform(POSITIONS, 4, 2**31 - 1)
    far = counter_uniform(POSITIONS + 2**32, 4, 2**31 - 1)
    assert far.min() >= 0 and (near == far).float().mean() < 0.01
