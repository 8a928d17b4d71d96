"""Globally optimal one-dimensional k-means on sorted samples, in plain numpy.

In one dimension the cells of an optimal codebook are intervals of the sorted samples, so k-means is the choice of
``K - 1`` borders. Lloyd's algorithm moves every border by itself and stops at a local optimum; here all borders
move together: a dynamic programme over a window of positions around every border, repeated on finer windows
until single samples no longer move.

References
----------
.. [1] Wu, "Optimal quantization by matrix searching", J. Algorithms 12(4), 1991, :doi:`10.1016/0196-6774(91)90039-2`
.. [2] Panter & Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels",
   Proc. IRE 39(1), 1951 (codebook density proportional to the cube root of the density).
.. [3] Han, Mao & Dally, "Deep Compression", arXiv:1510.00149.
"""

# SPDX-License-Identifier: BSD-3-Clause
from typing import NamedTuple

import numpy as np

from skfactor.solvers._assign1d import round_down
from skfactor.solvers._prefix import (
    build_prefix,
    cell_means,
    has_heavy_duplicates,
    interval_inertia,
    merge_duplicates,
    sort_samples,
    sums_at,
)


class KMeans1DResult(NamedTuple):
    """Centres (sorted, distinct), inertia, a lower bound on the optimal inertia, number of iterations."""

    centers: np.ndarray
    inertia: float
    lower_bound: float
    n_iter: int


def check_samples(x, weights, n_clusters=1):
    """``x`` as a flat floating array and ``weights`` as a flat float64 array or None."""
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1, got {n_clusters}")
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32 if x.dtype == np.float16 else np.float64)
    x = x.reshape(-1)
    if x.size == 0:
        raise ValueError("x must hold at least one value, got an empty array")
    if weights is None:
        return x, None
    weights = np.asarray(weights, dtype=np.float64).reshape(-1)
    if weights.shape != x.shape:
        raise ValueError(f"weights must have one entry per value, got {weights.size} for {x.size} values")
    low, high = weights.min(), weights.max()
    if not (low >= 0 and np.isfinite(high)):
        raise ValueError("weights must be finite and not negative")
    if high == 0:
        raise ValueError("at least one weight must be positive, got all zeros")
    return x, weights


def prepare(x, weights, exponent=None):
    """Sort, scale to a safe range and build prefix sums -> ``(SortedSamples, exponent)``, x = 2**exponent * x'."""
    x, w, shift = sort_samples(x, weights)
    top = max(abs(float(x[0])), abs(float(x[-1])))
    if not np.isfinite(top):
        raise ValueError("x must be finite, got NaN or infinity")
    if exponent is None:
        # Squares must neither overflow nor vanish.
        exponent = int(np.frexp(top)[1]) if top > 0 and not 1e-60 < top < 1e60 else 0
    if exponent:
        x = np.ldexp(x.astype(np.float64), -exponent)
        shift = float(np.ldexp(shift, -exponent))
    if has_heavy_duplicates(x):
        x, w = merge_duplicates(x, w)
    return build_prefix(x, w, shift), exponent


def kmeans_1d(x, n_clusters, *, weights=None, certify=False):
    """Globally optimal k-means of scalars.

    Minimises ``sum_i w_i * min_k (x_i - c_k)^2`` over the ``n_clusters`` centres ``c_k``.

    Parameters
    ----------
    x : ndarray of shape (n,), float32 or float64
        Values in any order; not modified.
    n_clusters : int
        Number of centres. Fewer are returned when ``x`` has fewer distinct values of positive weight.
    weights : ndarray of shape (n,), default=None
        Weight of every value, finite and >= 0; values of weight 0 do not count.
    certify : bool, default=False
        Close the duality gap: return a proven optimum whose ``lower_bound`` equals ``inertia`` to rounding.

    Returns
    -------
    KMeans1DResult
        ``centers`` of shape (k,) sorted, ``inertia``, ``lower_bound`` (0 without ``certify``, unless the
        solution is exact for a trivial reason), ``n_iter``.

    Raises
    ------
    ValueError
        Empty or non-finite ``x``, ``n_clusters`` < 1, or weights that are negative, non-finite or all zero.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import kmeans_1d
    >>> result = kmeans_1d(np.array([0.0, 0.2, 5.0, 5.2, 9.0]), 3)
    >>> result.centers.round(6).tolist()
    [0.1, 5.1, 9.0]
    >>> round(result.inertia, 6)
    0.04
    """
    x, weights = check_samples(x, weights, n_clusters)
    data, exponent = prepare(x, weights)
    data, borders, n_iter = optimal_borders(data, n_clusters)
    if certify:
        from skfactor.solvers._certify1d import certify_borders

        data, borders, bound, passes = certify_borders(data, borders)
        n_iter += passes
    else:
        bound = 0.0
    centers, inertia, _ = settle(data, borders)
    bound = min(bound, inertia)
    scale = 2.0**exponent
    return KMeans1DResult((centers + data.shift) * scale, inertia * scale * scale, bound * scale * scale, n_iter)


def optimal_borders(data, n_clusters):
    """Borders (k + 1,) of the optimal intervals, ``borders[0] = 0`` and ``borders[-1] = n``."""
    if data.size <= 4 * n_clusters or n_clusters > data.size // 8:
        data = distinct(data)
    n = data.size
    if n_clusters >= n:
        n_distinct = n if data.w is not None else 1 + np.count_nonzero(data.x[1:] != data.x[:-1])
        if n_distinct == n:
            return data, np.arange(n + 1), 1
    if n_clusters == 1:
        return data, np.array([0, n]), 1
    borders, n_iter = _refine(data, compander_borders(data, n_clusters))
    inner = borders[1:-1]
    if (data.x[inner - 1] == data.x[inner]).any():
        # A border inside a run of equal values cannot leave it by short moves: merge the runs.
        merged = distinct(data)
        if n_clusters >= merged.size:
            return merged, np.arange(merged.size + 1), n_iter
        borders = np.searchsorted(merged.x, data.x[borders[:-1]])
        borders = _spread(np.append(borders, merged.size))
        data = merged
        borders, more = _refine(data, borders)
        n_iter += more
    return data, borders, n_iter


def distinct(data):
    """``data`` with equal values merged."""
    if not (data.x[1:] == data.x[:-1]).any():
        return data
    x, w = merge_duplicates(data.x, data.w)
    return build_prefix(x, w, data.shift)


def _spread(borders):
    """Nearest strictly increasing borders: every cell holds a sample."""
    k = np.arange(borders.size)
    n = borders[-1]
    inner = np.maximum.accumulate(borders - k) + k
    inner = np.minimum(inner, n - (borders.size - 1 - k))
    inner[0] = 0
    return inner


def _knots(n):
    """Positions 0..n: dense at both ends (an outlier may deserve a cell), then growing, then evenly spaced."""
    if n <= 4096:
        return np.arange(n + 1)
    step = n / 4096
    edge = [np.arange(33)]
    at, width = 33.0, 1.0
    while width < step and at < n / 4:
        edge.append([int(at)])
        width *= 1.15
        at += width
    edge = np.concatenate(edge)
    return np.unique(np.concatenate((edge, np.linspace(edge[-1], n - edge[-1], 4096).astype(np.intp), n - edge)))


def compander_borders(data, n_clusters):
    """Starting borders, equally spaced in the compander coordinate ``integral of density^(1/3)`` [2]_."""
    n = data.size
    knots = _knots(n)
    x = data.x[np.minimum(knots, n - 1)].astype(np.float64)
    mass = np.diff(knots).astype(np.float64) if data.t is None else np.diff(sums_at(data, knots)[1])
    room = np.diff(knots).astype(np.float64)  # borders that fit between two knots
    g = np.cbrt(mass * np.diff(x) ** 2)
    for _ in range(30):
        # A gap between two samples takes one border, however wide it is.
        cap = room * (g.sum() / n_clusters)
        if (g <= cap * 1.01).all():
            break
        g = np.minimum(g, cap)
    coordinate = np.concatenate(([0.0], np.cumsum(g)))
    at = np.interp(np.arange(n_clusters + 1) * (coordinate[-1] / n_clusters), coordinate, knots)
    at[0], at[-1] = 0, n
    return _spread(np.rint(at).astype(np.intp))


def _refine(data, borders):
    """Joint moves of all borders over ever finer windows, until no border moves."""
    cells = borders.size - 1
    widest = np.diff(borders).max()
    n_iter = 0
    levels, tau = [(1 / 16, 16, 12)], 1 / 16
    while True:
        tau /= 2
        levels.append((tau, 16, 6))
        if tau * widest <= 1:
            break
    for tau, half, repeats in levels:
        last = tau == levels[-1][0]
        for _ in range(4 * repeats if last else repeats):
            n_iter += 1
            positions = _window(borders, tau, half)
            choice = _joint_move(data, borders, positions)
            moved = positions[np.arange(cells - 1), choice]
            changed = not np.array_equal(moved, borders[1:-1])
            borders = np.concatenate(([0], moved, [data.size]))
            if not changed or (not last and np.abs(choice - half).max() < half):
                break
    return borders, n_iter


def _window(borders, tau, half):
    """Candidate positions (K - 1, 2 * half + 1) of the inner borders: steps of ``tau`` cells, at least one sample."""
    cells, n = borders.size - 1, borders[-1]
    step = np.arange(-half, half + 1)
    k = np.arange(1, cells)
    if half * tau <= 1:
        sizes = np.diff(borders)
        shift = np.where(step < 0, sizes[:-1, None], sizes[1:, None]) * (tau * step)
    else:
        shift = np.interp(k[:, None] + tau * step, np.arange(cells + 1), borders) - borders[1:-1, None]
    shift = np.where(step < 0, np.minimum(np.rint(shift), step), np.maximum(np.rint(shift), step)).astype(np.intp)
    shift[:, half] = 0
    positions = borders[1:-1, None] + shift
    np.clip(positions, k[:, None], (n - cells + k)[:, None], out=positions)
    return positions


def _joint_move(data, borders, positions):
    """Best combination of one position per border, by dynamic programming; returns the chosen columns.

    With cell means ``r_k``, moving border k by samples of weight ``c`` and sum ``d`` (about the midpoint of its two
    means, half distance h) changes the cost against fixed means by ``4 h d``; refitting the means then
    gains ``s^2 / t`` per cell, s being its new sum about its old mean. Every term is local to a border, so nothing
    cancels even beside an outlier or between distant groups of samples.
    """
    s_border, t_border = sums_at(data, borders)
    t_cell = np.diff(t_border)
    mean = np.diff(s_border) / t_cell
    half = np.diff(mean) / 2
    middle = mean[:-1] + half
    s, t = sums_at(data, positions)
    c = t - t_border[1:-1, None]
    d = s - s_border[1:-1, None] - middle[:, None] * c
    shift = half[:, None] * c
    into_left, out_of_right = d + shift, d - shift
    penalty = 4 * half[:, None] * d
    n_inner, width = positions.shape
    first = into_left[0] ** 2 / (t_cell[0] + c[0])
    scores = np.empty((n_inner, width))
    scores[0] = first - penalty[0]
    last = out_of_right[-1] ** 2 / (t_cell[-1] - c[-1])
    gains = []
    batch = max(1, (1 << 16) // (width * width))
    table = np.empty((width, width))
    for lo in range(1, n_inner, batch):
        hi = min(lo + batch, n_inner)
        gain = into_left[lo:hi, None, :] - out_of_right[lo - 1 : hi - 1, :, None]
        weight = (t_cell[lo:hi, None] + c[lo:hi])[:, None, :] - c[lo - 1 : hi - 1, :, None]
        if (positions[lo - 1 : hi - 1].max(axis=1) >= positions[lo:hi].min(axis=1)).any():
            empty = positions[lo - 1 : hi - 1, :, None] >= positions[lo:hi, None, :]
            weight[empty] = 1.0
            np.square(gain, out=gain)
            gain /= weight
            gain[empty] = -np.inf
        else:
            np.square(gain, out=gain)
            gain /= weight
        gain -= penalty[lo:hi, None, :]
        gains.append(gain)
        for k in range(lo, hi):
            np.add(gain[k - lo], scores[k - 1][:, None], out=table)
            np.max(table, axis=0, out=scores[k])
    choice = np.empty(n_inner, dtype=np.intp)
    choice[-1] = np.argmax(scores[-1] + last)
    for k in range(n_inner - 1, 0, -1):
        gain = gains[(k - 1) // batch][(k - 1) % batch]
        choice[k - 1] = np.argmax(scores[k - 1] + gain[:, choice[k]])
    return choice


def settle(data, borders):
    """Centres and inertia of a partition whose cells are the nearest-centre cells of its means."""
    centers = cell_means(data, borders)
    for _ in range(100):
        nearest = cut(data.x, centers)
        if np.array_equal(nearest, borders) or (np.diff(nearest) <= 0).any():
            break
        borders = nearest
        centers = cell_means(data, borders)
    return centers, interval_inertia(data, borders, centers), borders


def cut(x, centers):
    """Borders of the nearest-centre cells of sorted ``x``; a value on a midpoint belongs to the lower cell."""
    middle = round_down((centers[:-1] + centers[1:]) / 2, x.dtype)
    return np.concatenate(([0], np.searchsorted(x, middle, side="right"), [x.size]))
