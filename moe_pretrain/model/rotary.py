"""Rotary positions of queries and keys. ``heads`` are attention heads, ``half`` is half of one's width."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.compiled import one_kernel_on_cuda


def rotary_table(
    position_ids: Int[Tensor, "batch sequence"], head_size: int, base: float
) -> tuple[Float[Tensor, "batch 1 sequence half"], Float[Tensor, "batch 1 sequence half"]]:
    """Cosine and sine of the rotary angles, float32 (RoFormer, arXiv:2104.09864, eq. 15)."""
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angle = position_ids[:, None, :, None].float() * base**-exponent
    return angle.cos(), angle.sin()


def apply_rotary(
    heads: Float[Tensor, "batch heads sequence head"],
    table: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch heads sequence head"]:
    """Rotate pairs ``(i, i + head / 2)``, Llama's layout; computed in float32, returned in the input's dtype."""
    return _Rotary.apply(heads, *table)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    if heads.is_cuda:
        return _rotate_at_once(heads, cosine, sine, back)
    rotated = torch.empty(heads.shape, dtype=heads.dtype)
    _rotate_into(rotated, heads, cosine, sine, back)
    return rotated


def _rotate_into(rotated: Tensor, heads: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> None:
    """The same on a CPU, to the bit, in any order of the axes but the last.

    What can be is done over whole heads and in place: loops over half a head are short, and new memory is slow.
    """
    wide, half = heads.float(), cosine.shape[-1]
    of_second, of_first = (sine, -sine) if back else (-sine, sine)
    crossed = torch.empty(wide.shape)
    torch.mul(wide[..., half:], of_second, out=crossed[..., :half])
    torch.mul(wide[..., :half], of_first, out=crossed[..., half:])
    total = rotated if rotated.dtype == torch.float32 else torch.empty(wide.shape)
    torch.mul(wide, torch.cat([cosine, cosine], dim=-1), out=total).add_(crossed)
    if total is not rotated:
        rotated.copy_(total)


@one_kernel_on_cuda
def _rotate_at_once(heads: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """Written in order of tokens: so is then what attention makes of it, and its heads are joined without a copy."""
    cosine, sine = cosine.transpose(1, 2), (-sine if back else sine).transpose(1, 2)
    first, second = heads.transpose(1, 2).float().chunk(2, dim=-1)
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.to(heads.dtype).transpose(1, 2)


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is the rotation back: one node instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(heads, cosine, sine, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(grads[0], cosine, sine, True), None, None


def rotated_projection(
    projected: Float[Tensor, "batch sequence width"], table: tuple[Tensor, Tensor], sizes: list[int], head_size: int
) -> tuple[
    Float[Tensor, "batch heads sequence head"],
    Float[Tensor, "batch kv_heads sequence head"],
    Float[Tensor, "batch kv_heads sequence head"],
]:
    """Queries and keys, rotated, and values, by head, of a projection that holds ``sizes`` columns of each.

    The same as splitting it and ``apply_rotary``; its gradient is written in one pass instead of being rotated, put in
    order of tokens and joined.
    """
    return _RotatedProjection.apply(projected, *table, sizes, head_size)


class _RotatedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, cosine: Tensor, sine: Tensor, sizes: list[int], head_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        turning, value = (
            heads.unflatten(-1, (-1, head_size)).transpose(1, 2)
            for heads in projected.split([sizes[0] + sizes[1], sizes[2]], dim=-1)
        )
        turned = _rotate(turning, cosine, sine, False)
        query, key = turned.split([size // head_size for size in sizes[:2]], dim=1)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        join = _joined_gradient if grads[0].is_cuda else _joined_gradient_in_place
        return join(*grads, *ctx.saved_tensors), None, None, None, None


@one_kernel_on_cuda
def _joined_gradient(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Gradients of rotated queries, rotated keys and values as that of the projection that they come from."""

    def back(heads: Tensor) -> Tensor:
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat([first * cosine + second * sine, second * cosine - first * sine], dim=-1)
        return turned.to(heads.dtype)

    return torch.cat([heads.transpose(1, 2).flatten(2) for heads in (back(query), back(key), value)], dim=-1)


def _joined_gradient_in_place(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The same on a CPU, each part written where it belongs."""
    grads = [heads.transpose(1, 2) for heads in (query, key, value)]
    batch, sequence, _, head_size = grads[0].shape
    counts = [grad.shape[2] for grad in grads]
    joined = query.new_empty(batch, sequence, sum(counts) * head_size)
    *turned, kept = joined.unflatten(-1, (-1, head_size)).split(counts, dim=2)
    for part, grad in zip(turned, grads[:2], strict=True):
        _rotate_into(part, grad, cosine.transpose(1, 2), sine.transpose(1, 2), back=True)
    kept.copy_(grads[2])
    return joined
