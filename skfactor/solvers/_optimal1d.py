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

from skfactor.solvers._chain1d import best_chain
from skfactor.solvers._prefix import (
    SortedSamples,
    build_prefix,
    cell_means,
    has_heavy_duplicates,
    interval_inertia,
    merge_duplicates,
    sort_samples,
    sums_at,
)
from skfactor.solvers._threads import usable_threads
from skfactor.solvers._windows1d import compander_borders, distinct, interlaced, refine, settle, slide

_EXACT, _MIN_EXACT = 192, 4096  # samples per cell, samples: the exact chain is also the fastest way
_GRID, _MIN_GRID = 64, 1024  # coarse samples per cell, and in all
_GRID_ROUGH = 128  # the same where sampling noise or weights make the objective rough
_ROUGH, _ROUGH_CELL = 1 << 18, 2048  # samples, in all and in a cell, up to which it is
_LARGE, _LARGE_CLUSTERS = 1 << 24, 1024  # beyond so many samples, for so few clusters, means stand for them
_MEANS, _PART = 1 << 20, 1 << 23  # how many, and samples of a part of the range
_FINE, _REACH = 256, 1 / 8  # steps to a cell by which all borders slide together, and how far at once, in cells


class KMeans1DResult(NamedTuple):
    """Centres (sorted, distinct), inertia, a lower bound on the optimal inertia, number of iterations.

    Inertia and bound carry rounding of about 1e-15 of the inertia of one cluster.
    """

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


def prepare(x, weights, exponent=None, n_threads=1):
    """Sort, scale to a safe range and build prefix sums -> ``(SortedSamples, exponent)``, x = 2**exponent * x'."""
    x, w, shift = sort_samples(x, weights, n_threads)
    top = max(abs(float(x[0])), abs(float(x[-1])))
    if not np.isfinite(x[[0, -1]]).all():
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


def kmeans_1d(x, n_clusters, *, weights=None, certify=False, n_threads=None):
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
    n_threads : int, default=None
        Threads that share passes over large arrays; None means as many as there are usable cores.

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
    within = 0.0
    n_threads = usable_threads(n_threads)
    plain = weights is None and not certify and x.dtype == np.float32
    if plain and x.size > _LARGE and n_clusters <= _LARGE_CLUSTERS:
        x, weights, within = _condense(x)
    data, exponent = prepare(x, weights, n_threads=n_threads)
    data, borders, bound, n_iter = optimal_borders(data, n_clusters)
    if certify and bound == 0.0 and 2 < borders.size <= data.size:  # else the bound is the inertia, perhaps zero
        data, borders, bound, passes = _certified(data, borders)
        n_iter += passes
    if borders.size > data.size:  # every value has a cell of its own
        centers, inertia = data.x.astype(np.float64), 0.0
    else:
        centers, inertia, _ = settle(data, borders)
    bound = min(bound, inertia)
    scale = 2.0**exponent
    inertia = inertia * scale * scale + within
    return KMeans1DResult((centers + data.shift) * scale, inertia, bound * scale * scale, n_iter)


def _condense(x):
    """A million weighted means that stand for many float32: ``(means, weights, inertia about the means)``.

    The samples are sorted by one part of their range after the other, so that no second copy of all is in memory. A
    cell has hundreds of means, placed as borders would be, and so loses less than 1e-6 where it may end only between
    two of them.
    """
    n_parts = -(-x.size // _PART)
    probes = np.sort(x[:: x.size // 4096])
    if not np.isfinite((x.min(), x.max())).all():
        raise ValueError("x must be finite, got NaN or infinity")
    cuts = np.unique(probes[(np.arange(1, n_parts) * probes.size) // n_parts])
    means, weights, within = [], [], 0.0
    for low, high in zip((None, *cuts), (*cuts, None)):
        part = _between(x, low, high)
        if part.size == 0:
            continue
        part.sort()
        data = build_prefix(*(merge_duplicates(part, None) if has_heavy_duplicates(part, 0.75) else (part, None)))
        grid = compander_borders(data, min(data.size, _MEANS // n_parts))
        mean = cell_means(data, grid)
        means.append(mean)
        weights.append(np.diff(sums_at(data, grid)[1]))
        within += interval_inertia(data, grid, mean)
        del part, data
    return np.concatenate(means), np.concatenate(weights), within


def _between(x, low, high):
    """The samples above ``low`` and not above ``high``, None for no limit."""

    def inside(piece):
        kept = np.ones(piece.size, dtype=bool) if low is None else piece > low
        return kept if high is None else kept & (piece <= high)

    pieces = [x[i : i + (1 << 20)] for i in range(0, x.size, 1 << 20)]
    part = np.empty(sum(np.count_nonzero(inside(piece)) for piece in pieces), dtype=x.dtype)
    at = 0
    for piece in pieces:
        found = piece[inside(piece)]
        part[at : at + found.size] = found
        at += found.size
    return part


def optimal_borders(data, n_clusters):
    """Borders (k + 1,) of the optimal intervals, ``borders[0] = 0`` and ``borders[-1] = n``.

    Returns ``(data, borders, lower_bound or 0, n_iter)``; ``data`` may have its equal values merged.
    """
    exact = max(_EXACT * n_clusters, _MIN_EXACT)
    if data.size <= exact:
        data = distinct(data)
    n = data.size
    if n_clusters == 1:
        borders = np.array([0, n])
        return data, borders, settle(data, borders)[1], 1
    if n <= exact:
        return _exact_borders(data, n_clusters)
    rough = n <= max(_ROUGH, _ROUGH_CELL * n_clusters) or data.w is not None
    borders, inertia, n_iter = _from_chain(data, n_clusters, _GRID_ROUGH if rough else _GRID)
    if rough:
        window = {"tau": 1 / 16, "half": 32, "narrow": 32}
    else:
        borders, n_slides = slide(data, borders, inertia, _FINE, _REACH)
        n_iter += n_slides
        window = {"tau": 1 / (4 * _FINE), "half": 32, "narrow": 8}
    borders, n_moves = refine(data, borders, inertia, **window)
    n_iter += n_moves
    inner = borders[1:-1]
    if (data.x[inner - 1] == data.x[inner]).any():
        # A border inside a run of equal values cannot leave it by short moves: merge the runs.
        return optimal_borders(distinct(data), n_clusters)
    return data, borders, 0.0, n_iter


def _exact_borders(data, n_clusters, between=None):
    """Optimum over distinct samples; proven unless ``between`` finds it."""
    n = data.size
    if n_clusters >= n:
        return data, np.arange(n + 1), 0.0, 1
    borders = compander_borders(data, n_clusters)
    inertia = settle(data, borders, 40)[1]
    borders, bound, n_iter = best_chain(data, n_clusters, 1.95 * inertia / n_clusters, between=between)
    return data, borders, bound, n_iter


def _coarse(data, grid):
    """One weighted sample per grid cell: its mean."""
    s, t = sums_at(data, grid)
    weight = np.diff(t)
    return SortedSamples(data.origin + np.diff(s) / weight, weight, s, t, data.origin, data.shift, 1)


def _from_chain(data, n_clusters, per_cell):
    """Borders near the optimum, of those of a coarse grid, and about their inertia."""
    grid = compander_borders(data, max(_MIN_GRID, per_cell * n_clusters))
    coarse = _coarse(data, grid)
    _, borders, inertia, n_iter = _exact_borders(coarse, n_clusters, interlaced)
    return grid[borders], inertia, n_iter


def _certified(data, borders):
    """Proven optimum, started from a good partition: ``(data, borders, lower_bound, n_passes)``."""
    n_clusters = borders.size - 1
    starts = data.x[borders[:-1]]
    data = distinct(data)
    borders = np.append(np.searchsorted(data.x, starts), data.size)
    _, inertia, borders = settle(data, borders)
    around = [settle(*optimal_borders(data, k)[:2])[1] for k in (n_clusters - 1, n_clusters + 1)]
    # Half of what two cells more save lies inside the interval of prices that give n_clusters cells.
    price = (around[0] - around[1]) / 2
    best, bound, n_pass = best_chain(data, n_clusters, price, known=inertia)
    if best is not None and settle(data, best)[1] < inertia:
        borders = best
    return data, borders, bound, n_pass
