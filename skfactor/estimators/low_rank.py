"""`LowRankFactorizer`: the best approximation of a matrix by a product of two thin ones."""
# SPDX-License-Identifier: BSD-3-Clause

from numbers import Integral, Real

import numpy as np

from skfactor._sklearn import Interval, RealNotInt
from skfactor.codec.linear import ComponentsDecoder
from skfactor.estimators._linear import Factors, LinearFactorizer, factor_errors, rank_within
from skfactor.solvers.low_rank import low_rank_basis
from skfactor.solvers.whitening import code_operators, refit_basis

__all__ = ["LowRankFactorizer"]


class LowRankFactorizer(LinearFactorizer):
    r"""Low-rank factorisation by a truncated singular value decomposition.

    Minimises

    .. math:: \operatorname{tr}\,(X - CB)\,G\,(X - CB)^T, \qquad C \in R^{n \times r},\ B \in R^{r \times d},

    in closed form [1]_: no matrix of rank r has a smaller error. G is the identity, or the second moment of the layer's
    inputs (`input_gram`), for which the layer's output is approximated best. The codes are C, n x r numbers, and
    the decoder holds B.

    Parameters
    ----------
    rank : int or float, default=None
        Rank r. A float in (0, 1] is the share of the numbers of `X` that B and C may hold together: 0.25 is the largest
        r with r (n + d) <= n d / 4, and at least 1. Ranks above that of `X` give that of `X`, so that one grid serves
        layers of all sizes. None: as many as `energy` asks for, or all.
    energy : float, default=None
        Take the least rank that keeps this share of the squared norm of `X` (of the layer's output), instead of `rank`.

    Attributes
    ----------
    components_ : ndarray of shape (rank_, n_columns)
        B. Its rows are orthonormal, :math:`BGB^T = I`, for the damped gram.
    singular_values_ : ndarray of shape (rank_,)
        Falling.
    rank_ : int
    energy_ : float
        Share of the squared norm that is kept.
    error_bound_ : float
        Sum of the squares of the singular values left out. The error equals it up to rounding.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    decoder_ : ComponentsDecoder
    n_features_in_ : int

    Notes
    -----
    The gram is damped by 0.003 of its mean diagonal, since calibration data are few: with it, `error_bound_` and
    `energy_` are those of the damped gram, and `output_error_` of the gram itself is at most `error_bound_`.

    Rows of a grouped convolution meet inputs with different grams. There is no closed form then, and the factorisation
    alternates between codes and basis.

    References
    ----------
    .. [1] C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936),
       :doi:`10.1007/BF02288367`
    .. [2] E. Denton, W. Zaremba, J. Bruna, Y. LeCun, R. Fergus, "Exploiting linear structure within convolutional
       networks for efficient evaluation", NIPS 2014, :arxiv:`1404.0736`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import LowRankFactorizer
    >>> X = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> factorizer = LowRankFactorizer(rank=1).fit(X)
    >>> factorizer.inverse_transform(factorizer.transform(X))
    array([[0., 0.],
           [0., 4.],
           [0., 0.]])
    >>> factorizer.error_bound_
    9.0
    """

    _parameter_constraints: dict = {
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(RealNotInt, 0, 1, closed="right"), None],
        "energy": [Interval(Real, 0, 1, closed="right"), None],
    }

    def __init__(self, rank=None, *, energy=None):
        self.rank = rank
        self.energy = energy

    def _factorize(self, X, weights, gram):
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"rank and energy exclude each other, got rank={self.rank} and energy={self.energy}")
        d = X.shape[1]
        n = len(X) if weights is None else weights.sum()
        rank = rank_within(self.rank, n * d, n + d, min(X.shape))

        metric = None if gram is None else gram.mean(axis=0)
        found = low_rank_basis(X, rank, energy=self.energy, weights=weights, gram=metric)
        kept = float(np.square(found.singular_values).sum())
        bound = max(0.0, found.total - kept)
        decoder = ComponentsDecoder(found.basis.astype(X.dtype), X.dtype.name)
        if gram is not None and len(gram) > 1:
            decoder, bound = _shared_by_groups(X, decoder, weights, gram), None
        return Factors(decoder, bound, {
            "components_": decoder.components, "singular_values_": found.singular_values, "rank_": len(found.basis),
            "energy_": kept / found.total if found.total > 0 else 1.0})


def _shared_by_groups(X, decoder, weights, gram):
    """Basis for groups of rows with grams of their own; never worse in output error than the one without any gram."""
    plain = low_rank_basis(X, len(decoder.components), weights=weights).basis
    start = decoder.basis()
    bases = [plain, start, *(refit_basis(X, B, gram, weights=weights) for B in (plain, start))]
    decoders = [ComponentsDecoder(B.astype(X.dtype), X.dtype.name) for B in bases]
    errors = [factor_errors(X, one, code_operators(one.basis(), gram), weights=weights, gram=gram)[1]
              for one in decoders]
    return decoders[int(np.argmin(errors))]
