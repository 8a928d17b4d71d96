# SPDX-License-Identifier: BSD-3-Clause
"""Unfoldings of tensors and the leading singular vectors of wide matrices."""

import math

import numpy as np

__all__ = ["axis_letters", "balanced_shape", "left_singular", "mode_product", "squared_sum", "tucker_ranks", "unfold"]


def unfold(T, axis):
    """Matrix of a tensor: rows are the positions along `axis`, columns all others in their order.

    >>> import numpy as np
    >>> unfold(np.arange(6).reshape(2, 3), 1)
    array([[0, 3],
           [1, 4],
           [2, 5]])
    """
    return np.moveaxis(T, axis, 0).reshape(T.shape[axis], -1)


def mode_product(T, matrix, axis):
    """Multiply every fibre along `axis` by `matrix` (p, d_axis).

    >>> import numpy as np
    >>> mode_product(np.ones((2, 3, 4)), np.ones((5, 3)), 1).shape
    (2, 5, 4)
    """
    return np.moveaxis(np.tensordot(matrix, T, (1, axis)), 0, axis)


def squared_sum(A):
    """Sum of squares."""
    flat = np.ravel(A)
    return float(flat @ flat)


def left_singular(A, rank=None):
    """Left singular vectors and singular values of a matrix, descending.

    From the eigenvectors of A Aᵀ, which is much the cheapest for a wide matrix; its eigenvalues are right to
    ``eps ‖A‖²`` only, so where those that count are not well above that, from a triangular factor of A.

    Parameters
    ----------
    A : ndarray of shape (m, n)
    rank : int, optional
        How many singular vectors count; all when not given.

    Returns
    -------
    vectors : ndarray of shape (m, min(m, n))
    values : ndarray of shape (min(m, n),)
    """
    m, n = A.shape
    if n < m:
        U, s, _ = np.linalg.svd(A, full_matrices=False)
        return _with_signs(U), s
    values, vectors = np.linalg.eigh(A @ A.T)
    if values[-(rank or m)] > 1e-9 * values[-1]:
        return _with_signs(vectors[:, ::-1]), np.sqrt(np.maximum(values[::-1], 0.0))
    U, s, _ = np.linalg.svd(np.linalg.qr(A.T, mode="r").T)
    return _with_signs(U), s


def _with_signs(U):
    """The largest number of every column positive: signs do not hang on rounding."""
    largest = np.take_along_axis(U, np.abs(U).argmax(axis=0)[None], axis=0)
    return U * np.where(largest < 0, -1.0, 1.0)


def tucker_ranks(shape, ranks, axes):
    """`ranks` of the frames along `axes`, none above its size or the product of all other extents of the core.

    >>> tucker_ranks((64, 16, 3), (64, 4, 3), (0, 1, 2))
    (12, 4, 3)
    """
    extents = list(shape)
    for axis, rank in zip(axes, ranks, strict=True):
        extents[axis] = min(int(rank), shape[axis])
    for _ in axes:
        for axis in axes:
            extents[axis] = min(extents[axis], math.prod(extents[:axis] + extents[axis + 1 :]))
    return tuple(extents[axis] for axis in axes)


def axis_letters(n):
    """13 letters for bonds, and n of the next 9 for the codes and the column axes of a `Network`.

    >>> axis_letters(3)
    ('abcdefghijklm', 'nop')
    """
    if n > 9:
        raise ValueError(f"rows may be tensors of at most 8 axes, got {n - 1}")
    return "abcdefghijklm", "nopqrstuv"[:n]


def balanced_shape(d):
    """Two factors of `d` as near to each other as there are, the larger first; `(d,)` for a prime.

    >>> balanced_shape(4608), balanced_shape(16), balanced_shape(7)
    ((72, 64), (4, 4), (7,))
    """
    small = next(k for k in range(math.isqrt(d), 0, -1) if d % k == 0)
    return (d // small, small) if small > 1 else (d,)
