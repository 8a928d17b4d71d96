# SPDX-License-Identifier: BSD-3-Clause
"""Distances between the subspaces that factors span, for all pairs at once, and which of similar filters to drop.

With orthonormal bases Q_i (m, R) the cosines of the principal angles between two subspaces are the singular values of
``Q_iᵀ Q_j`` (Björck, Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3). One product of all stacked bases has every
pair; its squares summed block by block are Σ cos² θ, which is all that the chordal distance needs.
"""

from itertools import combinations

import numpy as np

__all__ = ["DISTANCES", "eliminate_similar", "orthonormal_bases", "published_selection", "subspace_angles",
           "subspace_distances", "vbd_distances"]

DISTANCES = ("chordal", "geodesic", "largest")

_BLOCK_ELEMENTS = 1 << 22
_ROWS = 32  # of pairs that are computed together
_MAX_JACOBI = 6  # rank up to which rotations beat LAPACK
_LANES = 16384  # matrices that are rotated together: more than that no longer fit the cache
_MAX_SWEEPS = 20
_CLOSE = 1e-4  # squared angles below which cosines lose digits
_PAIRS = 1024  # pairs whose small angles are computed together


def orthonormal_bases(factors):
    """Orthonormal bases of the columns of factors (n, m, R); directions that are lost in rounding become zero columns.

    >>> import numpy as np
    >>> orthonormal_bases(np.array([[[2.0], [0.0]]]))
    array([[[1.],
            [0.]]])
    """
    factors = np.asarray(factors, dtype=np.float64)
    norms = np.sqrt(np.einsum("nmr,nmr->nr", factors, factors))[:, None, :]
    u, s, _ = np.linalg.svd(factors / np.where(norms > 0, norms, 1.0), full_matrices=False)
    kept = s > s[:, :1] * max(factors.shape[1:]) * np.finfo(np.float64).eps
    u = u * kept[:, None, :]
    lead = np.take_along_axis(u, np.abs(u).argmax(axis=1, keepdims=True), axis=1)
    return u * np.where(lead < 0, -1.0, 1.0)


def subspace_angles(bases):
    """All principal angles of all pairs of subspaces, falling: (n, n, R) in radians.

    Small angles come from their sines, the singular values of Q_j − Q_i Q_iᵀ Q_j, which the cosines do not resolve.

    Parameters
    ----------
    bases : ndarray of shape (n, m, R)
        From :func:`orthonormal_bases`.

    Returns
    -------
    angles : ndarray of shape (n, n, R)

    Examples
    --------
    >>> import numpy as np
    >>> bases = orthonormal_bases(np.array([[[1.0], [0.0]], [[1.0], [1.0]]]))
    >>> np.rad2deg(subspace_angles(bases)[0, 1]).round(6)
    array([45.])
    """
    n, _, rank = bases.shape
    angles = np.zeros((n, n, rank))
    for rows, block in _products(bases):
        k, first = len(rows), rows[0]
        C = block.reshape(k, rank, n - first, rank).transpose(1, 3, 0, 2).reshape(rank, rank, -1)  # Q_iᵀ Q_j
        squares = np.clip(_eigenvalues(np.einsum("rap,rbp->abp", C, C)), 0.0, 1.0)
        found = np.arctan2(np.sqrt(1 - squares), np.sqrt(squares)).T.reshape(k, n - first, rank)
        i, j = np.nonzero((squares[-1] > 1 - _CLOSE).reshape(k, n - first) & ~np.tri(k, n - first, dtype=bool))
        for some in np.split(np.arange(i.size), range(_PAIRS, i.size, _PAIRS)):
            Q, P = bases[first + i[some]], bases[first + j[some]]
            sines = np.linalg.svd(P - Q @ (Q.transpose(0, 2, 1) @ P), compute_uv=False)
            small = found[i[some], j[some]]
            found[i[some], j[some]] = np.where(small**2 < _CLOSE, np.arcsin(np.minimum(sines, 1.0)), small)
        found[np.tri(k, n - first, dtype=bool)] = 0.0
        angles[rows, first:] += found
        angles[first:, rows] += found.transpose(1, 0, 2)
    return angles


def _eigenvalues(A):
    """Eigenvalues, rising, of symmetric matrices A (R, R, p): (R, p). Small ones by Jacobi rotations, all at once."""
    rank, _, p = A.shape
    if rank > _MAX_JACOBI:
        return np.linalg.eigvalsh(A.transpose(2, 0, 1)).T
    values = np.empty((rank, p))
    for start in range(0, p, _LANES):
        values[:, start : start + _LANES] = _jacobi(A[..., start : start + _LANES])
    return values


def _jacobi(A):
    """Diagonals, sorted, of symmetric matrices A (R, R, p) after as many sweeps of rotations as it takes."""
    rank = len(A)
    a = {(i, j): A[i, j].copy() for i in range(rank) for j in range(i, rank)}
    scratch = np.empty((4, A.shape[2]))
    for _ in range(_MAX_SWEEPS):
        for p, q in combinations(range(rank), 2):
            cos, sin = _rotate(a[p, p], a[q, q], a[p, q], *scratch)
            for k in set(range(rank)) - {p, q}:
                x, y = a[min(k, p), max(k, p)], a[min(k, q), max(k, q)]
                np.multiply(sin, x, out=scratch[0])
                np.multiply(sin, y, out=scratch[3])
                x *= cos
                x -= scratch[3]
                y *= cos
                y += scratch[0]
        if rank < 3 or max(np.abs(a[i, j]).max() for i, j in combinations(range(rank), 2)) < np.finfo(A.dtype).eps:
            break
    values = [a[i, i] for i in range(rank)]
    for end in range(rank - 1, 0, -1):
        for i in range(end):
            values[i], values[i + 1] = np.minimum(values[i], values[i + 1]), np.maximum(values[i], values[i + 1])
    return values


def _rotate(app, aqq, apq, d, t, h, u):
    """Make the entries apq zero, in place: cosines and sines of the rotations. Without new arrays: they cost most."""
    np.subtract(aqq, app, out=d)
    np.add(apq, apq, out=t)
    np.multiply(d, d, out=h)
    np.multiply(t, t, out=u)
    h += u
    np.sqrt(h, out=h)
    h += np.finfo(h.dtype).tiny
    np.copysign(h, d, out=h)
    h += d
    t /= h  # the tangent of the smaller angle
    np.multiply(t, apq, out=u)
    app -= u
    aqq += u
    apq.fill(0.0)
    np.multiply(t, t, out=h)
    h += 1.0
    np.sqrt(h, out=h)
    np.divide(1.0, h, out=h)
    t *= h
    return h, t


def _products(bases):
    """Rows, and their products (rows * R, (n - first row) * R) with all bases from the first of them on."""
    n, m, rank = bases.shape
    stacked = np.ascontiguousarray(bases.transpose(1, 0, 2).reshape(m, n * rank))
    step = max(1, min(_ROWS, _BLOCK_ELEMENTS // (n * rank**2)))
    for start in range(0, n, step):
        rows = np.arange(start, min(start + step, n))
        yield rows, stacked[:, start * rank : (rows[-1] + 1) * rank].T @ stacked[:, start * rank :]


def subspace_distances(bases, kind="chordal"):
    """Distances of all pairs of subspaces: (n, n), symmetric, zero on the diagonal.

    Parameters
    ----------
    bases : ndarray of shape (n, m, R)
        From :func:`orthonormal_bases`.
    kind : {"chordal", "geodesic", "largest"}, default="chordal"
        The root of Σ sin² θ, the root of Σ θ², or the largest angle θ, each divided by its maximum √R, √R π/2 or π/2.

    Returns
    -------
    distances : ndarray of shape (n, n)
        In [0, 1].
    """
    n, _, rank = bases.shape
    if kind == "chordal":
        shared = np.zeros((n, n))
        for rows, block in _products(bases):
            np.square(block, out=block)
            block = sum(block[:, b::rank] for b in range(rank))
            shared[rows, rows[0] :] = sum(block[a::rank] for a in range(rank))
        # the dimensions of both, so that a lost direction counts as a right angle
        dimension = np.diag(shared)
        both = np.sqrt(np.outer(dimension, dimension))
        distances = np.sqrt(np.maximum(1.0 - np.divide(shared, both, out=np.zeros_like(shared), where=both > 0), 0.0))
    else:
        angles = subspace_angles(bases)
        mean = np.einsum("ijr,ijr->ij", angles, angles) / rank
        distances = (angles[..., 0] if kind == "largest" else np.sqrt(mean)) / (np.pi / 2)
    upper = np.triu(distances, 1)
    return upper + upper.T


def eliminate_similar(distances, n_removed):
    """Drop one of the closest pair again and again: the one that is nearer to the rest.

    Parameters
    ----------
    distances : ndarray of shape (n, n)
        Symmetric.
    n_removed : int
        At most n − 1.

    Returns
    -------
    removed : ndarray of shape (n_removed,)
        Indices in the order in which they went.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([0.0, 1.0, 1.1, 5.0, 6.0])
    >>> eliminate_similar(np.abs(x[:, None] - x), 1)
    array([2])
    """
    D = np.array(distances, dtype=np.float64)
    sums = D.sum(axis=1) - np.diag(D)
    np.fill_diagonal(D, np.inf)
    nearest = D.argmin(axis=1)
    least = D[np.arange(len(D)), nearest]
    removed = np.empty(n_removed, dtype=np.intp)
    for step in range(n_removed):
        i = int(least.argmin())
        j = int(nearest[i])
        out = j if sums[j] < sums[i] else i
        removed[step] = out
        gone = np.isfinite(D[out])
        sums[gone] -= D[out, gone]
        D[out], D[:, out] = np.inf, np.inf
        sums[out], least[out] = np.inf, np.inf
        for k in np.flatnonzero((nearest == out) & np.isfinite(least)):
            nearest[k] = D[k].argmin()
            least[k] = D[k, nearest[k]]
    return removed


def vbd_distances(factors):
    """Variance-based distance of all pairs of flattened factors (n, m): var(x − y) / (var x + var y).

    Zero for equal vectors, 2 for opposite ones: it is not invariant to the sign. (CORING, Pham et al. 2024.)
    """
    x = np.asarray(factors, dtype=np.float64).reshape(len(factors), -1)
    x = x - x.mean(axis=1, keepdims=True)
    cov = x @ x.T / x.shape[1]
    var = np.diag(cov)
    total = var[:, None] + var
    return np.divide(total - 2 * cov, total, out=np.zeros_like(cov), where=total > 0)


def published_selection(factors, n_kept):
    """The filters that the published code of NORTON keeps, with its defects.

    Angles are ``asin(min(1, ‖Q_j − Q_i Q_iᵀ Q_j‖)) mod π/2``, so that orthogonal subspaces have distance 0; those of
    all axes are added; the order of elimination is used as if it were its inverse. Computed in float32 as there.

    Parameters
    ----------
    factors : list of ndarray of shape (n, m, R)
        One for each axis.
    n_kept : int

    Returns
    -------
    kept : ndarray of shape (n_kept,)
        In rising order.
    """
    n = len(factors[0])
    D = np.zeros((n, n), dtype=np.float32)
    for F in factors:
        Q = np.linalg.qr(np.asarray(F, dtype=np.float32))[0]
        for i in range(n):
            E = Q - np.matmul(Q[i], np.matmul(Q[i].T, Q))
            chordal = np.minimum(np.sqrt(np.square(E).sum(axis=(1, 2))), np.float32(1))
            D[i] += np.abs(np.arcsin(chordal)) % np.float32(np.pi / 2)
    order = _published_order(D)
    return np.sort(np.argsort(order, kind="stable")[n - n_kept :])


def _published_order(D):
    """Index of the filter that goes at each step; the last one stays."""
    D = D.copy()
    n = len(D)
    np.fill_diagonal(D, np.inf)
    order = np.zeros(n, dtype=np.intp)
    alive = np.ones(n, dtype=bool)
    for step in range(n - 1):
        i, j = np.unravel_index(D.argmin(), D.shape)
        rows = [np.where(np.isfinite(D[k]), D[k], 0).sum() for k in (i, j)]
        out = i if rows[0] < rows[1] else j
        order[step] = out
        alive[out] = False
        D[out], D[:, out] = np.inf, np.inf
    order[-1] = int(np.flatnonzero(alive)[0])
    return order
