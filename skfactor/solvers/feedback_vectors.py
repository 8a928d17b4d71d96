# SPDX-License-Identifier: BSD-3-Clause
"""Error feedback for sub-vectors: the codes of product quantisation, chosen for a layer's output.

The objective is that of `skfactor.solvers.feedback` with ``x̂_i`` made of sub-vectors of v neighbouring columns.
"""

import numpy as np

from skfactor.solvers.feedback import _groups, _inverse_root, output_error
from skfactor.solvers.kmeans import assign

__all__ = ["feedback_quantize_vectors", "refit_vector_centers"]


def feedback_quantize_vectors(X, centers, gram, *, damping=0.01):
    """Choose the codes of sub-vectors block by block and pass each block's error on to the columns still open.

    With ``G + δI = (UᵀU)⁻¹`` and B the columns of a block, the choice lowers ``‖(w_B - c) U_BB⁻¹‖²``, the least output
    error that the open columns leave, and they absorb it: ``w_i -= (w_B - c) U_BB⁻¹ U_B``.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    centers : ndarray of shape (k, v)
        v divides d.
    gram : ndarray of shape (d, d) or (g, d, d)
        Second moment of the layer's inputs; with g matrices the rows are split evenly over g groups.
    damping : float, default=0.01
        δ as a multiple of the mean of the gram's diagonal.

    Returns
    -------
    codes : ndarray of shape (n, d // v), int64

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[0.4, 0.4, 0.4, 0.4]])
    >>> centers = np.array([[0.0, 0.0], [1.0, 1.0]])
    >>> feedback_quantize_vectors(X, centers, np.eye(4))
    array([[0, 0]])
    >>> feedback_quantize_vectors(X, centers, np.ones((4, 4)))
    array([[0, 1]])
    """
    X, centers = np.asarray(X, dtype=np.float64), np.asarray(centers, dtype=np.float64)
    n, d = X.shape
    v = centers.shape[1]
    codes = np.empty((n, d // v), dtype=np.int64)
    for rows, G in _groups(n, gram):
        # blocks stay whole, so they come in the order of their falling input power
        blocks = np.argsort(-np.diag(G).reshape(-1, v).sum(axis=1), kind="stable")
        order = (blocks[:, None] * v + np.arange(v)).ravel()
        U = _inverse_root(G, damping, order)
        W = X[rows][:, order]
        for place, block in enumerate(blocks):
            B = slice(place * v, (place + 1) * v)
            inverse = np.linalg.inv(U[B, B])
            chosen = assign(np.ascontiguousarray(W[:, B] @ inverse), centers @ inverse)
            codes[rows, block] = chosen
            W[:, B.stop :] -= ((W[:, B] - centers[chosen]) @ inverse) @ U[B, B.stop :]
    return codes


def refit_vector_centers(X, codes, centers, gram, *, row_weight=None, n_iter=20):
    """Codebook of sub-vectors of less output error for given codes, by conjugate gradients from `centers`.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    codes : ndarray of shape (n, d // v)
    centers : ndarray of shape (k, v)
    gram : ndarray of shape (d, d) or (g, d, d)
    row_weight : ndarray of shape (n,), optional
        Importance of every row's output.
    n_iter : int, default=20
        Steps of conjugate gradients; every step lowers the output error.

    Returns
    -------
    centers : ndarray of shape (k, v)
        Never of larger output error than the `centers` given.
    """
    X, start = np.asarray(X, dtype=np.float64), np.asarray(centers, dtype=np.float64)
    k, v = start.shape
    n, d = X.shape
    r = np.ones(n) if row_weight is None else np.asarray(row_weight, dtype=np.float64)
    groups = _groups(n, gram)
    flat = codes.ravel()

    def gather(E):
        # Σ_i r_i S_iᵀ G e_i, summed over the places that use a center
        pulled = np.concatenate([(E[rows] @ G) * r[rows, None] for rows, G in groups]).reshape(-1, v)
        return np.stack([np.bincount(flat, pulled[:, c], minlength=k) for c in range(v)], axis=1)

    step, residual = np.zeros_like(start), gather(X - start[codes].reshape(n, d))
    direction, power = residual.copy(), float((residual * residual).sum())
    for _ in range(n_iter):
        if power <= 0:
            break
        image = gather(direction[codes].reshape(n, d))
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        step += power / curvature * direction
        residual -= power / curvature * image
        power, previous = float((residual * residual).sum()), power
        direction = residual + power / previous * direction
    new = start + step
    errors = [output_error(X, c[codes].reshape(n, d), gram, row_weight=r) for c in (new, start)]
    return new if errors[0] <= errors[1] else start.copy()
