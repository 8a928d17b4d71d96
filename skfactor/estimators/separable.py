"""`SeparableFactorizer`: convolutions as two cheaper ones, from singular value decompositions."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from functools import partial
from numbers import Integral

import numpy as np

from skfactor._sklearn import Interval, RealNotInt, StrOptions
from skfactor._validation import check_kernel_shape
from skfactor.codec.separable import DepthwiseSeparableDecoder, SpatialSeparableDecoder
from skfactor.estimators._linear import Factors, LinearFactorizer, factor_errors, rank_within
from skfactor.solvers.separable import (
    collapse_depthwise,
    collapse_vertical,
    depthwise_kernels,
    expand_depthwise,
    expand_vertical,
    vertical_kernels,
)
from skfactor.solvers.whitening import code_operators, refit_basis

__all__ = ["SeparableFactorizer"]


class SeparableFactorizer(LinearFactorizer):
    r"""Separable convolutions: a kernel becomes two, each of which sees only some of the axes.

    Minimises the squared error of the filters :math:`W_{ncij}` (rows of `X`) over

    * ``kind="spatial"``: :math:`\sum_r A_{rci} P_{nrj}`, a convolution with kernel (kh, 1) to r channels and one with
      kernel (1, kw) [1]_;
    * ``kind="depthwise"``: :math:`\sum_m D_{cmij} P_{ncm}`, m kernels for every input channel by itself and one
      convolution of 1 x 1 [2]_.

    Both are solved in closed form by singular value decompositions: nothing of the same form has a smaller error. The
    codes are P, and the decoder holds A or D. With `input_gram` the error of the layer's output is lowered, from a
    closed-form start by turns between P and A or D; it is never larger than without.

    Parameters
    ----------
    rank : int or float, default=0.5
        r, or m. A float in (0, 1] is the share of the numbers of `X` that both parts may hold together. Ranks above
        that of `X` give that of `X`.
    kernel_shape : tuple of int, default=None
        What one row of `X` is: (c_in, kh, kw). (c_in, k) of a 1-D convolution has kw = 1; of more than two spatial axes
        "spatial" separates the first from the others. None: the bridge fills in the layer's; for a plain matrix
        (n_columns,), for which "spatial" is a low-rank factorisation and "depthwise" changes nothing.
    kind : {"spatial", "depthwise"}, default="spatial"

    Attributes
    ----------
    kernels_ : ndarray of shape (rank_, c_in, kh) or (c_in, rank_, \*spatial)
        A or D.
    rank_ : int
    error_bound_ : float or None
        Sum of the squares of the singular values left out, which the error equals up to rounding. None with
        `input_gram`.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    decoder_ : SpatialSeparableDecoder or DepthwiseSeparableDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] M. Jaderberg, A. Vedaldi, A. Zisserman, "Speeding up convolutional neural networks with low rank expansions",
       BMVC 2014, :arxiv:`1405.3866`
    .. [2] J. Guo, Y. Li, W. Lin, Y. Chen, J. Li, "Network decoupling: from regular to depthwise separable
       convolutions", BMVC 2018, :arxiv:`1808.05517`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import SeparableFactorizer
    >>> X = np.outer([2.0, 3.0, 6.0], [1.0, 2.0, 1.0]).reshape(1, 9)
    >>> factorizer = SeparableFactorizer(rank=1, kernel_shape=(1, 3, 3))
    >>> factorizer.fit_transform(X).round(3)
    array([[ 7., 14.,  7.]])
    >>> factorizer.kernels_.round(3)
    array([[[0.286, 0.429, 0.857]]])
    """

    _parameter_constraints: dict = {
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(RealNotInt, 0, 1, closed="right")],
        "kernel_shape": ["array-like", None],
        "kind": [StrOptions({"spatial", "depthwise"})],
    }

    def __init__(self, rank=0.5, *, kernel_shape=None, kind="spatial"):
        self.rank = rank
        self.kernel_shape = kernel_shape
        self.kind = kind

    def _factorize(self, X, weights, gram):
        c, *spatial = check_kernel_shape(self.kernel_shape, X.shape[1])
        n = len(X) if weights is None else weights.sum()
        build = _Spatial if self.kind == "spatial" else _Depthwise
        form = build(c, tuple(spatial) or (1,), X.dtype)
        rank = rank_within(self.rank, n * X.shape[1], form.numbers_per_rank(n), form.most(len(X)))

        plain, bound = form.solve(X, rank, weights=weights)
        decoder = form.decoder(plain)
        if gram is not None:
            decoder, bound = _for_output(X, form, plain, rank, weights, gram), None
        kernels, = decoder.parts()[1].values()
        return Factors(decoder, bound, {"kernels_": kernels, "rank_": form.rank_of(kernels)})


class _Spatial:
    """Columns of positions shared by all filters."""

    def __init__(self, c, spatial, dtype):
        self.shape = (c, spatial[0], math.prod(spatial[1:]))
        self.dtype = dtype

    def numbers_per_rank(self, n_rows):
        c, height, width = self.shape
        return n_rows * width + c * height

    def most(self, n_rows):
        c, height, width = self.shape
        return min(n_rows * width, c * height)

    def solve(self, X, rank, **given):
        return vertical_kernels(X, self.shape, rank, **given)

    def refit_functions(self, kernels):
        width = self.shape[2]
        return partial(expand_vertical, width=width), partial(collapse_vertical, shape=kernels.shape, width=width)

    def decoder(self, kernels):
        return SpatialSeparableDecoder(kernels.astype(self.dtype), self.shape[2], self.dtype.name)

    @staticmethod
    def rank_of(kernels):
        return len(kernels)


class _Depthwise:
    """Kernels of every input channel shared by all filters."""

    def __init__(self, c, spatial, dtype):
        self.c, self.spatial, self.dtype = c, spatial, dtype

    def numbers_per_rank(self, n_rows):
        return self.c * (n_rows + math.prod(self.spatial))

    def most(self, n_rows):
        return min(n_rows, math.prod(self.spatial))

    def solve(self, X, rank, **given):
        return depthwise_kernels(X, self.c, rank, **given)

    @staticmethod
    def refit_functions(kernels):
        return expand_depthwise, partial(collapse_depthwise, shape=kernels.shape)

    def decoder(self, kernels):
        return DepthwiseSeparableDecoder(kernels.reshape(*kernels.shape[:2], *self.spatial).astype(self.dtype),
                                         self.dtype.name)

    @staticmethod
    def rank_of(kernels):
        return kernels.shape[1]


def _for_output(X, form, plain, rank, weights, gram):
    """Decoder of least output error: from the better of two closed-form starts, refitted."""
    def error(kernels):
        decoder = form.decoder(kernels)
        return factor_errors(X, decoder, code_operators(decoder.basis(), gram), weights=weights, gram=gram)[1]

    starts = [plain, form.solve(X, rank, weights=weights, gram=gram.mean(axis=0)).kernels]
    errors = [error(kernels) for kernels in starts]
    best = int(np.argmin(errors))
    expand, collapse = form.refit_functions(starts[best])
    refitted = refit_basis(X, starts[best], gram, expand=expand, collapse=collapse, weights=weights)
    return form.decoder(refitted if error(refitted) <= errors[best] else starts[best])
