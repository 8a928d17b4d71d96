"""`BlockTermFactorizer`: rows as tensors, a sum of small Tucker blocks."""
# SPDX-License-Identifier: BSD-3-Clause

from numbers import Integral, Real

from sklearn.utils import check_random_state

from skfactor._sklearn import Interval, StrOptions
from skfactor.codec.tensor_decoders import BlockTermDecoder
from skfactor.estimators._tensor_factorizer import RANK, SHAPE, TensorFactorizer
from skfactor.estimators.tucker import framed_axes, ranks_within_share, tucker_rank
from skfactor.solvers._tensors import tucker_ranks
from skfactor.solvers.block_term import block_terms
from skfactor.solvers.tucker import without_useless_factors

__all__ = ["BlockTermFactorizer"]


class BlockTermFactorizer(TensorFactorizer):
    r"""Block-term decomposition of the weights of a layer: a sum of Tucker blocks.

    The rows of `X` are tensors, so that `X` is a tensor T of shape :math:`(n, d_1, \dots, d_m)`. Minimises

    .. math:: \Big\|T - \sum_{b=1}^B D_b \times_0 C_b \times_k U_{b,k}\Big\|^2

    over the codes :math:`C_b` (n, L), cores :math:`D_b` and factors :math:`U_{b,k}` of B blocks, by alternating least
    squares from several starts. With factors for rows and input channels only these are De Lathauwer's terms of type
    (L, M, .) [1]_: a Tucker-2 decomposition whose core is block-diagonal, and so a 1 x 1 convolution, an h x w
    convolution in B groups and a 1 x 1 convolution, as in a ResNeXt block [2]_. At equal numbers it has more directions
    than Tucker-2 and fewer ties between them.

    With `input_gram` the error is that of the layer's output. The decomposition starts in coordinates that whiten each
    axis, and alternating least squares fits everything to the whole gram.

    Parameters
    ----------
    n_blocks : int, default=4
    rank : int, float or tuple of int, default=0.25
        Ranks L of the rows and M of every column axis that has a factor, for each block: one for all, or one for
        each; larger ones are lowered to what an axis has. A float in (0, 1] is the share of the numbers of `X` that
        codes and decoder may hold together. None: full ranks, of which one block would do.
    modes : {"tucker2", "full"}, default="tucker2"
        Factors for the first column axis, or for all.
    kernel_shape : tuple of int, default=None
        Shape (c_in, kh, kw) of the kernel that a row is.
    tensor_shape : tuple of int, default=None
        Shape of a row as a tensor; `kernel_shape` when None, and without that two factors of the number of columns as
        near to each other as there are. Axes of length 1 are left out.
    n_init : int, default=3
        Starts: the first takes one block after the other from what is left, the others are random.
    tol : float, default=1e-3
        Stop when a sweep lowers the error by less than this part of it.
    max_iter : int, default=100
        Most sweeps.
    random_state : int, RandomState or None, default=0
        Of the starts behind the first.

    Attributes
    ----------
    ranks_ : tuple of int
        Of the rows and of the column axes of a block. A factor that would save no numbers is multiplied into the core.
    tensor_shape_ : tuple of int
    error_bound_ : None
        The method has no bound.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
        Sweeps, the start counted.
    decoder_ : BlockTermDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] L. De Lathauwer, "Decompositions of a higher-order tensor in block terms, part II: definitions and
       uniqueness", SIAM J. Matrix Anal. Appl. 30 (2008), :doi:`10.1137/070690729`
    .. [2] Y. Chen, X. Jin, B. Kang, J. Feng, S. Yan, "Sharing residual units through collective tensor factorization to
       improve deep neural networks", IJCAI 2018, :arxiv:`1703.02180`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import BlockTermFactorizer
    >>> X = np.random.default_rng(0).standard_normal((16, 8 * 3 * 3))
    >>> factorizer = BlockTermFactorizer(n_blocks=3, rank=2, kernel_shape=(8, 3, 3)).fit(X)
    >>> factorizer.transform(X).shape, [core.shape for core in factorizer.decoder_.cores]
    ((16, 6), [(2, 2, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3)])
    """

    _parameter_constraints: dict = {
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "rank": RANK,
        "modes": [StrOptions({"tucker2", "full"})],
        "kernel_shape": SHAPE,
        "tensor_shape": SHAPE,
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(self, n_blocks=4, rank=0.25, *, modes="tucker2", kernel_shape=None, tensor_shape=None, n_init=3,
                 tol=1e-3, max_iter=100, random_state=0):
        self.n_blocks = n_blocks
        self.rank = rank
        self.modes = modes
        self.kernel_shape = kernel_shape
        self.tensor_shape = tensor_shape
        self.n_init = n_init
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    _refits = False
    _random = True

    def _decomposer(self, T, n):
        axes = framed_axes(self.modes, T.ndim)
        ranks = None
        if not isinstance(self.rank, float):
            given = [T.shape[axis] for axis in axes] if self.rank is None else tucker_rank(self.rank, axes)
            ranks = tucker_ranks(T.shape, given, axes)
        rng = check_random_state(self.random_state)

        def decompose(T):
            chosen = ranks or ranks_within_share(T, axes, n, self.rank, self.n_blocks)
            found = block_terms(T, self.n_blocks, chosen, axes, n_init=self.n_init, tol=self.tol,
                                max_iter=self.max_iter, rng=rng)
            return tuple(map(without_useless_factors, found.networks)), None, 1 + found.n_iter

        return decompose

    def _decoder(self, networks, dtype):
        first = networks[0]
        modes = tuple(first.output.index(labels[0]) - 1 for labels in first.labels[1:])
        return BlockTermDecoder(tuple(n.operands[0] for n in networks),
                                tuple(factor for n in networks for factor in n.operands[1:]), modes, dtype)

    def _ranks(self, decoder):
        return decoder.cores[0].shape
