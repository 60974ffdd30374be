"""Expert-router coupling (2512.23447) in plain Python, from related.md's correction 6."""

import math

Vector = list[float]
Matrix = list[Vector]


def noise_bound(rows: Matrix, i: int) -> float:
    """``eps_i = ||R_i - R_j|| / (2 ||R_i||)`` with ``j`` the nearest other row."""
    distances = [math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i]
    return min(distances) / (2 * math.hypot(*rows[i]))


def activation_norms(proxies: Matrix, gates: list[Matrix]) -> Matrix:
    """``M_ij = ||R~_i W_g^j||``; each gate as ``[width][hidden]``."""

    def response(proxy: Vector, unit: Vector) -> float:
        return sum(one * other for one, other in zip(proxy, unit, strict=True))

    return [[math.hypot(*(response(proxy, unit) for unit in gate)) for gate in gates] for proxy in proxies]


def loss(norms: Matrix, alpha: float) -> float:
    """``1/n^2 sum_i sum_{j != i} [max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0)]``."""
    n, total = len(norms), 0.0
    for i in range(n):
        for j in range(n):
            if j != i:
                total += max(norms[i][j] - alpha * norms[i][i], 0.0)
                total += max(norms[j][i] - alpha * norms[i][i], 0.0)
    return total / n**2
