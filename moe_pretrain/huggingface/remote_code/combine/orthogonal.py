"""The weighted sum of a token's expert outputs, which are made orthogonal first."""

from collections.abc import Callable

import torch
from torch import Tensor


def combine(hidden: Tensor, gates: Tensor, run: Callable[[Tensor, int], Tensor], form: str | None) -> Tensor:
    """Outputs of each token's experts, the largest gate first, by Gram-Schmidt, or symmetrically; then their sum."""
    ranked = gates.masked_fill(gates == 0, -torch.inf)
    count = int((gates != 0).sum(dim=1).max()) if len(gates) else 0
    if count == 0:  # as one new token may be, of a scheme that may give it no expert
        return torch.zeros_like(hidden)
    order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    weights = gates.gather(1, order)
    outputs = hidden.new_zeros(len(hidden), count, hidden.shape[1])
    for expert in (gates != 0).any(dim=0).nonzero().flatten().tolist():
        token, slot = ((order == expert) & (weights != 0)).nonzero(as_tuple=True)
        outputs[token, slot] = run(hidden[token], expert)
    exact = outputs.double()
    factors = orthogonal_factors(exact @ exact.mT, weights.double(), str(form))
    return torch.einsum("tsh,ts->th", outputs, factors.to(outputs.dtype))


def orthogonal_factors(products: Tensor, weights: Tensor, form: str) -> Tensor:
    """Factors of the outputs ``[tokens, slots]`` by their scalar products; dependent ones are damped towards 0."""
    dependent = 1e-10
    squares = products.diagonal(dim1=1, dim2=2)
    is_there = squares > 0
    norms = torch.where(is_there, squares, 1.0).sqrt()
    if form == "symmetric":
        size = norms.amax(dim=1, keepdim=True)
        diagonal = torch.where(is_there, dependent * squares / size**2, 1.0)
        values, vectors = torch.linalg.eigh(products / size[:, :, None] ** 2 + torch.diag_embed(diagonal))
        root = (vectors / values.clamp(min=dependent).sqrt()[:, None, :]) @ vectors.mT
        return (root @ (weights * norms / size)[:, :, None])[:, :, 0]
    cosines = products / (norms[:, :, None] * norms[:, None, :])
    lower = torch.linalg.cholesky(cosines + torch.diag_embed(torch.where(is_there, dependent, 1.0)))
    scales = weights if form == "unit" else weights * norms
    if form == "parts":
        scales = scales * lower.diagonal(dim1=1, dim2=2)
    return torch.linalg.solve_triangular(lower.mT, scales[:, :, None], upper=True)[:, :, 0] / norms
