"""Codebooks of `KMeansWeightSharer`: which solver finds them for which parameters, and how codes are assigned."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

from skfactor.solvers.kmeans import assign, kmeans
from skfactor.solvers.kmeans1d import (
    KMeans1DResult,
    assign_1d,
    assign_1d_entropy,
    entropy_kmeans_1d,
    init_1d,
    kmeans_1d,
    lloyd_1d,
)
from skfactor.solvers.kmeans1d_rows import assign_1d_rows, kmeans_1d_rows

_BLOCK_ELEMENTS = 1 << 15  # a block and its float64 squares stay in the cache

#: A step of vector k-means has momentum and is worth several plain ones of Lloyd, whose `tol` users give.
MOMENTUM_TOL = 20


class Plan(NamedTuple):
    """Resolved parameters of one fit."""

    n_clusters: int
    granularity: str
    group_size: int
    vector_size: int
    preserve_zeros: bool
    lagrangian: float  # price of one bit in units of the weighted squared error
    init: str
    max_iter: int
    tol: float
    n_init: int
    certify: bool
    rng: np.random.RandomState


class Weights(NamedTuple):
    """What weighs the error: `counts` (n_rows, 1) says how many rows each one stands for, `importance` its error."""

    counts: np.ndarray | None
    importance: np.ndarray | None

    def of_error(self):
        """Weights of the squared errors, broadcastable to `X`, or None."""
        given = [w for w in self if w is not None]
        return None if not given else given[0] if len(given) == 1 else given[0] * given[1]


def row_importance(weights):
    """Importance of each row (n_rows,) of `Weights` whose importance does not differ within rows, or None."""
    return None if weights.importance is None else np.ascontiguousarray(weights.importance[:, 0])


class Solution(NamedTuple):
    """Codebooks found."""

    codebooks: np.ndarray  # (n_codebooks, K, vector_size)
    code_lengths: np.ndarray | None  # (n_codebooks, K) bits
    lower_bound: float
    n_iter: int
    inertia: float | None = None  # of the nearest codes, before the centroids are rounded to the dtype of X; if known
    codes: np.ndarray | None = None  # the nearest codes of X, if known


class _Book(NamedTuple):
    centers: np.ndarray  # (k, vector_size)
    code_lengths: np.ndarray | None
    lower_bound: float
    n_iter: int
    inertia: float | None = None
    codes: np.ndarray | None = None


def split_books(A, plan):
    """The elements of `A` (n_rows, n_columns) that share a codebook, as a list of arrays (m, vector_size)."""
    n, d = A.shape
    v = plan.vector_size
    if plan.granularity == "tensor":
        return [A.reshape(-1, v)]
    if plan.granularity == "column":
        return [A[:, j : j + v] for j in range(0, d, v)]
    size = 1 if plan.granularity == "row" else plan.group_size
    return [A[i : i + size].reshape(-1, v) for i in range(0, n, size)]


def _split_or_none(A, shape, plan, n_books):
    return [None] * n_books if A is None else split_books(np.broadcast_to(A, shape), plan)


def solve_books(X, weights, plan):
    """Centroids of every codebook of `X` (n_rows, n_columns) under `Weights`."""
    error_weights = weights.of_error()
    if _is_batched(plan):
        if error_weights is not None:
            error_weights = np.broadcast_to(error_weights, X.shape)
        return _solve_batched(X, error_weights, plan)
    books = split_books(X, plan)
    if plan.lagrangian > 0:
        importance = _split_or_none(weights.importance, X.shape, plan, len(books))
        counts = _split_or_none(weights.counts, X.shape, plan, len(books))
        found = [_solve_with_rate(x, w, n, plan) for x, w, n in zip(books, importance, counts)]
        # codes that a shorter codebook repeats are never used: they get an infinite length
        lengths = _stack([b.code_lengths for b in found], np.inf)
    else:
        book_weights = _split_or_none(error_weights, X.shape, plan, len(books))
        solve = _solve_vectors if plan.vector_size > 1 else _solve_scalars
        found = [solve(x, w, plan) for x, w in zip(books, book_weights)]
        lengths = None
    codebooks = _stack([b.centers for b in found], None).astype(X.dtype)
    inertia = codes = None
    if len(found) == 1:
        inertia, codes = found[0].inertia, found[0].codes
    return Solution(codebooks, lengths, float(sum(b.lower_bound for b in found)), max(b.n_iter for b in found), inertia,
                    codes if codes is None else codes.reshape(len(X), -1))


def _stack(arrays, fill):
    """Stack arrays along a new first axis, the shorter ones filled up (with their last entry if fill is None)."""
    k = max(len(a) for a in arrays)
    out = np.empty((len(arrays), k, *arrays[0].shape[1:]))
    for row, a in zip(out, arrays):
        row[: len(a)] = a
        row[len(a) :] = a[-1] if fill is None else fill
    return out


def _is_batched(plan):
    plain = not (plan.certify or plan.preserve_zeros or plan.lagrangian) and plan.init == "optimal"
    return plain and plan.vector_size == 1 and plan.granularity != "tensor"


def _solve_batched(X, weights, plan):
    """One optimal scalar codebook per row, column or group, all at once."""
    if plan.granularity == "group":
        n_full = len(X) // plan.group_size
        blocks = [slice(0, n_full * plan.group_size), slice(n_full * plan.group_size, len(X))]
        parts = []
        for block, n_books in zip(blocks, (n_full, 1)):
            if block.start < block.stop:
                w = None if weights is None else weights[block].reshape(n_books, -1)
                parts.append(kmeans_1d_rows(X[block].reshape(n_books, -1), plan.n_clusters, weights=w))
        centers = _stack([row for part in parts for row in part.centers], None)
        n_iter = max(part.n_iter for part in parts)
    else:
        turn = (lambda A: A) if plan.granularity == "row" else (lambda A: np.ascontiguousarray(A.T))
        result = kmeans_1d_rows(turn(X), plan.n_clusters, weights=None if weights is None else turn(weights))
        centers, n_iter = result.centers, result.n_iter
    return Solution(centers[:, :, None].astype(X.dtype), None, 0.0, n_iter)


def _flat(x):
    return None if x is None else np.ascontiguousarray(x[:, 0])


def _without_zeros(x, *weights):
    kept = x != 0
    return int((~kept).sum()), x[kept], *(None if w is None or not w[kept].any() else w[kept] for w in weights)


def _solve_scalars(x, w, plan):
    """Codebook of scalars `x` (m, 1)."""
    x, w, k = _flat(x), _flat(w), plan.n_clusters
    pinned = plan.preserve_zeros and not x.all()
    if pinned:
        _, x, w = _without_zeros(x, w)
        k -= 1
        if k == 0 or not len(x):
            return _Book(np.zeros((1, 1)), None, 0.0, 1)
    result = _plain_scalars(x, w, k, plan)
    centers = np.asarray(result.centers)
    if pinned:
        centers = np.insert(centers, np.searchsorted(centers, 0.0), 0.0)
    if pinned:
        return _Book(centers[:, None], None, 0.0, result.n_iter)
    return _Book(centers[:, None], None, result.lower_bound, result.n_iter, result.inertia)


def _solve_with_rate(x, w, counts, plan):
    """Entropy-constrained codebook of scalars `x` (m, 1)."""
    x, w, counts, k = _flat(x), _flat(w), _flat(counts), plan.n_clusters
    pinned = plan.preserve_zeros and not x.all()
    if pinned:
        total = len(x) if counts is None else counts.sum()
        zeros = int((x == 0).sum()) if counts is None else counts[x == 0].sum()
        _, x, w, counts = _without_zeros(x, w, counts)
        k -= 1
        if k == 0 or not len(x):
            return _Book(np.zeros((1, 1)), np.zeros(1), 0.0, 1)
    result = entropy_kmeans_1d(x, k, entropy_weight=plan.lagrangian, weights=w, counts=counts,
                               max_iter=max(1, plan.max_iter), tol=plan.tol)
    centers, lengths = result.centers, result.code_lengths
    if pinned and zeros > 0:
        at = np.searchsorted(centers, 0.0)
        lengths = np.insert(lengths - np.log2(1 - zeros / total), at, -np.log2(zeros / total))
        centers = np.insert(centers, at, 0.0)
    return _Book(np.asarray(centers)[:, None], lengths, 0.0, result.n_iter)


def _plain_scalars(x, w, k, plan):
    if plan.init == "optimal":
        return kmeans_1d(x, k, weights=w, certify=plan.certify)
    n_init = plan.n_init if plan.init == "random" else 1
    best = None
    for _ in range(n_init):
        start = init_1d(x, k, method=plan.init, weights=w, rng=plan.rng)
        if plan.max_iter == 0:
            return KMeans1DResult(start, None, 0.0, 1)
        result = lloyd_1d(x, start, weights=w, max_iter=plan.max_iter, tol=plan.tol)
        if best is None or result.inertia < best.inertia:
            best = result
    return best


def _solve_vectors(x, w, plan):
    """Codebook of sub-vectors `x` (m, vector_size)."""
    x = np.ascontiguousarray(x)
    distinct = _few_distinct_rows(x, plan.n_clusters)
    if distinct is not None:
        return _Book(distinct, None, 0.0, 1)
    w = None if w is None else w.mean(axis=1)
    result = kmeans(x, plan.n_clusters, rng=plan.rng, sample_weight=w, n_init=plan.n_init,
                    max_iter=max(1, plan.max_iter), tol=MOMENTUM_TOL * plan.tol)
    return _Book(result.centers, None, 0.0, result.n_iter, result.inertia if w is None else None, result.labels)


def _few_distinct_rows(x, k):
    """The distinct rows of `x` if there are at most `k`, else None; one column, or a sample, settles most cases."""
    sample = x[: 2 * k + 64]
    if len(np.unique(sample[:, 0])) > k or len(np.unique(sample, axis=0)) > k:
        return None
    distinct = np.unique(x, axis=0)
    return distinct if len(distinct) <= k else None


def assign_codes(X, codebooks, plan, *, code_lengths=None, importance=None):
    """Codes of `X` (n_rows, n_columns // vector_size): nearest centroid, or least error plus price of the bits."""
    if plan.vector_size > 1:
        return _assign_vectors(X, codebooks, plan)
    if code_lengths is not None:
        return _assign_with_rate(X, codebooks, plan, code_lengths, importance)
    centers = codebooks[:, :, 0]
    if plan.granularity == "tensor":
        return assign_1d(X, centers[0])
    if plan.granularity == "column":
        return np.ascontiguousarray(assign_1d_rows(np.ascontiguousarray(X.T), centers).T)
    size = 1 if plan.granularity == "row" else plan.group_size
    return assign_1d_rows(X, np.repeat(centers, size, axis=0)[: len(X)])


def _assign_vectors(X, codebooks, plan):
    n, d = X.shape
    v = plan.vector_size
    codes = [assign(np.ascontiguousarray(x), c) for x, c in zip(split_books(X, plan), codebooks)]
    return _join_books(codes, (n, d // v), plan)


def _assign_with_rate(X, codebooks, plan, code_lengths, importance):
    books = split_books(X, plan)
    book_weights = _split_or_none(importance, X.shape, plan, len(books))
    codes = []
    for x, w, centers, lengths in zip(books, book_weights, codebooks[:, :, 0], code_lengths):
        x = _flat(x)
        label = assign_1d_entropy(x, centers, lengths, plan.lagrangian, weights=_flat(w))
        if plan.preserve_zeros and (centers == 0).any():
            label[x == 0] = np.flatnonzero(centers == 0)[0]
        codes.append(label)
    return _join_books(codes, X.shape, plan)


def _join_books(codes, shape, plan):
    if plan.granularity == "column":
        return np.ascontiguousarray(np.stack(codes, axis=1))
    return np.concatenate([c.ravel() for c in codes]).reshape(shape)


def known_inertia(X, solution, weights):
    """The solver's inertia, unless rounding the centroids to the dtype of `X` could change it by more than 1e-8."""
    if solution.inertia is None:
        return None
    total = X.size if weights is None else float(np.broadcast_to(weights, X.shape).sum())
    ulp = float(np.finfo(X.dtype).eps) * float(np.abs(solution.codebooks).max())
    return solution.inertia if total * ulp**2 <= 1e-8 * solution.inertia else None


def squared_error(X, decoder, codes, weights):
    """Weighted squared error of the codes in float64, without a second copy of `X`."""
    return _blockwise_square_sum(X, weights, lambda rows: X[rows] - decoder.decode_rows(codes, rows.start, rows.stop))


def weighted_square_sum(X, weights):
    """Weighted sum of squares in float64, without a second copy of `X`."""
    return _blockwise_square_sum(X, weights, lambda rows: X[rows])


def _blockwise_square_sum(X, weights, values_of):
    total = 0.0
    step = max(1, _BLOCK_ELEMENTS // max(1, X.shape[1]))
    for start in range(0, len(X), step):
        rows = slice(start, min(start + step, len(X)))
        squares = np.square(values_of(rows), dtype=np.float64)
        if weights is None:
            total += float(squares.sum())
        else:
            total += float(np.einsum("ij,ij->", np.broadcast_to(weights[rows], squares.shape), squares))
    return total
