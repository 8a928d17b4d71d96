"""Codes with a given number of non-zeros by order-recursive orthogonal matching pursuit, many rows at once."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
from scipy.sparse import csr_array

from skfactor.solvers._row_threads import row_map

# Bytes of the correlations and bases of one block of rows: they stay in the cache through all steps.
_BLOCK_BYTES = 1 << 20
# An atom of which less than this part of the squared norm, in units of the rounding, is outside the span of the chosen
# ones depends on them.
_DEPENDENT = 64


def omp_codes(X, V, n_nonzero, *, positive=False, tol=0.0, n_threads=None):
    """Greedy codes of every row with a bounded number of non-zeros.

    Seeks the least ``|x - u V|^2`` for every row x of X. Each step takes the atom that lowers the error most when all
    codes are fitted again: the largest ``(v . r)^2 / |v - P v|^2`` with the residual r and the projection P on the
    atoms chosen before (order-recursive matching pursuit; plain OMP leaves the denominator out and ends at a higher
    error). The codes are the least-squares fit to the chosen atoms.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    V : ndarray of shape (K, d)
        Atoms, of any norm.
    n_nonzero : int
        Most non-zeros of a row, at least 0; more than ``min(K, d)`` counts as that.
    positive : bool, default=False
        Whether codes must not be negative: only atoms with ``v . r > 0`` are chosen, and those whose fitted codes come
        out negative are left out, the most negative first.
    tol : float, default=0
        A row is finished when ``|r| <= tol |x|``; never below the rounding.
    n_threads : int, default=None
        Threads over blocks of rows; None means as many as there are usable cores.

    Returns
    -------
    codes : csr_array of shape (n, K), dtype of X
        The column indices of a row are sorted.

    Raises
    ------
    ValueError
        If the shapes do not fit, X or V is not finite, or a number is out of range.

    References
    ----------
    S. F. Cotter, J. Adler, B. D. Rao, K. Kreutz-Delgado, IEE Proc. Vision 146(5), 1999, doi:10.1049/ip-vis:19990445.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.omp import omp_codes
    >>> omp_codes(np.array([[3.0, 0.5, -2.0]]), np.eye(3), 2).toarray()
    array([[ 3.,  0., -2.]])
    """
    X, V = _check(X, V, n_nonzero, tol)
    n, K = len(X), len(V)
    depth = int(min(n_nonzero, *V.shape))
    longest = np.sqrt(np.square(V, dtype=np.float64).sum(axis=1).max())
    atoms = (V / (longest or 1)).astype(X.dtype)
    step = max(16, _BLOCK_BYTES // (X.itemsize * (K + depth * X.shape[1])))
    blocks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    indices = np.zeros((n, depth), dtype=np.int32)
    values = np.zeros((n, depth), dtype=X.dtype)

    def run(rows):
        size = np.abs(X[rows]).max(axis=1, keepdims=True)
        size[size == 0] = 1
        found = _block(X[rows] / size, atoms, depth, positive, tol)
        indices[rows], values[rows] = found[0], found[1] * (size / (longest or 1))

    if depth:
        with row_map(n_threads, n) as over:
            list(over(run, blocks))
    rows, places = np.nonzero(values)
    codes = csr_array((values[rows, places], (rows, indices[rows, places])), shape=(n, K))
    codes.sort_indices()
    return codes


def _block(X, atoms, depth, positive, tol):
    """Chosen atoms and their codes, both (n, depth), zeros where a row needed fewer."""
    (n, d), K, dtype = X.shape, len(atoms), X.dtype
    columns = np.ascontiguousarray(atoms.T)
    norms = np.einsum("kd,kd->k", atoms, atoms)
    floor = np.where(norms > 0, _DEPENDENT * np.finfo(dtype).eps * norms, 1)
    c, free = X @ columns, norms + floor  # correlations; squared norms outside the span of the chosen, never zero
    products, work = np.empty((2, n, K), dtype=dtype)
    residual = X.copy()
    target = max(tol, 16 * np.finfo(dtype).eps) ** 2 * np.einsum("nd,nd->n", X, X)
    chosen = np.zeros((n, depth), dtype=np.int32)
    basis = np.zeros((n, depth, d), dtype=dtype)
    triangle = np.tile(np.eye(depth, dtype=dtype), (n, 1, 1))  # the chosen atoms are its columns in the basis
    weights = np.zeros((n, depth), dtype=dtype)
    going = np.ones(n, dtype=bool)
    for t in range(depth):
        np.multiply(np.maximum(c, 0, out=work) if positive else c, c, out=work)
        j = np.divide(work, free, out=work).argmax(axis=1)
        q, inner, length = _orthogonal(basis[:, :t], atoms[j])
        weight = np.einsum("nd,nd->n", q, residual)
        going &= np.einsum("nd,nd->n", residual, residual) > target
        going &= (length**2 > floor[j]) & ((weight > 0) | (not positive))
        weight = np.where(going, weight, 0)
        chosen[:, t], weights[:, t], basis[:, t] = j, weight, q
        triangle[:, :t, t], triangle[:, t, t] = np.where(going[:, None], inner, 0), np.where(going, length, 1)
        if t + 1 == depth or not going.any():
            break
        residual -= weight[:, None] * q
        np.matmul(q, columns, out=products)
        c -= np.multiply(products, weight[:, None], out=work)
        free = np.subtract(free, np.multiply(products, products, out=products), out=free if t else None)
    values = _back_substitution(triangle, weights)
    return chosen, _without_negative(triangle, weights, values) if positive else values


def _orthogonal(basis, v):
    """Unit vectors along what of v is outside the bases (n, t, d), its coefficients in them, and its lengths."""
    q, inner = v, np.zeros(basis.shape[:2], dtype=v.dtype)
    for _ in range(2 if basis.shape[1] else 0):  # once more, for orthogonality to the rounding
        part = np.einsum("ntd,nd->nt", basis, q)
        q = q - np.einsum("ntd,nt->nd", basis, part)
        inner += part
    length = np.sqrt(np.einsum("nd,nd->n", q, q))
    return q / np.where(length > 0, length, 1)[:, None], inner, length


def _back_substitution(triangle, weights):
    values = np.zeros_like(weights)
    for t in reversed(range(weights.shape[1])):
        later = np.einsum("nk,nk->n", triangle[:, t, t + 1 :], values[:, t + 1 :])
        values[:, t] = (weights[:, t] - later) / triangle[:, t, t]
    return values


def _without_negative(triangle, weights, values):
    """Fit again without the most negative code of a row until none is negative."""
    kept = weights != 0
    rows = np.flatnonzero((values < 0).any(axis=1))
    while len(rows):
        kept[rows, values[rows].argmin(axis=1)] = False
        keep, upper = kept[rows], triangle[rows].astype(np.float64)
        gram = np.einsum("nki,nkj->nij", upper, upper) * (keep[:, :, None] & keep[:, None, :])
        i = np.arange(keep.shape[1])
        gram[:, i, i] += ~keep
        right = np.einsum("nki,nk->ni", upper, weights[rows]) * keep
        values[rows] = np.linalg.solve(gram, right[..., None])[..., 0] * keep
        rows = rows[(values[rows] < 0).any(axis=1)]
    return values


def _check(X, V, n_nonzero, tol):
    X = np.asarray(X)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    V = np.asarray(V, dtype=X.dtype)
    if X.ndim != 2 or V.ndim != 2 or X.shape[1] != V.shape[1] or V.size == 0:
        raise ValueError(f"X and V must be matrices with the same number of columns, got shapes {X.shape}, {V.shape}")
    for name, array in (("X", X), ("V", V)):
        if array.size and not (np.isfinite(array.max()) and np.isfinite(array.min())):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if n_nonzero < 0:
        raise ValueError(f"n_nonzero must be at least 0, got {n_nonzero}")
    if not 0 <= tol < np.inf:
        raise ValueError(f"tol must be a number of at least 0, got {tol}")
    return X, V
