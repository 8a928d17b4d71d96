"""Lasso codes of a block of rows: working precision first, float64 for the rows that miss their certificate."""
# SPDX-License-Identifier: BSD-3-Clause

from functools import cache
from typing import NamedTuple

import numpy as np

from skfactor.solvers import _active_set
from skfactor.solvers._coordinate import descend

# Relative gap below which float32 cannot certify a row, and magnitudes outside which its squares are unsafe.
_FLOAT32_TOL = 2e-6
_FLOAT32_RANGE = (1e-12, 1e12)
# An alpha below this part of the largest |V x| is taken as that part: at 0 no finite bound of the gap exists.
_SMALLEST_ALPHA = 1e-9
# Times that the active set of a row is rebuilt in float64 before coordinate descent takes over.
_N_REBUILT = 3
# Numbers of the inverse matrices of one pool, and bounds of its rows.
_POOL_NUMBERS, _POOL_ROWS = 1 << 24, (64, 16384)


class Prepared(NamedTuple):
    """What all blocks of rows share."""

    V: np.ndarray  # (K, r) float64, in the coordinates of `basis`
    basis: np.ndarray | None  # (d, r) orthonormal columns that span the atoms
    dictionary: object  # dtype -> Dictionary
    positive: bool
    n_rows: int  # rows of one block


class Triples(NamedTuple):
    """Non-zero codes as (row, atom, value), relative gap of every row, and steps."""

    rows: np.ndarray
    atoms: np.ndarray
    values: np.ndarray
    gap: np.ndarray
    n_iter: int


def prepare(V, positive):
    """Prepare a dictionary; codes do not change when rows and atoms are projected on the span of the atoms."""
    V = V.astype(np.float64)
    basis = None
    if V.shape[1] > len(V):
        basis, triangle = np.linalg.qr(V.T)
        V = triangle.T
    # eigvalsh sees singular values down to the root of the rounding: only then is the dearer decomposition needed.
    spectrum = np.linalg.eigvalsh(V.T @ V)
    if spectrum[0] <= 1e-12 * spectrum[-1]:
        left, scale, right = np.linalg.svd(V, full_matrices=False)
        rank = max(1, np.count_nonzero(scale > scale[0] * max(V.shape) * np.finfo(np.float64).eps))
        V = left[:, :rank] * scale[:rank]
        basis = right[:rank].T if basis is None else basis @ right[:rank].T
    n_rows = int(np.clip(_POOL_NUMBERS // min(V.shape) ** 2, *_POOL_ROWS))
    return Prepared(V, basis, cache(lambda dtype: _active_set.dictionary(V, dtype, positive)), positive, n_rows)


def solve_rows(prepared, X, alpha, warm, tol, max_iter):
    """Codes of the rows of X (n, d) within the relative gap `tol`, unless they take more than `max_iter` steps.

    `warm` is None or codes to start from, as `Triples` without gap.
    """
    half = 0.5 * np.einsum("ij,ij->i", X, X, dtype=np.float64)
    live = np.flatnonzero(half > 0)
    gap = np.zeros(len(X))
    if len(live) == 0:
        return Triples(live, live, np.zeros(0), gap, 0)
    precisions = _precisions(prepared, X, tol)
    if prepared.basis is not None:
        X = X.astype(np.float64) @ prepared.basis
    x, target = X[live], tol * half[live]
    alpha = _raised(prepared, x, alpha[live])
    K, r = prepared.V.shape
    start = None if warm is None else padded(warm, live, len(X), K, r)
    n_iter, found, left = 0, [], np.arange(len(live))
    for dtype in precisions:
        part = _active_set.solve(prepared.dictionary(dtype), x[left], alpha[left], target[left], max_iter, start)
        gap[live[left]] = part.gap
        n_iter = max(n_iter, part.n_iter)
        open_ = np.zeros(len(left), dtype=bool)
        open_[part.failed] = True
        closed = ~open_[part.rows]
        found.append((left[part.rows[closed]], part.atoms[closed], part.values[closed]))
        start = padded(part, part.failed, len(left), K, r)
        left = left[part.failed]
        if len(left) == 0:
            break
    if len(left):
        values, gap[live[left]], n_sweeps = descend(prepared.V, x[left], alpha[left], start, target[left], max_iter,
                                                    prepared.positive)
        i, atoms = np.nonzero(values)
        found.append((left[i], atoms, values[i, atoms]))
        n_iter = max(n_iter, n_sweeps)
    rows, atoms, values = (np.concatenate(part) for part in zip(*found, strict=True))
    gap[live] /= half[live]
    return Triples(live[rows], atoms, values, gap, n_iter)


def padded(triples, chosen, n, n_atoms, most):
    """Triples of some of n rows as atoms and values (T, n_chosen), largest first; at most `most` of each row."""
    place = np.full(n, -1)
    place[chosen] = np.arange(len(chosen))
    rows = place[triples.rows]
    kept = np.flatnonzero(rows >= 0)
    order = kept[np.lexsort((-np.abs(triples.values[kept]), rows[kept]))]
    rows = rows[order]
    starts = np.searchsorted(rows, np.arange(len(chosen)))
    rank = np.arange(len(rows)) - starts[rows]
    fits = rank < most
    order, rows, rank = order[fits], rows[fits], rank[fits]
    T = int(rank.max(initial=0)) + 1
    atoms, values = np.full((T, len(chosen)), n_atoms), np.zeros((T, len(chosen)))
    atoms[rank, rows], values[rank, rows] = triples.atoms[order], triples.values[order]
    return atoms, values


def _precisions(prepared, X, tol):
    """The precisions to try in turn: float32 first where rows, atoms and tolerance allow it."""
    longest = prepared.dictionary(np.float64).longest
    size = max(float(X.max(initial=0)), -float(X.min(initial=0)))
    low, high = _FLOAT32_RANGE
    single = X.dtype == np.float32 and tol >= _FLOAT32_TOL and low < longest < high and low < size < high
    return [np.float32] * single + [np.float64] * _N_REBUILT


def _raised(prepared, x, alpha):
    """Alpha in float64, raised where it is too small against the correlations."""
    V = prepared.V
    alpha = alpha.astype(np.float64)
    bound = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64)) * prepared.dictionary(np.float64).longest
    small = np.flatnonzero(alpha < 1e3 * _SMALLEST_ALPHA * bound)
    if len(small):
        top = np.abs(x[small] @ V.T).max(axis=1)
        noise = 8 * V.shape[1] * np.finfo(np.float64).eps * bound[small]
        alpha[small] = np.maximum(alpha[small], np.maximum(_SMALLEST_ALPHA * top, noise))
    return alpha
