"""Sparse codes of the rows of a matrix for a dictionary that its sub-vectors share, also for a layer's output."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

from skfactor.solvers.lasso import lasso_codes
from skfactor.solvers.omp import omp_codes
from skfactor.solvers.whitening import damped_grams, row_groups, whiten

__all__ = ["RowCosts", "SparseCoder", "shared_metric", "unit_grams"]

# Codes are optimal up to this part of half the squared norm of the row.
_GAP = 1e-6
# Rounds over the sub-vectors of a row whose errors meet in the output of the layer.
_N_ROUNDS = 10
_BLOCK_ELEMENTS = 1 << 22


class RowCosts(NamedTuple):
    """Of every row, in float64: squared error, sum of the sizes of the codes, duality gap of the lasso."""

    squared_error: np.ndarray
    norm: np.ndarray
    gap: np.ndarray


class SparseCoder(NamedTuple):
    r"""Codes of rows of q sub-vectors with v columns, each a sparse combination of the K atoms.

    The lasso minimises :math:`\frac12 rGr^T + \alpha\|u\|_1` with the error :math:`r = x - (u_1V, \dots, u_qV)`.

    Attributes
    ----------
    V : ndarray of shape (K, v)
    alpha : float
    n_nonzero : int or None
        Codes by orthogonal matching pursuit, at most so many for each sub-vector.
    positive : bool
    grams : ndarray of shape (g, d, d) or None
        Metric of each group of rows, float64; None is the identity.
    """

    V: np.ndarray
    alpha: float
    n_nonzero: int | None = None
    positive: bool = False
    grams: np.ndarray | None = None

    def codes(self, X, start=None):
        """Codes (n, q * K) in the dtype of X, lasso codes from those of `start` on."""
        q = X.shape[1] // self.V.shape[1]
        out = np.empty((len(X), q * len(self.V)), dtype=X.dtype)
        for rows, gram in self._groups(X):
            warm = None if start is None else start[rows]
            if gram is None:
                K, v = self.V.shape
                warm = None if warm is None else warm.reshape(-1, K)
                out[rows] = self._solve(X[rows].reshape(-1, v), self.V, warm).reshape(-1, q * K)
            elif q == 1:
                root = whiten(gram, 0.0).root
                out[rows] = self._solve(X[rows].astype(np.float64) @ root, self.V @ root, warm)
            else:
                out[rows] = self._joint_codes(X[rows].astype(np.float64), gram, warm)
        return out

    def costs(self, X, codes):
        """`RowCosts` of these codes."""
        K, v = self.V.shape
        V = self.V.astype(np.float64)
        found = RowCosts(*(np.zeros(len(X)) for _ in RowCosts._fields))
        for rows, gram in self._groups(X):
            step = max(1, _BLOCK_ELEMENTS // max(X.shape[1], codes.shape[1]))
            for first in range(rows.start, rows.stop, step):
                part = slice(first, min(first + step, rows.stop))
                U = codes[part].astype(np.float64)
                R = X[part] - (U.reshape(-1, K) @ V).reshape(len(U), -1)
                M = R if gram is None else R @ gram
                error, norm = np.einsum("nd,nd->n", R, M), np.abs(U).sum(axis=1)
                pull = (M.reshape(-1, v) @ V.T).reshape(U.shape)  # of every code on the error
                found.squared_error[part], found.norm[part] = error, norm
                found.gap[part] = self._gap(error, norm, pull, U)
        return found

    def _gap(self, error, norm, pull, codes):
        top = np.maximum(pull, 0).max(axis=1) if self.positive else np.abs(pull).max(axis=1)
        scale = np.divide(self.alpha, top, out=np.ones_like(top), where=top > self.alpha)
        inner = np.einsum("nk,nk->n", pull, codes)
        return np.maximum(0, 0.5 * (1 - scale) ** 2 * error + self.alpha * norm - scale * inner)

    def _groups(self, X):
        if self.grams is None:
            return [(slice(0, len(X)), None)]
        if len(self.grams) > 1 and len(X) % len(self.grams):
            raise ValueError(f"X must have rows for each of the {len(self.grams)} groups of input_gram, got {len(X)}")
        return list(zip(row_groups(len(X), len(self.grams)), self.grams))

    def _solve(self, X, V, start):
        if self.n_nonzero is not None:
            return omp_codes(X, V, self.n_nonzero, positive=self.positive).toarray()
        return lasso_codes(X, V, self.alpha, codes=start, positive=self.positive, tol=_GAP).codes

    def _joint_codes(self, X, gram, start):
        """Rounds of exact minimisation over one sub-vector at a time, given the errors of the others."""
        K, v = self.V.shape
        V = self.V.astype(np.float64)
        q = X.shape[1] // v
        blocks = [slice(j * v, (j + 1) * v) for j in range(q)]
        metrics = [whiten(gram[b, b], 1e-9) for b in blocks]
        atoms = [V @ metric.root for metric in metrics]
        U = np.zeros((len(X), q, K))
        if start is None:
            for j, (b, metric) in enumerate(zip(blocks, metrics)):
                U[:, j] = self._solve(X[:, b] @ metric.root, atoms[j], None)
        else:
            U[:] = start.reshape(U.shape)
        R = X - (U @ V).reshape(X.shape)
        energy = np.einsum("nd,de,ne->n", X, gram, X, optimize=True)
        open_ = np.arange(len(X))
        for _ in range(_N_ROUNDS):
            codes, E = U[open_], R[open_]
            before = np.einsum("nd,nd->n", E @ gram, E)
            for j, (b, metric) in enumerate(zip(blocks, metrics)):
                target = (X[open_][:, b] + ((E @ gram[:, b]) @ metric.inverse.T @ metric.inverse - E[:, b]))
                codes[:, j] = self._solve(target @ metric.root, atoms[j], codes[:, j])
                E[:, b] = X[open_][:, b] - codes[:, j] @ V
            if self.n_nonzero is None:
                better = np.ones(len(open_), dtype=bool)
            else:  # greedy codes may be worse
                better = np.einsum("nd,nd->n", E @ gram, E) < before
            U[open_[better]], R[open_[better]] = codes[better], E[better]
            done = ~better
            if self.n_nonzero is None:
                flat = codes.reshape(len(codes), -1)
                M = E @ gram
                pull = (M.reshape(-1, v) @ V.T).reshape(flat.shape)
                gap = self._gap(np.einsum("nd,nd->n", E, M), np.abs(flat).sum(axis=1), pull, flat)
                done = gap <= _GAP * 0.5 * energy[open_]
            open_ = open_[~done]
            if len(open_) == 0:
                break
        return U.reshape(len(X), -1)


def unit_grams(gram):
    """Damped grams, scaled so that their mean diagonal is 1: errors keep the units of X."""
    damped = damped_grams(gram)
    return damped * (len(damped) * damped.shape[-1] / np.einsum("gii->", damped))


def shared_metric(grams, vector_size):
    """`Whitening` of the mean metric of the sub-vectors, over groups and positions."""
    g, d, _ = grams.shape
    q = d // vector_size
    blocks = grams.reshape(g, q, vector_size, q, vector_size)
    return whiten(np.einsum("gjajb->ab", blocks) / (g * q), 0.0)
