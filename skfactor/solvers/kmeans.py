# SPDX-License-Identifier: BSD-3-Clause
"""K-means of the rows of a matrix: k-means++, then Lloyd's iteration with momentum on growing subsets.

The nearest centre of ``x`` is the ``argmax`` of ``[x, 1] @ [c, -|c|^2 / 2]``: one small matrix product per block of
rows, never an (N, K) matrix. After the first assignment of a subset, a row is compared only with the centres nearest
to its present one. Restricted or accelerated, no step is kept that raises the inertia; the labels that are returned
come from a comparison with all centres.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from threadpoolctl import ThreadpoolController

# Numbers in one block of scores: a second thread starts late, and has nothing to do where products are smaller.
_SCORES = 262144
# Multiply-adds below which a second thread costs more than it saves.
_WORK_PER_THREAD = 200_000_000
# Centres with which a row is compared after the first pass of a subset; argmax is fastest on multiples of 64.
_N_NEAR = 64
# Up to this many times as many centres, comparing with all of them is as fast.
_FULL = 4
# Rows of one cluster that are compared in one product of a batch.
_CHUNK = 64
# A step of Lloyd is prolonged by this fraction, and by that of the last change of the means.
_OVER_RELAXATION, _MOMENTUM = 0.5, 0.85
# Rows of the smallest subset, and relative decrease at which the iterations on it and on the larger ones end: the
# optimum of a subset is only a start for the next one.
_FIRST = 16384
_TRIAL_TOL, _SUBSET_TOL = 1e-2, 2e-3
# Columns from which the iterations start in a sketch of the rows, and the columns of the sketch.
_LONG_ROW, _SKETCH = 1024, 128
# Multiply-adds of k-means++ above which centres are drawn in batches.
_GREEDY_WORK = 30_000_000
# Rows up to which k-means++ may take all mutual distances at once.
_FEW_ROWS = 2048


class KMeansResult(NamedTuple):
    """A partition of the rows of a matrix.

    Attributes
    ----------
    centers : ndarray of shape (k, d), dtype of X
        Fewer than `n_clusters` when fewer rows are distinct.
    labels : ndarray of shape (n,), uint8, uint16 or int32
        Index of the nearest centre.
    inertia : float
        Weighted sum of squared differences between rows and their centres, in float64.
    n_iter : int
        Iterations of the best start, all subsets together.
    converged : bool
        Whether the last iteration on all rows lowered the inertia by less than `tol`, relatively.
    """

    centers: np.ndarray
    labels: np.ndarray
    inertia: float
    n_iter: int
    converged: bool


class _Space(NamedTuple):
    """The coordinates of the computation: ``[(X - shift) * scale, 1]``."""

    rows: np.ndarray  # (n, d + 1)
    shift: np.ndarray  # (d,)
    scale: float


class _Points(NamedTuple):
    """Rows with a last column of ones, their weights, and weight times squared norm."""

    rows: np.ndarray  # (n, d + 1)
    weights: np.ndarray | None  # (n,)
    norms: np.ndarray  # (n,) weight * squared norm, float64


class _State(NamedTuple):
    """What one assignment gives: labels, the rows grouped by label, sums and masses of the groups, inertia."""

    labels: np.ndarray  # (n,)
    order: np.ndarray  # (n,) rows by label, intp
    starts: np.ndarray  # (K + 1,) first position in `order` of each label
    sums: np.ndarray  # (K, d)
    masses: np.ndarray  # (K,)
    inertia: float  # with respect to the means sums / masses
    fixed: bool = False  # whether the labels are those of the nearest means


def kmeans(X, n_clusters, *, rng, sample_weight=None, n_init=1, max_iter=100, tol=2e-3, n_threads=None):
    """K-means of rows.

    Minimises ``sum_i w[i] * |X[i] - c[labels[i]]|**2`` over centres and labels: k-means++ on a subset of the rows, then
    Lloyd's iteration on nested subsets that grow fourfold up to all rows. Steps are prolonged beyond the means, with
    momentum; where that does not lower the inertia, the plain step is taken. Rows of 1024 columns or more are first
    clustered in a sketch of 256 random signed sums of columns. Empty clusters move to the
    farthest row of the cluster with the largest inertia.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    n_clusters : int
        At least 1.
    rng : numpy.random.Generator
        Source of all random choices; the same state gives the same result, whatever `n_threads`.
    sample_weight : ndarray of shape (n,), default=None
        Non-negative; None means 1.
    n_init : int, default=1
        Number of starts, of which the one with the lowest inertia is returned.
    max_iter : int, default=100
        Most iterations on each subset.
    tol : float, default=2e-3
        Iterations on all rows end when the inertia falls by less than this fraction; with 0 they end at a fixed point.
        The default costs about one percent of inertia on weights, 4e-4 half of that in half as much time again.
    n_threads : int, default=None
        Threads over blocks of rows; None means as many as there are usable cores.

    Returns
    -------
    KMeansResult

    Raises
    ------
    ValueError
        If `X` is not a non-empty finite matrix, a number is out of range, or the weights are negative, not finite,
        all zero or of another length.

    References
    ----------
    S. Lloyd, IEEE Trans. Inf. Theory 28(2), 1982, doi:10.1109/TIT.1982.1056489.
    D. Arthur, S. Vassilvitskii, "k-means++", SODA 2007, doi:10.5555/1283383.1283494.
    B. T. Polyak, USSR Comput. Math. Math. Phys. 4(5), 1964, doi:10.1016/0041-5553(64)90137-5 (momentum).
    M. Charikar, K. Chen, M. Farach-Colton, ICALP 2002, doi:10.1007/3-540-45465-9_59 (sketch).
    J. Wang et al., "Fast approximate k-means via cluster closures", CVPR 2012, doi:10.1109/CVPR.2012.6248034.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans import kmeans
    >>> X = np.array([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0], [9.0, 7.0]])
    >>> result = kmeans(X, 2, rng=np.random.default_rng(0))
    >>> result.centers[result.labels]
    array([[0., 1.],
           [0., 1.],
           [9., 8.],
           [9., 8.]])
    >>> result.inertia
    4.0
    """
    X, weights = _check(X, n_clusters, sample_weight)
    for name, value in (("n_init", n_init), ("max_iter", max_iter)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= tol < np.inf:
        raise ValueError(f"tol must be a number of at least 0, got {tol}")
    with _threads(n_threads, X.size * n_clusters) as pool:
        space = _space(X)
        points = _points(space.rows, weights)
        best = None
        for _ in range(n_init):
            labels, state, n_iter, converged = _fit(points, min(n_clusters, len(X)), rng, (max_iter, tol), pool)
            centers, labels = _finish(X, space, state, labels, pool)
            inertia = _inertia(X, weights, centers, labels, pool)
            result = KMeansResult(centers, labels, inertia, n_iter, converged)
            if best is None or result.inertia < best.inertia:
                best = result
    return best


def lloyd(X, centers, *, sample_weight=None, max_iter=100, tol=2e-3, n_threads=None):
    """Lloyd's iteration from given centres, with the steps of `kmeans`: where rows move a little, so do their clusters.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    centers : ndarray of shape (k, d)
    sample_weight, max_iter, tol, n_threads
        As in `kmeans`.

    Returns
    -------
    KMeansResult
        The centres in the order of those given; the inertia is not above that of the centres given.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans import lloyd
    >>> lloyd(np.array([[0.0], [3.0], [9.0]]), np.array([[8.0], [1.0]])).labels
    array([1, 1, 0], dtype=uint8)
    """
    centers = np.asarray(centers, dtype=np.float64)
    if centers.ndim != 2 or len(centers) == 0 or not np.isfinite(centers).all():
        raise ValueError(f"centers must be a finite matrix with at least one row, got shape {centers.shape}")
    X, weights = _check(X, len(centers), sample_weight)
    if X.shape[1] != centers.shape[1]:
        raise ValueError(f"X and centers must have the same number of columns, got shapes {X.shape}, {centers.shape}")
    with _threads(n_threads, X.size * len(centers)) as pool:
        space = _space(X)
        start = (centers - space.shift.astype(np.float64)) * space.scale
        labels, state, n_iter, converged = _improve(_points(space.rows, weights), start, (max_iter, tol), pool)
        centers, labels = _finish(X, space, state, labels, pool)
        return KMeansResult(centers, labels, _inertia(X, weights, centers, labels, pool), n_iter, converged)


def assign(X, centers, *, n_threads=None):
    """Index of the nearest centre of every row.

    Computed from the expansion of the square around the mean of the centres, in the precision of `X`; two centres
    whose distances differ by less than that rounding may be exchanged.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    centers : ndarray of shape (k, d)
    n_threads : int, default=None
        Threads over blocks of rows; None means as many as there are usable cores.

    Returns
    -------
    labels : ndarray of shape (n,), uint8, uint16 or int32

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans import assign
    >>> assign(np.array([[0.0], [3.0], [9.0]]), np.array([[1.0], [8.0]]))
    array([0, 0, 1], dtype=uint8)
    """
    X = _as_float(X)
    centers = np.asarray(centers, dtype=np.float64)
    if X.ndim != 2 or centers.ndim != 2 or X.shape[1] != centers.shape[1] or len(centers) == 0:
        raise ValueError(f"X and centers must have the same number of columns, got shapes {X.shape}, {centers.shape}")
    if X.size == 0:
        return np.zeros(len(X), dtype=_label_type(len(centers)))
    with _threads(n_threads, X.size * len(centers)) as pool:
        return _assign_all(X, centers, pool)


def _assign_all(X, centers, pool):
    """Labels of `assign`, from float64 centres."""
    space = _space(X, centers.mean(axis=0))
    return _assign(space.rows, _columns(centers, space), pool)


def _check(X, n_clusters, sample_weight):
    X = _as_float(X)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"X must be a matrix with at least one row and one column, got shape {X.shape}")
    if not np.isfinite(_bound(X)):
        raise ValueError("X must be finite, got NaN or infinity")
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1, got {n_clusters}")
    if sample_weight is None:
        return X, None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != X.shape[:1]:
        raise ValueError(f"sample_weight must have shape {X.shape[:1]}, got {weights.shape}")
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() == 0:
        raise ValueError("sample_weight must be finite, not negative, and not zero everywhere")
    return X, weights


def _bound(X):
    """Largest magnitude; NaN where there is one. By blocks that stay in the cache between the two passes."""
    flat = X.ravel() if X.flags.c_contiguous else X
    step = _SCORES if flat.ndim == 1 else max(1, _SCORES // X.shape[1])
    blocks = (flat[i : i + step] for i in range(0, len(flat), step))
    return float(np.max([(block.max(), -block.min()) for block in blocks]))


def _as_float(X):
    X = np.asarray(X)
    return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)


@cache
def _controller():
    return ThreadpoolController()


@contextmanager
def _threads(n_threads, work):
    """A pool for `n_threads` threads with one BLAS thread in each, or None where one thread is enough."""
    if n_threads is None:
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = min(n_threads, 1 + work // _WORK_PER_THREAD)
    with _controller().limit(limits=1, user_api="blas"):
        if n_threads < 2:
            yield None
        else:
            with ThreadPoolExecutor(n_threads) as pool:
                yield pool


def _run(pool, function, tasks):
    return [function(task) for task in tasks] if pool is None else list(pool.map(function, tasks))


def _space(X, shift=None):
    """Coordinates around `shift`, or around the mean, scaled by a power of two to magnitudes of at most 1."""
    if shift is None:
        shift = np.full(len(X), 1 / len(X), dtype=X.dtype) @ X
    shift = shift.astype(X.dtype)
    # A bound on |X - shift| without a copy of X; ldexp(..., -exponent) brings it below 1.
    bound = _bound(X) + float(np.abs(shift).max())
    scale = np.ldexp(1.0, min(-int(np.frexp(bound)[1]), np.finfo(X.dtype).maxexp - 8))
    rows = np.empty((X.shape[0], X.shape[1] + 1), dtype=X.dtype)
    step = max(1, _SCORES // rows.shape[1])
    for i in range(0, len(X), step):
        block = rows[i : i + step]
        np.subtract(X[i : i + step], shift, out=block[:, :-1])
        block[:, :-1] *= X.dtype.type(scale)
        block[:, -1] = 1
    return _Space(rows, shift, scale)


def _columns(centers, space):
    """Centres in the units of X as augmented columns of the space."""
    return _augment((centers - space.shift.astype(np.float64)) * space.scale, space.rows.dtype)


def _points(rows, weights):
    norms = np.einsum("ij,ij->i", rows[:, :-1], rows[:, :-1]).astype(np.float64)
    return _Points(rows, weights, norms if weights is None else norms * weights)


def _sketch(points, rng):
    """Rows of fewer columns with about the same mutual distances: every column is added, with a random sign, to one."""
    n, d = points.rows.shape[0], points.rows.shape[1] - 1
    signs = np.where(rng.random(d) < 0.5, -1, 1).astype(points.rows.dtype)
    rows = np.zeros((n, _SKETCH + 1), dtype=points.rows.dtype)
    for j in range(0, d, _SKETCH):
        columns = slice(j, min(j + _SKETCH, d))
        rows[:, : columns.stop - j] += points.rows[:, columns] * signs[columns]
    rows[:, -1] = 1
    return _points(rows, points.weights)


def _augment(centers, dtype):
    """``[c, -|c|^2 / 2]`` as columns, shape (d + 1, k)."""
    columns = np.empty((centers.shape[1] + 1, centers.shape[0]), dtype=dtype)
    columns[:-1] = centers.T
    columns[-1] = -0.5 * np.einsum("ij,ij->i", centers, centers)
    return columns


def _label_type(n_clusters):
    return np.uint8 if n_clusters <= 256 else np.uint16 if n_clusters <= 65536 else np.int32


def _assign(rows, columns, pool):
    """Label of every row against all centres, in blocks of rows."""
    n, k = len(rows), columns.shape[1]
    labels = np.empty(n, dtype=_label_type(k))
    block = max(16, _SCORES // k)
    task = block * max(1, min(64, n // (8 * block)))

    def run(start):
        scores = np.empty((block, k), dtype=rows.dtype)
        for i in range(start, min(start + task, n), block):
            here = rows[i : min(i + block, start + task)]
            labels[i : i + len(here)] = np.matmul(here, columns, out=scores[: len(here)]).argmax(axis=1)

    _run(pool, run, range(0, n, task))
    return labels


def _assign_near(points, state, columns, pool):
    """Label of every row against the centres nearest to its present one."""
    k = columns.shape[1]
    if k <= _FULL * _N_NEAR:
        return _assign(points.rows, columns, pool)
    by_cluster = np.empty(len(points.rows), dtype=_label_type(k))
    task = max(1, k // 16)
    batch = max(1, _SCORES // (_N_NEAR * _CHUNK))

    def run(first):
        last = min(first + task, k)
        own = np.arange(first, last)
        doubled = columns[:, own].copy()
        doubled[-1] = 1
        closeness = doubled.T @ columns
        near = np.argpartition(closeness, k - _N_NEAR, axis=1)[:, k - _N_NEAR :]
        near.sort(axis=1)
        chosen = np.ascontiguousarray(columns.T[near].transpose(0, 2, 1))
        near = near.astype(by_cluster.dtype)
        # Clusters in chunks of as many rows, the last row of a cluster repeated: one batched product for many clusters.
        starts, ends = state.starts[first:last], state.starts[first + 1 : last + 1]
        counts = -((starts - ends) // _CHUNK)
        cluster = np.repeat(np.arange(last - first), counts)
        begin = starts[cluster] + _CHUNK * (np.arange(len(cluster)) - np.repeat(np.cumsum(counts) - counts, counts))
        for i in range(0, len(cluster), batch):
            here = cluster[i : i + batch]
            position = np.minimum(begin[i : i + batch, None] + np.arange(_CHUNK), ends[here, None] - 1)
            scores = points.rows.take(state.order.take(position), axis=0) @ chosen.take(here, axis=0)
            pick = scores.argmax(axis=2)
            pick += _N_NEAR * here[:, None]
            by_cluster[position] = near.take(pick)

    _run(pool, run, range(0, k, task))
    labels = np.empty_like(by_cluster)
    labels[state.order] = by_cluster
    return labels


def _group(points, labels, n_clusters):
    """Sums and masses of the groups, and the inertia about their means: sum |x|^2 - sum |sum_k|^2 / mass_k."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=n_clusters)
    starts = np.concatenate([[0], np.cumsum(counts)])
    dtype = points.rows.dtype
    if points.weights is None:
        data, masses = np.ones(len(labels), dtype=dtype), counts.astype(np.float64)
    else:
        data, masses = points.weights[order].astype(dtype), np.bincount(labels, points.weights, n_clusters)
    sums = (
        csr_array((data, order.astype(np.int32), starts.astype(np.int32)), shape=(n_clusters, len(labels)))
        @ points.rows
    )[:, :-1].astype(np.float64)
    explained = (np.einsum("ij,ij->i", sums, sums) / np.where(masses > 0, masses, 1)).sum()
    return _State(labels, order, starts, sums, masses, points.norms.sum() - explained)


def _take(points, index):
    weights = None if points.weights is None else points.weights[index]
    return _Points(points.rows[index], weights, points.norms[index])


def _finish(X, space, state, labels, pool):
    """Centres in the units of X, and the labels against all of them; clusters that stay empty are left out."""
    full = state.masses > 0
    means = state.sums[full] / state.masses[full, None]
    centers = (means / space.scale + space.shift).astype(X.dtype)
    if state.fixed and full.all() and X.shape[1] >= _LONG_ROW:
        return centers, labels  # rounding the centres exchanges no labels of long rows
    labels = _assign_all(X, centers.astype(np.float64), pool)
    used = np.bincount(labels, minlength=len(centers)) > 0
    if not used.all():
        labels = (np.cumsum(used) - 1)[labels]
    return centers[used], labels.astype(_label_type(np.count_nonzero(used)), copy=False)


def _inertia(X, weights, centers, labels, pool):
    """Weighted sum of squared differences: differences in the dtype of X, squares and sums in float64."""
    block = max(1, _SCORES // X.shape[1])

    def part(start):
        here = slice(start, start + block)
        difference = centers.take(labels[here], axis=0)
        difference = np.subtract(X[here], difference, out=difference).astype(np.float64, copy=False)
        if weights is None:
            return np.vdot(difference, difference)
        return np.einsum("ij,ij,i->", difference, difference, weights[here])

    return float(sum(_run(pool, part, range(0, len(X), block))))


def _fit(points, n_clusters, rng, stop, pool):
    """Labels and state after k-means++ and Lloyd on nested subsets; iterations of all; whether the last converged."""
    n, n_columns = len(points.rows), points.rows.shape[1] - 1
    if n_columns >= _LONG_ROW:
        labels, _, n_first, _ = _fit(_sketch(points, rng), n_clusters, rng, (stop[0], max(stop[1], _SUBSET_TOL)), pool)
        state = _group(points, labels, int(labels.max()) + 1)
        state, n_iter, converged = _lloyd(points, state, None, stop, pool)
        return state.labels, state, n_first + n_iter, converged
    sizes = [n]
    while sizes[0] // 4 >= max(16 * n_clusters, _FIRST):
        sizes.insert(0, sizes[0] // 4)
    shuffled = rng.permutation(n) if len(sizes) > 1 else np.arange(n)
    centers, n_iter = np.empty((0, n_columns)), 0
    if len(sizes) > 1:
        first, second = (_take(points, shuffled[:size]) for size in sizes[:2])
        centers, n_iter = _subset_start(first, second, n_clusters, rng, (stop[0], max(stop[1], _TRIAL_TOL)), pool)
        sizes = sizes[1:]
    for size in sizes:
        subset = points if size == n else _take(points, shuffled[:size])
        if len(centers) < n_clusters:
            centers = _plus_plus(subset, n_clusters, rng, 1.0)
        if len(centers) < n_clusters and size < n:
            continue
        tol = stop[1] if size == n else max(stop[1], _SUBSET_TOL)
        labels, state, steps, converged = _improve(subset, centers, (stop[0], tol), pool)
        centers = _means(state)
        n_iter += steps
    return labels, state, n_iter, converged


def _subset_start(first, second, n_clusters, rng, stop, pool):
    """Centres from the rows `first`, of two starts the one better on the rows `second`; iterations of both.

    k-means++ finds separated clusters, but on continuous data it spends too many centres on the few rows that a
    subset has of the tails; a start that hardly prefers distant rows is then better.
    """
    found, n_iter = [], 0
    few = _take(first, slice(max(16 * n_clusters, _FIRST // 4)))
    for power in (1.0, 0.25):
        centers = _plus_plus(few, n_clusters, rng, power)
        if len(centers) < n_clusters:
            return centers, n_iter
        _, state, steps, _ = _improve(first, centers, stop, pool)
        centers = _means(state)
        n_iter += steps
        labels = _assign(second.rows, _augment(centers, second.rows.dtype), pool)
        found.append((_group(second, labels, n_clusters).inertia, centers))
    return min(found, key=lambda pair: pair[0])[1], n_iter


def _improve(points, centers, stop, pool):
    """Lloyd from centres: labels, state (of the rows grouped by their first label), iterations, convergence."""
    labels = _assign(points.rows, _augment(centers, points.rows.dtype), pool)
    # Grouped by label, the rows of a cluster lie together in memory.
    grouped = np.argsort(labels, kind="stable")
    points = _take(points, grouped)
    state = _group(points, labels[grouped], len(centers))
    state, n_iter, converged = _lloyd(points, state, centers, stop, pool)
    labels = np.empty_like(state.labels)
    labels[grouped] = state.labels
    return labels, state, n_iter, converged


def _means(state):
    return state.sums / np.where(state.masses > 0, state.masses, 1)[:, None]


def _lloyd(points, state, centers, stop, pool):
    """Lloyd with momentum until the inertia falls by less than `tol`, relatively.

    `centers` gave the state; None: others did, and the first step is a plain one.
    """
    max_iter, tol = stop
    before, plain = None, centers is None
    if plain:
        centers = _means(state)
    for n_iter in range(1, max_iter + 1):
        means = np.where(state.masses[:, None] > 0, _means(state), centers)
        target = means
        if not plain:
            target = means + _OVER_RELAXATION * (means - centers)
            if before is not None:
                target += _MOMENTUM * (means - before)
        labels = _assign_near(points, state, _augment(target, points.rows.dtype), pool)
        if plain and np.array_equal(labels, state.labels):
            return state._replace(fixed=True), n_iter, True
        new = _refill(points, _group(points, labels, len(centers)))
        if new.inertia >= state.inertia:
            if plain:
                return state, n_iter, True
            before, centers, plain = None, means, True
            continue
        small = state.inertia - new.inertia < tol * abs(state.inertia)
        state, centers, before, plain = new, target, means, False
        if small:
            return state, n_iter, True
    return state, n_iter, False


def _refill(points, state):
    """Give every empty cluster the farthest row of a cluster with large inertia."""
    empty = np.flatnonzero(state.masses == 0)
    if empty.size == 0:
        return state
    means = _means(state)
    within = np.bincount(state.labels, points.norms, len(means)) - (state.sums * means).sum(axis=1)
    labels = state.labels.copy()
    for target, donor in zip(empty, np.argsort(-within, kind="stable")):
        members = state.order[state.starts[donor] : state.starts[donor + 1]]
        distance = ((points.rows[members, :-1] - means[donor]) ** 2).sum(axis=1)
        if points.weights is not None:
            distance = distance * (points.weights[members] > 0)
        if len(members) > 1 and distance.max() > 0:
            labels[members[distance.argmax()]] = target
    return _group(points, labels, len(means))


def _plus_plus(points, n_clusters, rng, power):
    """Greedy k-means++: each centre is the best of a few draws, in proportion to a power of the squared distance.

    Where that is much work, centres are drawn in batches of at most an eighth of the centres so far. Fewer than
    `n_clusters` centres where all rows coincide with a centre, to rounding.
    """
    n = len(points.rows)
    weights = np.ones(n) if points.weights is None else points.weights
    norms = np.einsum("ij,ij->i", points.rows[:, :-1], points.rows[:, :-1])
    rounding = 8 * np.finfo(norms.dtype).eps
    n_draws = 2 + int(np.log(n_clusters))
    batch = 1 + points.rows.size * n_clusters * n_draws // _GREEDY_WORK
    nearest = np.full(n, np.inf, dtype=norms.dtype)
    chosen = np.empty(0, dtype=np.intp)
    potential = np.cumsum(weights)

    def squared(picks):  # distances of the rows from those picked, (len(picks), n)
        columns = _augment(points.rows[picks, :-1], norms.dtype)
        distances = norms - 2 * (columns.T @ points.rows.T)
        distances[distances <= rounding * (norms - 2 * columns[-1, :, None])] = 0
        return distances

    if n <= min(2 * n_clusters * n_draws, _FEW_ROWS):
        squared = squared(np.arange(n)).__getitem__  # hardly more than one by one, in one product
    while len(chosen) < n_clusters and potential[-1] > 0:
        size = min(batch, max(1, len(chosen) // 8), n_clusters - len(chosen))
        draws = max(2, n_draws // size)
        picks = np.searchsorted(potential, rng.random(draws * size) * potential[-1], side="right")
        picks = np.minimum(picks, n - 1)
        distances = squared(picks).reshape(draws, size, n)
        candidates = np.minimum(nearest, distances[:, 0] if size == 1 else distances.min(axis=1))
        best = (candidates @ weights).argmin()
        nearest = candidates[best]
        chosen = np.concatenate([chosen, picks.reshape(draws, size)[best]])
        potential = np.cumsum((nearest if power == 1 else nearest**power) * weights)
    return points.rows[chosen, :-1].astype(np.float64)
