"""List of routes made of a mask that says what every token takes, without waiting for a GPU to count them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PADDED_OVER_EXPECTED = 1.25
"""Most rows that go to experts as padding and all, over those expected. A GPU gathers, activates and keeps padding as
it does routes, which soon takes longer than the one wait that cuts it off."""


@dataclass(frozen=True)
class RouteList:
    """Places of a mask ``[tokens, slots]`` that are True, token by token.

    Attributes:
        token: Token of each route, ascending; of padding the last one.
        slot: Its column in the mask; of padding the number of columns.
        num_routes: See ``Routing.num_routes``.
    """

    token: Int[Tensor, "routes"]
    slot: Int[Tensor, "routes"]
    num_routes: Int[Tensor, ""] | None
    _place: Int[Tensor, "routes"]

    def take(self, values: Tensor) -> Tensor:
        """``values[token, slot]`` of ``values [tokens, slots, ...]``, differentiable; of padding any number.

        Its gradient adds nothing up, as every pair is there once: on a GPU the gradient of an index has to sort.
        """
        return _Take.apply(values, self._place)


def list_routes(taken: Bool[Tensor, "tokens slots"], most: int, is_exact: bool = False) -> RouteList:
    """The True places of ``taken``.

    On a GPU the list has ``most`` places, and what is left of them is padding; elsewhere it is as long as it must be.

    Args:
        taken: The mask.
        most: Largest number of places that can be True. More would be lost on a GPU.
        is_exact: Whether it is their number.
    """
    tokens, slots = taken.shape
    flat = taken.flatten()
    if not (is_exact or taken.is_cuda):
        place = flat.nonzero()[:, 0]
    else:
        place = torch.nonzero_static(flat, size=most, fill_value=tokens * slots)[:, 0]
    token = place.div(slots, rounding_mode="floor")
    num_routes = None
    if taken.is_cuda and not is_exact:
        token, num_routes = token.clamp_(max=tokens - 1), flat.sum()
    return RouteList(token, place - token * slots, num_routes, place)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = values.shape
        rows = values.flatten(0, 1)
        return rows.index_select(0, place.clamp(max=len(rows) - 1) if place.is_cuda else place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        tokens, slots, *rest = ctx.shape
        # The last row is where the gradients of padding go.
        grad = grads[0].new_zeros(tokens * slots + 1, *rest).index_copy_(0, place, grads[0])
        return grad[:-1].view(ctx.shape), None
