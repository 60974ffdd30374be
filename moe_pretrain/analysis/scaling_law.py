"""The law ``L = E + A N^-alpha + B D^-beta``: fitted to runs, with intervals, and what follows from it.

Axis names:
    points     runs
    resamples  bootstrap resamples of the residuals
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import least_squares

HUBER_DELTA = 1e-3
"""Residual of the logarithm of a loss beyond which its weight no longer grows."""
RESAMPLES = 400
NUM_CONSTANTS = 5
_STARTS = ((0.15, 0.35, 0.7), (0.15, 0.35, 0.7), (0.5, 0.9))
"""Of alpha, of beta, and of E as a share of the lowest loss."""
LEAST_EXPONENT, LARGEST_EXPONENT = 0.01, 2.0
_BOUNDS = (
    [-np.inf, -np.inf, LEAST_EXPONENT, -np.inf, LEAST_EXPONENT],
    [np.inf, np.inf, LARGEST_EXPONENT, np.inf, LARGEST_EXPONENT],
)
"""Of the logarithms of E and A, alpha, that of B, beta."""
Floats = Float[np.ndarray, "points"]


@dataclass(frozen=True)
class Law:
    """Constants of the law.

    Attributes:
        irreducible: E, nats: the loss of an infinite model on infinite data.
        of_parameters: A.
        alpha: Exponent of the number of parameters.
        of_tokens: B.
        beta: Exponent of the number of tokens.
    """

    irreducible: float
    of_parameters: float
    alpha: float
    of_tokens: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss of a model with ``parameters`` after ``tokens``."""
        return self.irreducible + self.of_parameters * parameters**-self.alpha + self.of_tokens * tokens**-self.beta

    def best_parameters(self, product_of_both: float) -> float:
        """Parameters of the lowest loss at a fixed product of parameters and tokens (arXiv:2203.15556, eq. 4)."""
        total = self.alpha + self.beta
        scale = (self.alpha * self.of_parameters / (self.beta * self.of_tokens)) ** (1 / total)
        return scale * product_of_both ** (self.beta / total)


@dataclass(frozen=True)
class PercentileInterval:
    """An estimate, and where 95% of the resampled ones lie."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Sequence[float]) -> "PercentileInterval":
        """Percentile interval."""
        low, high = np.percentile(resampled, [2.5, 97.5])
        return cls(value, float(low), float(high))

    @property
    def sign(self) -> int:
        """1 or -1 where all of it is on that side of 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Fit:
    """A law, and those of resampled residuals.

    Attributes:
        law: The best one.
        resampled: Laws of the resamples, in an order that is the same for fits of the same draws.
        residual: Root mean square of the residuals of log losses.
    """

    law: Law
    resampled: list[Law]
    residual: float


def fit(parameters: Floats, tokens: Floats, losses: Floats, seed: int, resamples: int) -> Fit:
    """Fit the law, and again to resampled residuals.

    The Huber loss of log losses is minimised from several starts. A ladder is a design, and a resample that has lost
    one of four sizes has no exponent; so residuals are drawn and not runs, stretched by ``sqrt(n / (n - 5))``, for a
    fit of five constants leaves that much too little of them.

    Args:
        parameters: Of each run.
        tokens: Of each run.
        losses: Of each run, nats.
        seed: Of the draws: fits of the same number of runs and seed have the same ones.
        resamples: Number of them.

    Source:
        Hoffmann et al. 2022 (arXiv:2203.15556), approach 3; Besiroglu et al. 2024 (arXiv:2404.10102) for carrying the
        minimisation to its end.
    """
    of_parameters, of_tokens, target = np.log(parameters), np.log(tokens), np.log(losses)
    centre = float(of_parameters.mean()), float(of_tokens.mean())
    x, y = of_parameters - centre[0], of_tokens - centre[1]
    points = _Points(x, y, target)
    best = min((points.minimise(start) for start in _starts(losses)), key=lambda found: found[1])[0]
    residuals = -points.residuals(best)
    stretched = math.sqrt(len(x) / (len(x) - NUM_CONSTANTS)) * residuals
    draws: Int[np.ndarray, "resamples points"]
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    moved = [_Points(x, y, target - residuals + stretched[drawn]).minimise(best)[0] for drawn in draws]
    laws = [_law(constants, centre) for constants in moved]
    return Fit(_law(best, centre), laws, float(np.sqrt(np.mean(residuals**2))))


def _starts(losses: Floats) -> list[np.ndarray]:
    lowest, mean = float(losses.min()), float(losses.mean())
    found = []
    for alpha, beta, share in product(*_STARTS):
        rest = math.log((mean - share * lowest) / 2)
        found.append(np.array([math.log(share * lowest), rest, alpha, rest, beta]))
    return found


class _Points:
    """Runs by the logarithms of size and tokens, which have a mean of 0, and of the loss."""

    def __init__(self, x: Floats, y: Floats, target: Floats):
        self.x, self.y, self.target = x, y, target

    def terms(self, constants: np.ndarray) -> np.ndarray:
        """Logarithms of the three terms of the law [3, points]."""
        irreducible, of_parameters, alpha, of_tokens, beta = constants
        flat = np.full_like(self.x, irreducible)
        return np.stack([flat, of_parameters - alpha * self.x, of_tokens - beta * self.y])

    def residuals(self, constants: np.ndarray) -> np.ndarray:
        """Logarithms of predicted over observed losses [points]."""
        return np.logaddexp.reduce(self.terms(constants), axis=0) - self.target

    def slopes(self, constants: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals by the constants [points, 5]."""
        terms = self.terms(constants)
        share = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        return np.stack([share[0], share[1], -share[1] * self.x, share[2], -share[2] * self.y], axis=1)

    def minimise(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """Constants of the lowest Huber loss near ``start``, and that loss."""
        found = least_squares(
            self.residuals,
            start,
            jac=self.slopes,
            bounds=_BOUNDS,
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            ftol=1e-10,
            xtol=1e-10,
            gtol=1e-13,
            max_nfev=300,
        )
        return found.x, float(found.cost)


def _law(constants: np.ndarray, centre: tuple[float, float]) -> Law:
    """The constants without the shift of the logarithms."""
    irreducible, of_parameters, alpha, of_tokens, beta = map(float, constants)
    return Law(
        irreducible=math.exp(irreducible),
        of_parameters=math.exp(of_parameters + alpha * centre[0]),
        alpha=alpha,
        of_tokens=math.exp(of_tokens + beta * centre[1]),
        beta=beta,
    )
