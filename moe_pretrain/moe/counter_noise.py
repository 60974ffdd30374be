"""Random numbers that depend on what they are for, not on who draws them.

A generator with state would give other noise when the number of ranks, the micro-batch or the order of layers
changes. Here each number is a hash of (seed, stream, step, layer, token position, column), so every topology
and every recomputation sees the same noise.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), on wrapping int64."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


START_STREAM = 9


def start_noise(shape: torch.Size, seed: int, key: int, layer: int, number: int) -> Tensor:
    """Noise of variance 1 for one parameter of an expert that begins in training: the same on every rank.

    Args:
        shape: Of one expert's part of the parameter.
        seed: Of the run.
        key: Number of the event.
        layer: Index of the layer.
        number: Which of the experts' parameters it is.
    """
    rows = torch.arange(shape[0])
    uniform = counter_uniform(rows, shape[1:].numel(), seed, START_STREAM, key, layer, number)
    return (math.sqrt(12) * (uniform - 0.5)).view(shape)


def counter_uniform(token_position: Int[Tensor, "tokens"], columns: int, *keys: int) -> Float[Tensor, "tokens columns"]:
    """Uniform numbers in [0, 1), one per token and column, a pure function of the arguments.

    Args:
        token_position: Position of each token in the run.
        columns: Numbers per token.
        *keys: Integers that name the stream, for example (seed, step, layer).

    Returns:
        float32 with 24 random bits.
    """
    state = token_position.new_zeros(1)
    for key in keys:
        state = _mix(state * 31 + _GOLDEN + key)
    per_token = _mix(token_position * _GOLDEN + state)
    column = torch.arange(1, columns + 1, device=token_position.device)
    bits = _mix(per_token[:, None] + column * _GOLDEN)
    return _shift_right(bits, 40).float() * 2.0**-24


def counter_normal(token_position: Int[Tensor, "tokens"], columns: int, *keys: int) -> Float[Tensor, "tokens columns"]:
    """Standard normal numbers from ``counter_uniform``, by the inverse of the distribution: none is beyond 5.3."""
    # The middle of each of the 2**24 steps, so that neither end is reached.
    return torch.special.ndtri(counter_uniform(token_position, columns, *keys).double() + 2.0**-25).float()
