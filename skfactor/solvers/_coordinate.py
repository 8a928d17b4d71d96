"""Block coordinate descent for lasso codes on transposed arrays (K, n): the atoms are rows, the samples run along."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

# Atoms of one block: the block's cross term is one matrix product, inside it Gauss-Seidel in vectors over the samples.
_BLOCK = 16
# Sweeps between two looks at the gap.
_SWEEPS = 10


def sweep_in_place(codes_t, cross_t, gram, alpha, n_sweeps, positive=False):
    """Lower ``1/2 |x - u V|^2 + alpha |u|_1`` of every column by cyclic exact minimisation over one atom at a time.

    Writes to `codes_t`. An atom of norm zero gets the code zero.

    Parameters
    ----------
    codes_t : ndarray of shape (K, n)
        Codes, one column for each sample; C-contiguous is fastest.
    cross_t : ndarray of shape (K, n)
        ``V X'``.
    gram : ndarray of shape (K, K)
        ``V V'``.
    alpha : float or ndarray of shape (n,)
    n_sweeps : int
    positive : bool, default=False
    """
    K = len(codes_t)
    norms = np.diagonal(gram)
    for _ in range(n_sweeps):
        for start in range(0, K, _BLOCK):
            stop = min(start + _BLOCK, K)
            rest = cross_t[start:stop] - gram[start:stop] @ codes_t  # correlations with the residual
            for j in range(start, stop):
                if norms[j] <= 0:
                    codes_t[j] = 0
                    continue
                old = codes_t[j]
                new = _shrink(rest[j - start] + norms[j] * old, alpha, positive) / norms[j]
                if j + 1 < stop:
                    rest[j + 1 - start :] -= gram[j + 1 : stop, j, None] * (new - old)
                codes_t[j] = new


def _shrink(c, alpha, positive):
    """The soft threshold: the minimiser of ``1/2 (c - u)^2 + alpha |u|``."""
    if positive:
        return np.maximum(c - alpha, 0)
    return c - np.clip(c, -alpha, alpha)


def descend(V, X, alpha, start, target, max_iter, positive):
    """Codes by coordinate descent down to the absolute gaps `target`, all in float64.

    `start` is a pair of atoms and values (T, n), empty places with the atom K. Returns codes (n, K), gaps and sweeps.
    """
    K, n = len(V), len(X)
    X = X.astype(np.float64)
    codes_t = np.zeros((K + 1, n))
    codes_t[start[0], np.arange(n)] = start[1]
    codes_t = codes_t[:K]
    gram, cross_t = V @ V.T, V @ X.T
    gap = duality_gap(X, V, alpha, codes_t.T, positive)
    n_sweeps = 0
    open_ = np.flatnonzero(~(gap <= target))
    while len(open_) and n_sweeps < max_iter:
        some = min(_SWEEPS, max_iter - n_sweeps)
        part = codes_t[:, open_]
        sweep_in_place(part, cross_t[:, open_], gram, alpha[open_], some, positive)
        codes_t[:, open_] = part
        gap[open_] = duality_gap(X[open_], V, alpha[open_], part.T, positive)
        n_sweeps += some
        open_ = open_[gap[open_] > target[open_]]
    return codes_t.T, gap, n_sweeps


def duality_gap(X, V, alpha, codes, positive):
    """Absolute duality gap of every row.

    With ``r = x - u V`` and the dual point ``s r``, ``s = min(1, alpha / max|V r|)``, the gap is
    ``1/2 (1 - s)^2 |r|^2 + sum_k(alpha |u_k| - s u_k v_k . r)``, a sum of terms that are not negative.
    """
    residual = X - codes @ V
    c = residual @ V.T
    top = (np.maximum(c, 0) if positive else np.abs(c)).max(axis=1, initial=0)
    scale = np.where(top > alpha, alpha / np.where(top > 0, top, 1), 1.0)
    linear = alpha * np.abs(codes).sum(axis=1) - scale * np.einsum("ij,ij->i", c, codes)
    return 0.5 * (1 - scale) ** 2 * np.einsum("ij,ij->i", residual, residual) + np.maximum(linear, 0)
