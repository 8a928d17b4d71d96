"""Sparse codes for a fixed dictionary: the lasso of every row of a matrix, with a certificate for every row.

Rows are coded by an active-set method that advances thousands of them by one step at once, in float32 for float32
rows; a row whose duality gap is not certified below the tolerance is coded again in float64, and by coordinate descent
where that fails too.
"""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, issparse

from skfactor.solvers import _coordinate
from skfactor.solvers._lasso_rows import Triples, prepare, solve_rows
from skfactor.solvers._row_threads import row_map

# Numbers of one dense block of codes.
_BLOCK_NUMBERS = 1 << 22


class LassoCodes(NamedTuple):
    """Codes of the rows of a matrix.

    Attributes
    ----------
    codes : ndarray or csr_array of shape (n, K), dtype of X
    n_iter : int
        Most steps that a row took.
    gap : ndarray of shape (n,), float64
        Certified duality gap of every row divided by ``1/2 |x|^2``: its objective is above the optimum by at most that
        much. It is the gap of the row's projection on the span of the atoms, which is the tightest and has the same
        codes, and belongs to the codes before they are rounded to the type of X.
    """

    codes: np.ndarray | csr_array
    n_iter: int
    gap: np.ndarray


def lasso_codes(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000, n_threads=None):
    """Lasso codes of every row for fixed atoms.

    Minimises ``1/2 |x - u V|^2 + alpha |u|_1`` over u for every row x of X.

    Parameters
    ----------
    X : ndarray of shape (n, d), float32 or float64
    V : ndarray of shape (K, d)
        Atoms, of any norm; repeated, dependent and zero ones are allowed.
    alpha : float or ndarray of shape (n,)
        At least 0. An alpha below 1e-9 times the largest ``|v . x|`` of a row is taken as that: alpha = 0 gives least
        squares up to that part, with at most ``min(K, d)`` non-zeros.
    codes : ndarray or sparse array of shape (n, K), default=None
        Start; codes near the optimum save steps. None starts from zero.
    positive : bool, default=False
        Whether codes must not be negative; alpha = 0 then gives non-negative least squares.
    tol : float, default=1e-4
        Largest gap of a row, relative to ``1/2 |x|^2``.
    max_iter : int, default=1000
        Most steps of a row in each precision; a row that needs more is returned with its gap.
    n_threads : int, default=None
        Threads over blocks of rows; None means as many as there are usable cores. The codes do not depend on it.

    Returns
    -------
    LassoCodes

    Raises
    ------
    ValueError
        If the shapes do not fit, a number is out of range, or X, V or alpha is not finite.

    References
    ----------
    H. Lee et al., "Efficient sparse coding algorithms", NIPS 2006 (active sets with signs).
    O. Fercoq, A. Gramfort, J. Salmon, ICML 2015, arXiv:1505.03410 (the dual point of the gap).

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import lasso_codes
    >>> lasso_codes(np.array([[3.0, 0.5], [0.0, -2.0]]), np.eye(2), 1.0).codes
    array([[ 2.,  0.],
           [ 0., -1.]])
    """
    X, V, alpha = _check(X, V, alpha, codes, tol, max_iter)
    out = np.zeros((len(X), len(V)), dtype=X.dtype)
    gap, n_iter = np.zeros(len(X)), 0
    for rows, part in _solved(X, V, alpha, codes, (positive, tol, max_iter), n_threads):
        out[rows][part.rows, part.atoms] = part.values
        gap[rows], n_iter = part.gap, max(n_iter, part.n_iter)
    return LassoCodes(out, n_iter, gap)


def lasso_codes_sparse(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000, n_threads=None):
    """`lasso_codes` with the codes as a csr_array: memory for the non-zeros only.

    Parameters, result and errors are those of `lasso_codes`; the column indices of a row are sorted.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import lasso_codes_sparse
    >>> lasso_codes_sparse(np.array([[3.0, 0.5], [0.0, -2.0]]), np.eye(2), 1.0).codes.nnz
    2
    """
    X, V, alpha = _check(X, V, alpha, codes, tol, max_iter)
    parts = _solved(X, V, alpha, codes, (positive, tol, max_iter), n_threads)
    rows = np.concatenate([np.zeros(0, dtype=np.intp), *(part.rows + block.start for block, part in parts)])
    atoms, values = (np.concatenate([np.zeros(0, dtype=dtype), *(part[i].astype(dtype) for _, part in parts)])
                     for i, dtype in ((1, np.int32), (2, X.dtype)))
    out = csr_array((values, (rows, atoms)), shape=(len(X), len(V)))
    out.sort_indices()
    return LassoCodes(out, max((part.n_iter for _, part in parts), default=0),
                      np.concatenate([np.zeros(0), *(part.gap for _, part in parts)]))


def lasso_blocks(X, V, alpha, *, codes=None, positive=False, tol=1e-4, max_iter=1000):
    """Yield ``(rows, LassoCodes)`` for consecutive slices of rows, with dense codes of bounded size.

    Parameters and errors are those of `lasso_codes`.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import lasso_blocks
    >>> [(rows, part.codes.shape) for rows, part in lasso_blocks(np.ones((5, 3)), np.eye(3), 0.5)]
    [(slice(0, 5, None), (5, 3))]
    """
    X, V, alpha = _check(X, V, alpha, codes, tol, max_iter)
    blocks, run = _blocks(X, V, alpha, codes, (positive, tol, max_iter))
    for rows in blocks:
        with row_map(1, 0):
            _, part = run(rows)
        dense = np.zeros((rows.stop - rows.start, len(V)), dtype=X.dtype)
        dense[part.rows, part.atoms] = part.values
        yield rows, LassoCodes(dense, part.n_iter, part.gap)


def lasso_path(X, V, alphas, *, positive=False, tol=1e-4, max_iter=1000, sparse=False, n_threads=None):
    """Yield the `LassoCodes` of each of `alphas`, each started from the one before.

    The sets of active atoms change little from one alpha to the next: a falling grid costs a few steps for each.

    Parameters
    ----------
    alphas : iterable of float or ndarray of shape (n,)
    sparse : bool, default=False
        Whether codes are csr_arrays.

    The others, and the errors, are those of `lasso_codes`.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import lasso_path
    >>> [part.codes.tolist() for part in lasso_path(np.array([[3.0, 0.5]]), np.eye(2), [2.0, 0.25])]
    [[[1.0, 0.0]], [[2.75, 0.25]]]
    """
    codes = None
    for alpha in alphas:
        part = lasso_codes_sparse(X, V, alpha, codes=codes, positive=positive, tol=tol, max_iter=max_iter,
                                  n_threads=n_threads)
        codes = part.codes
        yield part if sparse else part._replace(codes=codes.toarray())


def lasso_sweeps(X, V, alpha, codes, n_sweeps, *, gram=None, positive=False):
    """Codes after a few sweeps of block coordinate descent: cheap, not optimal, never of a higher objective.

    The arithmetic runs on the transposed array (K, n). The result is such an array seen from the other side, in
    Fortran order, and codes of that order are taken without a transposition: in an alternation hand the result back.
    To save the copy and ``V X'`` too, call `skfactor.solvers._coordinate.sweep_in_place`, which writes to (K, n).

    Parameters
    ----------
    X, V, alpha, positive
        As in `lasso_codes`.
    codes : ndarray of shape (n, K)
        Start; negative ones count as zero if `positive`.
    n_sweeps : int
        Each minimises over one atom after the other.
    gram : ndarray of shape (K, K), default=None
        ``V V'``, if it is known.

    Returns
    -------
    codes : ndarray of shape (n, K), dtype of X, Fortran order

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import lasso_sweeps
    >>> lasso_sweeps(np.array([[3.0, 0.5]]), np.eye(2), 1.0, np.zeros((1, 2)), 1)
    array([[2., 0.]])
    """
    X, V, alpha = _check(X, V, alpha, codes, 0, 1)
    codes_t = np.array(np.asarray(codes).T, dtype=X.dtype, order="C")
    if positive:
        np.maximum(codes_t, 0, out=codes_t)
    gram = V @ V.T if gram is None else np.asarray(gram, dtype=X.dtype)
    _coordinate.sweep_in_place(codes_t, V @ X.T, gram, alpha, n_sweeps, positive)
    return codes_t.T


def alpha_max(X, V, *, positive=False):
    """The smallest alpha for which all codes are zero: the largest ``|v . x|``, or ``v . x`` if `positive`.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import alpha_max
    >>> alpha_max(np.array([[3.0, 0.5], [0.0, -4.0]]), np.eye(2))
    4.0
    """
    X, V, _ = _check(X, V, 0.0, None, 0, 1)
    step = max(1, _BLOCK_NUMBERS // max(V.shape))
    top = 0.0
    for start in range(0, len(X), step):
        cross = X[start : start + step] @ V.T
        top = max(top, float(cross.max(initial=0)), 0.0 if positive else -float(cross.min(initial=0)))
    return top


def duality_gap(X, V, alpha, codes, *, positive=False):
    """Duality gap of every row divided by ``1/2 |x|^2``, for any codes; 0 for rows of zeros.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.lasso import duality_gap
    >>> duality_gap(np.array([[2.0, 0.0], [2.0, 0.0]]), np.eye(2), 1.0, np.array([[1.0, 0.0], [0.0, 0.0]]))
    array([0.  , 0.25])
    """
    X, V, alpha = _check(X, V, alpha, codes, 0, 1)
    X = X.astype(np.float64)
    half = 0.5 * np.einsum("ij,ij->i", X, X)
    gap = _coordinate.duality_gap(X, V.astype(np.float64), alpha.astype(np.float64), np.asarray(codes, np.float64),
                                  positive)
    return np.divide(gap, half, out=np.zeros(len(X)), where=half > 0)


def _solved(X, V, alpha, codes, options, n_threads):
    """(slice, Triples) of consecutive blocks of rows."""
    blocks, run = _blocks(X, V, alpha, codes, options)
    with row_map(n_threads, len(X)) as over:
        return list(over(run, blocks))


def _blocks(X, V, alpha, codes, options):
    """Slices of rows, and the function that codes one of them."""
    positive, tol, max_iter = options
    with row_map(1, 0):
        prepared = prepare(V, positive)
    step = max(1, min(prepared.n_rows, _BLOCK_NUMBERS // len(V)))

    def run(rows):
        warm = None if codes is None else _warm(codes[rows], positive)
        return rows, solve_rows(prepared, X[rows], alpha[rows], warm, tol, max_iter)

    return [slice(start, min(start + step, len(X))) for start in range(0, len(X), step)], run


def _warm(codes, positive):
    if issparse(codes):
        codes = codes.tocoo()
        rows, atoms, values = codes.row, codes.col, codes.data
    else:
        codes = np.asarray(codes)
        rows, atoms = np.nonzero(codes)
        values = codes[rows, atoms]
    kept = np.flatnonzero(values > 0 if positive else values != 0)
    return Triples(rows[kept], atoms[kept], values[kept].astype(np.float64), None, 0)


def _check(X, V, alpha, codes, tol, max_iter):
    X = np.asarray(X)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    V = np.asarray(V, dtype=X.dtype)
    if X.ndim != 2 or V.ndim != 2 or X.shape[1] != V.shape[1] or V.size == 0:
        raise ValueError(f"X and V must be matrices with the same number of columns, got shapes {X.shape}, {V.shape}")
    alpha = np.asarray(alpha, dtype=X.dtype)
    if alpha.shape not in ((), X.shape[:1]):
        raise ValueError(f"alpha must be a number or of shape {X.shape[:1]}, got shape {alpha.shape}")
    if alpha.size and not (alpha.min() >= 0 and np.isfinite(alpha.max())):
        raise ValueError(f"alpha must be finite and at least 0, got {alpha.min()} to {alpha.max()}")
    for name, values in (("X", X), ("V", V)):
        if values.size and not (np.isfinite(values.max()) and np.isfinite(values.min())):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if codes is not None and codes.shape != (len(X), len(V)):
        raise ValueError(f"codes must have shape {(len(X), len(V))}, got {codes.shape}")
    if not 0 <= tol < np.inf:
        raise ValueError(f"tol must be a number of at least 0, got {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    return X, V, np.broadcast_to(alpha, X.shape[:1])
