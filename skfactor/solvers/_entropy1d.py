"""Entropy-constrained scalar quantisation: k-means in which a code also costs its length.

References
----------
.. [1] Chou, Lookabaugh & Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP 37(1), 1989,
   :doi:`10.1109/29.17498`
.. [2] Gish & Pierce, "Asymptotically efficient quantizing", IEEE Trans. IT 14(5), 1968 (uniform steps are optimal
   at high rate), :doi:`10.1109/TIT.1968.1054193`
"""

# SPDX-License-Identifier: BSD-3-Clause
from typing import NamedTuple

import numpy as np

from skfactor.solvers._assign1d import cut_labels, label_dtype, round_down
from skfactor.solvers._optimal1d import check_samples, optimal_borders, prepare
from skfactor.solvers._prefix import cell_means, interval_inertia, sums_at

_BLOCK_CELLS = 1 << 18  # entries of one (values, codes) block of costs


class EntropyKMeans1DResult(NamedTuple):
    """Centres (k,), ideal code lengths in bits (k,), objective, inertia, rate in bits, number of iterations."""

    centers: np.ndarray
    code_lengths: np.ndarray
    objective: float
    inertia: float
    rate_bits: float
    n_iter: int


def envelope(centers, penalties):
    """Lower envelope of the parabolas ``(x - c_k)^2 + penalty_k``, ``centers`` sorted.

    Returns
    -------
    kept : ndarray of shape (m,)
        Indices of the codes that are best somewhere.
    borders : ndarray of shape (m - 1,)
        Where the best code changes; a value on a border belongs to the lower index.
    """
    kept, borders = [], []
    c, p = np.asarray(centers, dtype=np.float64).tolist(), np.asarray(penalties, dtype=np.float64).tolist()
    for k in range(len(c)):
        cross = -np.inf if p[k] < np.inf else np.inf
        while kept and cross < np.inf:
            j = kept[-1]
            if c[k] == c[j]:
                cross = -np.inf if p[k] < p[j] else np.inf
            else:
                cross = (c[j] + c[k]) / 2 + (p[k] - p[j]) / (2 * (c[k] - c[j]))
            if cross > (borders[-1] if borders else -np.inf):
                break
            kept.pop()
            if borders:
                borders.pop()
        if cross < np.inf:
            if kept:
                borders.append(cross)
            kept.append(k)
    return np.array(kept, dtype=np.intp), np.array(borders)


def assign_1d_entropy(x, centers, code_lengths, entropy_weight, *, weights=None, n_threads=1):
    """Codes that minimise distortion plus rate, value by value.

    ``labels_i = argmin_k w_i (x_i - c_k)^2 + entropy_weight * code_lengths_k``, ties to the lower index.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64
    centers, code_lengths : ndarray of shape (k,)
        Sorted centres and the length of their codes in bits (infinite: the code is not used).
    entropy_weight : float
        Price of one bit, in units of ``x`` squared.
    weights : ndarray of the shape of ``x``, default=None
        Weight of every squared error, >= 0; a value of weight 0 takes the shortest code.
    n_threads : int, default=1
        Threads that share large unweighted arrays.

    Returns
    -------
    labels : ndarray of the shape of ``x``, uint8, uint16 or int32

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import assign_1d_entropy
    >>> centers, bits = np.array([0.0, 1.0]), np.array([1.0, 3.0])
    >>> assign_1d_entropy(np.array([0.4, 0.6, 0.9]), centers, bits, 0.2).tolist()
    [0, 0, 1]
    """
    x = np.asarray(x)
    centers = np.asarray(centers, dtype=np.float64)
    dtype = label_dtype(centers.size)
    if weights is None:
        kept, borders = envelope(centers, entropy_weight * np.asarray(code_lengths, dtype=np.float64))
        labels = cut_labels(x, borders, n_threads=n_threads)
        if kept.size == centers.size:
            return labels
        return kept.astype(dtype)[labels]
    labels = np.empty(x.size, dtype=dtype)
    flat, weights = x.reshape(-1), np.asarray(weights).reshape(-1)
    penalty = entropy_weight * np.asarray(code_lengths, dtype=np.float64)
    step = max(1, _BLOCK_CELLS // centers.size)
    for lo in range(0, x.size, step):
        cost = flat[lo : lo + step, None] - centers
        cost *= cost
        cost *= weights[lo : lo + step, None]
        cost += penalty
        labels[lo : lo + step] = np.argmin(cost, axis=1)
    return labels.reshape(x.shape)


def entropy_kmeans_1d(x, n_clusters, *, entropy_weight, weights=None, counts=None, max_iter=500, tol=1e-9):
    """Scalar codebook that minimises distortion plus rate.

    Minimises ``sum_i n_i (w_i (x_i - c_{l_i})^2 + entropy_weight * bits_{l_i})`` over centres, labels and code
    lengths ``bits_k = -log2(share of the labels equal to k)``, with weights w and counts n that are 1 by default,
    by alternating the three [1]_, each exact given the others. It starts from the k-means optimum and from uniform
    codebooks, which are near-optimal at high rate [2]_, and keeps the best. Codes that no value takes disappear.

    Parameters
    ----------
    x : ndarray of shape (n,), float32 or float64
    n_clusters : int
        Largest number of codes.
    entropy_weight : float
        Price of one bit, in units of ``x`` squared, >= 0.
    weights : ndarray of shape (n,), default=None
        Weight of every squared error, >= 0. Every value counts once in the rate whatever its weight.
    counts : ndarray of shape (n,), default=None
        How many values each one stands for, >= 0, in the error and in the rate.
    max_iter : int, default=500
    tol : float, default=1e-9
        Stop when the objective falls by less than ``tol`` relative to itself.

    Returns
    -------
    EntropyKMeans1DResult

    Raises
    ------
    ValueError
        As :func:`kmeans_1d`, and for an ``entropy_weight`` that is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import entropy_kmeans_1d
    >>> x = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 5.0])
    >>> entropy_kmeans_1d(x, 3, entropy_weight=0.1).centers.tolist()
    [0.0, 1.0, 5.0]
    >>> entropy_kmeans_1d(x, 3, entropy_weight=1.0).centers.round(3).tolist()
    [0.143, 5.0]
    """
    if not 0 <= entropy_weight < np.inf:
        raise ValueError(f"entropy_weight must be finite and at least 0, got {entropy_weight}")
    x, weights = check_samples(x, weights, n_clusters)
    if counts is not None:
        counts = check_samples(x, counts)[1]
        used = counts > 0
        x, counts, weights = x[used], counts[used], None if weights is None else weights[used]
    data, exponent = prepare(x, counts)
    price = float(np.ldexp(entropy_weight, -2 * exponent))
    if weights is None:
        problem, run = data, _interval_run
        optimum = data
    else:
        counts = np.ones(x.size) if counts is None else counts
        problem, run = (np.ldexp(x.astype(np.float64), -exponent) - data.shift, weights, counts), _weighted_run
        optimum = prepare(x, weights * counts, exponent)[0]
    best = None
    for start in _starts(data, optimum, n_clusters, price):
        result = run(problem, start, price, max_iter, tol)
        if best is None or result.objective < best.objective:
            best = result
    scale = 2.0**exponent
    return best._replace(
        centers=(best.centers + data.shift) * scale,
        objective=best.objective * scale * scale,
        inertia=best.inertia * scale * scale,
    )


def _starts(data, optimum, n_clusters, price):
    """Starting codebooks: the k-means optimum, and uniform steps (at most ``n_clusters`` of them)."""
    optimum, borders, _, _ = optimal_borders(optimum, n_clusters)
    yield cell_means(optimum, borders) + (optimum.shift - data.shift)
    low, high = float(data.x[0]), float(data.x[-1])
    if price == 0 or low == high or n_clusters == 1:
        return
    yield np.linspace(low, high, n_clusters)
    # Distortion step^2 / 12 falls by price per bit at this step; one centre at the mean, or a border.
    step = np.sqrt(6 * price / np.log(2))
    for middle in (data.origin, data.origin + step / 2):
        first = max(np.ceil((low - middle) / step), -(n_clusters // 2))
        last = min(np.floor((high - middle) / step), first + n_clusters - 1)
        if last >= first:
            yield middle + step * np.arange(first, last + 1)


def _lengths(counts):
    return -np.log2(counts / counts.sum())


def _interval_run(data, centers, price, max_iter, tol):
    """Alternate from ``centers`` with values of weight 1 (merged ones: their count): the cells are intervals."""
    bits = np.zeros(centers.size)
    total = float(np.square(data.x[[0, -1]].astype(np.float64) - data.origin).max()) * data.total_weight
    previous, borders = np.inf, None
    for n_iter in range(1, max_iter + 1):
        cuts = envelope(centers, price * bits)[1]
        cuts = np.searchsorted(data.x, round_down(cuts, data.x.dtype), side="right")
        edges = np.unique(np.concatenate(([0], cuts, [data.size])))
        if borders is not None and np.array_equal(edges, borders):
            break
        borders = edges
        s, t = sums_at(data, borders)
        counts = np.diff(t)
        gain = np.diff(s) ** 2 / counts
        bits = _lengths(counts)
        centers = data.origin + np.diff(s) / counts
        objective = total - gain.sum() + price * np.dot(counts, bits)
        if previous - objective <= tol * abs(objective) and n_iter > 1:
            break
        previous = objective
    inertia = interval_inertia(data, borders, centers)
    rate = float(np.dot(counts, bits))
    return EntropyKMeans1DResult(centers, bits, inertia + price * rate, inertia, rate, n_iter)


def _weighted_run(problem, centers, price, max_iter, tol):
    """Alternate from ``centers`` when every value weighs its own error: the cells may interleave."""
    x, importance, n = problem
    w = importance * n
    bits = np.zeros(centers.size)
    best = None
    for n_iter in range(1, max_iter + 1):
        labels = assign_1d_entropy(x, centers, bits, price, weights=importance)
        counts = np.bincount(labels, weights=n, minlength=centers.size)
        mass = np.bincount(labels, weights=w, minlength=centers.size)
        sums = np.bincount(labels, weights=w * (x - centers[labels]), minlength=centers.size)
        moved = centers + np.divide(sums, mass, out=np.zeros(centers.size), where=mass > 0)
        rest = x - moved[labels]
        inertia = float(np.dot(w, rest * rest))
        used = np.flatnonzero(counts)
        used = used[np.argsort(moved[used])]
        centers, bits = moved[used], _lengths(counts[used])
        rate = float(np.dot(counts[used], bits))
        result = EntropyKMeans1DResult(centers, bits, inertia + price * rate, inertia, rate, n_iter)
        if best is not None and best.objective - result.objective <= tol * best.objective:
            return result if result.objective < best.objective else best._replace(n_iter=n_iter)
        best = result
    return best
