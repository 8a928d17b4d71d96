# SPDX-License-Identifier: BSD-3-Clause
"""Canonical polyadic (CP) decomposition of many small filters at once.

A filter W of shape (C, k_1, .., k_D) is approximated by R terms, ``W ≈ Σ_r a_r ∘ b¹_r ∘ .. ∘ b^D_r``. With the
unfolding X (C, P), P = Π k_d, and the Khatri-Rao product K (P, R) of the spatial factors, the best A is ``X K (KᵀK)⁻¹``
and all else depends on ``G = XᵀX`` (P, P) alone: the iterations do not know how many input channels there are. All
filters advance together, with the filters as the last axis of every array, so that numpy's loops run over them.

The squared error of any rank-R CP is at least the sum of all but the R largest eigenvalues of G, since R terms have an
unfolding of rank R: the certificate.
"""

import math
from typing import NamedTuple

import numpy as np

__all__ = ["CP", "cp_filters", "cp_matrix", "khatri_rao"]

_BLOCK_ELEMENTS = 1 << 22  # of X that are held in float64
_BLOCK_FILTERS = 512  # filters that iterate together: their arrays stay in the cache
_CHECK_EVERY = 5
_RIDGE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12}
_LOST = 1e-12  # share of the first eigenvalue under which an eigen-image holds nothing
_NEAR_EXACT = 1e-5  # squared relative error under which float32 says nothing more


class CP(NamedTuple):
    """CP decompositions of n filters.

    Attributes
    ----------
    pointwise : ndarray of shape (n, C, R), float64
        a_r, with the norms of the terms.
    spatial : tuple of ndarray of shape (n, k_d, R), float64
        b^d_r, columns of unit norm.
    rel_error : ndarray of shape (n,)
        ‖W − Ŵ‖ / ‖W‖ of each filter; 0 for a filter of zeros.
    svd_bound : ndarray of shape (n,)
        No CP of this rank has a smaller relative error.
    n_iter : int
        Sweeps of the slowest filter.
    """

    pointwise: np.ndarray
    spatial: tuple[np.ndarray, ...]
    rel_error: np.ndarray
    svd_bound: np.ndarray
    n_iter: int


def cp_filters(X, kernel_shape, rank, *, tol=1e-5, max_iter=300, dtype=np.float32):
    """CP decomposition of every row of X by alternating least squares on the Gram matrices of the pixels.

    The start is deterministic: the leading rank-one terms of the R leading eigen-images of G. From R = P on, the pixels
    themselves are the factors and the decomposition is exact.

    Parameters
    ----------
    X : ndarray of shape (n, C * k_1 * .. * k_D)
    kernel_shape : tuple of int
        (C, k_1, .., k_D); without spatial axes a filter is its own channel factor.
    rank : int
        R; more than P terms are P.
    tol : float, default=1e-5
        A filter stops when a sweep lowers its squared relative error by less.
    max_iter : int, default=300
    dtype : dtype, default=float32
        Of the iterations. Filters that are all but exact go on in float64.

    Returns
    -------
    cp : CP

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.cp import cp_filters, cp_matrix
    >>> X = np.outer([1.0, -2.0], np.outer([1.0, 2.0], [3.0, 4.0]).ravel()).reshape(1, 8)
    >>> cp = cp_filters(X, (2, 2, 2), 1)
    >>> np.allclose(cp_matrix(cp.pointwise, cp.spatial), X), cp.svd_bound
    (True, array([0.]))
    """
    channels, *spatial = kernel_shape
    if not spatial:
        return CP(X.astype(np.float64)[:, :, None], (), np.zeros(len(X)), np.zeros(len(X)), 1)
    rank = min(rank, math.prod(spatial))
    parts = []
    step = max(1, min(_BLOCK_FILTERS, _BLOCK_ELEMENTS // X.shape[1]))
    for start in range(0, len(X), step):
        W = X[start : start + step].reshape(-1, channels, math.prod(spatial)).astype(np.float64)
        parts.append(_cp_block(W, tuple(spatial), rank, tol, max_iter, np.dtype(dtype)))
    pointwise, factors, errors, bounds, n_iters = zip(*parts)
    factors = tuple(map(np.concatenate, zip(*factors)))
    return CP(np.concatenate(pointwise), factors, np.concatenate(errors), np.concatenate(bounds), max(n_iters))


def cp_matrix(pointwise, spatial):
    """Rows ``Σ_r a_r ∘ b¹_r ∘ ..`` of factors (n, C, R) and (n, k_d, R), summed in the order of r, in float64.

    >>> import numpy as np
    >>> cp_matrix(np.ones((1, 1, 2)), (np.full((1, 2, 2), 0.5),))
    array([[1., 1.]])
    """
    K = khatri_rao([np.asarray(f, dtype=np.float64).transpose(1, 2, 0) for f in spatial])  # (P, R, n)
    A = np.asarray(pointwise, dtype=np.float64)
    n, channels, rank = A.shape
    total = np.zeros((n, channels, len(K)))
    for r in range(rank):
        total += A[:, :, r, None] * K[:, r].T[:, None, :]
    return total.reshape(n, channels * len(K))


def khatri_rao(factors):
    """Products of the entries of factors (k_d, R, n) for every pixel: (Π k_d, R, n), the last axis fastest."""
    K = factors[0]
    for F in factors[1:]:
        K = (K[:, None] * F[None]).reshape(len(K) * len(F), *F.shape[1:])
    return K


def _cp_block(W, spatial, rank, tol, max_iter, dtype):
    """CP of filters W (n, C, P) in float64, that fit the cache together."""
    G = np.matmul(W.transpose(0, 2, 1), W)
    power = np.einsum("npp->n", G)
    safe = np.where(power > 0, power, 1.0)
    values, images = np.linalg.eigh(G / safe[:, None, None])
    bound = np.sqrt(np.maximum(values[:, : values.shape[1] - rank].sum(axis=1), 0.0)) * (power > 0)
    if rank == len(values[0]):
        factors, n_iter = [np.repeat(F[:, :, None], len(W), 2) for F in _pixels(spatial)], 1
        bound = np.zeros(len(W))
    else:
        unit = np.ascontiguousarray((G / safe[:, None, None]).transpose(1, 2, 0))
        start = _rank_one_terms(images[:, :, : -rank - 1 : -1], values[:, : -rank - 1 : -1], spatial)
        factors, error, n_iter = _iterate(unit.astype(dtype), [F.astype(dtype) for F in start], tol, max_iter)
        near = np.flatnonzero(error < _NEAR_EXACT) if dtype != np.float64 else []
        factors = [F.astype(np.float64) for F in factors]
        if len(near):
            exact, _, more = _iterate(unit[..., near], [F[..., near] for F in factors], tol**2, max_iter)
            for F, E in zip(factors, exact):
                F[..., near] = E
            n_iter += more
    K = khatri_rao(factors)
    H = _divide(K, _normal(factors)).transpose(2, 0, 1)
    GH = np.matmul(G, H)  # ‖X − X H Kᵀ‖², H being the best up to a ridge
    kept = 2 * np.einsum("npr,npr->n", GH, K.transpose(2, 0, 1))
    kept -= np.einsum("nrs,rsn->n", np.matmul(H.transpose(0, 2, 1), GH), _normal(factors))
    spatial_factors = tuple(np.ascontiguousarray(F.transpose(2, 0, 1)) for F in factors)
    A, squares = np.matmul(W, H), np.maximum(power - kept, 0.0)
    near = squares < 1e-6 * power  # where the difference has lost its digits
    E = W[near] - cp_matrix(A[near], [F[near] for F in spatial_factors]).reshape(-1, *W.shape[1:])
    squares[near] = np.einsum("ncp,ncp->n", E, E)
    return A, spatial_factors, np.sqrt(squares / safe), bound, n_iter


def _pixels(spatial):
    """Factors (k_d, P) of the unit images of all pixels."""
    places = np.unravel_index(np.arange(math.prod(spatial)), spatial)
    return [(np.arange(k)[:, None] == place).astype(np.float64) for k, place in zip(spatial, places)]


def _rank_one_terms(images, values, spatial):
    """Leading rank-one term of each image (n, P, R): factors (k_d, R, n) of unit norm.

    Of filters with fewer than R images of any power (of few channels), the terms behind the leading ones too: those
    that hold most.
    """
    n, _, rank = images.shape
    images = images.transpose(0, 2, 1).reshape(n * rank, *spatial)
    if len(spatial) == 2:
        u, s, v = np.linalg.svd(images, full_matrices=False)
        first, term = np.tile(np.arange(rank), (n, 1)), np.zeros((n, rank), dtype=np.intp)
        few = values[:, -1] <= _LOST * values[:, 0]
        power = (values[few, :, None] * s.reshape(n, rank, -1)[few] ** 2).reshape(-1, s.shape[1] * rank)
        first[few], term[few] = np.divmod(np.argsort(-power, axis=1, kind="stable")[:, :rank], s.shape[1])
        rows = (first + rank * np.arange(n)[:, None]).ravel(), term.ravel()
        vectors = [u[rows[0], :, rows[1]], v[rows]]
    else:
        vectors = []
        for axis in range(len(spatial)):
            M = np.moveaxis(images, axis + 1, 1).reshape(n * rank, spatial[axis], -1)
            vectors.append(np.linalg.eigh(np.matmul(M, M.transpose(0, 2, 1)))[1][:, :, -1])
    return [np.ascontiguousarray(v.reshape(n, rank, -1).transpose(2, 1, 0)) for v in vectors]


@np.errstate(over="ignore", invalid="ignore")  # terms of more rank than a filter has may grow without end
def _iterate(G, factors, tol, max_iter):
    """Sweeps of alternating least squares for grams (P, P, n) of unit trace, until every filter gains less than tol.

    A filter whose factors overflow gains nothing, and stays with the best that it had.
    """
    n = G.shape[-1]
    out = [F.copy() for F in factors]
    error = np.ones(n)
    active, previous = np.arange(n), np.full(n, np.inf)
    for sweep in range(1, max_iter + 1):
        K = khatri_rao(factors)
        S = _divide(np.einsum("pqn,qrn->prn", G, K), _normal(factors))  # Xᵀ A
        if sweep % _CHECK_EVERY == 1 or sweep == max_iter:
            now = 1.0 - np.einsum("prn,prn->n", S, K, dtype=np.float64)
            better = now <= error[active]
            for F, best in zip(factors, out):
                best[..., active[better]] = F[..., better]
            error[active] = np.minimum(now, error[active])
            going = previous - now > tol * _CHECK_EVERY
            if not going.any():
                break
            active, previous = active[going], now[going]
            G, S, K = (np.ascontiguousarray(M[..., going]) for M in (G, S, K))
            factors = [np.ascontiguousarray(F[..., going]) for F in factors]
        factors = _sweep(S, _divide(np.einsum("prn,psn->rsn", S, K), _normal(factors)), factors)
    return out, error, sweep


def _sweep(S, AA, factors):
    """New spatial factors, one after the other, for Xᵀ A (P, R, n) and Aᵀ A (R, R, n)."""
    factors = list(factors)
    S = S.reshape(*(len(F) for F in factors), *S.shape[1:])
    for d in range(len(factors)):
        T = np.moveaxis(S, d, 0)
        for F in reversed([f for e, f in enumerate(factors) if e != d]):
            T = (T * F).sum(axis=-3)
        others = [f for e, f in enumerate(factors) if e != d]
        F = _divide(T, AA * _normal(others) if others else AA)
        norm = np.sqrt(np.einsum("krn,krn->rn", F, F))
        factors[d] = F / np.where(norm > 0, norm, 1)
        AA = AA * norm[:, None] * norm[None]  # the norm moves into A
        S = S * norm
    return factors


def _normal(factors):
    """Elementwise product of the Gram matrices of factors (k_d, R, n): (R, R, n)."""
    return math.prod(np.einsum("krn,ksn->rsn", F, F) for F in factors)


def _divide(B, M):
    """B M⁻¹ for B (m, R, n) and n symmetric positive semi-definite M (R, R, n), by Cholesky factors unrolled over R."""
    rank = len(M)
    ridge = _RIDGE[M.dtype] / rank * sum(M[r, r] for r in range(rank)) + np.finfo(M.dtype).tiny
    L = {}
    for i in range(rank):
        for j in range(i + 1):
            s = M[i, j] + ridge if i == j else M[i, j].copy()
            for k in range(j):
                s -= L[i, k] * L[j, k]
            L[i, j] = 1 / np.sqrt(np.maximum(s, ridge)) if i == j else s * L[j, j]  # the diagonal inverted
    Y = np.ascontiguousarray(B.transpose(1, 0, 2))
    for i in range(rank):
        for j in range(i):
            Y[i] -= Y[j] * L[i, j]
        Y[i] *= L[i, i]
    for i in reversed(range(rank)):
        for j in range(i + 1, rank):
            Y[i] -= Y[j] * L[j, i]
        Y[i] *= L[i, i]
    return Y.transpose(1, 0, 2)
