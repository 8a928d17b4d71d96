# SPDX-License-Identifier: BSD-3-Clause
"""Tucker decomposition: higher-order SVD, refined by higher-order orthogonal iteration."""

from typing import NamedTuple

import numpy as np

from skfactor.solvers._tensors import axis_letters, left_singular, mode_product, squared_sum, tucker_ranks, unfold
from skfactor.solvers.multilinear import Network

__all__ = ["TuckerResult", "tucker", "tucker_network", "without_useless_factors"]


_SUBSPACE_STEPS = 4


class TuckerResult(NamedTuple):
    """Core and orthonormal frames of a tensor.

    Attributes
    ----------
    core : ndarray
        The tensor with every axis of `axes` expressed in its frame.
    frames : tuple of ndarray of shape (d_k, r_k)
        For each of `axes`, with orthonormal columns.
    axes : tuple of int
    error : float
        ‖T − T̂‖², measured.
    errors : ndarray of shape (n_iter + 1,)
        ‖T‖² − ‖core‖² of the higher-order SVD and after every sweep; never rises.
    bound : float
        Sum of the squared singular values that the higher-order SVD leaves out: ``error <= bound``, and the error of
        the best decomposition of these ranks is at least ``bound / len(axes)``.
    n_iter : int
    """

    core: np.ndarray
    frames: tuple
    axes: tuple
    error: float
    errors: np.ndarray
    bound: float
    n_iter: int


def tucker(T, ranks, axes=None, *, tol=1e-4, max_iter=50, callback=None):
    r"""Minimise :math:`\|T - C \times_k U_k\|^2` over a core and frames with orthonormal columns.

    Higher-order SVD, then higher-order orthogonal iteration: each frame in turn moves towards the leading left singular
    vectors of the tensor that is projected on all other frames, the best it can be for them. A few steps of subspace
    iteration are enough, each of which lowers the error.

    Parameters
    ----------
    T : ndarray, float64
    ranks : sequence of int
        One for each of `axes`; those that no core of such ranks can use are lowered.
    axes : sequence of int, optional
        Axes that get a frame; all when not given. Axes 0 and 1 of a convolution's weight give Tucker-2.
    tol : float, default=1e-4
        Stop when a sweep lowers the error by less than this part of it.
    max_iter : int, default=50
        Most sweeps; 0 is the higher-order SVD.
    callback : callable, optional
        Called after every sweep; True stops.

    Returns
    -------
    result : TuckerResult

    References
    ----------
    De Lathauwer, De Moor, Vandewalle: A multilinear singular value decomposition, SIAM J. Matrix Anal. Appl. 21
    (2000), doi:10.1137/S0895479896305696; On the best rank-1 and rank-(R1, R2, ..., RN) approximation of higher-order
    tensors, ibid., doi:10.1137/S0895479898346995.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.tucker import tucker
    >>> T = np.einsum("i,j,k->ijk", [1.0, 2], [1.0, 0, 1], [3.0, 4])
    >>> result = tucker(T, (1, 1, 1))
    >>> bool(result.error < 1e-20), [U.shape for U in result.frames]
    (True, [(2, 1), (3, 1), (2, 1)])
    """
    axes = tuple(range(T.ndim)) if axes is None else tuple(axes)
    ranks = tucker_ranks(T.shape, ranks, axes)
    total, bound, frames = squared_sum(T), 0.0, {}
    for axis, rank in zip(axes, ranks):
        if rank < T.shape[axis]:
            U, s = left_singular(unfold(T, axis))
            frames[axis], bound = U[:, :rank], bound + squared_sum(s[rank:])
    core = _projected(T, frames)
    errors, n_iter = [max(total - squared_sum(core), 0.0)], 0
    # one frame: its singular vectors are the optimum
    while len(frames) > 1 and n_iter < max_iter:
        kept = 0.0
        for axis, frame in list(frames.items()):
            frames[axis], kept = _turned(frame, unfold(_projected(T, frames, skip=axis), axis))
        n_iter += 1
        errors.append(min(max(total - kept, 0.0), errors[-1]))
        if (callback and callback()) or errors[-2] - errors[-1] <= tol * errors[-2]:
            break
    core = _projected(T, frames)
    T_hat = core
    for axis, frame in frames.items():
        T_hat = mode_product(T_hat, frame, axis)
    all_frames = tuple(frames.get(axis, np.eye(T.shape[axis])) for axis in axes)
    return TuckerResult(core, all_frames, axes, squared_sum(T - T_hat), np.array(errors), bound, n_iter)


def _turned(frame, A):
    """Frame after subspace iteration towards the leading left singular vectors of A, and the squared norm it keeps."""
    S = A @ A.T
    for _ in range(_SUBSPACE_STEPS):
        frame = np.linalg.qr(S @ frame)[0]
    return frame, float(np.einsum("ij,ij->", frame, S @ frame))


def _projected(T, frames, skip=None):
    """The tensor in the coordinates of the frames; the longest axes first, which leaves least for the others."""
    for axis in sorted((a for a in frames if a != skip), key=lambda a: frames[a].shape[1] / frames[a].shape[0]):
        T = mode_product(T, frames[axis].T, axis)
    return T


def tucker_network(core, factors, modes):
    """Basis of the codes along axis 0: `core` (r, s_1, ..., s_m) times `factors` (d_k, s_k) along the axes `modes`.

    >>> import numpy as np
    >>> tucker_network(np.ones((2, 3, 4)), [np.ones((5, 3))], [1]).shape
    (2, 5, 4)
    """
    bonds, columns = axis_letters(core.ndim)
    inner = "".join(bonds[k] if k in modes else columns[k] for k in range(core.ndim))
    inner = columns[0] + inner[1:]
    return Network((core, *factors), (inner, *(columns[k] + bonds[k] for k in modes)), columns)


def without_useless_factors(network):
    """A `tucker_network` whose factors that save no numbers are multiplied into the core.

    >>> import numpy as np
    >>> network = tucker_network(np.ones((2, 3, 4)), [np.ones((4, 3)), np.ones((50, 4))], [1, 2])
    >>> [a.shape for a in without_useless_factors(network).operands]
    [(2, 4, 4), (50, 4)]
    """
    (core, *factors), (letters, *labels) = network.operands, network.labels
    kept = []
    for factor, label in zip(factors, labels, strict=True):
        d, s = factor.shape
        if core.size // s * d > core.size + factor.size:
            kept.append((factor, label))
            continue
        core = mode_product(core, factor, letters.index(label[1]))
        letters = letters.replace(label[1], label[0])
    return Network((core, *(factor for factor, _ in kept)), (letters, *(label for _, label in kept)), network.output)
