"""Sparse codes for a fixed dictionary: the lasso of every row of a matrix, with a certificate for every row."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, vstack

from skfactor.solvers._coordinate import sweep_in_place

# Numbers of one block of codes.
_BLOCK_NUMBERS = 1 << 20


class LassoCodes(NamedTuple):
    """Codes of the rows of a matrix.

    Attributes
    ----------
    codes : ndarray or csr_array of shape (n, K), dtype of X
    n_iter : int
        Most steps that a row took.
    gap : ndarray of shape (n,), float64
        Duality gap of every row divided by ``1/2 |x|^2``: the objective is above the optimum by at most that much.
    """

    codes: np.ndarray
    n_iter: int
    gap: np.ndarray


def lasso_codes(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000):
    """Minimise ``1/2 |x - u V|^2 + alpha |u|_1`` over u, for every row x of X."""
    X, V, alpha = _check(X, V, alpha)
    out = np.zeros((len(X), len(V)), dtype=X.dtype)
    gap = np.zeros(len(X))
    n_iter = 0
    for rows, part in lasso_blocks(X, V, alpha, codes=codes, positive=positive, tol=tol, max_iter=max_iter):
        out[rows], gap[rows] = part.codes, part.gap
        n_iter = max(n_iter, part.n_iter)
    return LassoCodes(out, n_iter, gap)


def lasso_codes_sparse(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000):
    """`lasso_codes` with the codes as a csr_array: memory for the non-zeros only."""
    X, V, alpha = _check(X, V, alpha)
    parts = [part._replace(codes=csr_array(part.codes)) for _, part in
             lasso_blocks(X, V, alpha, codes=codes, positive=positive, tol=tol, max_iter=max_iter)]
    if not parts:
        return LassoCodes(csr_array((0, len(V)), dtype=X.dtype), 0, np.zeros(0))
    return LassoCodes(csr_array(vstack([p.codes for p in parts], format="csr")), max(p.n_iter for p in parts),
                      np.concatenate([p.gap for p in parts]))


def lasso_blocks(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000):
    """Yield ``(rows, LassoCodes)`` for consecutive slices of rows, codes dense."""
    X, V, alpha = _check(X, V, alpha)
    step = max(64, _BLOCK_NUMBERS // max(1, len(V)))
    for start in range(0, len(X), step):
        rows = slice(start, min(start + step, len(X)))
        yield rows, _solve(X[rows], V, alpha[rows], None if codes is None else codes[rows], positive, tol, max_iter)


def _solve(X, V, alpha, codes, positive, tol, max_iter):
    dtype = X.dtype
    X, V = X.astype(np.float64), V.astype(np.float64)
    gram, cross = V @ V.T, V @ X.T
    codes_t = np.zeros((len(V), len(X))) if codes is None else np.array(codes.T, dtype=np.float64, order="C")
    if positive:
        np.maximum(codes_t, 0, out=codes_t)
    gap = duality_gap(X, V, alpha, codes_t.T, positive=positive)
    n_iter = 0
    while n_iter < max_iter and (gap > tol).any():
        open_ = np.flatnonzero(gap > tol)
        part = codes_t[:, open_]
        sweep_in_place(part, cross[:, open_], gram, alpha[open_], 5, positive)
        codes_t[:, open_] = part
        gap[open_] = duality_gap(X[open_], V, alpha[open_], part.T, positive=positive)
        n_iter += 5
    return LassoCodes(codes_t.T.astype(dtype), n_iter, gap)


def lasso_sweeps(X, V, alpha, codes, n_sweeps, *, gram=None, positive=False):
    """Codes after a few sweeps of coordinate descent from `codes`: cheap, not optimal, never a higher objective.

    The result is the transpose of a C-contiguous (K, n) array; codes of that form are taken without a transposition.
    """
    X, V, alpha = _check(X, V, alpha)
    codes_t = np.array(np.asarray(codes).T, dtype=X.dtype, order="C")
    gram = V @ V.T if gram is None else gram
    if positive:
        np.maximum(codes_t, 0, out=codes_t)
    sweep_in_place(codes_t, V @ X.T, gram, alpha, n_sweeps, positive)
    return codes_t.T


def lasso_path(X, V, alphas, *, positive=False, tol=1e-4, max_iter=1000):
    """Yield the `LassoCodes` of each of `alphas`, each warm-started from the one before; falling is fastest."""
    codes = None
    for alpha in alphas:
        part = lasso_codes(X, V, alpha, codes=codes, positive=positive, tol=tol, max_iter=max_iter)
        codes = part.codes
        yield part


def alpha_max(X, V, *, positive=False):
    """The smallest alpha at which all codes are zero: the largest ``|v . x|``."""
    X, V, _ = _check(X, V, 0.0)
    step = max(64, _BLOCK_NUMBERS // max(1, len(V)))
    top = 0.0
    for start in range(0, len(X), step):
        cross = X[start : start + step] @ V.T
        top = max(top, float(cross.max(initial=0)), 0.0 if positive else -float(cross.min(initial=0)))
    return top


def duality_gap(X, V, alpha, codes, *, positive=False):
    """Relative duality gap of every row."""
    residual = X - codes @ V
    c = residual @ V.T
    top = np.maximum(c, 0).max(axis=1, initial=0) if positive else np.abs(c).max(axis=1, initial=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(top > alpha, alpha / top, 1.0)
    half = 0.5 * np.einsum("ij,ij->i", X, X)
    gap = (0.5 * (1 - scale) ** 2 * np.einsum("ij,ij->i", residual, residual)
           + alpha * np.abs(codes).sum(axis=1) - scale * np.einsum("ij,ij->i", c, codes))
    return np.where(half > 0, np.maximum(gap, 0) / np.where(half > 0, half, 1), 0.0)


def _check(X, V, alpha):
    X = np.asarray(X)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    V = np.asarray(V, dtype=X.dtype)
    if X.ndim != 2 or V.ndim != 2 or X.shape[1] != V.shape[1] or len(V) == 0:
        raise ValueError(f"X and V must be matrices with the same number of columns, got shapes {X.shape}, {V.shape}")
    alpha = np.asarray(alpha, dtype=X.dtype)
    if alpha.shape not in ((), X.shape[:1]) or not (np.isfinite(alpha) & (alpha >= 0)).all():
        raise ValueError(f"alpha must be finite and at least 0, a number or one for each of {len(X)} rows")
    return X, V, np.broadcast_to(alpha, X.shape[:1])
