# SPDX-License-Identifier: BSD-3-Clause
"""Kernels that separate into a column and a row of positions, or into positions and channels: both from an SVD.

With the weights of a convolution as ``W[n, c, i, j]``,

* spatially: ``W[n, c, i, j] ≈ Σ_r A[r, c, i] P[n, r, j]``, the SVD of the matrix with rows (n, j) and columns (c, i);
* by depth: ``W[n, c, i, j] ≈ Σ_m D[c, m, (i, j)] P[n, c, m]``, the SVD of the slice (n, (i, j)) of every channel.

Either is the best there is of its rank (Jaderberg, Vedaldi, Zisserman 2014, arXiv:1405.3866; Guo, Li, Lin, Chen, Li
2018, arXiv:1808.05517). With a second moment of the inputs they start :func:`skfactor.solvers.whitening.refit_basis`.
"""

from typing import NamedTuple

import numpy as np

from skfactor.solvers.low_rank import low_rank_basis
from skfactor.solvers.whitening import whiten

__all__ = ["Separable", "collapse_depthwise", "collapse_vertical", "depthwise_kernels", "expand_depthwise",
           "expand_vertical", "vertical_kernels"]

_BLOCK_ELEMENTS = 1 << 21


class Separable(NamedTuple):
    """What the filters share.

    Attributes
    ----------
    kernels : ndarray
        A (rank, c, kh), or D (c, m, k) with k positions.
    error : float
        Sum of the squared singular values left out: the weighted squared error with the best codes.
    """

    kernels: np.ndarray
    error: float


def vertical_kernels(X, kernel_shape, rank, *, weights=None, gram=None):
    """Best columns A of spatially separable kernels.

    Parameters
    ----------
    X : ndarray of shape (n, c * kh * kw)
    kernel_shape : (c, kh, kw)
    rank : int
        Fewer are returned where fewer give X.
    weights : ndarray of shape (n,), optional
        Row weights.
    gram : ndarray of shape (d, d), optional
        Second moment of the inputs, taken as the same for every j and without correlation between them.

    Returns
    -------
    separable : Separable

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.separable import vertical_kernels
    >>> kernel = np.outer([0.6, 1.2, 1.2], [1.0, 2.0, 1.0])
    >>> vertical_kernels(kernel.reshape(1, 9), (1, 3, 3), 3).kernels.round(3)
    array([[[0.333, 0.667, 0.667]]])
    """
    c, height, width = kernel_shape
    rows = X.reshape(-1, c, height, width).transpose(0, 3, 1, 2).reshape(-1, c * height)
    weights = None if weights is None else np.repeat(weights, width)
    if gram is not None:
        size = c * height
        gram = np.einsum("ajbj->ab", np.asarray(gram).reshape(size, width, size, width)) / width
    found = low_rank_basis(rows, rank, weights=weights, gram=gram)
    left_out = max(0.0, found.total - float(np.square(found.singular_values).sum()))
    return Separable(found.basis.reshape(-1, c, height), left_out)


def depthwise_kernels(X, n_channels, m, *, weights=None, gram=None):
    """Best m kernels D for each input channel.

    Parameters
    ----------
    X : ndarray of shape (n, n_channels * k)
    n_channels : int
    m : int
        At most k.
    weights : ndarray of shape (n,), optional
        Row weights.
    gram : ndarray of shape (d, d), optional
        Second moment of the inputs, taken as without correlation between channels.

    Returns
    -------
    separable : Separable

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.separable import depthwise_kernels
    >>> depthwise_kernels(np.array([[3.0, 4.0, 0.0, 2.0]]), 2, 1)
    Separable(kernels=array([[[0.6, 0.8]],
    <BLANKLINE>
           [[0. , 1. ]]]), error=0.0)
    """
    n, d = X.shape
    size = d // n_channels
    squares = np.zeros((n_channels, size, size))
    step = max(1, _BLOCK_ELEMENTS // d)
    for start in range(0, n, step):
        block = X[start : start + step].astype(np.float64).reshape(-1, n_channels, size).transpose(1, 2, 0)
        w = 1.0 if weights is None else weights[start : start + step]
        squares += (w * block) @ block.transpose(0, 2, 1)
    roots = inverses = np.broadcast_to(np.eye(size), squares.shape)
    if gram is not None:
        own = np.einsum("cicj->cij", np.asarray(gram).reshape(n_channels, size, n_channels, size))
        roots, inverses = (np.stack(parts) for parts in zip(*(whiten(G) for G in own)))
    values, vectors = np.linalg.eigh(roots.transpose(0, 2, 1) @ squares @ roots)
    kernels = vectors[:, :, ::-1][:, :, :m].transpose(0, 2, 1) @ inverses
    # the sign of a singular vector is free: the largest entry is positive
    largest = np.take_along_axis(kernels, np.abs(kernels).argmax(axis=2)[:, :, None], axis=2)
    return Separable(np.where(largest < 0, -kernels, kernels), float(values[:, : size - m].clip(0).sum()))


def expand_vertical(kernels, width):
    """Basis (rank * kw, c * kh * kw) of the codes (r, j).

    >>> import numpy as np
    >>> expand_vertical(np.array([[[5.0]]]), 2)
    array([[5., 0.],
           [0., 5.]])
    """
    rank, c, height = kernels.shape
    blocks = kernels[:, None, :, :, None] * np.eye(width)[None, :, None, None, :]
    return blocks.reshape(rank * width, c * height * width)


def collapse_vertical(basis, shape, width):
    """Adjoint of `expand_vertical` for kernels of a shape (rank, c, kh)."""
    rank, c, height = shape
    return np.einsum("rjcij->rci", basis.reshape(rank, width, c, height, width))


def expand_depthwise(kernels):
    """Basis (c * m, c * k) of the codes (c, m).

    >>> import numpy as np
    >>> expand_depthwise(np.array([[[1.0, 2.0]], [[3.0, 4.0]]]))
    array([[1., 2., 0., 0.],
           [0., 0., 3., 4.]])
    """
    c, m, size = kernels.shape
    out, channels = np.zeros((c, m, c, size)), np.arange(c)
    out[channels, :, channels] = kernels
    return out.reshape(c * m, c * size)


def collapse_depthwise(basis, shape):
    """Adjoint of `expand_depthwise` for kernels of a shape (c, m, k)."""
    c, m, size = shape
    return np.einsum("cmck->cmk", basis.reshape(c, m, c, size))
