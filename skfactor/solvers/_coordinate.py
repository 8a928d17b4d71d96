"""Block coordinate descent for lasso codes on transposed arrays (K, n): the atoms are rows, the samples run along."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

# Atoms of one block: the block's cross term is one matrix product, inside it Gauss-Seidel in vectors over the samples.
_BLOCK = 16


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
