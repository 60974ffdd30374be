"""Newton-Schulz iteration: matrices with the same singular directions and singular values near 1."""

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of ``a x + b (x x^T) x + c (x x^T)^2 x``, as steep at zero as it can be, so that small singular values grow."""
NUM_STEPS = 5
_SMALLEST_NORM = 1e-7
"""Below it a matrix is left small: one of zeros stays zeros."""


@torch.no_grad()
def newton_schulz(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
    """Each matrix with its singular values brought into about 0.7 to 1.2, whatever their size.

    Five steps do not converge, and need not: the mean is what counts. Computed in the dtype of ``matrices``.

    Source:
        Jordan 2024, Muon (kellerjordan.github.io/posts/muon), as in ``torch.optim.Muon``; for a stack of matrices, each
        divided by its own norm.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    first, third, fifth = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        wide = torch.baddbmm(wide, polynomial, wide, beta=first)
    return wide.mT if is_tall else wide


def newton_schulz_flops(rows: int, columns: int) -> float:
    """FLOPs for one matrix: in each step the Gram matrix, its square, and the product with the matrix."""
    small, large = sorted((rows, columns))
    return NUM_STEPS * (4.0 * small**2 * large + 2.0 * small**3)
