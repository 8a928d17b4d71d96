# SPDX-License-Identifier: BSD-3-Clause
"""The metric of a layer's output, and the codes that are best under it for a given basis.

The output error ``tr((X - X̂) G (X - X̂)ᵀ)`` is the plain squared error of ``X R`` against ``X̂ R`` with ``G = R Rᵀ``. One
factorisation of the gram therefore serves every decoder that is linear in its codes.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["DAMPING", "Whitening", "code_operator", "damped_grams", "linear_codes", "row_groups", "whiten"]

DAMPING = 0.003  # of the gram, as a multiple of its mean diagonal: calibration data are few

_BLOCK_ELEMENTS = 1 << 21  # of a block of rows that is held in float64


class Whitening(NamedTuple):
    """A root of a damped gram.

    Attributes
    ----------
    root : ndarray of shape (d, d)
        Symmetric R with ``G + δI = R Rᵀ``.
    inverse : ndarray of shape (d, d)
        R⁻¹; the pseudo-inverse where the damped gram is singular.
    """

    root: np.ndarray
    inverse: np.ndarray


def whiten(gram, damping=DAMPING):
    """Root and inverse root of ``G + δI``, ``δ = damping · mean(diag G)``, from the eigenvectors of G.

    Rounding may leave eigenvalues of a singular gram slightly negative: they count as zero. A gram of zeros says
    nothing about the inputs and is taken as the identity.

    Parameters
    ----------
    gram : ndarray of shape (d, d)
        Symmetric, positive semi-definite.
    damping : float, default=DAMPING

    Returns
    -------
    whitening : Whitening

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.whitening import whiten
    >>> whiten(np.diag([4.0, 1.0]), damping=0.0).root
    array([[2., 0.],
           [0., 1.]])
    """
    gram = np.asarray(gram, dtype=np.float64)
    d = len(gram)
    mean = np.trace(gram) / d
    if not mean > 0:
        return Whitening(np.eye(d), np.eye(d))
    values, vectors = np.linalg.eigh((gram + gram.T) / (2 * mean))
    floor = d * np.finfo(np.float64).eps * values[-1]
    roots = np.sqrt((np.where(values > floor, values, 0.0) + damping) * mean)
    inverses = np.divide(1.0, roots, out=np.zeros(d), where=roots > 0)
    return Whitening((vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T)


def damped_grams(gram, damping=DAMPING):
    """``G + δI`` for a gram (d, d) or each of (g, d, d), as (g, d, d); a gram of zeros gives the identity.

    >>> import numpy as np
    >>> damped_grams(np.diag([3.0, 1.0]), damping=0.5)
    array([[[4., 0.],
            [0., 2.]]])
    """
    gram = np.asarray(gram, dtype=np.float64)
    gram = gram.reshape((-1, *gram.shape[-2:]))
    mean = np.einsum("gii->g", gram)[:, None, None] / gram.shape[-1]
    return np.where(mean > 0, gram + damping * mean * np.eye(gram.shape[-1]), np.eye(gram.shape[-1]))


def row_groups(n_rows, n_groups):
    """Slices of the rows that belong to each gram of a grouped convolution.

    >>> row_groups(6, 2)
    [slice(0, 3, None), slice(3, 6, None)]
    """
    if n_rows % n_groups:
        raise ValueError(f"rows must split evenly over the {n_groups} groups of the gram, got {n_rows} rows")
    size = n_rows // n_groups
    return [slice(g * size, (g + 1) * size) for g in range(n_groups)]


def code_operator(basis, gram=None, damping=DAMPING):
    """P with ``X P = argmin_C tr((X - C B) G (X - C B)ᵀ)``, G damped as in :func:`whiten`.

    With ``A = (B R)ᵀ`` it is ``P = R A (AᵀA)⁻¹``, from a QR decomposition of A, which does not square its condition.
    Where the rows of B depend on each other, it gives the smallest of the best codes, each measured by the length of
    what it adds.

    Parameters
    ----------
    basis : ndarray of shape (m, d)
    gram : ndarray of shape (d, d), optional
        The identity when not given.
    damping : float, default=DAMPING

    Returns
    -------
    operator : ndarray of shape (d, m)

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.whitening import code_operator
    >>> code_operator(np.array([[2.0, 2.0]])).round(6)
    array([[0.25],
           [0.25]])
    """
    A = np.asarray(basis, dtype=np.float64).T
    root = None if gram is None else whiten(gram, damping).root
    if root is not None:
        A = root @ A
    length = np.sqrt(np.einsum("dm,dm->m", A, A))
    length[length == 0] = 1.0
    pinv = _pinv(A / length) / length[:, None]  # (m, d)
    return pinv.T if root is None else root @ pinv.T


def _pinv(A):
    """Pseudo-inverse of a matrix (d, m) with columns of length 1."""
    d, m = A.shape
    if m <= d:
        Q, R = np.linalg.qr(A)
        if np.abs(np.diag(R)).min() > 1e-9:
            return np.linalg.solve(R, Q.T)
    return np.linalg.pinv(A, rcond=1e-10)


def linear_codes(X, basis, gram=None, damping=DAMPING):
    """Best codes of every row for a given basis: ``argmin_C tr((X - C B) (G + δI) (X - C B)ᵀ)``.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    basis : ndarray of shape (m, d)
        B; its rows may depend on each other, and there may be more of them than columns.
    gram : ndarray of shape (d, d) or (g, d, d), optional
        G, the second moment of the layer's inputs; with g matrices the rows split evenly over g groups. The identity
        when not given.
    damping : float, default=DAMPING
        δ as a multiple of the mean of the gram's diagonal.

    Returns
    -------
    codes : ndarray of shape (n, m), dtype of X if that is a float, else float64

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.whitening import linear_codes
    >>> B = np.array([[1.0, 1.0]])
    >>> linear_codes(np.array([[1.0, 3.0]]), B)
    array([[2.]])
    >>> linear_codes(np.array([[1.0, 3.0]]), B, np.diag([1.0, 0.0]), damping=0.0)  # the second input is always 0
    array([[1.]])
    """
    X = np.asarray(X)
    grams = [None] if gram is None else np.asarray(gram).reshape((-1, *np.shape(gram)[-2:]))
    dtype = X.dtype if X.dtype.kind == "f" else np.float64
    codes = np.empty((len(X), len(basis)), dtype=dtype)
    step = max(1, _BLOCK_ELEMENTS // max(1, *np.shape(basis)))
    for rows, G in zip(row_groups(len(X), len(grams)), grams, strict=True):
        operator = code_operator(basis, G, damping)
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            codes[block] = X[block].astype(np.float64) @ operator
    return codes
