# SPDX-License-Identifier: BSD-3-Clause
"""The metric of a layer's output: the best codes for a basis under it, and the best basis for its codes.

The output error ``tr((X - X̂) G (X - X̂)ᵀ)`` is the plain squared error of ``X R`` against ``X̂ R`` with ``G = R Rᵀ``. One
factorisation of the gram therefore serves every decoder that is linear in its codes.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.sparse.linalg import LinearOperator, cg

__all__ = ["DAMPING", "Whitening", "apply_operators", "code_operators", "damped_grams", "linear_codes", "refit_basis",
           "row_groups", "whiten"]

DAMPING = 0.003  # of the gram, as a multiple of its mean diagonal: calibration data are few

_BLOCK_ELEMENTS = 1 << 21  # of a block of rows that is held in float64
_CG_STEPS = 12


class Whitening(NamedTuple):
    """A root of a damped gram.

    Attributes
    ----------
    root : ndarray of shape (d, d)
        R with ``G + δI = R Rᵀ``; not symmetric in general.
    inverse : ndarray of shape (d, d)
        R⁻¹; the pseudo-inverse where the damped gram is singular.
    """

    root: np.ndarray
    inverse: np.ndarray


def whiten(gram, damping=DAMPING):
    """Root of ``G + δI``, ``δ = damping · mean(diag G)``, and the inverse of the root.

    The Cholesky factor; of a matrix that is singular to rounding, the eigenvectors times the roots of the eigenvalues,
    small and negative ones counted as zero. A gram of zeros says nothing about the inputs and is taken as the identity.

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
    damped = damped_grams(gram, damping)[0]
    root = _cholesky(damped)
    if root is not None:
        return Whitening(root, solve_triangular(root, np.eye(len(root)), lower=True))
    values, vectors = np.linalg.eigh((damped + damped.T) / 2)
    keep = values > len(values) * np.finfo(np.float64).eps * values[-1]
    roots = np.sqrt(np.where(keep, values, 0.0))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=keep)
    return Whitening(vectors * roots, inverses[:, None] * vectors.T)


def _root(gram, damping):
    """R of :func:`whiten` alone, at a third of the cost."""
    root = _cholesky(damped_grams(gram, damping)[0])
    return whiten(gram, damping).root if root is None else root


def _cholesky(A):
    """Lower Cholesky factor, None where A is singular to rounding."""
    try:
        root = np.linalg.cholesky(A)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diag(root) ** 2
    return root if pivots.min() > 1e-12 * np.diag(A).max() else None


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


def code_operators(basis, gram=None, damping=DAMPING):
    """P with ``X P = argmin_C tr((X - C B) G (X - C B)ᵀ)``, G damped as in :func:`whiten`, for every gram.

    With ``A = (B R)ᵀ`` it is ``P = R A (AᵀA)⁻¹``, from a QR decomposition of A, which does not square its condition.
    Where the rows of B depend on each other, it gives the smallest of the best codes, each measured by the length of
    what it adds.

    Parameters
    ----------
    basis : ndarray of shape (m, d)
    gram : ndarray of shape (d, d) or (g, d, d), optional
        The identity when not given.
    damping : float, default=DAMPING

    Returns
    -------
    operators : ndarray of shape (g, d, m), g = 1 for a single gram or none

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.whitening import code_operators
    >>> code_operators(np.array([[2.0, 2.0]])).round(6)
    array([[[0.25],
            [0.25]]])
    """
    basis = np.asarray(basis, dtype=np.float64)
    if gram is None:
        return _scaled_pinv(basis.T).T[None]
    return _operators(basis, [_root(G, damping) for G in np.reshape(gram, (-1, *np.shape(gram)[-2:]))])


def _operators(basis, roots):
    return np.stack([R @ _scaled_pinv((basis @ R).T).T for R in roots])


def _scaled_pinv(A):
    """Pseudo-inverse (m, d) of A (d, m) with its columns brought to one length first."""
    length = np.sqrt(np.einsum("dm,dm->m", A, A))
    length[length == 0] = 1.0
    A = A / length
    d, m = A.shape
    if m <= d:
        Q, R = np.linalg.qr(A)
        if np.abs(np.diag(R)).min() > 1e-9:
            return solve_triangular(R, Q.T) / length[:, None]
    return np.linalg.pinv(A, rcond=1e-10) / length[:, None]


def apply_operators(X, operators):
    """``X P`` with each block of rows multiplied by its own operator, in float64, rounded to the dtype of X.

    >>> import numpy as np
    >>> apply_operators(np.array([[1.0], [1.0]]), np.array([[[2.0]], [[3.0]]]))
    array([[2.],
           [3.]])
    """
    X = np.asarray(X)
    codes = np.empty((len(X), operators.shape[2]), dtype=X.dtype if X.dtype.kind == "f" else np.float64)
    step = max(1, _BLOCK_ELEMENTS // max(operators.shape[1:]))
    for rows, P in zip(row_groups(len(X), len(operators)), operators, strict=True):
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            codes[block] = X[block].astype(np.float64) @ P
    return codes


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
    return apply_operators(X, code_operators(basis, gram, damping))


def refit_basis(X, parameters, gram, *, expand=np.asarray, collapse=np.asarray, weights=None, damping=DAMPING,
                n_rounds=3):
    """Lower the output error of a basis whose structure leaves no closed form.

    Alternates the best codes C with better parameters θ of the basis ``B = expand(θ)`` for them: the normal equations
    ``collapse(Σ_g C_gᵀ C_g B G_g) = collapse(Σ_g C_gᵀ X_g G_g)`` are solved approximately, by conjugate gradients from
    the parameters as they are. No step raises the error; rounds end early once they gain less than a thousandth.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    parameters : ndarray
        θ to start from.
    gram : ndarray of shape (d, d) or (g, d, d)
    expand, collapse : callable
        Puts every parameter in its places in the basis (m, d), and the adjoint: sums what stands in its places.
        By default the parameters are the basis.
    weights : ndarray of shape (n,), optional
        Row weights.
    damping : float, default=DAMPING
    n_rounds : int, default=3

    Returns
    -------
    parameters : ndarray, float64

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.whitening import refit_basis
    >>> X, G = np.array([[2.0, 1.0], [4.0, 2.0]]), np.diag([1.0, 3.0])
    >>> B = refit_basis(X, np.array([[1.0, 1.0]]), G)  # X has rank 1
    >>> (linear_codes(X, B, G) @ B).round(2)
    array([[2., 1.],
           [4., 2.]])
    """
    X, theta = np.asarray(X, dtype=np.float64), np.array(parameters, dtype=np.float64)
    w = np.ones((len(X), 1)) if weights is None else weights[:, None]
    grams = damped_grams(gram, damping)
    groups = list(zip(row_groups(len(X), len(grams)), grams, strict=True))
    roots, before = [_root(G, 0.0) for G in grams], np.inf
    for _ in range(n_rounds):
        B, right, squares, error = expand(theta), 0.0, [], 0.0
        for (rows, G), P in zip(groups, _operators(B, roots)):
            codes = X[rows] @ P
            residual = X[rows] - codes @ B
            weighted = w[rows] * (residual @ G)
            error += np.einsum("ij,ij->", weighted, residual)
            right = right + codes.T @ weighted
            squares.append(codes.T @ (w[rows] * codes))
        if not 0 < error < (1 - 1e-3) * before:
            break
        theta, before = theta + _normal_step(collapse(right), squares, grams, expand, collapse), error
    return theta


def _normal_step(right, squares, grams, expand, collapse):
    """Step v with ``collapse(Σ_g S_g expand(v) G_g) = right``, by a few preconditioned conjugate gradients."""
    def apply(v):
        B = expand(v.reshape(right.shape))
        return collapse(sum(S @ B @ G for S, G in zip(squares, grams))).ravel()

    diagonal = collapse(sum(np.outer(np.diag(S), np.diag(G)) for S, G in zip(squares, grams))).ravel()
    inverse = np.divide(1.0, diagonal, out=np.ones_like(diagonal), where=diagonal > 0)
    shape = (right.size, right.size)
    step, _ = cg(LinearOperator(shape, matvec=apply, dtype=np.float64), right.ravel(), rtol=1e-3, atol=0.0,
                 maxiter=_CG_STEPS, M=LinearOperator(shape, matvec=lambda v: inverse * v.ravel(), dtype=np.float64))
    return step.reshape(right.shape)
