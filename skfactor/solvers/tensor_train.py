# SPDX-License-Identifier: BSD-3-Clause
"""Tensor train: a chain of three-way cores, by successive singular value decompositions."""

import math
from typing import NamedTuple

import numpy as np

from skfactor.solvers._tensors import axis_letters, left_singular, squared_sum
from skfactor.solvers.multilinear import Network

__all__ = ["TensorTrainResult", "tensor_train", "train_network", "train_ranks"]


class TensorTrainResult(NamedTuple):
    """Cores of a tensor train.

    Attributes
    ----------
    cores : tuple of ndarray of shape (r_{k-1}, d_k, r_k)
        The first and the last rank are 1; all cores but the last have orthonormal columns as matrices
        (r_{k-1} d_k, r_k).
    bound : float
        Sum of the squared singular values left out, equal to ‖T − T̂‖² up to rounding.
    """

    cores: tuple
    bound: float

    @property
    def ranks(self):
        """r_1 to r_{m-1}."""
        return tuple(core.shape[2] for core in self.cores[:-1])


def train_ranks(shape, ranks):
    """Ranks between the cores, none above what its neighbours and the unfolding allow.

    >>> train_ranks((10, 4, 3), (20, 20))
    (10, 3)
    """
    found, before = [], 1
    for k, rank in enumerate(ranks, 1):
        before = max(1, min(int(rank), before * shape[k - 1], math.prod(shape[k:])))
        found.append(before)
    for k in range(len(found) - 2, -1, -1):
        found[k] = min(found[k], found[k + 1] * shape[k + 1])
    return tuple(found)


def tensor_train(T, ranks=None, *, tol=None):
    r"""TT-SVD: :math:`T_{i_1 \dots i_m} \approx G_1(i_1) G_2(i_2) \cdots G_m(i_m)` with matrices G_k(i) (r_{k-1}, r_k).

    The error is at most :math:`\sqrt{m - 1}` times that of the best train of the same ranks. The errors of the steps
    are orthogonal to each other, so what a step leaves of its share of the allowed error is given to the next ones.

    Parameters
    ----------
    T : ndarray of shape (d_1, ..., d_m), float64
    ranks : sequence of m - 1 int, optional
        Largest ranks; as large as `tol` asks for when not given.
    tol : float, optional
        Largest relative error ‖T − T̂‖ / ‖T‖ that leaving out singular values may give, where `ranks` do not ask for
        less.

    Returns
    -------
    result : TensorTrainResult

    References
    ----------
    Oseledets: Tensor-train decomposition, SIAM J. Sci. Comput. 33 (2011), doi:10.1137/090752286.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.tensor_train import tensor_train
    >>> i, j, k = np.ogrid[:4, :5, :6]
    >>> tensor_train(i + j + k + 0.0, tol=1e-10).ranks
    (2, 2)
    """
    allowed = (tol or 0.0) ** 2 * squared_sum(T)
    most = train_ranks(T.shape, [math.prod(T.shape)] * (T.ndim - 1) if ranks is None else ranks)
    cores, bound, left = [], 0.0, T.reshape(1, -1)
    for k, most_k in enumerate(most):
        A = left.reshape(left.shape[0] * T.shape[k], -1)
        U, s = left_singular(A)
        rank = min(most_k, _rank_within(s, max(allowed - bound, 0.0) / (len(most) - k)))
        bound += squared_sum(s[rank:])
        cores.append(U[:, :rank].reshape(left.shape[0], T.shape[k], rank))
        left = U[:, :rank].T @ A
    cores.append(left.reshape(-1, T.shape[-1], 1))
    return TensorTrainResult(tuple(cores), bound)


def _rank_within(values, allowed):
    """Least rank, at least 1, whose left out squared singular values sum to at most `allowed`."""
    tails = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)  # of rank 0, 1, ..., all
    return max(1, int(np.argmax(tails <= allowed)))


def train_network(cores):
    """Basis of the codes r_1: the cores (r_{k-1}, d_k, r_k) behind the first one; the last rank is 1.

    >>> import numpy as np
    >>> train_network([np.ones((2, 5, 3)), np.ones((3, 4, 1))]).shape
    (2, 5, 4)
    """
    bonds, columns = axis_letters(len(cores) + 1)
    labels = [bonds[k] + columns[k + 1] + bonds[k + 1] for k in range(len(cores))]
    labels[0] = columns[0] + labels[0][1:]
    labels[-1] = labels[-1][:2]
    return Network((*cores[:-1], cores[-1][..., 0]), tuple(labels), columns)
