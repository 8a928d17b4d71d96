"""Codes with a given number of non-zeros by order-recursive orthogonal matching pursuit, all rows at once."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
from scipy.sparse import csr_array

# Numbers of one block of scores.
_BLOCK_NUMBERS = 1 << 18
# An atom of which less than this part of the squared norm is left outside the span of the chosen ones is not chosen.
_DEPENDENT = 64


def omp_codes(X, V, n_nonzero, *, positive=False, tol=0.0):
    """Greedy codes with at most `n_nonzero` non-zeros; returns a csr_array (n, K)."""
    X = np.asarray(X)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    V = np.asarray(V, dtype=X.dtype)
    n, K = len(X), len(V)
    depth = max(0, min(n_nonzero, K, X.shape[1]))
    indices = np.zeros((n, depth), dtype=np.int32)
    values = np.zeros((n, depth), dtype=X.dtype)
    step = max(16, _BLOCK_NUMBERS // K)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        indices[rows], values[rows] = _block(X[rows], V, depth, positive, tol)
    keep = values != 0
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    codes = csr_array((values[keep], indices[keep], indptr), shape=(n, K))
    codes.sort_indices()
    return codes


def _block(X, V, depth, positive, tol):
    n, d = X.shape
    norms = np.einsum("kd,kd->k", V, V)
    free = np.broadcast_to(norms, (n, len(V))).copy()  # squared norm of each atom outside the span of the chosen ones
    c = X @ V.T
    residual = X.copy()
    floor = _DEPENDENT * np.finfo(X.dtype).eps * norms
    chosen = np.zeros((n, depth), dtype=np.int32)
    basis = np.zeros((n, depth, d), dtype=X.dtype)
    triangle = np.zeros((n, depth, depth), dtype=X.dtype)
    weights = np.zeros((n, depth), dtype=X.dtype)
    every = np.arange(n)
    target = max(tol, 16 * np.finfo(X.dtype).eps) ** 2 * np.einsum("nd,nd->n", X, X)
    for t in range(depth):
        open_ = np.einsum("nd,nd->n", residual, residual) > target
        usable = free > floor
        gain = np.where(usable, (np.maximum(c, 0) if positive else c) ** 2 / np.where(usable, free, 1), 0)
        j = gain.argmax(axis=1)
        open_ &= gain[every, j] > 0
        q = V[j]
        for _ in range(2):  # once more, for orthogonality in working precision
            inner = np.einsum("ntd,nd->nt", basis[:, :t], q)
            triangle[:, :t, t] += inner
            q = q - np.einsum("ntd,nt->nd", basis[:, :t], inner)
        length = np.sqrt(np.einsum("nd,nd->n", q, q))
        open_ &= length > 0
        q = np.where(open_[:, None], q / np.where(open_, length, 1)[:, None], 0)
        chosen[:, t], triangle[:, t, t], basis[:, t] = j, np.where(open_, length, 1), q
        triangle[~open_, :t, t] = 0
        weights[:, t] = np.einsum("nd,nd->n", q, residual)
        residual = residual - weights[:, t, None] * q
        free -= (q @ V.T) ** 2
        free[every, j] = 0
        c = residual @ V.T
    return chosen, _back_substitution(triangle, weights)


def _back_substitution(triangle, weights):
    values = np.zeros_like(weights)
    for t in reversed(range(weights.shape[1])):
        values[:, t] = (weights[:, t] - np.einsum("nk,nk->n", triangle[:, t, t + 1 :], values[:, t + 1 :])) / (
            triangle[:, t, t])
    return values
