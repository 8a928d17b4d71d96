"""Codebooks of `KMeansWeightSharer`: which solver finds them for which parameters, and how codes are assigned."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

from skfactor.solvers.kmeans import assign, kmeans
from skfactor.solvers.kmeans1d import (
    assign_1d,
    assign_1d_entropy,
    entropy_kmeans_1d,
    init_1d,
    kmeans_1d,
    lloyd_1d,
)
from skfactor.solvers.kmeans1d_rows import assign_1d_rows, kmeans_1d_rows


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


class Solution(NamedTuple):
    """Codebooks found."""

    codebooks: np.ndarray  # (n_codebooks, K, vector_size)
    code_lengths: np.ndarray | None  # (n_codebooks, K) bits
    lower_bound: float
    n_iter: int


class _Book(NamedTuple):
    centers: np.ndarray  # (k, vector_size)
    code_lengths: np.ndarray | None
    lower_bound: float
    n_iter: int


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


def solve_books(X, weights, plan):
    """Centroids of every codebook of `X` (n_rows, n_columns); `weights` broadcast against `X` or None."""
    if weights is not None:
        weights = np.broadcast_to(weights, X.shape)
    if _is_batched(plan):
        return _solve_batched(X, weights, plan)
    books = split_books(X, plan)
    book_weights = [None] * len(books) if weights is None else split_books(weights, plan)
    solve = _solve_vectors if plan.vector_size > 1 else _solve_scalars
    found = [solve(x, w, plan) for x, w in zip(books, book_weights)]
    lengths = None
    if found[0].code_lengths is not None:
        # codes that a shorter codebook repeats are never used: they get an infinite length
        lengths = _stack([b.code_lengths for b in found], np.inf).astype(np.float64)
    codebooks = _stack([b.centers for b in found], None).astype(X.dtype)
    return Solution(codebooks, lengths, float(sum(b.lower_bound for b in found)), max(b.n_iter for b in found))


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


def _solve_scalars(x, w, plan):
    """Codebook of scalars `x` (m, 1)."""
    x, w = x[:, 0], None if w is None else np.ascontiguousarray(w[:, 0])
    x = np.ascontiguousarray(x)
    k = plan.n_clusters
    pinned = plan.preserve_zeros and not x.all()
    if pinned:
        kept = x != 0
        if k == 1 or not kept.any():
            return _Book(np.zeros((1, 1)), np.zeros(1) if plan.lagrangian else None, 0.0, 1)
        n_zeros, x, w, k = int((~kept).sum()), x[kept], None if w is None else w[kept], k - 1
        if w is not None and not w.any():
            w = None
    if plan.lagrangian > 0:
        result = entropy_kmeans_1d(x, k, entropy_weight=plan.lagrangian, weights=w, max_iter=plan.max_iter or 1,
                                   tol=plan.tol)
        centers, lengths, bound = result.centers, result.code_lengths, 0.0
    else:
        result = _plain_scalars(x, w, k, plan)
        centers, lengths, bound = result.centers, None, result.lower_bound
    if pinned:
        centers, lengths = _add_zero(centers, lengths, n_zeros / (n_zeros + len(x)))
    return _Book(np.asarray(centers)[:, None], lengths, bound, result.n_iter)


def _plain_scalars(x, w, k, plan):
    if plan.init == "optimal":
        return kmeans_1d(x, k, weights=w, certify=plan.certify)
    n_init = plan.n_init if plan.init == "random" else 1
    best = None
    for _ in range(n_init):
        start = init_1d(x, k, method=plan.init, weights=w, rng=plan.rng)
        result = lloyd_1d(x, start, weights=w, max_iter=plan.max_iter, tol=plan.tol)
        if best is None or result.inertia < best.inertia:
            best = result
    return best


def _add_zero(centers, lengths, zero_share):
    """Insert the centroid 0, and its code length given the share of exact zeros."""
    at = int(np.searchsorted(centers, 0.0))
    if lengths is not None:
        lengths = np.insert(lengths - np.log2(1 - zero_share), at, -np.log2(zero_share))
    return np.insert(centers, at, 0.0), lengths


def _solve_vectors(x, w, plan):
    """Codebook of sub-vectors `x` (m, vector_size)."""
    w = None if w is None else w.mean(axis=1)
    result = kmeans(np.ascontiguousarray(x), plan.n_clusters, rng=plan.rng, sample_weight=w, n_init=plan.n_init,
                    max_iter=max(1, plan.max_iter), tol=plan.tol)
    return _Book(result.centers, None, 0.0, result.n_iter)


def assign_codes(X, codebooks, plan, *, code_lengths=None, weights=None):
    """Codes of `X` (n_rows, n_columns // vector_size): nearest centroid, or least error plus price of the bits."""
    if plan.vector_size > 1:
        return _assign_vectors(X, codebooks, plan)
    if code_lengths is not None:
        return _assign_with_rate(X, codebooks, plan, code_lengths, weights)
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


def _assign_with_rate(X, codebooks, plan, code_lengths, weights):
    books = split_books(X, plan)
    book_weights = [None] * len(books)
    if weights is not None:
        book_weights = split_books(np.broadcast_to(weights, X.shape), plan)
    codes = []
    for x, w, centers, lengths in zip(books, book_weights, codebooks[:, :, 0], code_lengths):
        w = None if w is None else np.ascontiguousarray(w[:, 0])
        x = np.ascontiguousarray(x[:, 0])
        label = assign_1d_entropy(x, centers, lengths, plan.lagrangian, weights=w)
        if plan.preserve_zeros:
            zero = np.flatnonzero(centers == 0)
            label[x == 0] = zero[0] if len(zero) else label[x == 0]
        codes.append(label)
    return _join_books(codes, X.shape, plan)


def _join_books(codes, shape, plan):
    if plan.granularity == "column":
        return np.ascontiguousarray(np.stack(codes, axis=1))
    return np.concatenate([c.ravel() for c in codes]).reshape(shape)


def squared_error(X, X_hat, weights):
    """Weighted squared error in float64, summed over blocks of rows so that no second copy of `X` is made."""
    total = 0.0
    step = max(1, 1 << 18 // max(1, X.shape[1]))
    for i in range(0, len(X), step):
        block = np.square(X[i : i + step].astype(np.float64) - X_hat[i : i + step])
        total += float((block if weights is None else block * weights[i : i + step]).sum())
    return total
