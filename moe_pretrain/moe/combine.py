"""Combination of a token's expert outputs: their weighted sum, or first made orthogonal to each other.

The weighted sum is the experts' own last step (``moe/experts``), one node with the products before it. A combination
that compares the outputs of one token gets them unsummed, one row for each route, after they have come back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.row_layout import ExpertRowLayout, weighted_sum
from moe_pretrain.moe.types import Combine

OrthogonalForm = Literal["parts", "magnitudes", "unit", "symmetric"]
_DEPENDENT = 1e-10
"""Added to the squared cosines' diagonal. An output whose part outside the span of those before it is below 1e-5 of
itself counts as dependent: float32 leaves a part of 1e-7 of two equal outputs, whose direction is noise."""
_CHUNK_NUMBERS = 2**22
"""float64 numbers of rows that exist at a time."""


@dataclass(frozen=True)
class SumConfig:
    """``combine=sum``: ``y = sum_i g_i v_i`` over a token's experts with outputs ``v_i`` and weights ``g_i``.

    Attributes:
        name: ``sum``.
    """

    name: Literal["sum"]


@dataclass(frozen=True)
class OrthogonalConfig:
    """``combine=orthogonal``: a token's expert outputs are made orthogonal before they are summed; see ``Orthogonal``.

    Attributes:
        name: ``orthogonal``.
        form: What is summed: ``parts``, ``magnitudes``, ``unit`` or ``symmetric``.
    """

    name: Literal["orthogonal"]
    form: OrthogonalForm


CombineConfig = SumConfig | OrthogonalConfig


def build_combine(config: CombineConfig) -> Combine | None:
    """The combination of ``config``; None for the weighted sum."""
    return Orthogonal(config.form) if isinstance(config, OrthogonalConfig) else None


def pair_product_flops(config: CombineConfig, hidden_size: int, experts_per_token: float) -> float:
    """Forward FLOPs of one token's scalar products of its outputs with each other; backward costs as many."""
    return 2.0 * experts_per_token**2 * hidden_size if isinstance(config, OrthogonalConfig) else 0.0


class Orthogonal:
    """Weighted sum of a token's expert outputs after Gram-Schmidt, the output with the largest weight first.

    With ``u_i = v_i - sum_{j<i} <q_j, v_i> q_j`` and ``q_i = u_i / |u_i|`` the forms are

    ==============  ===========================  =======================================================================
    ``parts``       ``sum_i g_i u_i``            an output that becomes dependent fades out; a duplicate adds nothing
    ``magnitudes``  ``sum_i g_i |v_i| q_i``      every expert keeps its size
    ``unit``        ``sum_i g_i q_i``            as published, on a LoRA's outputs; throws away the size of full experts
    ``symmetric``   ``sum_i g_i |v_i| l_i``      ``l`` the rows of ``(V V^T)^(-1/2) V`` (Loewdin), the orthonormal set
                                                 nearest to the outputs; depends on no order
    ==============  ===========================  =======================================================================

    Each is a weighted sum of the ``v_i`` themselves, with factors that follow from their scalar products. Those are
    float64, so that factors of nearly dependent outputs are right too; no orthogonal vector is ever stored. An output
    whose own part is below 1e-5 of it is damped towards 0 instead of normalised noise (``_DEPENDENT``). Gradients of
    ``magnitudes`` and ``unit`` grow up to 1e5 near dependence, as the published form's do without bound. All but
    ``symmetric`` jump where the order of two weights changes.

    Source:
        OMoE (arXiv:2501.10062), Gram-Schmidt over LoRA experts with unit norm, after MOORE (arXiv:2311.11385). The
        other forms, for full experts, are ours.
    """

    def __init__(self, form: OrthogonalForm):
        self.form = form

    def __call__(
        self, rows: Float[Tensor, "rows hidden"], weight: Float[Tensor, "rows"], order: ExpertRowLayout
    ) -> Float[Tensor, "sources hidden"]:
        """Combine the outputs of each source's rows; arguments as in ``types.Combine``."""
        if order.rows_of_source.numel() == 0:
            return weighted_sum(rows, weight, order)
        slots = _best_first(weight, order)
        given = slots >= 0
        weights = torch.where(given, weight[slots.clamp(min=0)], 0.0).double()
        factors = self.factors(_PairProducts.apply(rows, slots), weights)
        per_row = torch.zeros_like(weight).index_put((slots[given],), factors[given].to(weight.dtype))
        return weighted_sum(rows, per_row, order)

    def factors(
        self, products: Float[Tensor, "sources slots slots"], weights: Float[Tensor, "sources slots"]
    ) -> Float[Tensor, "sources slots"]:
        """Factors ``c`` with ``y = sum_i c_i v_i``.

        Args:
            products: Scalar products of each source's outputs, best first; zeros where it has fewer. float64.
            weights: Their weights, 0 where it has fewer.
        """
        squares = products.diagonal(dim1=1, dim2=2)
        is_there = squares > 0
        norms = torch.where(is_there, squares, 1.0).sqrt()
        if self.form == "symmetric":
            # Of a common size, so that the diagonal of what is not there is of theirs.
            size = norms.detach().amax(dim=1, keepdim=True)
            diagonal = torch.where(is_there, _DEPENDENT * squares / size**2, 1.0)
            root = _InverseRoot.apply(products / size[:, :, None] ** 2 + torch.diag_embed(diagonal))
            return (root @ (weights * norms / size)[:, :, None])[:, :, 0]
        cosines = products / (norms[:, :, None] * norms[:, None, :])
        cosines = cosines + torch.diag_embed(torch.where(is_there, _DEPENDENT, 1.0))
        lower = torch.linalg.cholesky(cosines)
        scales = weights if self.form == "unit" else weights * norms
        if self.form == "parts":
            scales = scales * lower.diagonal(dim1=1, dim2=2)
        return torch.linalg.solve_triangular(lower.mT, scales[:, :, None], upper=True)[:, :, 0] / norms


def _best_first(weight: Float[Tensor, "rows"], order: ExpertRowLayout) -> Int[Tensor, "sources slots"]:
    """``order.rows_of_source`` by weight, largest first, equal ones in the router's order; -1 last."""
    slots = order.rows_of_source
    weights = weight.detach()[slots.clamp(min=0)].masked_fill(slots < 0, -torch.inf)
    return slots.gather(1, weights.sort(dim=1, descending=True, stable=True).indices)


class _PairProducts(torch.autograd.Function):
    """Scalar products of each source's rows with each other, float64; it keeps the rows and nothing else."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots)
        return torch.cat([taken @ taken.mT for taken, _ in _taken(rows, slots)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, slots = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        first = 0
        for taken, part in _taken(rows, slots):
            grad = grads[0][first : first + len(part)]
            first += len(part)
            of_slots = (grad + grad.mT) @ taken
            given = part >= 0
            grad_rows[part[given]] = of_slots[given].to(rows.dtype)
        return grad_rows, None


def _taken(rows: Tensor, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of some sources at a time, ``[sources, slots, hidden]`` float64, 0 where there are fewer; their slots."""
    sources = max(1, _CHUNK_NUMBERS // (slots.shape[1] * rows.shape[1]))
    for part in slots.split(sources):
        yield rows[part.clamp(min=0)].double().masked_fill_((part < 0)[:, :, None], 0.0), part


class _InverseRoot(torch.autograd.Function):
    """``A^(-1/2)`` of symmetric positive definite matrices.

    Its derivative is written with divided differences of eigenvalues, ``-1 / (a b (a + b))`` for their roots ``a`` and
    ``b``, which are finite where eigenvalues are equal, as those of orthogonal outputs are; that of ``eigh`` is not.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrices)
        roots = values.clamp(min=_DEPENDENT).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots[:, None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        left, right = roots[:, :, None], roots[:, None, :]
        differences = -1 / (left * right * (left + right))
        return vectors @ (differences * (vectors.mT @ grads[0] @ vectors)) @ vectors.mT
