"""Weighted logistic regression with targets between 0 and 1, for the heads of a finder."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 50
_ENOUGH = 1e-4  # of the largest change of a weight


@dataclass(frozen=True, eq=False)
class Logistic:
    """Logistic regression: `sigmoid(weight . row + bias)`.

    Attributes:
        weight: `[dim]`, float64.
        bias: A number.
    """

    weight: NDArray[np.float64]
    bias: float

    def logits(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        """Logits `[...]` of rows `[..., dim]`."""
        logits: NDArray[np.float64] = rows @ self.weight + self.bias
        return logits

    def probabilities(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities `[...]` of rows `[..., dim]`."""
        return sigmoid(self.logits(rows))


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function, without overflow."""
    result: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * logits))
    return result


def fit_weighted(
    rows: NDArray[np.floating],
    targets: NDArray[np.floating],
    weights: NDArray[np.floating],
    penalty: float,
    *,
    start: Logistic | None = None,
) -> Logistic:
    """Logistic regression of rows with weights, by iteratively reweighted least squares.

    The weighted mean cross-entropy plus `penalty / 2 * |weight|^2`; the bias is free. Newton's
    steps, halved while the objective does not fall (Hastie et al., The Elements of Statistical
    Learning, 2nd ed., section 4.4.1).

    Args:
        rows: `[n, dim]`, of comparable scale in each column.
        targets: `[n]` in 0 ... 1.
        weights: `[n]`, at least 0, some above.
        penalty: Of the squared length of the weight, above 0.
        start: Where to begin; the optimum does not depend on it.
    """
    x = np.column_stack([rows, np.ones(len(rows))]).astype(np.float64)
    y, share = np.asarray(targets, np.float64), np.asarray(weights, np.float64)
    share = share / share.sum()
    ridge = np.append(np.full(x.shape[1] - 1, penalty), 0.0)
    point = np.zeros(x.shape[1]) if start is None else np.append(start.weight, start.bias)

    def objective(at: NDArray[np.float64]) -> float:
        logits = x @ at
        return float(share @ (np.logaddexp(0, logits) - y * logits) + ridge @ np.square(at) / 2)

    value = objective(point)
    for _ in range(_STEPS):
        p = sigmoid(x @ point)
        slope = x.T @ (share * (p - y)) + ridge * point
        curvature = (x * (share * p * (1 - p))[:, None]).T @ x
        curvature[np.diag_indices_from(curvature)] += ridge + 1e-10
        step = np.linalg.solve(curvature, slope)
        size = 1.0
        while (after := objective(point - size * step)) > value and size > 1e-6:
            size /= 2
        point, value = point - size * step, min(after, value)
        if np.abs(size * step).max() < _ENOUGH:
            break
    return Logistic(point[:-1], float(point[-1]))
