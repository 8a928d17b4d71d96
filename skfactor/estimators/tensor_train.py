"""`TensorTrainFactorizer`: rows as tensors, decoded by a chain of three-way cores."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from numbers import Integral, Real

from skfactor._sklearn import Interval
from skfactor.codec.tensor_decoders import TensorTrainDecoder
from skfactor.estimators._tensor_factorizer import (
    RANK,
    SHAPE,
    TensorFactorizer,
    checked_ranks,
    least_harm,
    singular_tails,
)
from skfactor.solvers._tensors import left_singular
from skfactor.solvers.tensor_train import tensor_train, train_network, train_ranks

__all__ = ["TensorTrainFactorizer"]


class TensorTrainFactorizer(TensorFactorizer):
    r"""Tensor train of the weights of a layer.

    The rows of `X` are tensors, so that `X` is a tensor T of shape :math:`(n, d_1, \dots, d_m)`, approximated by

    .. math:: T_{i, j_1 \dots j_m} \approx c_i\, G_1(j_1)\, G_2(j_2) \cdots G_m(j_m)

    with codes :math:`c_i` of length :math:`r_1` and matrices :math:`G_k(j)` of shape :math:`(r_k, r_{k+1})`. TT-SVD
    [1]_ keeps to a prescribed error; alternating least squares over all cores then lowers the error further.

    With `input_gram` the error is that of the layer's output. The train is made in coordinates that whiten each axis,
    and the sweeps fit codes and cores to the whole gram. Where rows are vectors this is the best approximation of the
    output of its rank, in closed form.

    Parameters
    ----------
    rank : int, float or tuple of int, default=None
        Ranks :math:`r_1, \dots, r_m`: one for all, or one for each; larger ones are lowered to what the unfoldings
        have. A float in (0, 1] is the share of the numbers of `X` that codes and cores may hold together: from full
        ranks down, the rank is lowered that loses least for what it saves. None: as many as `tol` asks for, or all.
    tol : float, default=None
        Take the ranks that keep :math:`\|T - \hat T\| \le tol\,\|T\|`, instead of `rank`. With `input_gram` these are
        the ranks, and the promise is that of the weights before the refit.
    kernel_shape : tuple of int, default=None
        Shape (c_in, kh, kw) of the kernel that a row is.
    tensor_shape : tuple of int, default=None
        Shape of a row as a tensor; `kernel_shape` when None, and without that two factors of the number of columns as
        near to each other as there are. Axes of length 1 are left out.
    max_iter : int, default=20
        Most sweeps of alternating least squares.

    Attributes
    ----------
    ranks_ : tuple of int
    tensor_shape_ : tuple of int
    error_bound_ : float or None
        Sum of the squared singular values that TT-SVD leaves out, which the squared error does not exceed but for
        rounding; None with `input_gram`.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
        Sweeps, TT-SVD counted.
    decoder_ : TensorTrainDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] I. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011), :doi:`10.1137/090752286`
    .. [2] A. Novikov, D. Podoprikhin, A. Osokin, D. Vetrov, "Tensorizing neural networks", NIPS 2015,
       :arxiv:`1509.06569`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import TensorTrainFactorizer
    >>> X = np.random.default_rng(0).standard_normal((16, 8 * 3 * 3))
    >>> factorizer = TensorTrainFactorizer(tol=0.5, kernel_shape=(8, 3, 3)).fit(X)
    >>> bool(factorizer.relative_error_ <= 0.5**2), len(factorizer.decoder_.cores)
    (True, 3)
    """

    _parameter_constraints: dict = {
        "rank": RANK,
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "kernel_shape": SHAPE,
        "tensor_shape": SHAPE,
        "max_iter": [Interval(Integral, 0, None, closed="left")],
    }

    def __init__(self, rank=None, *, tol=None, kernel_shape=None, tensor_shape=None, max_iter=20):
        self.rank = rank
        self.tol = tol
        self.kernel_shape = kernel_shape
        self.tensor_shape = tensor_shape
        self.max_iter = max_iter

    def _decomposer(self, T, n):
        if self.rank is not None and self.tol is not None:
            raise ValueError(f"rank and tol exclude each other, got rank={self.rank} and tol={self.tol}")
        ranks = None
        if self.tol is not None:
            ranks = tensor_train(T, tol=self.tol).ranks
        elif not isinstance(self.rank, float):
            full = [math.prod(T.shape)] * (T.ndim - 1)
            ranks = full if self.rank is None else checked_ranks(self.rank, T.ndim - 1, "each column axis")

        def decompose(T):
            found = tensor_train(T, ranks or self._ranks_within_share(T, n))
            return [train_network(found.cores[1:])], found.bound, 1

        return decompose

    def _ranks_within_share(self, T, n):
        most = train_ranks(T.shape, [math.prod(T.shape)] * (T.ndim - 1))
        tails = [singular_tails(left_singular(T.reshape(math.prod(T.shape[:k]), -1))[1])[: rank + 1]
                 for k, rank in enumerate(most, 1)]

        def numbers(ranks):
            after = (*ranks[1:], 1)
            return n * ranks[0] + sum(a * d * b for a, d, b in zip(ranks, T.shape[1:], after, strict=True))

        return least_harm(tails, numbers, self.rank * n * math.prod(T.shape[1:]))

    def _decoder(self, networks, dtype):
        *cores, last = networks[0].operands
        return TensorTrainDecoder((*cores, last[..., None]), dtype)

    def _ranks(self, decoder):
        return tuple(len(core) for core in decoder.cores)
