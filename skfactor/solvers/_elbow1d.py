"""The error of every codebook size from one layered dynamic programme."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from skfactor.solvers._optimal1d import check_samples, prepare
from skfactor.solvers._prefix import cell_means, interval_inertia, sums_at
from skfactor.solvers._windows1d import compander_borders

_PER_CELL = 16  # candidate borders per cell of the largest codebook
_STRIDE = 64  # rows between those that are searched first
_MIN_CANDIDATES = 4096
_FEW = 16  # starts per row that are searched without bounds from the rows beside it
_MANY = 2048  # candidates from which on the gain changes little from one start to the next


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
        Rounding adds about 1e-15 of ``inertia[0]`` (1e-8 for weights over many decades beside an outlier).

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
    best = np.full(n, -np.inf)
    best[1:] = (s[1:] - s[0]) ** 2 / (t[1:] - t[0])
    split = np.zeros(n, dtype=np.intp)
    reach = n
    out = [best[-1]]
    for k in range(2, k_max + 1):
        layer = _layer_nearby if reach <= _FEW and n >= _MANY else _layer
        new, new_split = layer(best, split, s, t, k, reach)
        reach = 2 + int((new_split - split)[k:].max(initial=0))
        best, split = new, new_split
        out.append(best[-1])
    return np.array(out)


def _layer_nearby(best, split, s, t, k, reach):
    """As `_layer`, when no start moved far at the layer before: the next few positions of every row, all at once.

    Rows whose best start is the last of them are searched on, up to the start of the next row that is settled.
    """
    n = s.size
    new, new_split = np.full(n, -np.inf), np.full(n, k - 1, dtype=np.intp)
    rows = np.arange(k, n)
    i = np.maximum(split[k:], k - 1) + np.arange(reach)[:, None]
    np.minimum(i, rows - 1, out=i)
    value = s[k:] - s.take(i)
    value *= value
    value /= t[k:] - t.take(i)
    value += best.take(i)
    pick = value.argmax(axis=0)
    new[k:] = value[pick, rows - k]
    new_split[k:] = i[pick, rows - k]
    open_end = (pick == reach - 1) & (new_split[k:] < rows - 1)
    if open_end.any():
        settled = np.where(open_end, n, new_split[k:])
        settled = np.minimum.accumulate(settled[::-1])[::-1]
        far = rows[open_end]
        low, high = new_split[far], np.minimum(settled[open_end], far - 1)
        if (high - low).sum() > 4 * n:
            return _layer(best, split, s, t, k, reach)
        _search(best, s, t, far, low, high, new, new_split)
    return new, new_split


def _layer(best, split, s, t, k, _):
    """Best partitions into ``k`` cells of the first j grid cells, and where their last cell starts, for every j.

    The start never falls as j or k grows, so every 64th row is searched from the start it had with k - 1 cells, and
    the rows in between, level by level, from the start of the row before to that of the row after.
    """
    n = s.size
    new, new_split = np.full(n, -np.inf), np.full(n, k - 1, dtype=np.intp)
    rows = np.append(np.arange(k, n - 1, _STRIDE), n - 1)
    _search(best, s, t, rows, np.maximum(split[rows], k - 1), rows - 1, new, new_split)
    step = _STRIDE
    while step > 1:
        step //= 2
        rows = np.arange(k + step, n - 1, 2 * step)
        after = np.minimum(rows + step, n - 1)
        low = np.maximum(new_split[rows - step], split[rows])
        _search(best, s, t, rows, low, np.minimum(new_split[after], rows - 1), new, new_split)
    return new, new_split


def _search(best, s, t, rows, low, high, new, new_split):
    """Maximise over the starts low..high of the last cell of every row (ragged), into ``new`` and ``new_split``."""
    if rows.size == 0:
        return
    width = np.maximum(high - low, 0) + 1
    begin = np.cumsum(width) - width
    row = np.repeat(np.arange(rows.size), width)
    i = np.arange(row.size)
    i -= (begin - low).take(row)
    value = s.take(rows).take(row)
    value -= s.take(i)
    value *= value
    weight = t.take(rows).take(row)
    weight -= t.take(i)
    value /= weight
    value += best.take(i)
    top = np.maximum.reduceat(value, begin)
    new[rows] = top
    hits = np.flatnonzero(value == top.take(row))
    first = np.empty(rows.size, dtype=np.intp)
    first[row.take(hits[::-1])] = hits[::-1]  # of equal ones the leftmost is written last
    new_split[rows] = i.take(first)
