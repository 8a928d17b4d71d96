# SPDX-License-Identifier: BSD-3-Clause
"""Coupled CP decomposition: clusters of filters that share their channel factor.

With the unfolding W_n (C, P) of filter n, of cluster k: ``W_n ≈ A^k K_nᵀ``, K_n (P, R) the Khatri-Rao product of the
spatial factors of n. The channel factor is fitted to all filters of a cluster together, each spatial factor to its
filter alone: alternating least squares. Clusters start as subspaces: a filter belongs to the channel directions that
hold most of it.

The published method (CoDeC: Pham, Zniyed, Nguyen 2025, doi:10.1109/TNNLS.2025.3609797) names these two steps; the
measure of the clustering and the start of the iterations are choices made here.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from skfactor.solvers.cp import cp_matrix, khatri_rao
from skfactor.solvers.cp_output import fit_spatial_factor
from skfactor.solvers.whitening import damped_grams, row_groups

__all__ = ["CoupledCP", "coupled_cp", "encode_coupled", "most_terms", "refit_coupled"]

_RIDGE = 1e-9
_CHECK_EVERY = 5
_REASSIGNMENTS = 3
_SUBSPACE_SWEEPS = 30
_DIRECT = 3000  # unknowns of a channel factor that are solved for directly in the metric of a gram
_CG_STEPS = 20
_ENCODE_SWEEPS = 30
_BLOCK_ELEMENTS = 1 << 22


class CoupledCP(NamedTuple):
    """Coupled decomposition of n filters.

    Attributes
    ----------
    channels : ndarray of shape (K, C, R)
        A^k, columns of unit norm.
    spatial : tuple of ndarray of shape (n, k_d, R)
        The terms' norms are spread evenly over them.
    labels : ndarray of shape (n,)
    errors : ndarray of shape (n,)
        Squared error of each filter (of its output, after `refit_coupled`).
    n_iter : int
    """

    channels: np.ndarray
    spatial: tuple[np.ndarray, ...]
    labels: np.ndarray
    errors: np.ndarray
    n_iter: int


def most_terms(kernel_shape):
    """Terms with which one channel factor represents every filter exactly: C times the pixels off the longest axis.

    >>> most_terms((16, 3, 3)), most_terms((16,))
    (48, 16)
    """
    channels, *spatial = kernel_shape
    return channels * math.prod(spatial) // max(spatial, default=1)


def coupled_cp(X, kernel_shape, rank, n_clusters, *, tol=1e-5, max_iter=200, n_init=4, rng=None):
    """Clusters of the rows of X, and their coupled CP decomposition.

    Parameters
    ----------
    X : ndarray of shape (n, C * k_1 * .. * k_D)
    kernel_shape : tuple of int
        (C, k_1, .., k_D); without spatial axes each cluster is a linear subspace of R dimensions.
    rank : int
        R, at most `most_terms(kernel_shape)`.
    n_clusters : int
        Most clusters; those that no filter needs are left out.
    tol : float, default=1e-5
        Iterations end when a sweep lowers the error by less than this part of the squared norm of X.
    max_iter : int, default=200
        Most sweeps between two assignments.
    n_init : int, default=4
        Starts of the clustering, the first deterministic.
    rng : numpy Generator, optional

    Returns
    -------
    coupled : CoupledCP

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[1.0, 0, 2, 0], [3, 0, 1, 0], [0, 5, 0, 1]])  # two channels with two pixels each
    >>> found = coupled_cp(X[:, [0, 2, 1, 3]], (2, 2), 1, 2)
    >>> found.labels.tolist(), bool(found.errors.max() < 1e-12)
    ([0, 0, 1], True)
    """
    W, spatial = _unfolded(X, kernel_shape)
    unit = np.sqrt(np.einsum("ncp,ncp->", W, W))
    if not unit > 0:
        labels = np.zeros(len(W), dtype=np.intp)
        start = _empty(len(W), kernel_shape, spatial, rank)
        return CoupledCP(*start, labels, np.zeros(len(W)), 0)
    W = W / unit
    labels = _subspace_clusters(W, min(n_clusters, len(W)), _directions(kernel_shape, rank), n_init,
                                rng or np.random.default_rng(0))
    parts = [_start(W[labels == k], spatial, rank) for k in range(labels.max() + 1)]
    A = np.stack([a for a, _ in parts])
    S = [np.empty((len(W), k, rank)) for k in spatial]
    for k, (_, factors) in enumerate(parts):
        for F, f in zip(S, factors, strict=True):
            F[labels == k] = f
    n_iter = 0
    for turn in range(_REASSIGNMENTS + 1):
        errors, sweeps = _alternate(W, A, S, labels, tol, max_iter)
        n_iter += sweeps
        if len(A) == 1 or turn == _REASSIGNMENTS or not _reassign(W, A, S, labels, errors):
            break
    A, S = _balanced(A, S, labels)
    return CoupledCP(A, tuple(F * unit ** (1 / len(S)) for F in S), labels, errors * unit**2, n_iter)


def encode_coupled(X, kernel_shape, channels):
    """Cluster and spatial factors of filters for channel factors that are given.

    Returns
    -------
    labels : ndarray of shape (n,)
    spatial : tuple of ndarray of shape (n, k_d, R)
    errors : ndarray of shape (n,)
    """
    W, spatial = _unfolded(X, kernel_shape)
    labels, best = np.zeros(len(W), dtype=np.intp), np.full(len(W), np.inf)
    out = [np.zeros((len(W), k, channels.shape[2])) for k in spatial]
    for k, A in enumerate(channels.astype(np.float64)):
        S, errors = _encoded(W, A, spatial)
        better = errors < best
        labels[better], best[better] = k, errors[better]
        for F, f in zip(out, S, strict=True):
            F[better] = f[better]
    return labels, tuple(_spread(out)), best


def refit_coupled(X, coupled, gram, *, n_rounds=4):
    """Lower the output error by turns over the channel factors and the spatial factors; it never rises.

    Parameters
    ----------
    X : ndarray of shape (n, C * P)
    coupled : CoupledCP
    gram : ndarray of shape (g, d, d)
        For each of g equal blocks of rows.
    n_rounds : int, default=4

    Returns
    -------
    coupled : CoupledCP
        With errors of the output under the damped grams.
    """
    X = np.asarray(X, dtype=np.float64)
    A, S, labels = coupled.channels.copy(), [F.copy() for F in coupled.spatial], coupled.labels
    groups = list(zip(row_groups(len(X), len(gram)), damped_grams(gram), strict=True))
    XG = np.concatenate([X[rows] @ G for rows, G in groups])
    for _ in range(n_rounds):
        for d in range(len(S)):
            for rows, G in groups:
                S[d][rows] = fit_spatial_factor(A[labels[rows]], [F[rows] for F in S], d, XG[rows], G)
        for k in range(len(A)):
            A[k] = _fit_channels(A[k], S, labels == k, XG, groups)
    errors = np.empty(len(X))
    for rows, G in groups:
        E = X[rows] - cp_matrix(A[labels[rows]], [F[rows] for F in S])
        errors[rows] = np.einsum("nd,nd->n", E @ G, E)
    A, S = _balanced(A, S, labels)
    return CoupledCP(A, tuple(S), labels, errors, coupled.n_iter + n_rounds)


def _unfolded(X, kernel_shape):
    """W (n, C, P) in float64, and the spatial axes, one of one pixel where there are none."""
    channels, *spatial = kernel_shape
    spatial = spatial or [1]
    return np.asarray(X, dtype=np.float64).reshape(-1, channels, math.prod(spatial)), spatial


def _empty(n, kernel_shape, spatial, rank):
    A = np.zeros((1, kernel_shape[0], rank))
    A[:, 0] = 1.0
    return A, tuple(np.zeros((n, k, rank)) for k in spatial)


# ------------------------------------------------------------------------------------------------------- the clusters
def _directions(kernel_shape, rank):
    """Dimensions of the subspaces that tell clusters apart: half of the channels at most where a filter has pixels."""
    channels, *spatial = kernel_shape
    return min(rank, channels if math.prod(spatial) == 1 else max(1, channels // 2))


def _subspace_clusters(W, n_clusters, size, n_init, rng):
    """Labels of filters by the subspace of channels that holds most of them: Lloyd's iterations on subspaces."""
    if n_clusters == 1:
        return np.zeros(len(W), dtype=np.intp)
    power = np.einsum("ncp,ncp->n", W, W)
    best = None
    for start in range(n_init):
        labels = _nearest_seeds(W, power, n_clusters, None if start == 0 else rng)
        previous = -np.inf
        for _ in range(_SUBSPACE_SWEEPS):
            held = np.stack([_energy(W, _leading(W[labels == k], size)) for k in range(n_clusters)])
            labels, total = held.argmax(axis=0), held.max(axis=0).sum()
            if total <= previous * (1 + 1e-9):
                break
            previous = total
        if best is None or total > best[0]:
            best = total, labels
    _, first, labels = np.unique(best[1], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels.reshape(-1)]  # numbered as they first appear


def _nearest_seeds(W, power, n_clusters, rng):
    """Labels by the most similar of some filters that are unlike each other; similar: ‖W_iᵀ W_j‖ is large."""
    safe = np.where(power > 0, power, 1.0)
    seed = int(power.argmax()) if rng is None else int(rng.integers(len(W)))
    similar = []
    for _ in range(n_clusters):
        cross = np.einsum("cp,ncq->npq", W[seed], W, optimize=True)
        similar.append(np.einsum("npq,npq->n", cross, cross) / (safe * safe[seed]))
        nearest = np.max(similar, axis=0)
        far = np.where(power > 0, np.maximum(1 - nearest, 0.0), 0.0)
        seed = int(far.argmax()) if rng is None or not far.sum() > 0 else int(rng.choice(len(W), p=far / far.sum()))
    return np.argmax(similar, axis=0)


def _leading(W, size):
    """Orthonormal basis (C, size) of the directions of channels that hold most of filters (m, C, P)."""
    flat = W.transpose(1, 0, 2).reshape(W.shape[1], -1)
    return np.linalg.eigh(flat @ flat.T)[1][:, : -size - 1 : -1]


def _energy(W, basis):
    projected = np.matmul(basis.T, W)
    return np.einsum("nmp,nmp->n", projected, projected)


# -------------------------------------------------------------------------------------------- alternating least squares
def _start(W, spatial, rank):
    """Channel and spatial factors of one cluster: principal directions, each with so many terms as its images ask for.

    The image of a direction in a filter is a sum of rank-one images. Of all (direction, place in that sum) those are
    taken that hold most over all filters.
    """
    basis = _leading(W, W.shape[1])
    images = np.matmul(basis.T, W)  # (m, C, P)
    first, rest = spatial[0], math.prod(spatial[1:])
    u, s, vt = np.linalg.svd(images.reshape(*images.shape[:2], first, rest), full_matrices=False)
    energy = np.square(s).sum(axis=0)  # (C, places)
    chosen = np.argsort(-energy, axis=None, kind="stable")
    chosen = np.resize(chosen, rank)  # more terms than there are: again from the first, with small factors
    direction, place = np.unravel_index(chosen, energy.shape)
    left = np.moveaxis(u[:, direction, :, place], 0, 1) * s[:, direction, place][..., None]  # (m, R, first)
    factors = [left.transpose(0, 2, 1), *_rank_one(vt[:, direction, place], spatial[1:])]
    factors[0][:, :, energy.size :] *= 1e-3
    return basis[:, direction], factors


def _rank_one(images, spatial):
    """Factors (m, k_d, R) of the leading rank-one term of images (m, R, Π k_d)."""
    if not spatial:
        return []
    if len(spatial) == 1:
        return [images.transpose(0, 2, 1)]
    images = images.reshape(*images.shape[:2], spatial[0], -1)
    u, s, vt = np.linalg.svd(images, full_matrices=False)
    left = (u[..., 0] * s[..., :1]).transpose(0, 2, 1)
    return [left, *_rank_one(vt[..., 0, :], spatial[1:])]


def _alternate(W, A, S, labels, tol, max_iter):
    """Sweeps over channel and spatial factors, which are written to; squared errors of the filters, and the sweeps."""
    previous = np.inf
    members = [np.flatnonzero(labels == k) for k in range(len(A))]
    for sweep in range(1, max_iter + 1):
        for k, rows in enumerate(members):
            if len(rows):
                s = [F[rows] for F in S]
                A[k] = _channels(W[rows], A[k], s)
                s = _spatial_sweep(W[rows], A[k], s)
                for F, f in zip(S, s, strict=True):
                    F[rows] = f
        if sweep % _CHECK_EVERY == 0 or sweep == max_iter:
            errors = _errors(W, A, S, labels)
            if previous - errors.sum() <= tol * _CHECK_EVERY:
                break
            previous = errors.sum()
    return errors, sweep


def _khatri_rao_rows(S):
    """(n, P, R)."""
    return khatri_rao([F.transpose(1, 2, 0) for F in S]).transpose(2, 0, 1)


def _channels(W, A, S):
    """Best channel factor of filters (m, C, P) that share it, its columns of unit norm: the rest goes into S[0]."""
    K = _khatri_rao_rows(S)
    M = np.einsum("npr,nps->rs", K, K, optimize=True)
    A = _divided(np.tensordot(W, K, ((0, 2), (0, 1))), M, A)
    norm = np.linalg.norm(A, axis=0)
    norm = np.where(norm > 0, norm, 1.0)
    S[0] *= norm
    return A / norm


def _spatial_sweep(W, A, S):
    """Best spatial factors of filters (m, C, P), axis after axis."""
    S = list(S)
    Z = np.matmul(A.T, W)  # (m, R, P)
    Z = Z.reshape(*Z.shape[:2], *(F.shape[1] for F in S))
    AA = A.T @ A
    for d in range(len(S)):
        T = np.moveaxis(Z, 2 + d, 2)  # (m, R, k_d, others..)
        M = np.broadcast_to(AA, (len(W), *AA.shape))
        for F in reversed([f for e, f in enumerate(S) if e != d]):
            T = (T * F.transpose(0, 2, 1).reshape(len(F), F.shape[2], *(1,) * (T.ndim - 3), -1)).sum(axis=-1)
            M = M * np.matmul(F.transpose(0, 2, 1), F)
        S[d] = _divided(T.transpose(0, 2, 1), M, S[d])
    return S


def _divided(B, M, old):
    """B M⁻¹ with a ridge of rounding size towards the old solution."""
    rank = M.shape[-1]
    ridge = _RIDGE * np.trace(M, axis1=-2, axis2=-1)[..., None, None] / rank + np.finfo(float).tiny
    return np.linalg.solve(M + ridge * np.eye(rank), np.swapaxes(B + ridge * old, -1, -2)).swapaxes(-1, -2)


def _errors(W, A, S, labels):
    errors = np.empty(len(W))
    step = max(1, _BLOCK_ELEMENTS // W[0].size)
    for start in range(0, len(W), step):
        rows = slice(start, start + step)
        E = W[rows] - np.matmul(A[labels[rows]], _khatri_rao_rows([F[rows] for F in S]).transpose(0, 2, 1))
        errors[rows] = np.einsum("ncp,ncp->n", E, E)
    return errors


def _reassign(W, A, S, labels, errors):
    """Move filters to clusters that hold them better, in place; whether any moved. No cluster is left empty."""
    moved = False
    spatial = [F.shape[1] for F in S]
    for k in range(len(A)):
        others = np.flatnonzero(labels != k)
        found, error = _encoded(W[others], A[k], spatial)
        for i in np.flatnonzero(error < errors[others] * (1 - 1e-3)):
            n = others[i]
            if np.count_nonzero(labels == labels[n]) > 1:
                labels[n], errors[n], moved = k, error[i], True
                for F, f in zip(S, found, strict=True):
                    F[n] = f[i]
    return moved


def _encoded(W, A, spatial):
    """Spatial factors of filters for one channel factor, and their squared errors."""
    images = np.matmul(np.linalg.pinv(A), W)  # (m, R, P)
    S = _rank_one(images, spatial)
    for _ in range(_ENCODE_SWEEPS if len(spatial) > 1 else 1):
        S = _spatial_sweep(W, A, S)
    E = W - np.matmul(A, _khatri_rao_rows(S).transpose(0, 2, 1))
    return S, np.einsum("ncp,ncp->n", E, E)


def _balanced(A, S, labels):
    """Channel factors of unit norm with positive leading entries, the terms' norms spread over the spatial factors."""
    norm = np.linalg.norm(A, axis=1)
    lead = np.take_along_axis(A, np.abs(A).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale = np.where(norm > 0, norm, 1.0) * np.where(lead < 0, -1.0, 1.0)
    return A / scale[:, None], _spread([S[0] * scale[labels][:, None], *S[1:]])


def _spread(S):
    """The same terms with equal norms of all spatial factors, and positive leading entries of all but the first."""
    norms = [np.linalg.norm(F, axis=1, keepdims=True) for F in S]
    each = math.prod(norms) ** (1 / len(S))
    out, sign = [], 1.0
    for F, norm in zip(S[1:], norms[1:], strict=True):
        lead = np.take_along_axis(F, np.abs(F).argmax(axis=1, keepdims=True), axis=1)
        flip = np.where(lead < 0, -1.0, 1.0)
        out.append(F * np.divide(each, norm, out=np.zeros_like(norm), where=norm > 0) * flip)
        sign = sign * flip
    first = S[0] * np.divide(each, norms[0], out=np.zeros_like(each), where=norms[0] > 0) * sign
    return [first, *out]


# ---------------------------------------------------------------------------------------------- in the metric of a gram
def _fit_channels(A, S, member, XG, groups):
    """Best channel factor of one cluster in the metric of the grams."""
    channels, rank = A.shape
    parts = []  # gram, Khatri-Rao products, and right-hand sides of the cluster's filters in each group
    rhs = np.zeros((channels, rank))
    for rows, G in groups:
        mine = np.arange(len(member))[rows][member[rows]]
        if len(mine):
            K = _khatri_rao_rows([F[mine] for F in S])
            rhs += np.tensordot(XG[mine].reshape(len(mine), channels, -1), K, ((0, 2), (0, 1)))
            parts.append((G, K))
    if not parts:
        return A
    if channels * rank > _DIRECT:
        return _channels_by_gradients(A, parts, rhs)
    size = parts[0][1].shape[1]
    M = np.zeros((channels * rank, channels * rank))
    for G, K in parts:
        pairs = np.einsum("npr,nqs->pqrs", K, K, optimize=True).reshape(size * size, rank * rank)
        flat = G.reshape(channels, size, channels, size).transpose(0, 2, 1, 3).reshape(-1, size * size)
        M += (flat @ pairs).reshape(channels, channels, rank, rank).transpose(0, 2, 1, 3).reshape(M.shape)
    ridge = _RIDGE * np.trace(M) / len(M)
    if not ridge > 0:
        return A
    M[np.diag_indices(len(M))] += ridge
    factor = cho_factor(M, lower=True, overwrite_a=True, check_finite=False)
    return cho_solve(factor, (rhs + ridge * A).reshape(-1), check_finite=False).reshape(A.shape)


def _channels_by_gradients(A, parts, rhs):
    def apply(a):
        out = np.zeros_like(a)
        for G, K in parts:
            full = np.matmul(a, K.transpose(0, 2, 1))
            full = (full.reshape(len(K), -1) @ G).reshape(full.shape)
            out += np.tensordot(full, K, ((0, 2), (0, 1)))
        return out

    x, r = A.copy(), rhs - apply(A)
    p, rr = r.copy(), float(np.vdot(r, r))
    for _ in range(_CG_STEPS):
        q = apply(p)
        curvature = float(np.vdot(p, q))
        if not curvature > 0:
            break
        x += rr / curvature * p
        r -= rr / curvature * q
        new = float(np.vdot(r, r))
        p = r + new / rr * p
        rr = new
        if not rr > 0:
            break
    return x
