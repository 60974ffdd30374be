"""OMoE (arXiv:2501.10062): the outputs of a token's experts made orthogonal before they are summed."""

from typing import Any, Literal, NamedTuple

import torch
from reference.papers.swiglu import swiglu
from torch import Tensor

Form = Literal["unit", "parts", "magnitude", "loewdin", "loewdin_magnitude"]


class Combined(NamedTuple):
    """Output and the components that were weighted, in the order in which they were made orthogonal."""

    y: Tensor  # [d]
    components: Tensor  # [k, d]
    order: list[int]  # row of ``outputs`` behind each component


def gram_schmidt(v: Tensor, tolerance: float = 1e-10) -> tuple[list[Tensor], list[Tensor]]:
    """``u_i = v_i - sum_{j<i} <q_j, v_i> q_j`` and ``q_i = u_i / ||u_i||`` for the rows of v [k, d].

    A row with ``||u_i|| <= tolerance ||v_i||`` depends on those before it: u_i = q_i = 0, with zero gradient, so
    that rounding noise is no direction. The published form has no such guard and gives NaN or noise.
    """
    parts: list[Tensor] = []
    units: list[Tensor] = []
    for i in range(v.shape[0]):
        u = v[i]
        for q in units:
            u = u - (q @ v[i]) * q
        dependent = bool(u.detach().norm() <= tolerance * v[i].detach().norm())
        parts.append(u * 0 if dependent else u)
        units.append(u * 0 if dependent else u / u.norm())
    return parts, units


class _InverseRoot(torch.autograd.Function):
    """A^(-1/2) of a symmetric positive definite A [k, k]; the derivative by divided differences of x^(-1/2).

    Differentiating eigh itself would divide by differences of eigenvalues, which are 0 for orthogonal outputs of
    equal length.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        ctx.save_for_backward(values, vectors)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        root = values.sqrt()
        slopes = -1 / (root[:, None] * root[None, :] * (root[:, None] + root[None, :]))
        return vectors @ (slopes * (vectors.T @ grads[0] @ vectors)) @ vectors.T


def loewdin(v: Tensor) -> Tensor:
    """Rows of ``(V V^T)^(-1/2) V`` for V = v [k, d]: the orthonormal set nearest to v. Needs independent rows."""
    return _InverseRoot.apply(v @ v.T) @ v


def combine(
    outputs: Tensor,
    weights: Tensor,
    form: Form = "unit",
    order: Literal["given", "weight"] = "given",
    tolerance: float = 1e-10,
) -> Combined:
    """One token: ``y = sum_i g_i c_i`` with orthogonal c_i.

    Args:
        outputs: [k, d], unweighted outputs v of the token's experts. weights: [k], g.
        form: c_i is the unit vector q_i ("unit", published), u_i ("parts"), ||v_i|| q_i ("magnitude"), the rows of
            the symmetric orthogonalisation ("loewdin"), or those times ||v_i|| ("loewdin_magnitude").
        order: Gram-Schmidt in the given order of the experts, or by falling weight (ties: the given order).
    """
    indices = list(range(outputs.shape[0]))
    if order == "weight":
        indices.sort(key=lambda i: -float(weights[i]))
    v = outputs[indices]
    if form in ("loewdin", "loewdin_magnitude"):
        components = list(loewdin(v))
    else:
        parts, units = gram_schmidt(v, tolerance)
        components = parts if form == "parts" else units
    if form in ("magnitude", "loewdin_magnitude"):
        components = [v[i].norm() * components[i] for i in range(len(indices))]
    y = torch.zeros_like(v[0])
    for i, component in zip(indices, components, strict=True):
        y = y + weights[i] * component
    return Combined(y, torch.stack(components), indices)


def forward(
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    form: Form = "unit",
    order: Literal["given", "weight"] = "given",
    tolerance: float = 1e-10,
) -> Tensor:
    """Layer output [T, d] for x [T, d], mask and weights [T, E]; a token without an expert gives 0."""
    rows = []
    for t in range(x.shape[0]):
        chosen = [e for e in range(mask.shape[1]) if mask[t, e]]
        if not chosen:
            rows.append(torch.zeros_like(x[t]))
            continue
        outputs = torch.stack([swiglu(x[t], w_gate[e], w_up[e], w_down[e]) for e in chosen])
        rows.append(combine(outputs, weights[t, chosen], form, order, tolerance).y)
    return torch.stack(rows)


def output_similarity_loss(outputs: list[Tensor]) -> Tensor:
    """Mean of cos^2 over all pairs of experts that share a token; ``outputs`` is one [k_t, d] per token."""
    squares = []
    for v in outputs:
        for i in range(v.shape[0]):
            for j in range(i):
                squares.append(((v[i] @ v[j]) / (v[i].norm() * v[j].norm())) ** 2)
    return torch.stack(squares).mean() if squares else torch.zeros((), dtype=torch.float64)


def parameter_similarity_loss(rows: Tensor) -> Tensor:
    """``||offdiag(What What^T)||^2``, each pair twice, for one row [n] of parameters or their sketch per expert."""
    total = torch.zeros_like(rows[0, 0])
    for i in range(rows.shape[0]):
        for j in range(rows.shape[0]):
            if i != j:
                total = total + ((rows[i] @ rows[j]) / (rows[i].norm() * rows[j].norm())) ** 2
    return total
