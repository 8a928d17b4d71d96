# SPDX-License-Identifier: BSD-3-Clause
"""One scalar k-means per row of a matrix, all rows at once.

Every row gets its own codebook (per-channel weight sharing). The rows are sorted and reduced to prefix sums, so
that a partition is a list of borders; a dynamic programme over few candidate borders finds a start, and dynamic
programmes over windows around the borders move all borders of a row jointly until nothing gains. Each step is a
numpy operation over a block of rows; blocks are spread over threads.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Rows with at most this many distinct values are solved exactly: every position is a candidate border.
EXACT_LENGTH = 96
# Rows handled by one numpy call.
_BLOCK = 1024
# Rows whose candidates are handled by one numpy call.
_CANDIDATE_BLOCK = 256
# Candidates at either end of a row.
_EXTREMES = 8
# Numbers in one work array: two of them fit the cache of one core.
_WORK = 32768
# A segment of negative length must never win: dividing by this makes its gain -inf or far below that of any other.
_NEGATIVE = {np.dtype(np.float64): -1e-300, np.dtype(np.float32): np.float32(-1e-30)}


class RowKMeansResult(NamedTuple):
    """Codebooks of all rows.

    Attributes
    ----------
    centers : ndarray of shape (n_rows, n_clusters), float64
        Ascending in every row. A row with fewer distinct values than clusters repeats its last centre.
    inertia : ndarray of shape (n_rows,), float64
        Weighted sum of squared differences to the centre of the cluster, per row.
    n_iter : int
        Largest number of refinement sweeps that any row took.
    """

    centers: np.ndarray
    inertia: np.ndarray
    n_iter: int


class _Rows(NamedTuple):
    """A block of sorted rows without repeated values, padded at the end by weight 0; the last axis is the row."""

    values: np.ndarray  # (n, R)
    weights: np.ndarray  # (n, R)
    n_distinct: np.ndarray  # (R,)
    sums: np.ndarray  # (n + 1, R) prefix sums of weight * (value - mean)
    masses: np.ndarray  # (n + 1, R) prefix sums of weight
    mean: np.ndarray  # (R,)


class _Prefix(NamedTuple):
    """What the programmes need of a block of rows, in double precision or, for moves proposed, in single."""

    sums: np.ndarray  # (n + 1, R)
    masses: np.ndarray  # (n + 1, R)
    tiny: np.ndarray  # (R,) mass that makes an empty segment's gain 0/tiny = 0 and changes no other one, to rounding
    counts: bool  # masses are whole numbers, so that no two of them differ by `tiny`

    @classmethod
    def of(cls, rows, dtype):
        masses = rows.masses.astype(dtype, copy=False)
        tiny = np.spacing(masses[-1])
        return cls(rows.sums.astype(dtype, copy=False), masses, tiny, tiny.max() < 1 and (masses % 1 == 0).all())

    def at(self, positions, active):
        """Sums and masses before the positions (..., R) of the chosen rows."""
        flat = positions * self.sums.shape[1]
        flat += active
        return self.sums.ravel().take(flat, mode="clip"), self.masses.ravel().take(flat, mode="clip")


def kmeans_1d_rows(X, n_clusters, *, weights=None):
    """Scalar k-means of every row, within a fraction of a percent of the optimum.

    Minimises, for each row ``i`` independently,

        sum_j w[i, j] * (X[i, j] - c[i, a(i, j)])**2

    over the centres ``c[i]`` and the assignments ``a(i, .)``. Rows with at most 96 distinct values are solved
    exactly; on longer rows the sum over rows is typically within 6e-4 of the optimum, and each row is a local
    optimum with respect to joint moves of all its borders, so no single value can move to another cluster and gain.
    The result does not depend on any random number, nor on the scale of the rows.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n), float32 or float64
    n_clusters : int
        At least 1.
    weights : ndarray of shape (n_rows, n), default=None
        Non-negative weight of every entry; None means 1. A row whose weights are all 0 is clustered without weights
        and has inertia 0.

    Returns
    -------
    RowKMeansResult

    Raises
    ------
    ValueError
        If `X` is not a non-empty finite matrix, `n_clusters` is below 1, or the weights are negative, not finite or
        of another shape.

    References
    ----------
    X. Wu, "Optimal quantization by matrix searching", J. Algorithms 12(4), 1991, doi:10.1016/0196-6774(91)90039-2
    (the exact dynamic programme that is restricted to windows here).

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d_rows import kmeans_1d_rows
    >>> X = np.array([[0.0, 0.2, 5.0, 5.2], [1.0, 1.0, 1.0, 4.0]])
    >>> kmeans_1d_rows(X, 2).centers
    array([[0.1, 5.1],
           [1. , 4. ]])
    """
    X = np.asarray(X)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"X must be a matrix with at least one row and one column, got shape {X.shape}")
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1, got {n_clusters}")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite, got NaN or infinity")
    if weights is not None:
        weights = np.asarray(weights)
        if weights.shape != X.shape:
            raise ValueError(f"weights must have the shape of X, {X.shape}, got {weights.shape}")
        if not np.isfinite(weights).all() or weights.min() < 0:
            raise ValueError("weights must be finite and not negative")
    n_clusters = int(n_clusters)
    centers = np.empty((X.shape[0], n_clusters))
    inertia = np.empty(X.shape[0])

    def solve(start):
        rows = slice(start, start + _BLOCK)
        centers[rows], inertia[rows], n_iter = _solve_block(
            X[rows], None if weights is None else weights[rows], n_clusters
        )
        return n_iter

    return RowKMeansResult(centers, inertia, max(_map(solve, range(0, X.shape[0], _BLOCK))))


def assign_1d_rows(X, centers):
    """Index of the nearest centre of the same row; of two equally near centres, the lower.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n), float32 or float64
    centers : ndarray of shape (n_rows, n_clusters)
        Ascending in every row; values may repeat.

    Returns
    -------
    labels : ndarray of shape (n_rows, n), uint8, or uint16 for more than 256 clusters, or int32

    Raises
    ------
    ValueError
        If the numbers of rows differ or a row of `centers` does not ascend.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d_rows import assign_1d_rows
    >>> assign_1d_rows(np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 2.0]]))
    array([[0, 0, 1]], dtype=uint8)
    """
    X = np.asarray(X)
    if X.dtype != np.float32:
        X = np.asarray(X, dtype=np.float64)
    centers = np.asarray(centers, dtype=np.float64)
    if X.ndim != 2 or centers.ndim != 2 or X.shape[0] != centers.shape[0]:
        raise ValueError(f"X and centers must have the same number of rows, got shapes {X.shape} and {centers.shape}")
    if (centers[:, 1:] < centers[:, :-1]).any():
        raise ValueError("every row of centers must ascend")
    n_clusters = centers.shape[1]
    dtype = np.uint8 if n_clusters <= 256 else np.uint16 if n_clusters <= 65536 else np.int32
    labels = np.zeros(X.shape, dtype=dtype)
    repeats = centers[:, 1:] == centers[:, :-1]
    limits = _upper_limits(centers, repeats, X.dtype)
    step = max(1, 65536 // max(X.shape[1], 1))

    def count(start):
        rows = slice(start, start + step)
        above = np.empty(X[rows].shape, dtype=bool)
        for k in range(n_clusters - 1):
            np.greater(X[rows], limits[rows, k, None], out=above)
            labels[rows] += above

    _map(count, range(0, X.shape[0], step))
    if repeats.any():
        # The count is a rank among the distinct centres; the first of equal centres carries the label.
        repeated = np.concatenate([np.zeros((len(X), 1), dtype=bool), repeats], axis=1)
        labels = np.take_along_axis(np.argsort(repeated, axis=1, kind="stable"), labels.astype(np.intp), axis=1).astype(
            dtype
        )
    return labels


def _map(function, starts):
    """Results of `function` over `starts`, in order, on as many threads as there are usable cores (8 at most)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = min(8, usable, len(starts))
    if n_threads < 2:
        return [function(start) for start in starts]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, starts))


def _upper_limits(centers, repeats, dtype):
    """Largest number of type `dtype` that still belongs to the lower of two neighbouring centres, exactly."""
    low, high = centers[:, :-1], centers[:, 1:]
    total = low + high
    # Knuth's two-sum: low + high == total + error exactly, so that 2x > low + high is decided without rounding.
    part = total - low
    error = (low - (total - part)) + (high - part)
    limits = np.where(error < 0, np.nextafter(total / 2, -np.inf), total / 2)
    limits[repeats] = np.inf
    if dtype == np.float32:
        rounded = limits.astype(np.float32)
        limits = np.where(rounded > limits, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return limits


def _solve_block(X, weights, n_clusters):
    """Centres (R, n_clusters), inertia (R,) and number of sweeps for a block of rows."""
    # A power of two per row: scaling by it is exact, and squares neither overflow nor vanish.
    exponent = np.frexp(np.maximum(X.max(axis=1), -X.min(axis=1)).astype(np.float64))[1]
    # Without weights the order does not matter: sorting in the type of the input is faster in single precision.
    values = (np.sort(X, axis=1) if weights is None else X).astype(np.float64)
    for part in (exponent // 2, exponent - exponent // 2):  # in two steps: one factor could overflow
        values *= np.ldexp(1.0, -part)[:, None]
    if weights is None:
        w_scale, dead = np.ones(len(X)), np.zeros(len(X), dtype=bool)
    else:
        w_scale = weights.max(axis=1).astype(np.float64)
        dead = w_scale == 0
        weights = np.where(dead[:, None], 1.0, weights / np.where(dead, 1.0, w_scale)[:, None])
    rows = _distinct(values, weights)
    borders = np.minimum(np.arange(n_clusters + 1)[:, None], rows.n_distinct)
    short = (rows.n_distinct > n_clusters) & (rows.n_distinct <= EXACT_LENGTH)
    long = (rows.n_distinct > n_clusters) & (rows.n_distinct > EXACT_LENGTH)
    n_iter = 0
    if n_clusters > 1 and short.any():
        borders[:, short] = _optimum(_take(rows, short), n_clusters)
    if n_clusters > 1 and long.any():
        borders[:, long], n_iter = _near_optimum(_take(rows, long), n_clusters, X.shape[1])
    parts = [_evaluate(rows, borders, slice(start, start + _CANDIDATE_BLOCK))
             for start in range(0, len(X), _CANDIDATE_BLOCK)]  # fmt: skip
    centers, inertia = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    inertia = np.where(dead, 0.0, np.ldexp(inertia * w_scale, 2 * exponent))
    return np.ldexp(centers.T, exponent[:, None]), inertia, n_iter


def _distinct(values, weights):
    """Sort rows and merge equal values; values of weight 0 take the place of another value of their row.

    Without weights the rows are sorted already.
    """
    n_rows, n = values.shape
    if weights is not None:
        heavy = np.take_along_axis(values, weights.argmax(axis=1)[:, None], axis=1)
        values = np.where(weights > 0, values, heavy)
        order = np.argsort(values, axis=1)
        values, weights = np.take_along_axis(values, order, axis=1), np.take_along_axis(weights, order, axis=1)
    steps = values[:, 1:] != values[:, :-1]
    n_distinct = 1 + np.count_nonzero(steps, axis=1)
    repeated = np.flatnonzero(n_distinct < n)
    if repeated.size:
        weights = np.ones((n_rows, n)) if weights is None else weights
        values[repeated], weights[repeated] = _merged(values[repeated], weights[repeated], steps[repeated])
        values, weights = values[:, : n_distinct.max()], weights[:, : n_distinct.max()]
    values = np.ascontiguousarray(values.T)
    if weights is None:
        weights, masses = np.broadcast_to(1.0, values.shape), np.repeat(np.arange(n + 1.0)[:, None], n_rows, axis=1)
        mean = values.mean(axis=0)
        parts = values - mean
    else:
        weights = np.ascontiguousarray(weights.T)
        masses = _prefix_sums(weights)
        mean = (values * weights).sum(axis=0) / masses[-1]
        parts = (values - mean) * weights
    return _Rows(values, weights, n_distinct, _prefix_sums(parts), masses, mean)


def _merged(values, weights, steps):
    """Distinct values of sorted rows and the sums of their weights, padded by the largest value and weight 0."""
    n_rows, n = values.shape
    slot = np.zeros((n_rows, n), dtype=np.intp)
    np.cumsum(steps, axis=1, out=slot[:, 1:])
    slot += n * np.arange(n_rows)[:, None]
    merged = np.repeat(values[:, -1:], n, axis=1)
    merged.ravel()[slot] = values
    return merged, np.bincount(slot.ravel(), weights.ravel(), n_rows * n).reshape(n_rows, n)


def _prefix_sums(parts):
    """Sums of the first 0, 1, ... rows of `parts`; a fifth of the time of numpy's cumsum along the first axis."""
    out = np.zeros((len(parts) + 1, parts.shape[1]))
    for before, part, after in zip(out[:-1], parts, out[1:], strict=True):
        np.add(before, part, out=after)
    return out


def _take(rows, keep):
    """The chosen rows, with padding that no chosen row needs cut off."""
    if keep.all():
        return rows
    n = rows.n_distinct[keep].max()
    values, weights, sums, masses = (
        np.compress(keep, array[:length], axis=1)
        for array, length in ((rows.values, n), (rows.weights, n), (rows.sums, n + 1), (rows.masses, n + 1))
    )
    return _Rows(values, weights, rows.n_distinct[keep], sums, masses, rows.mean[keep])


def _optimum(rows, n_clusters):
    """Optimal borders by the dynamic programme over all positions."""
    n, n_rows = rows.values.shape
    positions = np.broadcast_to(np.arange(n + 1)[:, None], (n + 1, n_rows))
    return _candidate_programme(_Prefix.of(rows, np.float64), np.arange(n_rows), positions, n_clusters, n)


def _near_optimum(rows, n_clusters, n_columns):
    """Borders from a programme on candidates, then on windows around the borders until no row gains.

    The sizes of the windows follow the number of columns of the matrix: no row depends on the others of its block.
    Moves are proposed in single precision first, where that resolves the inertia, and in double precision last.
    """
    everyone = np.arange(len(rows.mean))
    double = _Prefix.of(rows, np.float64)
    n_candidates = max(64, 3 * n_clusters)
    reach = min(n_candidates, -(-4 * n_candidates // n_clusters))
    borders = np.empty((n_clusters + 1, len(rows.mean)), dtype=np.intp)

    def start(chosen, dtype):
        for some in np.split(chosen, range(_CANDIDATE_BLOCK, len(chosen), _CANDIDATE_BLOCK)):
            positions = _candidate_positions(rows, some, n_candidates)
            borders[:, some] = _candidate_programme(double, some, positions, n_clusters, reach, dtype)
        return _gain(double, chosen, borders[:, chosen])

    gain = start(everyone, np.float32)
    total = (rows.weights * np.square(rows.values - rows.mean)).sum(axis=0)
    # Where single precision tells one ten-thousandth of the inertia.
    resolved = np.finfo(np.float32).eps * gain < 1e-4 * (total - gain)
    if not resolved.all():
        gain[~resolved] = start(everyone[~resolved], np.float64)
    single = _Prefix.of(rows, np.float32)
    levels = _offsets(n_columns, n_clusters)
    # few clusters get stuck in narrow windows, many are cheap to widen
    half = int(np.clip(2 * n_columns / n_clusters, 8, 11 if 8 <= n_clusters <= 32 else 14))
    # Indices that differ by up to 2/3 of `half`: segments from 1/3 to 5/3 of the present clusters.
    band = 2 * half // 3
    n_iter = 0

    def sweep(proposals, active, windows, band):
        nonlocal n_iter
        n_iter += 1
        return _improve(double, proposals, borders, gain, active, windows(borders[:, active]), band)

    def near(proposals, active, offsets):
        while active.size:
            active = sweep(proposals, active, lambda b: _near_windows(b, offsets), len(offsets))

    for active, proposals in ((everyone[resolved], single), (everyone[~resolved], double)):
        while active.size:
            for offsets in levels:
                near(proposals, active, offsets)
            active = sweep(proposals, active, lambda b: _wide_windows(b, half), band)
    near(double, everyone, levels[-1])
    return borders, n_iter


def _near_windows(borders, offsets):
    """Positions (K - 1, W, R) next to each inner border."""
    windows = borders[1:-1, None] + offsets[None, :, None]
    np.maximum(windows, 0, out=windows)
    return np.minimum(windows, borders[-1], out=windows)


def _wide_windows(borders, half):
    """From the lower to the upper neighbour: a cluster can be given up on one side and opened on the other."""
    fractions = np.arange(1, half + 1)[None, :, None] / half
    middle, low, high = borders[1:-1, None], borders[:-2, None], borders[2:, None]
    up = np.rint((high - middle) * fractions).astype(np.intp)
    down = np.rint((middle - low) * fractions).astype(np.intp)
    return np.concatenate([middle - down[:, ::-1], middle, middle + up], axis=1)


def _offsets(n, n_clusters):
    """Offsets of near windows, coarse to fine: units from a twelfth of the mean cluster size down to 1."""
    unit = max(1, round(n / (12 * n_clusters)))
    # With many clusters a sweep is dear by its number of steps, not by the width of its windows.
    steps = np.arange(-2, 3) if n_clusters <= 32 else np.arange(-4, 5)
    levels = [steps]
    while unit > 1:
        levels.insert(1, unit * steps)
        unit = round(unit / 3)
    return levels[1:] + levels[:1]


def _candidate_positions(rows, some, n_candidates):
    """Ascending candidates (M, R) for borders of the chosen rows: everywhere by density, and at both ends."""
    chosen = slice(some[0], some[-1] + 1) if some[-1] - some[0] + 1 == some.size else some
    n_distinct = rows.n_distinct[chosen]
    inside = _compander_positions(rows.values[:, chosen], rows.weights[:, chosen], rows.masses[:, chosen], n_candidates)
    # Outliers deserve clusters of their own.
    step = np.arange(1, _EXTREMES + 1)[:, None]
    positions = np.concatenate([np.minimum(inside, n_distinct), np.minimum(step, n_distinct),
                                np.maximum(n_distinct - step, 0)])  # fmt: skip
    positions.sort(axis=0)
    return positions


def _compander_positions(values, weights, masses, n_candidates):
    """Positions spread evenly in the coordinate int f^(3/8), mixed with the plain quantiles; shape (M + 1, R).

    The optimal density of centres is proportional to f^(1/3) of the density f (Panter and Dite, 1951). The power 3/8
    takes three square roots, a third of the time of one cube root. One spacing d that holds the mass w contributes
    d^(5/8) w^(3/8).
    """
    n, n_rows = values.shape
    spacing = np.diff(values, axis=0)
    between = (weights[1:] + weights[:-1]) / 2
    between *= np.sqrt(between)
    coordinate = _prefix_sums(np.sqrt(spacing * np.sqrt(np.sqrt(spacing) * between)))[1:]
    total = coordinate[-1]
    coordinate *= 0.7 / np.where(total > 0, total, 1)
    coordinate += masses[1:-1] * (0.3 / masses[-1])
    coordinate *= n_candidates
    bins = np.minimum(coordinate.astype(np.intp), n_candidates - 1)
    bins += n_candidates * np.arange(n_rows)
    counts = np.bincount(bins.ravel(), minlength=n_rows * n_candidates).reshape(n_rows, n_candidates)
    positions = np.zeros((n_candidates + 1, n_rows), dtype=np.intp)
    np.cumsum(counts.T, axis=0, out=positions[1:])
    positions[1:] += 1
    positions[-1] = n
    return positions


def _candidate_programme(prefix, active, positions, n_clusters, reach, dtype=np.float64):
    """Borders (K + 1, R) that maximise sum (segment sum)^2 / (segment mass) over the candidate positions.

    The weighted sum of squares is the same for every partition, so that maximising this gain minimises the inertia.
    `positions` has shape (M + 1, R); a segment spans at most `reach` candidates. Gains are rounded
    to `dtype` before they are added.
    """
    n_steps, n_rows = positions.shape[0] - 1, positions.shape[1]
    reach = min(reach, n_steps)
    row = np.arange(n_rows)
    sums, masses = prefix.at(positions, active)

    def starts(array, fill):
        # [j, l] is candidate j + 1 - reach + l, the possible starts of a segment that ends at candidate j + 1
        padded = np.concatenate([np.full((reach - 1, n_rows), fill), array[:-1]])
        return sliding_window_view(padded, reach, axis=0).transpose(0, 2, 1)

    gain = sums[1:, None] - starts(sums, 0.0)  # (M, reach, R)
    mass = masses[1:, None] - starts(masses, 0.0)
    mass += prefix.tiny[active]
    gain *= gain
    gain /= mass
    gain = gain.astype(dtype, copy=False)
    # one array of all rounds with -inf in front, where no segment can start
    history = np.full((n_clusters, reach + n_steps, n_rows), -np.inf, dtype=dtype)
    history[0, reach - 1] = 0.0
    work = np.empty_like(gain)
    for k in range(n_clusters - 1):
        np.add(gain, sliding_window_view(history[k, :-1], reach, axis=0).transpose(0, 2, 1), out=work)
        work.max(axis=1, out=history[k + 1, reach:])
    end = np.full(n_rows, n_steps)
    borders = np.zeros((n_clusters + 1, n_rows), dtype=np.intp)
    borders[-1] = positions[-1]
    lag = np.arange(reach)[:, None]
    for k in range(n_clusters - 1, 0, -1):
        start = end - reach + lag
        value = gain[end - 1, :, row].T + history[k][start + reach - 1, row]
        end = end - reach + value.argmax(axis=0)
        borders[k] = positions[end, row]
    return borders


def _improve(prefix, proposals, borders, gain, active, windows, band):
    """Move all borders jointly within one window each, in place where that gains; returns the rows that gained."""
    new = _window_programme(proposals, active, windows, borders[:, active], band)
    after = _gain(prefix, active, new)
    better = after > gain[active] * (1 + 1e-13)
    gained = active[better]
    borders[:, gained] = new[:, better]
    gain[gained] = after[better]
    return gained


def _gain(prefix, active, borders):
    sums, masses = prefix.at(borders, active)
    step = np.diff(sums, axis=0)
    return (step * step / (np.diff(masses, axis=0) + prefix.tiny[active])).sum(axis=0)


def _window_programme(prefix, active, windows, borders, band):
    """Borders (K + 1, R) with border k + 1 chosen from windows[k] (W, R), maximising the gain of all segments.

    Positions of two neighbouring windows are combined when their indices differ by about `band` at most.
    """
    n_inner, width, n_rows = windows.shape
    row = np.arange(n_rows)
    s, m = prefix.at(windows, active)  # (K - 1, W, R)
    tiny, negative = prefix.tiny[active], _NEGATIVE[s.dtype]
    ends = m + tiny
    best = np.empty_like(s)
    np.divide(s[0] * s[0], np.maximum(ends[0], tiny), out=best[0])
    step = max(1, _WORK // (width * n_rows))
    work = np.empty(2 * step * width * n_rows, dtype=s.dtype)
    with np.errstate(over="ignore"):
        for k in range(1, n_inner):
            for j in range(0, width, step):
                to, since = slice(j, min(j + step, width)), slice(max(0, j - band), min(j + step + band, width))
                shape = (2, to.stop - to.start, since.stop - since.start, n_rows)
                gain, mass = work[: math.prod(shape)].reshape(shape)
                np.subtract(s[k, to, None], s[k - 1, since], out=gain)
                np.subtract(ends[k, to, None], m[k - 1, since], out=mass)
                np.maximum(mass, negative, out=mass)
                if not prefix.counts:
                    np.copyto(mass, negative, where=mass == 0)
                gain *= gain
                gain /= mass
                gain += best[k - 1, since]
                gain.max(axis=1, out=best[k, to])
        chosen = borders.copy()
        end_sum, end_mass = prefix.sums[-1, active], prefix.masses[-1, active] + tiny
        for k in range(n_inner - 1, -1, -1):
            step = end_sum - s[k]
            mass = np.maximum(end_mass - m[k], negative)
            mass[mass == 0] = negative
            pick = (step * step / mass + best[k]).argmax(axis=0)
            chosen[k + 1] = windows[k, pick, row]
            end_sum, end_mass = s[k, pick, row], ends[k, pick, row]
    # A reversed segment whose sum is exactly 0 is not excluded above: order the borders, the caller compares gains.
    chosen.sort(axis=0)
    return chosen


def _evaluate(rows, borders, some):
    """Centres (K, R) and inertia (R,) of the partition of a slice of the rows, from differences to the centres."""
    values, weights, mean = rows.values[:, some], rows.weights[:, some], rows.mean[some]
    sums, masses, borders = rows.sums[:, some], rows.masses[:, some], borders[:, some].copy()
    n, n_rows = values.shape
    n_clusters = borders.shape[0] - 1
    row = np.arange(n_rows)
    borders[0] = 0
    # Empty segments move to the end, where they repeat the last centre.
    inside = borders[1:]
    inside[inside == borders[:-1]] = n
    borders.sort(axis=0)
    borders[-1] = n
    mass = np.diff(masses[borders, row], axis=0)
    full = mass > 0
    safe = np.where(full, mass, 1.0)
    centers = mean + np.diff(sums[borders, row], axis=0) / safe
    flat = np.repeat(np.arange(n_clusters * n_rows), np.diff(borders, axis=0).T.ravel())
    label = flat.reshape(n_rows, n).T - n_clusters * row  # (n, R)
    # One correction from the differences removes the rounding of the prefix sums: single values are met exactly.
    residual = (values - centers[label, row]) * weights
    centers += np.bincount(flat, residual.T.ravel(), n_clusters * n_rows).reshape(n_rows, n_clusters).T / safe
    centers = np.maximum.accumulate(np.where(full, centers, -np.inf), axis=0)
    return centers, (weights * (values - centers[label, row]) ** 2).sum(axis=0)
