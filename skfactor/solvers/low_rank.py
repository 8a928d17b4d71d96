# SPDX-License-Identifier: BSD-3-Clause
"""Best approximation of a matrix by one of low rank, in the metric of a layer's output.

For weights ``X`` (one filter per row), row weights w and inputs with second moment ``G = R Rᵀ`` the basis B minimises

    Σ_i w_i min_c (x_i - c B) G (x_i - c B)ᵀ,

which is solved by the leading right singular vectors V of ``diag(√w) X R`` (Eckart, Young 1936,
doi:10.1007/BF02288367): ``B = Vᵀ R⁻¹``. The smaller of the two products of that matrix with its own transpose finds
the subspace, and a QR decomposition within it gives the singular values and vectors to full precision.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, qr
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from skfactor.solvers.whitening import DAMPING, whiten

__all__ = ["LowRank", "low_rank_basis"]

_BLOCK_ELEMENTS = 1 << 21
_LANCZOS_FROM = 1024  # rows or columns, whichever are fewer: below, a full decomposition takes a fraction of a second
_LANCZOS_SHARE = 16  # and at most one in this many of the directions is wanted


class LowRank(NamedTuple):
    """A basis of low rank.

    Attributes
    ----------
    basis : ndarray of shape (r, d)
        ``B G Bᵀ = I`` for the damped gram.
    singular_values : ndarray of shape (r,)
        Of ``diag(√w) X R``, falling.
    total : float
        Sum of all squared singular values: the squared error of rank 0.
    """

    basis: np.ndarray
    singular_values: np.ndarray
    total: float


def low_rank_basis(X, rank=None, *, energy=None, weights=None, gram=None, damping=DAMPING):
    """Basis of the best approximation of given rank, or of the least rank that keeps a share of the energy.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    rank : int, optional
        Most rows of the basis; as many as X has when not given. Fewer are returned where X has a lower rank, one at
        least.
    energy : float in (0, 1], optional
        Share of ``total`` that the squared singular values kept reach.
    weights : ndarray of shape (n,), optional
        Row weights w, not negative.
    gram : ndarray of shape (d, d), optional
        The identity when not given.
    damping : float, default=DAMPING
        As for :func:`skfactor.solvers.whitening.whiten`.

    Returns
    -------
    low_rank : LowRank

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.low_rank import low_rank_basis
    >>> low_rank_basis(np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), 1).basis
    array([[0., 1.]])
    """
    root, inverse = (None, None) if gram is None else whiten(gram, damping)
    n, d = X.shape
    most = min(n, d) if rank is None else max(1, min(rank, n, d))
    small = _small_gram(X, weights, root)
    total = float(np.trace(small))
    vectors = _leading(small, most, energy, total)
    rows = _rows_of(X, weights, vectors, root) if n < d else vectors.T  # (r, d) in the whitened space
    if n < d:
        # rows = L Qᵀ: orthonormal directions Qᵀ, and what X has in each of them
        Q, L = qr(rows.T, mode="economic", overwrite_a=True)
        left, values, _ = np.linalg.svd(L)
        V = left.T @ Q.T
    else:
        R = _triangle_of(X, weights, rows, root)
        _, values, right = np.linalg.svd(R)
        V = right @ rows
    keep = max(1, int((values > 4 * max(n, d) * np.finfo(np.float64).eps * values[0]).sum()))
    V, values = V[:keep], values[:keep]
    basis = V if inverse is None else V @ inverse
    # the sign of a singular vector is free: the largest entry is positive
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    return LowRank(np.where(largest < 0, -basis, basis), values, total)


def _blocks(X, weights):
    """Blocks of rows of ``diag(√w) X`` in float64."""
    step = max(1, _BLOCK_ELEMENTS // X.shape[1])
    for start in range(0, len(X), step):
        rows = slice(start, start + step)
        block = X[rows].astype(np.float64)
        yield rows, block if weights is None else np.sqrt(weights[rows])[:, None] * block


def _small_gram(X, weights, root):
    """The smaller of ``Y Yᵀ`` and ``Yᵀ Y`` for ``Y = diag(√w) X R``."""
    n, d = X.shape
    if n < d:
        Y = np.concatenate([block if root is None else block @ root for _, block in _blocks(X, weights)])
        return Y @ Y.T
    total = np.zeros((d, d))
    for _, block in _blocks(X, weights):
        total += block.T @ block
    return total if root is None else root.T @ total @ root


def _leading(small, most, energy, total):
    """Eigenvectors of the largest eigenvalues, falling: `most` of them, or as few as reach the energy."""
    m = len(small)
    if energy is None and m >= _LANCZOS_FROM and most * _LANCZOS_SHARE <= m:
        try:
            start = np.random.default_rng(0).standard_normal(m)
            values, vectors = eigsh(small, k=most, which="LA", v0=start)
            return vectors[:, np.argsort(-values)]
        except ArpackNoConvergence:
            pass  # close eigenvalues: all of them then
    if energy is None and most < m:
        return eigh(small, subset_by_index=[m - most, m - 1])[1][:, ::-1]
    values, vectors = np.linalg.eigh(small)
    if energy is not None:
        reached = np.cumsum(values[::-1].clip(0))
        most = min(most, 1 + int((reached < energy * total * (1 - 1e-12)).sum()))
    return vectors[:, ::-1][:, :most]


def _rows_of(X, weights, vectors, root):
    """``Uᵀ Y`` (r, d) for left vectors U."""
    rows = np.zeros((vectors.shape[1], X.shape[1]))
    for where, block in _blocks(X, weights):
        rows += vectors[where].T @ block
    return rows if root is None else rows @ root


def _triangle_of(X, weights, rows, root):
    """R (r, r) of the QR decomposition of ``Y Vᵀ``, Y (n, d) read in blocks and the rows of V (r, d) orthonormal."""
    V = rows.T if root is None else root @ rows.T
    R = np.zeros((0, V.shape[1]))
    for _, block in _blocks(X, weights):
        R = np.linalg.qr(np.concatenate([R, block @ V]), mode="r")
    return R

