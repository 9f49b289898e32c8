"""Five distributions of points in the plane, with exact samples and their exact density.

All but the checkerboard are curves c_k(u), one a class k, blurred: pick k and u in [0, 1] uniformly, then
x = c_k(u) + noise * z with z standard normal. Points are standardised by the exact moments of the distribution,
y = (x - centre) / scale with one scale for both axes, so that the mean is 0 and the variance over all elements 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy import pi

from polydiff.data.table import Table

TRAIN, TEST = 8000, 2000


@dataclass(frozen=True)
class Curves:
    """A blurred-curve distribution.

    Args:
        curves: u (n,) -> points (classes, n, 2).
        noise: standard deviation of the blur, in the units of the curves.
        names: one a class.
        nodes: of the quadrature along a curve; 512 are less than half of the smallest noise apart.
    """

    curves: Callable[[np.ndarray], np.ndarray]
    noise: float
    names: tuple[str, ...]
    nodes: int = 512


def _turn(angle: np.ndarray, radius: np.ndarray | float = 1.0) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _moons(u: np.ndarray) -> np.ndarray:
    return np.stack([_turn(pi * u), np.array([1.0, 0.5]) - _turn(pi * u)])


def _rings(u: np.ndarray) -> np.ndarray:
    return np.stack([_turn(2 * pi * u, radius) for radius in (1.0, 2.0, 3.0)])


def _spiral(u: np.ndarray) -> np.ndarray:
    # Radius = angle; angle^2 uniform makes the points nearly uniform in arc length. From a quarter to 1.75 turns.
    angle = np.sqrt((pi / 2) ** 2 + u * ((3.5 * pi) ** 2 - (pi / 2) ** 2))
    return np.stack([_turn(angle, angle), -_turn(angle, angle)])


def _gaussians8(u: np.ndarray) -> np.ndarray:
    return np.stack([_turn(np.full_like(u, pi * k / 4)) for k in range(8)])


CURVES = {
    "moons": Curves(_moons, 0.1, ("upper", "lower")),
    "rings": Curves(_rings, 0.1, ("inner", "middle", "outer")),
    "spiral": Curves(_spiral, 0.3, ("first", "second")),
    "gaussians8": Curves(_gaussians8, 0.1, tuple("01234567"), nodes=1),
}
# Dark cells of a 4x4 board on [-2, 2]^2, by their lower left corner; each row and column has two, so that either
# coordinate is uniform: mean 0, variance 4/3.
CELLS = np.array([(i - 2, j - 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0], dtype=float)
BOARD_SCALE = (4 / 3) ** 0.5


def sample(name: str, n: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw independent points.

    Args:
        name: ``checkerboard`` or a key of ``CURVES``.
        n: how many.
        random: the source of randomness; its stream is frozen by NumPy, so that a seed means the same points for ever.
    Returns:
        Standardised points (n, 2) float32 and their classes (n,) int64.
    """
    if name == "checkerboard":
        label = random.randint(len(CELLS), size=n)
        return ((CELLS[label] + random.uniform(size=(n, 2))) / BOARD_SCALE).astype(np.float32), label.astype(np.int64)
    toy, (centre, scale) = CURVES[name], _moments(name)
    label = random.randint(len(toy.names), size=n)
    x = toy.curves(random.uniform(size=n))[label, np.arange(n)] + toy.noise * random.standard_normal((n, 2))
    return ((x - centre) / scale).astype(np.float32), label.astype(np.int64)


def log_prob(name: str, points: np.ndarray) -> np.ndarray:
    r"""Exact log density of standardised points, in nats.

    .. math:: p(y) = s^2 \frac1K \sum_k \int_0^1 \mathcal N(s y + m; c_k(u), \text{noise}^2 I)\, du

    with centre m and scale s, the integral by Gauss-Legendre quadrature (error below 1e-10 relative within five noise
    widths of a curve). The checkerboard is uniform on its cells and -inf outside.

    Args:
        name: ``checkerboard`` or a key of ``CURVES``.
        points: (n, 2), standardised.
    Returns:
        (n,) float64.
    """
    points = np.asarray(points, np.float64)
    if name == "checkerboard":
        cell = np.floor(points * BOARD_SCALE)
        is_inside = (cell[:, None] == CELLS).all(-1).any(-1)
        return np.where(is_inside, np.log(BOARD_SCALE**2 / len(CELLS)), -np.inf)
    toy, (centre, scale) = CURVES[name], _moments(name)
    u, weights = _quadrature(toy.nodes)
    c = toy.curves(u).reshape(-1, 2)
    weights = np.tile(weights, len(toy.names)) / len(toy.names) * scale**2 / (2 * pi * toy.noise**2)
    logs = []
    for x in np.array_split(centre + scale * points, 1 + len(points) // 256):
        squares = ((x**2).sum(-1)[:, None] + (c**2).sum(-1) - 2 * x @ c.T) / toy.noise**2
        nearest = squares.min(axis=1, keepdims=True)  # keeps the largest exponential at 1 far from every curve
        logs.append(np.log(np.exp((nearest - squares) / 2) @ weights) - nearest[:, 0] / 2)
    return np.concatenate(logs)


def recipe(name: str, source: Path | None) -> Table:
    """The data set of that name: 8000 training and 2000 test points, drawn independently with seed 0.

    Args:
        name: ``checkerboard`` or a key of ``CURVES``.
        source: not used, the points are generated.
    """
    points, label = sample(name, TRAIN + TEST, np.random.RandomState(0))
    names = tuple("01234567") if name == "checkerboard" else CURVES[name].names
    return Table(
        arrays={"point": points},
        columns={
            "id": np.array([f"{i:05d}" for i in range(len(points))]),
            "split": np.repeat(["train", "test"], [TRAIN, TEST]),
            "label": label,
        },
        names={"label": names},
        attributes={"units": "standard deviations", "normalisation": "(x - centre) / scale, exact moments"},
    )


@cache
def _quadrature(n: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


@cache
def _moments(name: str) -> tuple[np.ndarray, float]:
    """Mean (2,) and the root of the variance averaged over the two axes."""
    toy = CURVES[name]
    u, weights = _quadrature(toy.nodes)
    c = toy.curves(u)
    centre = np.einsum("knd,n->d", c, weights) / len(c)
    variance = np.einsum("knd,n->", (c - centre) ** 2, weights) / (2 * len(c)) + toy.noise**2
    return centre, float(variance) ** 0.5
