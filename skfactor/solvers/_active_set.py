"""Lasso codes of many rows by an active-set method that takes one step in all rows at once.

A row holds a set of atoms with signs and the inverse of their Gram matrix. While its codes are optimal for the set, the
atom most correlated with the residual joins; where the new optimum would turn the sign of another code, the codes move
as far as the change and that atom leaves. Every step lowers the objective, so that no set comes back. An atom that
depends linearly on the set takes the place of one that reaches zero first when the residual is held.

The matrices of all rows are updated by rank-one terms in arrays whose last axis runs over the rows.
"""
# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

# Numbers of one block of correlations: it stays in the second-level cache between the product and the argmax.
_SCORES = 65536
# Rows that finish are taken out once they are this part of the pool.
_IDLE = 0.25
# Smallest pivot.
_TINY = np.finfo(np.float32).tiny
# Numbers of gathered atoms up to which the overhead of a sparse product is larger than the gain.
_FEW = 32768
# Part of the squared norm of an atom outside the span of the set, in units of the rounding, below which it depends.
_DEPENDENT = 256


class Dictionary(NamedTuple):
    """Atoms in the working precision; number K is an atom of zeros for empty slots."""

    columns: np.ndarray  # (d, K)
    atoms: np.ndarray  # (K + 1, d)
    exact: np.ndarray  # (K + 1, d) float64
    gram: np.ndarray  # ((K + 1)**2,)
    norms: np.ndarray  # (K + 1,) squared
    floor: np.ndarray  # (K + 1,) squared norm outside the span of a set, below which an atom depends on it
    longest: float  # largest norm
    positive: bool


class Solved(NamedTuple):
    """Codes of rows as triples, certified gaps, steps of each row, and the rows whose gap is above the tolerance."""

    rows: np.ndarray
    atoms: np.ndarray
    values: np.ndarray
    gap: np.ndarray  # (n,) absolute
    n_iter: int
    failed: np.ndarray


@dataclass
class _Pool:
    """Rows in work."""

    rows: np.ndarray  # (n,) index of each
    x: np.ndarray  # (n, d)
    alpha: np.ndarray  # (n,)
    enough: np.ndarray  # (n,) largest gap that ends a row
    running: np.ndarray  # (n,) not yet collected
    stuck: np.ndarray  # (n,) without a step in this precision

    def take(self, kept):
        """A copy of some rows."""
        return _Pool(self.rows[kept], self.x[kept], self.alpha[kept], self.enough[kept], self.running[kept],
                     self.stuck[kept])


@dataclass
class _Sets:
    """At most T active atoms of each of n rows."""

    slot: np.ndarray  # (T, n) atoms
    sign: np.ndarray  # (T, n) -1, 1, and 0 where empty
    value: np.ndarray  # (T, n) codes
    inverse: np.ndarray  # (T, T, n) inverse Gram matrices, zero where empty

    def take(self, rows):
        """A copy of the sets of some rows."""
        return _Sets(*(a.take(rows, axis=-1) for a in (self.slot, self.sign, self.value, self.inverse)))

    def put(self, rows, part):
        """Write the sets of some rows back."""
        for whole, new in zip((self.slot, self.sign, self.value, self.inverse),
                              (part.slot, part.sign, part.value, part.inverse), strict=True):
            whole[..., rows] = new


def dictionary(V, dtype, positive):
    """Prepare the rows of V (K, d), float64."""
    exact = np.vstack([V, np.zeros((1, V.shape[1]))])
    gram = exact @ exact.T
    norms = np.diagonal(gram)
    return Dictionary(np.ascontiguousarray(V.T.astype(dtype)), exact.astype(dtype), exact,
                      gram.astype(dtype).ravel(), norms.astype(dtype),
                      (_DEPENDENT * np.finfo(dtype).eps * norms).astype(dtype), float(np.sqrt(norms.max())), positive)


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def solve(dic, X, alpha, tol, max_iter, warm=None):
    """Minimise ``1/2 |x - u V|^2 + alpha |u|_1`` for every row x of X.

    Parameters
    ----------
    dic : Dictionary
    X : ndarray of shape (n, d), float32 or float64
    alpha : ndarray of shape (n,), float64
        Positive.
    tol : ndarray of shape (n,), float64
        Largest duality gap that counts as solved, absolute.
    max_iter : int
        Most steps.
    warm : tuple of ndarrays, default=None
        Codes to start from: atoms and values (T, n), empty places with the atom K and the value zero.

    Returns
    -------
    Solved
    """
    dtype = dic.atoms.dtype
    n = len(X)
    pool = _Pool(np.arange(n), X.astype(dtype, copy=False), alpha.astype(dtype), (0.5 * tol).astype(dtype),
                 np.ones(n, dtype=bool), np.zeros(n, dtype=bool))
    sets = _empty(dic, n) if warm is None else _start(dic, pool, warm)
    found, n_iter = [], 0
    while True:
        residual = pool.x - _combine(sets.slot, sets.value, dic.atoms)
        j, c = _best_atoms(dic, residual)
        done = pool.running & (pool.stuck | (_gap_at_optimum(dic, pool, sets, (residual, c)) <= pool.enough))
        ended = np.flatnonzero(pool.running if n_iter == max_iter else done)
        if len(ended):
            found.append((pool.rows[ended], sets.slot[:, ended], sets.value[:, ended], residual[ended], c[ended]))
            pool.running[ended] = False
            kept = np.flatnonzero(pool.running)
            if len(kept) == 0:
                break
            if len(kept) <= (1 - _IDLE) * len(pool.rows):
                pool, sets, j, c = pool.take(kept), sets.take(kept), j[kept], c[kept]
        want, pool.stuck = _join(dic, pool, sets, j, c)
        _settle(dic, sets, want)
        n_iter += 1
    rows, slot, value, residual, c = _together(dic, found)
    gap = np.empty(n)
    gap[rows] = _certified_gap(dic, X[rows], alpha[rows], (slot, value), (residual, c))
    t, i = np.nonzero(value)
    return Solved(rows[i], slot[t, i], value[t, i], gap, n_iter, np.flatnonzero(~(gap <= tol)))


def _together(dic, found):
    """The rows that ended in different steps, with their sets filled up to the same number of slots."""
    T = max(len(part[1]) for part in found)
    rows, slot, value, residual, c = zip(*found, strict=True)
    slot = [np.pad(a, ((0, T - len(a)), (0, 0)), constant_values=len(dic.norms) - 1) for a in slot]
    value = [np.pad(a, ((0, T - len(a)), (0, 0))) for a in value]
    return (np.concatenate(rows), np.concatenate(slot, axis=1), np.concatenate(value, axis=1),
            np.concatenate(residual), np.concatenate(c))


def _empty(dic, n):
    dtype = dic.atoms.dtype
    return _Sets(np.full((1, n), dic.columns.shape[1]), np.zeros((1, n), dtype=dtype), np.zeros((1, n), dtype=dtype),
                 np.zeros((1, 1, n), dtype=dtype))


def _start(dic, pool, warm):
    """Sets of the atoms of given codes, as far as they are independent, at their optimum."""
    sets = _empty(dic, len(pool.rows))
    for atoms, values in zip(*warm, strict=True):
        b, schur, hole = _project(dic, sets, atoms)
        fits = (values != 0) & (schur > dic.floor[atoms])
        _insert(dic, sets, fits, (atoms, np.sign(values), values), (b, schur, hole))
    _settle(dic, sets, _optimum(dic, pool.x, pool.alpha, sets))
    return sets


def _combine(slot, value, atoms):
    """``u V`` of every row, shape (n, d)."""
    T, n = slot.shape
    if slot.size * atoms.shape[1] <= _FEW:
        return np.einsum("tn,tnd->nd", value, atoms.take(slot, axis=0))
    start = np.arange(0, n * T + 1, T)
    return csr_array((value.T.ravel(), slot.T.ravel(), start), shape=(n, len(atoms))) @ atoms


def _best_atoms(dic, residual):
    """The atom most correlated with each residual, and its correlation."""
    n, K = len(residual), dic.columns.shape[1]
    j, c = np.empty(n, dtype=np.intp), np.empty(n, dtype=residual.dtype)
    step = max(16, _SCORES // K)
    product, size = np.empty((2, min(step, n), K), dtype=residual.dtype)
    every = np.arange(step)
    for i in range(0, n, step):
        m = min(step, n - i)
        here = np.matmul(residual[i : i + m], dic.columns, out=product[:m])
        best = (here if dic.positive else np.abs(here, out=size[:m])).argmax(axis=1)
        j[i : i + m], c[i : i + m] = best, here[every[:m], best]
    return j, c


def _gap_at_optimum(dic, pool, sets, state):
    """Duality gap of codes that are optimal for their set: all correlations in it are alpha times the sign."""
    residual, c = state
    scale = pool.alpha / np.maximum(c if dic.positive else np.abs(c), pool.alpha)
    size = np.einsum("tn,tn->n", sets.sign, sets.value)
    return (1 - scale) * (0.5 * (1 - scale) * np.einsum("nd,nd->n", residual, residual) + pool.alpha * size)


def _certified_gap(dic, X, alpha, codes, state):
    """Duality gap in float64; the largest correlation is that of the working precision plus a bound of its error.

    With ``r = x - u V`` and the dual point ``s r``, ``s = min(1, alpha / max|V r|)``, the gap is the sum
    ``1/2 (1 - s)^2 |r|^2 + (alpha |u|_1 - s r . u V)`` of two terms that are not negative.
    """
    (slot, value), (residual, c) = codes, state
    fit = _combine(slot, value.astype(np.float64), dic.exact)
    r = X - fit
    off = r - residual
    rounding = (X.shape[1] + 2) * np.finfo(residual.dtype).eps
    top = np.maximum(c, 0) if dic.positive else np.abs(c)
    error = np.sqrt(np.einsum("nd,nd->n", off, off)) + rounding * np.sqrt(np.einsum("nd,nd->n", r, r))
    scale = np.minimum(1, alpha / (top + dic.longest * error))
    size = np.abs(value).sum(axis=0, dtype=np.float64)
    linear = alpha * size - scale * np.einsum("nd,nd->n", r, fit)
    return 0.5 * (1 - scale) ** 2 * np.einsum("nd,nd->n", r, r) + np.maximum(linear, 0)


def _project(dic, sets, j):
    """Coefficients b of atom j in the set, the squared norm of what is left of it (zero when nothing can be), and the
    first empty slot."""
    K1, d = len(dic.norms), len(dic.columns)
    products = dic.gram.take(sets.slot * K1 + j)
    b = np.einsum("ijn,jn->in", sets.inverse, products)
    schur = dic.norms[j] - np.einsum("in,in->n", products, b)
    empty = sets.slot == K1 - 1
    hole = np.where(empty.any(axis=0), empty.argmax(axis=0), len(empty))
    if len(empty) >= d:
        schur[np.count_nonzero(~empty, axis=0) >= d] = 0
    return b, schur, hole


def _insert(dic, sets, go, entry, projection):
    """Put an atom into the empty slot of the rows where `go`; returns ``[b, -1]``, the -1 in that slot."""
    (atoms, signs, values), (b, schur, hole) = entry, projection
    T, n = b.shape
    rows = np.flatnonzero(go)
    places = hole[rows]
    if T in places:
        zeros = np.zeros((1, n), dtype=b.dtype)
        sets.slot = np.vstack([sets.slot, np.full((1, n), len(dic.norms) - 1)])
        sets.sign, sets.value, b = (np.vstack([a, zeros]) for a in (sets.sign, sets.value, b))
    b[places, rows] = -1
    w = b * np.where(go, 1 / np.sqrt(np.where(go, schur, 1)), 0)
    inverse = w[:, None] * w
    inverse[:T, :T] += sets.inverse
    sets.inverse = inverse
    sets.slot[places, rows], sets.sign[places, rows], sets.value[places, rows] = atoms[rows], signs[rows], values[rows]
    return b


def _join(dic, pool, sets, j, c):
    """Let atom j join each running row; returns the optimum of the larger sets, and the rows where that failed."""
    sign = np.sign(c)
    projection = _project(dic, sets, j)
    schur = projection[1]
    inside = (sets.slot == j).any(axis=0)
    dependent = ~(schur > dic.floor[j])
    go = pool.running & ~inside & ~dependent & np.isfinite(c)
    b = _insert(dic, sets, go, (j, sign, np.zeros_like(c)), projection)
    want = sets.value - np.where(go, (c - pool.alpha * sign) / schur, 0) * b
    stuck = pool.running & ~go
    rows = np.flatnonzero(stuck & dependent & ~inside)
    if len(rows):
        part = sets.take(rows)
        moved, wanted = _exchange(dic, (pool.x[rows], pool.alpha[rows]), part, (j[rows], sign[rows]), b[:, rows])
        sets.put(rows, part)
        want[:, rows] = wanted
        stuck[rows[moved]] = False
    return want, stuck


def _exchange(dic, data, sets, atom, b):
    """Let a dependent atom ``v = b V`` take the place of the one that reaches zero first while ``u V`` stays.

    Returns the rows where this was possible, and the optima of their new sets; the other rows are left as they are.
    """
    (x, alpha), (j, sign) = data, atom
    move = sign * b
    length = np.where(move * sets.sign > 0, sets.value / move, np.inf)
    i = length.argmin(axis=0)
    length = length[i, np.arange(len(i))]
    old = sets.value
    moved = np.isfinite(length)
    rows = np.flatnonzero(moved)
    part = sets.take(rows)
    part.value -= length[rows] * move[:, rows]
    _drop(dic, part, i[rows])
    projection = _project(dic, part, j[rows])
    independent = projection[1] > dic.floor[j[rows]]
    _insert(dic, part, independent, (j[rows], sign[rows], (sign * length)[rows]), projection)
    rows, kept = rows[independent], np.flatnonzero(independent)
    part = part.take(kept)
    sets.put(rows, part)
    want = old.copy()
    want[:, rows] = _optimum(dic, x[rows], alpha[rows], part)
    return rows, want


def _optimum(dic, x, alpha, sets):
    """The codes that are optimal for the atoms and signs of the sets."""
    products = np.stack([np.einsum("nd,nd->n", x, dic.atoms[atoms]) for atoms in sets.slot])
    return np.einsum("ijn,jn->in", sets.inverse, products - alpha * sets.sign)


def _settle(dic, sets, want):
    """Move to the optima `want` of the sets; where a sign would change, as far as that, and drop the atom."""
    value, sets.value = sets.value, want
    rows = np.flatnonzero((want * sets.sign < 0).any(axis=0))
    if len(rows) == 0:
        return
    part, want = sets.take(rows), want[:, rows]
    part.value = value[:, rows]
    while len(rows):
        ratio = np.where(want * part.sign < 0, part.value / (part.value - want), np.inf)
        i = ratio.argmin(axis=0)
        part.value += np.minimum(ratio[i, np.arange(len(i))], 1) * (want - part.value)
        want = _drop(dic, part, i, want)
        again = (want * part.sign < 0).any(axis=0)
        part.value = np.where(again, part.value, want)
        sets.put(rows, part)
        again = np.flatnonzero(again)
        rows, part, want = rows[again], part.take(again), want[:, again]


def _drop(dic, sets, i, want=None):
    """Empty slot i of each row; returns the optima of the smaller sets from those of the larger ones."""
    every = np.arange(len(i))
    w = sets.inverse[:, i, every]
    w /= np.sqrt(np.maximum(w[i, every], _TINY))
    if want is not None:
        want = want - w * (want[i, every] / w[i, every])
        want[i, every] = 0
    sets.inverse -= w[:, None] * w
    sets.inverse[i, :, every] = 0
    sets.inverse[:, i, every] = 0
    sets.slot[i, every], sets.sign[i, every], sets.value[i, every] = len(dic.norms) - 1, 0, 0
    return want
