"""Warnings about routers that have stopped spreading tokens."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class RouterHealth:
    """Judge of the routes of every step: warns once when a layer falls ill, and again only after it was well.

    The only judge of collapse: the pages show its events, so a threshold of a page's own could contradict the run.
    """

    def __init__(self, layers: list[int], window_steps: int, collapse_ratio: float):
        """Start with nothing seen.

        Args:
            layers: Numbers of the MoE layers, for the messages.
            window_steps: ``metrics.router_health_steps``.
            collapse_ratio: ``metrics.collapse_ratio``.
        """
        self._layers, self._window_steps, self._collapse_ratio = layers, window_steps, collapse_ratio
        self._steps = 0
        self._tokens = 0
        self._routes: Tensor | None = None
        self._in_use: list[Tensor | None] = [None] * len(layers)
        self._dead: dict[int, list[int]] = {layer: [] for layer in layers}
        self._collapsed = dict.fromkeys(layers, False)

    def update(
        self,
        tokens_per_expert: Float[Tensor, "layers experts"],
        tokens: int,
        free_slots: Sequence[Bool[Tensor, "experts"] | None] = (),
    ) -> list[tuple[str, str]]:
        """Count one step; at the end of a window, what has fallen ill in it.

        Args:
            tokens_per_expert: Routes of the step.
            tokens: Text tokens of the step.
            free_slots: Each layer's ``Router.free_slots`` after the step: an expert that was one in the window is well.

        Returns:
            Names and messages: ``dead_experts`` and ``collapsed_router``.
        """
        if not self._layers:
            return []
        self._routes = tokens_per_expert if self._routes is None else self._routes + tokens_per_expert
        self._tokens += tokens
        for index, free in enumerate(free_slots):
            if free is not None:
                before = self._in_use[index]
                self._in_use[index] = ~free.cpu() if before is None else before & ~free.cpu()
        self._steps += 1
        if self._steps < self._window_steps:
            return []
        warnings: list[tuple[str, str]] = []
        for layer, routes, in_use in zip(self._layers, self._routes, self._in_use, strict=True):
            warnings += self._judge(layer, routes, torch.ones_like(routes) > 0 if in_use is None else in_use)
        self._steps, self._tokens, self._routes = 0, 0, None
        self._in_use = [None] * len(self._layers)
        return warnings

    def _judge(self, layer: int, routes: Tensor, in_use: Tensor) -> list[tuple[str, str]]:
        warnings = []
        number = int((in_use | (routes > 0)).sum())
        dead = ((routes == 0) & in_use).nonzero().flatten().tolist()
        if dead and dead != self._dead[layer]:
            names = ", ".join(map(str, dead))
            warnings.append(
                ("dead_experts", f"layer {layer}: no token in {self._steps} steps for expert {names} of {number}")
            )
        self._dead[layer] = dead
        used, per_token = effective_experts(routes), float(routes.sum()) / max(1, self._tokens)
        # A dense scheme uses all experts for every token, and is not ill.
        collapsed = used <= self._collapse_ratio * per_token < number
        if collapsed and not self._collapsed[layer]:
            warnings.append(
                (
                    "collapsed_router",
                    f"layer {layer}: {self._steps} steps used {used:.1f} of {number} experts, at {per_token:.1f} "
                    "experts per token: nearly all tokens go the same way",
                )
            )
        self._collapsed[layer] = collapsed
        return warnings


def effective_experts(routes: Float[Tensor, "experts"]) -> float:
    """Number of evenly used experts with the entropy of this load: 1 for a single one, all for an even load."""
    share = routes.double() / routes.sum().clamp(min=1)
    return math.exp(float(torch.special.entr(share).sum()))
