"""The error of every codebook size from one layered dynamic programme."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from skfactor.solvers._optimal1d import check_samples, prepare
from skfactor.solvers._prefix import cell_means, interval_inertia, sums_at
from skfactor.solvers._windows1d import compander_borders

_PER_CELL = 16  # candidate borders per cell of the largest codebook
_HALF = 6  # half width of the window in which a layer looks for its last border
_MIN_CANDIDATES = 1024


def elbow_1d(x, k_max, *, weights=None):
    """Near-optimal k-means inertia for every number of clusters 1..k_max.

    One dynamic programme over a few thousand candidate borders: layer K extends layer K - 1 by one cell, so
    every K costs one pass over the candidates.

    Parameters
    ----------
    x : ndarray of shape (n,), float32 or float64
    k_max : int
        Largest number of clusters.
    weights : ndarray of shape (n,), default=None

    Returns
    -------
    inertia : ndarray of shape (k_max,)
        ``inertia[K - 1]`` belongs to K clusters; non-increasing, 0 from the number of distinct values on.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import elbow_1d
    >>> elbow_1d(np.array([0.0, 2.0, 10.0, 10.0]), 4).tolist()
    [83.0, 2.0, 0.0, 0.0]
    """
    x, weights = check_samples(x, weights, k_max)
    data, exponent = prepare(x, weights)
    grid = compander_borders(data, min(data.size, max(_MIN_CANDIDATES, _PER_CELL * k_max)))
    s, t = sums_at(data, grid)
    total = interval_inertia(data, np.array([0, data.size]), cell_means(data, np.array([0, data.size])))
    gains = _layers(s, t, min(k_max, grid.size - 1))
    # sums are about the mean: s[-1] is rounding
    inertia = np.maximum(total - (gains - gains[0]), 0.0)
    inertia = np.minimum.accumulate(np.append(inertia, np.zeros(k_max - inertia.size)))
    return inertia * 4.0**exponent


def _layers(s, t, k_max):
    """Largest ``sum_k s_k^2 / t_k`` over partitions of the grid into K cells, for K = 1..k_max."""
    n = s.size
    j = np.arange(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = (s - s[0]) ** 2 / (t - t[0])
    best[0] = -np.inf
    split = np.zeros(n, dtype=np.intp)
    out = [best[-1]]
    for k in range(2, k_max + 1):
        if k <= 4:
            best, split = _wide_layer(best, s, t, k)
        else:
            guess = j - np.rint((j - split) * ((k - 1) / k)).astype(np.intp)
            best, split = _narrow_layer(best, s, t, k, guess)
        out.append(best[-1])
    return np.array(out)


def _evaluate(best, s, t, ends, starts):
    """Value of a last cell ``starts:ends`` after the best partition of what comes before."""
    value = s[ends] - s[starts]
    value *= value
    value /= t[ends] - t[starts]
    value += best[starts]
    return value


def _wide_layer(best, s, t, k):
    """One layer, looking for the last border first on every 32nd candidate, then around the best of them."""
    n = s.size
    new = np.full(n, -np.inf)
    split = np.zeros(n, dtype=np.intp)
    step = max(1, n // 128)
    starts = np.arange(k - 1, n - 1, step)
    ends = np.arange(k, n)
    clipped = np.minimum(starts, ends[:, None] - 1)
    column = np.argmax(_evaluate(best, s, t, ends[:, None], clipped), axis=1)
    split[k:] = clipped[np.arange(ends.size), column]
    while step > 1:
        step = (step + 3) // 4
        clipped = np.clip(split[k:, None] + step * np.arange(-4, 5), k - 1, ends[:, None] - 1)
        value = _evaluate(best, s, t, ends[:, None], clipped)
        column = np.argmax(value, axis=1)
        split[k:] = clipped[np.arange(ends.size), column]
    new[k:] = _evaluate(best, s, t, ends, split[k:])
    return new, split


def _narrow_layer(best, s, t, k, guess):
    """One layer, looking for the last border in a window around ``guess``; the window follows the maximum."""
    n = s.size
    new = np.full(n, -np.inf)
    split = np.zeros(n, dtype=np.intp)
    offsets = np.arange(-_HALF, _HALF + 1)
    todo, centre = np.arange(k, n), guess[k:]
    for _ in range(64):
        starts = np.clip(centre[:, None] + offsets, k - 1, todo[:, None] - 1)
        value = _evaluate(best, s, t, todo[:, None], starts)
        column = np.argmax(value, axis=1)
        row = np.arange(todo.size)
        at, value = starts[row, column], value[row, column]
        better = value > new[todo]
        new[todo[better]], split[todo[better]] = value[better], at[better]
        edge = better & ((column == 0) | (column == 2 * _HALF)) & (at > k - 1) & (at < todo - 1)
        todo, centre = todo[edge], at[edge]
        if todo.size == 0:
            break
    return new, split
