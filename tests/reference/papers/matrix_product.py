"""MPOE (arXiv:2203.01104): a weight matrix as a chain of 4-index cores whose central one all experts share.

Core m is [D_{m-1}, i_m, j_m, D_m] with D_0 = D_n = 1; ``W[i, j]`` is the product of the matrices T_m[:, i_m, j_m, :],
where i = (i_1 .. i_n) and j = (j_1 .. j_n) are read in row-major order, i_1 slowest.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from reference.papers.swiglu import weighted_sum
from torch import Tensor


def bond_sizes(rows: Sequence[int], columns: Sequence[int], truncation: int | None = None) -> list[int]:
    """``D_m = min(prod_{<=m} i j, prod_{>m} i j, truncation)`` for m = 0 .. n (section 3.1)."""
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    bonds = [min(math.prod(sizes[:m]), math.prod(sizes[m:])) for m in range(len(sizes) + 1)]
    return bonds if truncation is None else [min(bond, truncation) for bond in bonds]


def core_parameters(rows: Sequence[int], columns: Sequence[int], truncation: int | None = None) -> list[int]:
    """Numbers in each core."""
    bonds = bond_sizes(rows, columns, truncation)
    return [bonds[m] * rows[m] * columns[m] * bonds[m + 1] for m in range(len(rows))]


def layer_parameters(
    rows: Sequence[int],
    columns: Sequence[int],
    num_experts: int,
    shared: int | None = None,
    truncation: int | None = None,
) -> int:
    """Parameters of one matrix of all experts: core ``shared`` (the middle one if None) once, the rest per expert."""
    cores = core_parameters(rows, columns, truncation)
    central = cores[len(cores) // 2 if shared is None else shared]
    return central + num_experts * (sum(cores) - central)


def decompose(w: Tensor, rows: Sequence[int], columns: Sequence[int], truncation: int | None = None) -> list[Tensor]:
    """Cores of w [prod i, prod j] by a chain of SVDs from the left; exact without truncation.

    All cores but the last have orthonormal columns (the gauge is free), the last carries the norm.
    """
    n = len(rows)
    pairs = [axis for m in range(n) for axis in (m, n + m)]
    rest = w.reshape(*rows, *columns).permute(pairs)
    bonds = bond_sizes(rows, columns, truncation)
    cores = []
    for m in range(n - 1):
        u, s, vh = torch.linalg.svd(rest.reshape(bonds[m] * rows[m] * columns[m], -1), full_matrices=False)
        cores.append(u[:, : bonds[m + 1]].reshape(bonds[m], rows[m], columns[m], bonds[m + 1]))
        rest = torch.diag(s[: bonds[m + 1]]) @ vh[: bonds[m + 1]]
    cores.append(rest.reshape(bonds[n - 1], rows[-1], columns[-1], 1))
    return cores


def rebuild(cores: Sequence[Tensor]) -> Tensor:
    """W [prod i, prod j], one entry at a time."""
    matrix = []
    for i in itertools.product(*(range(core.shape[1]) for core in cores)):
        for j in itertools.product(*(range(core.shape[2]) for core in cores)):
            entry = cores[0][:, i[0], j[0], :]
            for m in range(1, len(cores)):
                entry = entry @ cores[m][:, i[m], j[m], :]
            matrix.append(entry[0, 0])
    return torch.stack(matrix).reshape(math.prod(core.shape[1] for core in cores), -1)


def rebuild_experts(shared: Tensor, auxiliaries: Sequence[Sequence[Tensor]], position: int | None = None) -> Tensor:
    """W of all experts [E, prod i, prod j] from the shared core and each expert's others, in order (section 3.2).

    ``position`` of the shared core in the chain: the middle one if None.
    """
    experts = []
    for cores in auxiliaries:
        middle = len(cores) // 2 if position is None else position
        experts.append(rebuild([*cores[:middle], shared, *cores[middle:]]))
    return torch.stack(experts)


def forward(
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    gate: tuple[Tensor, Sequence[Sequence[Tensor]]],
    up: tuple[Tensor, Sequence[Sequence[Tensor]]],
    down: tuple[Tensor, Sequence[Sequence[Tensor]]],
) -> Tensor:
    """SwiGLU mixture [T, d] of rebuilt experts; each matrix is (shared core, auxiliaries per expert)."""
    return weighted_sum(x, mask, weights, *(rebuild_experts(*matrix) for matrix in (gate, up, down)))


def switch_input(x: Tensor, probs: Tensor) -> Tensor:
    """The released Switch variant: x [T, d] times p / p.detach(), 1 in value, with p's [T] gradient."""
    return x * (probs / probs.detach())[:, None]


def mask_gradient(gradient: Tensor, draw: float, probability: float) -> Tensor:
    """Section 3.3: the shared core's gradient, 0 with ``probability``; ``draw`` is uniform in [0, 1)."""
    return gradient * 0 if draw < probability else gradient
