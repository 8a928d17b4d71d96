# SPDX-License-Identifier: BSD-3-Clause
"""CP factors of filters refitted to the output of their layer.

A filter w (d = C P) and its approximation ŵ cost ``(w − ŵ)ᵀ G (w − ŵ)`` with G the second moment of the layer's inputs.
Given all factors but one, ŵ is linear in that one, ŵ = Φ f, and the best f solves ``ΦᵀGΦ f = ΦᵀG w``. Factor after
factor the error never rises.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from skfactor.solvers.cp import cp_matrix, khatri_rao
from skfactor.solvers.whitening import DAMPING, damped_grams, row_groups

__all__ = ["OutputFit", "refit_cp"]

_DIRECT = 1024  # unknowns up to which a filter's channel factor is solved for directly
_CG_STEPS = 30
_BLOCK_ELEMENTS = 1 << 22
_RIDGE = 1e-9


class OutputFit(NamedTuple):
    """Refitted factors.

    Attributes
    ----------
    pointwise : ndarray of shape (n, C, R)
    spatial : tuple of ndarray of shape (n, k_d, R)
    errors : ndarray of shape (n,)
        Output error of each filter under the damped gram.
    """

    pointwise: np.ndarray
    spatial: tuple[np.ndarray, ...]
    errors: np.ndarray


def refit_cp(X, pointwise, spatial, gram, *, n_rounds=4, damping=DAMPING):
    """Lower the output error of CP-decomposed filters, by turns over their factors.

    Parameters
    ----------
    X : ndarray of shape (n, C * P)
    pointwise : ndarray of shape (n, C, R)
    spatial : tuple of ndarray of shape (n, k_d, R)
    gram : ndarray of shape (g, d, d)
        For each of g equal blocks of rows.
    n_rounds : int, default=4
        0 refits the channel factor alone.
    damping : float, default=DAMPING
        As for :func:`skfactor.solvers.whitening.whiten`.

    Returns
    -------
    fit : OutputFit
    """
    X = np.asarray(X, dtype=np.float64)
    A, S = np.array(pointwise, dtype=np.float64), [np.array(F, dtype=np.float64) for F in spatial]
    errors = np.empty(len(X))
    for rows, G in zip(row_groups(len(X), len(gram)), damped_grams(gram, damping), strict=True):
        a, s, w = A[rows], [F[rows] for F in S], X[rows]
        wG = w @ G
        a = _fit_pointwise(a, s, wG, G)
        for _ in range(n_rounds):
            for d in range(len(s)):
                s[d] = _fit_spatial(a, s, d, wG, G)
            a = _fit_pointwise(a, s, wG, G)
        E = w - cp_matrix(a, s)
        errors[rows] = np.einsum("nd,nd->n", E @ G, E)
        A[rows] = a
        for F, f in zip(S, s, strict=True):
            F[rows] = f
    return OutputFit(A, tuple(S), errors)


def _khatri_rao_rows(spatial):
    """(n, P, R)."""
    return khatri_rao([F.transpose(1, 2, 0) for F in spatial]).transpose(2, 0, 1)


def _fit_pointwise(A, spatial, wG, G):
    """Best channel factors (n, C, R)."""
    n, channels, rank = A.shape
    K = _khatri_rao_rows(spatial)
    size = K.shape[1]
    rhs = np.matmul(wG.reshape(n, channels, size), K)
    if channels * rank > _DIRECT:
        return _conjugate_gradients(A, K, rhs, G)
    out = np.empty_like(A)
    flat = np.ascontiguousarray(G).reshape(channels * size * channels, size)
    for i in range(n):
        half = (flat @ K[i]).reshape(channels, size, channels * rank)
        M = np.matmul(K[i].T, half).reshape(channels * rank, channels * rank)
        out[i] = _solve(M, rhs[i].reshape(-1), A[i].reshape(-1)).reshape(channels, rank)
    return out


def _fit_spatial(A, spatial, d, wG, G):
    """Best factors (n, k_d, R) of one spatial axis."""
    n, channels, rank = A.shape
    shape = [F.shape[1] for F in spatial]
    k = shape[d]
    others = [F if e != d else np.ones((n, 1, rank)) for e, F in enumerate(spatial)]
    rest = _khatri_rao_rows(others)  # (n, P / k, R)
    terms = A[:, :, None] * rest[:, None]  # (n, C, P / k, R)
    low = [1 if e == d else s for e, s in enumerate(shape)]
    terms = terms.reshape(n, channels, *low, rank)
    out = np.empty((n, k, rank))
    step = max(1, _BLOCK_ELEMENTS // (len(G) * k * rank))
    eye = np.eye(k)
    for start in range(0, n, step):
        block = np.moveaxis(terms[start : start + step], 2 + d, -1)[..., 0]  # (b, C, others.., R)
        design = np.moveaxis(np.multiply.outer(block, eye), -2, 2 + d)  # (b, C, k at its axis, .., R, k)
        b = len(design)
        design = design.reshape(b, len(G), rank * k)
        product = np.matmul(G, design.transpose(1, 0, 2).reshape(len(G), -1)).reshape(len(G), b, -1)
        M = np.matmul(design.transpose(0, 2, 1), product.transpose(1, 0, 2))
        rhs = np.matmul(design.transpose(0, 2, 1), wG[start : start + step, :, None])[..., 0]
        for i in range(b):
            old = spatial[d][start + i].T.reshape(-1)
            out[start + i] = _solve(M[i], rhs[i], old).reshape(rank, k).T
    return out


def _solve(M, rhs, old):
    """M⁻¹ rhs with a ridge of rounding size towards the old solution, so that the error never rises."""
    ridge = _RIDGE * np.trace(M) / len(M)
    if not ridge > 0:
        return old
    M = M + ridge * np.eye(len(M))
    return cho_solve(cho_factor(M, lower=True, overwrite_a=True, check_finite=False), rhs + ridge * old,
                     check_finite=False)


def _conjugate_gradients(A, K, rhs, G):
    """Channel factors of all filters at once; the gram of one channel, averaged, preconditions."""
    n, channels, rank = A.shape
    size = K.shape[1]
    pixel = np.einsum("cpcq->pq", G.reshape(channels, size, channels, size)) / channels
    inverse = np.matmul(K.transpose(0, 2, 1), np.matmul(pixel, K))
    ridge = _RIDGE * np.trace(inverse, axis1=1, axis2=2) / rank + np.finfo(float).tiny
    inverse = np.linalg.inv(inverse + ridge[:, None, None] * np.eye(rank))

    def apply(a):
        full = np.matmul(a, K.transpose(0, 2, 1)).reshape(n, -1) @ G
        return np.matmul(full.reshape(n, channels, size), K)

    def dot(x, y):
        return np.einsum("ncr,ncr->n", x, y)

    x, r = A.copy(), rhs - apply(A)
    z = np.matmul(r, inverse)
    p, rz = z.copy(), dot(r, z)
    for _ in range(_CG_STEPS):
        q = apply(p)
        curvature = dot(p, q)
        step = np.divide(rz, curvature, out=np.zeros_like(rz), where=curvature > 0)[:, None, None]
        x += step * p
        r -= step * q
        z = np.matmul(r, inverse)
        new = dot(r, z)
        p = z + np.divide(new, rz, out=np.zeros_like(rz), where=rz > 0)[:, None, None] * p
        rz = new
    return x
