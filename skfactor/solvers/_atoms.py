"""The dictionary's half of dictionary learning: atoms for given codes, starts, replacements, stationarity."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

__all__ = ["canonical_rows", "draw_rows", "stationarity", "unit_rows", "update_atoms"]

# Atoms of one block: the block's cross term is one matrix product.
_BLOCK = 16
# Numbers that are hashed at a time.
_HASHED = 1 << 16


def update_atoms(V, A, B, *, positive=False):
    """Lower ``1/2 <A, V V'> - <B, V>`` by exact minimisation over one unit-norm row of V at a time; writes to V.

    On the sphere the square of an atom's norm is constant, so the minimiser is the direction of the linear term
    (of its positive part for non-negative atoms). Atoms without codes keep their place.

    Parameters
    ----------
    V : ndarray of shape (K, d)
        Unit-norm rows.
    A : ndarray of shape (K, K)
        ``U' W U``.
    B : ndarray of shape (K, d)
        ``U' W X``.
    positive : bool, default=False
    """
    moves = np.empty((_BLOCK, V.shape[1]), V.dtype)
    for start in range(0, len(V), _BLOCK):
        stop = min(start + _BLOCK, len(V))
        rest = B[start:stop] - A[start:stop] @ V
        for k in range(start, stop):
            j = k - start
            moves[j] = 0
            if not A[k, k] > 0:
                continue
            v = rest[j] + A[k, k] * V[k]
            if j:
                v -= A[k, start:k] @ moves[:j]
            if positive:
                v = _best_positive(v)
            norm = np.sqrt(v @ v)
            if norm > 0:
                v /= norm
                np.subtract(v, V[k], out=moves[j])
                V[k] = v


def _best_positive(v):
    """The non-negative direction with the largest inner product with v: its positive part, or one axis."""
    top = int(v.argmax())
    if v[top] > 0:
        return np.maximum(v, 0)
    axis = np.zeros_like(v)
    axis[top] = 1
    return axis


def unit_rows(V):
    """Rows of V divided by their norms; rows of norm zero stay."""
    norms = np.sqrt(np.einsum("kd,kd->k", V, V))
    return V / np.where(norms > 0, norms, 1)[:, None].astype(V.dtype)


def stationarity(V, A, B, *, positive=False):
    """Norm of the gradient in V along the sphere, relative to the norm of ``B``; 0 at a stationary dictionary.

    Of non-negative atoms only the part counts that the sign allows to follow.
    """
    V, A, B = (np.asarray(M, dtype=np.float64) for M in (V, A, B))
    gradient = A @ V - B
    gradient -= np.einsum("kd,kd->k", gradient, V)[:, None] * V
    if positive:
        gradient = np.where(V > 0, gradient, np.minimum(gradient, 0))
    scale = np.linalg.norm(B)
    return float(np.linalg.norm(gradient) / scale) if scale > 0 else 0.0


def draw_rows(X, n_rows, rng, *, weights=None):
    """At most `n_rows` different non-zero rows of X, drawn with probability ``~ w |x|^2``, as unit rows."""
    mass = np.einsum("nd,nd->n", X, X).astype(np.float64)
    if weights is not None:
        mass = mass * weights
    n_drawn = min(n_rows, int((mass > 0).sum()))
    if n_drawn == 0:
        return X[:0]
    # the smallest of exponential clocks of these rates: sampling without replacement
    with np.errstate(divide="ignore"):
        clocks = np.where(mass > 0, rng.exponential(size=len(X)) / np.where(mass > 0, mass, 1), np.inf)
    order = np.argpartition(clocks, n_drawn - 1)[:n_drawn]
    return unit_rows(X[np.sort(order)])


def canonical_rows(X, weights=None):
    """The different rows of X in an order that depends on their values alone, and how often each occurs.

    So a row of weight 2 and the same row given twice lead to the same arithmetic, in whatever order rows come. The
    order is that of a hash, and so as good as random. Rows of weight 0 are left out.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    weights : ndarray of shape (n,), default=None

    Returns
    -------
    rows : ndarray of shape (m, d)
    weights : ndarray of shape (m,) or None
        None where every row counts once.
    """
    if weights is not None:
        X, weights = X[weights > 0], weights[weights > 0]
    X = np.ascontiguousarray(X + X.dtype.type(0))  # of the two zeros one
    factors = np.random.default_rng(0).integers(1, 2**63, size=X.shape[1], dtype=np.uint64)
    factors |= np.uint64(1)
    unit = np.ldexp(1.0, -int(np.frexp(np.abs(X).max(initial=0))[1]))
    keys = np.empty(len(X), dtype=np.uint64)
    step = max(1, _HASHED // X.shape[1])
    for start in range(0, len(X), step):
        # equal values hash alike in either dtype, and at any power of two
        bits = (X[start : start + step] * np.float64(unit)).view(np.uint64)
        mixed = (bits + factors) * factors
        mixed ^= mixed >> np.uint64(31)
        keys[start : start + step] = (mixed * factors).sum(axis=1)
    order = np.argsort(keys, kind="stable")
    rows, keys = X[order], keys[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1]).any(axis=1)
    if weights is None and first.all():
        return rows, None
    counts = np.ones(len(rows)) if weights is None else weights[order]
    counts = np.add.reduceat(counts, np.flatnonzero(first))
    return rows[first], None if (counts == 1).all() else counts
