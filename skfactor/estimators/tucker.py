"""`TuckerFactorizer`: rows as tensors, a small core and a factor for the axes of choice."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from itertools import combinations
from numbers import Integral, Real

import numpy as np

from skfactor._sklearn import Interval, StrOptions
from skfactor.codec.tensor_decoders import TuckerDecoder
from skfactor.estimators._tensor_factorizer import (
    RANK,
    SHAPE,
    TensorFactorizer,
    checked_ranks,
    least_harm,
    singular_tails,
)
from skfactor.solvers._tensors import left_singular, mode_product, squared_sum, tucker_ranks, unfold
from skfactor.solvers.tucker import tucker, tucker_network, without_useless_factors

__all__ = ["TuckerFactorizer"]


class TuckerFactorizer(TensorFactorizer):
    r"""Tucker decomposition of the weights of a layer.

    The rows of `X` are tensors, so that `X` is a tensor T of shape :math:`(n, d_1, \dots, d_m)`. Minimises

    .. math:: \|T - D \times_0 C \times_k U_k\|^2

    over codes C (n, r), a core D :math:`(r, s_1, \dots, s_m)` and factors :math:`U_k` :math:`(d_k, s_k)`, by
    higher-order SVD and higher-order orthogonal iteration [1]_. Tucker-2 [2]_ has factors for rows and input channels
    only: a convolution becomes 1 x 1, h x w and 1 x 1 convolutions.

    With `input_gram` the error is that of the layer's output. The decomposition starts in coordinates that whiten each
    axis, and alternating least squares then refits codes, core and factors to the whole gram. Where rows are vectors
    this is the best approximation of the output of its rank, in closed form.

    Parameters
    ----------
    rank : int, float or tuple of int, default=None
        Ranks of the rows and of every column axis that has a factor: one for all, or one for each; larger ones are
        lowered to what an axis has. A float in (0, 1] is the share of the numbers of `X` that codes and decoder may
        hold together: from full ranks down, the rank is lowered that loses least for what it saves. None: as
        many as `energy` asks for, or all.
    energy : float, default=None
        Take ranks that keep at least this share of the squared norm of `X`, instead of `rank`.
    modes : {"tucker2", "full"}, default="tucker2"
        Factors for the first column axis, or for all.
    kernel_shape : tuple of int, default=None
        Shape (c_in, kh, kw) of the kernel that a row is.
    tensor_shape : tuple of int, default=None
        Shape of a row as a tensor; `kernel_shape` when None, and without that two factors of the number of columns as
        near to each other as there are. Axes of length 1 are left out.
    tol : float, default=1e-4
        Orthogonal iteration stops when a sweep lowers the error by less than this part of it.
    max_iter : int, default=50
        Most sweeps.

    Attributes
    ----------
    ranks_ : tuple of int
        Of the rows and of the column axes. A factor that would save no numbers is multiplied into the core.
    tensor_shape_ : tuple of int
    error_bound_ : float or None
        Sum of the squared singular values that the higher-order SVD leaves out, which the squared error does not
        exceed but for rounding; None with `input_gram`.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
        Sweeps, the higher-order SVD counted.
    decoder_ : TuckerDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] L. De Lathauwer, B. De Moor, J. Vandewalle, "On the best rank-1 and rank-(R1, R2, ..., RN) approximation of
       higher-order tensors", SIAM J. Matrix Anal. Appl. 21 (2000), :doi:`10.1137/S0895479898346995`
    .. [2] Y.-D. Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile
       applications", ICLR 2016, :arxiv:`1511.06530`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import TuckerFactorizer
    >>> X = np.random.default_rng(0).standard_normal((16, 8 * 3 * 3))
    >>> factorizer = TuckerFactorizer(rank=(6, 4), kernel_shape=(8, 3, 3)).fit(X)
    >>> factorizer.transform(X).shape, factorizer.decoder_.core.shape, factorizer.decoder_.factors[0].shape
    ((16, 6), (6, 4, 3, 3), (8, 4))
    """

    _parameter_constraints: dict = {
        "rank": RANK,
        "energy": [Interval(Real, 0, 1, closed="right"), None],
        "modes": [StrOptions({"tucker2", "full"})],
        "kernel_shape": SHAPE,
        "tensor_shape": SHAPE,
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
    }

    def __init__(self, rank=None, *, energy=None, modes="tucker2", kernel_shape=None, tensor_shape=None, tol=1e-4,
                 max_iter=50):
        self.rank = rank
        self.energy = energy
        self.modes = modes
        self.kernel_shape = kernel_shape
        self.tensor_shape = tensor_shape
        self.tol = tol
        self.max_iter = max_iter

    _refits = False

    def _decomposer(self, T, n):
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"rank and energy exclude each other, got rank={self.rank} and energy={self.energy}")
        axes = framed_axes(self.modes, T.ndim)
        ranks = None
        if self.rank is None:
            full = [T.shape[axis] for axis in axes]
            ranks = tucker_ranks(T.shape, full if self.energy is None else self._ranks_of_energy(T, axes), axes)
        elif not isinstance(self.rank, float):
            ranks = tucker_ranks(T.shape, tucker_rank(self.rank, axes), axes)

        def decompose(T):
            chosen = ranks or ranks_within_share(T, axes, n, self.rank)
            found = tucker(T, chosen, axes, tol=self.tol, max_iter=self.max_iter)
            network = tucker_network(found.core, found.frames[1:], axes[1:])
            return [without_useless_factors(network)], found.bound, 1 + found.n_iter

        return decompose

    def _ranks_of_energy(self, T, axes):
        found = []
        for axis in axes:
            tails = singular_tails(left_singular(unfold(T, axis))[1])
            allowed = ((1 - self.energy) / len(axes) + 1e-14) * tails[0]
            found.append(max(1, int(np.argmax(tails <= allowed))))
        return found

    def _decoder(self, networks, dtype):
        core, *factors = networks[0].operands
        modes = tuple(networks[0].output.index(labels[0]) - 1 for labels in networks[0].labels[1:])
        return TuckerDecoder(core, tuple(factors), modes, dtype)

    def _ranks(self, decoder):
        return decoder.core.shape



def framed_axes(modes, ndim):
    """Axes with factors: the rows and the first column axis, or all. A matrix has its codes alone."""
    return (0,) if ndim == 2 else (0, 1) if modes == "tucker2" else tuple(range(ndim))


def tucker_rank(rank, axes):
    """Ranks of the framed axes of an integer or a tuple; of a matrix, whose rank is one number, the smallest."""
    if len(axes) == 1:
        return (min(checked_ranks(rank, 1 if isinstance(rank, Integral) else len(rank), "each axis")),)
    return checked_ranks(rank, len(axes), f"rows and column axes {', '.join(str(a - 1) for a in axes[1:])}")


def ranks_within_share(T, axes, n, share, n_blocks=1):
    """Ranks of `axes` whose Tucker blocks hold at most this share of the numbers of n rows; see `least_harm`.

    A factor that is not there is worth more than one of nearly full rank. So ranks are sought for several sets of
    column axes that keep their full extent without a factor, and those are taken whose higher-order SVD loses least.
    """
    full = tucker_ranks(T.shape, [T.shape[axis] for axis in axes], axes)
    spectra = [left_singular(unfold(T, axis)) for axis in axes]
    # a block of rank r takes part in n_blocks r of the directions
    tails = [whole[np.minimum(np.arange(rank + 1) * n_blocks, len(whole) - 1)]
             for whole, rank in zip((singular_tails(s) for _, s in spectra), full)]
    budget = share * n * math.prod(T.shape[1:])
    places = range(1, len(axes))
    sizes = range(len(axes)) if len(axes) <= 4 else (0, len(axes) - 1)
    found = []
    for whole in (chosen for size in sizes for chosen in combinations(places, size)):

        def numbers(ranks, whole=whole):
            extents = list(T.shape)
            for k, axis in enumerate(axes):
                extents[axis] = T.shape[axis] if k in whole else ranks[k]
            factors = sum(T.shape[axes[k]] * ranks[k] for k in places if k not in whole)
            return n_blocks * (n * ranks[0] + math.prod(extents) + factors)

        ranks = least_harm([tail[-2:] if k in whole else tail for k, tail in enumerate(tails)], numbers, budget)
        core = T
        for k, (axis, (frame, _)) in enumerate(zip(axes, spectra)):
            core = core if k in whole else mode_product(core, frame[:, : n_blocks * ranks[k]].T, axis)
        ranks = [T.shape[axes[k]] if k in whole else rank for k, rank in enumerate(ranks)]
        found.append((max(numbers(ranks) - budget, 0.0), -squared_sum(core), ranks))
    return tucker_ranks(T.shape, min(found)[2], axes)
