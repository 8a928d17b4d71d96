"""`SoftWeightSharer`: soft weight-sharing, a Gaussian mixture with a component pinned to zero."""
# SPDX-License-Identifier: BSD-3-Clause

from numbers import Integral, Real

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_importance, check_matrix, check_row_weights
from skfactor.codec.coders import CODERS
from skfactor.codec.decoders import CodebookDecoder
from skfactor.estimators._codebooks import Weights, squared_error
from skfactor.estimators.base import BaseCompressor, CentroidCodes
from skfactor.solvers._assign1d import label_dtype
from skfactor.solvers.gaussian_mixture1d import (
    PrecisionPrior,
    gaussian_mixture_1d,
    hard_borders,
    hard_labels,
    merge_components,
    spread_start,
)

__all__ = ["SoftWeightSharer", "mixture_start", "precision_prior"]


def precision_prior(sharer, unit):
    """`PrecisionPrior` of a `SoftWeightSharer` for values of root mean square `unit`."""
    shape = np.full(sharer.n_components, float(sharer.prior_shape))
    std = np.full(sharer.n_components, float(sharer.prior_std) * unit)
    shape[0], std[0] = sharer.zero_prior_shape, sharer.zero_prior_std * unit
    return PrecisionPrior(shape, shape * std**2)


def mixture_start(sharer, x, unit):
    """Evenly spread start (weights, means, precisions) of a `SoftWeightSharer` for the values `x`."""
    return spread_start(x, sharer.n_components, zero_weight=sharer.zero_weight, zero_std=sharer.zero_prior_std * unit)


class SoftWeightSharer(CentroidCodes, BaseCompressor):
    r"""Soft weight-sharing [1]_ [2]_: a mixture of Gaussians is fitted, each weight takes the value of its component.

    Maximises the penalised likelihood of the weights

    .. math:: \sum_{ij} w_{ij} \log \sum_k \pi_k N(x_{ij} | \mu_k, 1/t_k) + \sum_k \log \Gamma(t_k | a_k, b_k)

    by EM, with one component pinned at zero, :math:`\mu_0 = 0` and :math:`\pi_0` = `zero_weight`, which is what prunes.
    The Gamma priors of the precisions :math:`t_k` (inverse Gamma ones of the variances) keep components from collapsing
    onto single weights. Then near components are merged, and every weight gets the mean of the weights of the
    component with the largest responsibility; those of the zero component, and all zeros, become exactly 0.

    On a matrix this is a fit of weights that are what they are. The method is meant for training, where the mixture
    and the weights move together: `skfactor.SoftSharingTraining` uses this estimator as the rule of a layer.

    Parameters
    ----------
    n_components : int, default=17
        The one at zero included.
    zero_weight : float or None, default=0.999
        Mixing weight :math:`\pi_0` of the component at zero; None learns it as the others.
    prior_std : float, default=0.1
        Standard deviation that the prior expects of a component, in units of the root mean square of the weights:
        :math:`b = a \cdot \mathrm{std}^2`.
    prior_shape : float, default=250.0
        Shape a of the prior, at least 1: it counts as much as 2 (a - 1) weights of the component do.
    zero_prior_std : float, default=0.1
    zero_prior_shape : float, default=5000.0
        The same for the component at zero.
    merge_divergence : float, default=0.1
        Components of a smaller (symmetric) Kullback-Leibler divergence are merged; 0 merges none.
    max_iter : int, default=300
        Most steps of EM; with 0 the start is used as it is.
    tol : float, default=1e-6
        EM stops when the mean log-likelihood of a weight rises by less.
    weights_init, means_init, precisions_init : array-like of shape (n_init,), default=None
        A mixture to start from, component 0 being the one at zero, in the place of means that are evenly spread over
        the range of the weights; all three or none.
    coder : str, default="auto"
        Entropy coder of the codes in a file.

    Attributes
    ----------
    weights_, means_, precisions_ : ndarray of shape (n_merged,)
        The mixture after merging; component 0 is the one at zero.
    log_likelihood_trace_ : ndarray of shape (n_iter_ + 1,)
        Certificate: the objective before every step of EM and after the last; it never falls. For more than 2^15
        weights it is the lower bound that treats weights of one fine bin alike.
    cluster_centers_ : ndarray of shape (n_clusters, 1)
        Shared values, ascending; one of them is 0.
    labels_ : ndarray of shape (n_rows, n_columns)
    inertia_ : float
        Weighted squared error of the training data.
    sparsity_ : float
        Share of zeros in the reconstruction of the training data.
    decoder_ : CodebookDecoder
    kappa_ : float
        The course's compression factor :math:`1 - K/N`.
    rate_ : int
        Bytes of codes and codebook when stored, everything counted.
    n_iter_ : int
    n_features_in_ : int

    References
    ----------
    .. [1] S. Nowlan, G. Hinton, "Simplifying neural networks by soft weight-sharing", Neural Computation 4 (1992),
       :doi:`10.1162/neco.1992.4.4.473`
    .. [2] K. Ullrich, E. Meeds, M. Welling, "Soft weight-sharing for neural network compression", ICLR 2017,
       :arxiv:`1702.04008`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import SoftWeightSharer
    >>> W = np.array([[0.01, -0.02, 1.0], [1.1, 0.02, -0.01]])
    >>> sharer = SoftWeightSharer(n_components=3).fit(W)
    >>> sharer.inverse_transform(sharer.transform(W))
    array([[0.  , 0.  , 1.05],
           [1.05, 0.  , 0.  ]])
    """

    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "zero_weight": [Interval(Real, 0, 1, closed="neither"), None],
        "prior_std": [Interval(Real, 0, None, closed="neither")],
        "prior_shape": [Interval(Real, 1, None, closed="left")],
        "zero_prior_std": [Interval(Real, 0, None, closed="neither")],
        "zero_prior_shape": [Interval(Real, 1, None, closed="left")],
        "merge_divergence": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
        "coder": [StrOptions({"auto", *CODERS})],
    }

    def __init__(self, n_components=17, *, zero_weight=0.999, prior_std=0.1, prior_shape=250.0, zero_prior_std=0.1,
                 zero_prior_shape=5000.0, merge_divergence=0.1, max_iter=300, tol=1e-6, weights_init=None,
                 means_init=None, precisions_init=None, coder="auto"):
        self.n_components = n_components
        self.zero_weight = zero_weight
        self.prior_std = prior_std
        self.prior_shape = prior_shape
        self.zero_prior_std = zero_prior_std
        self.zero_prior_shape = zero_prior_shape
        self.merge_divergence = merge_divergence
        self.max_iter = max_iter
        self.tol = tol
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.coder = coder

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, importance=None):
        """Fit the mixture, merge components, share.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
            How many weights each element stands for, in the likelihood and in the means.

        Returns
        -------
        self : SoftWeightSharer
        """
        X = check_matrix(self, X, reset=True)
        w = Weights(check_row_weights(X, sample_weight), check_importance(X, importance)).of_error()
        x = X.reshape(-1).astype(np.float64)
        flat = None if w is None else np.broadcast_to(w, X.shape).reshape(-1)
        counted = x if flat is None else x[flat > 0]
        unit = float(np.sqrt(np.average(np.square(x), weights=flat))) or 1.0
        start = self._given_start() or mixture_start(self, counted, unit)
        prior = PrecisionPrior(*(p[: len(start[0])] for p in precision_prior(self, unit)))

        found = gaussian_mixture_1d(x, start, prior, weights=flat, zero_weight=self.zero_weight,
                                    max_iter=self.max_iter, tol=self.tol)
        mixture = merge_components(found.weights, found.means, found.precisions, self.merge_divergence)
        borders, owners = hard_borders(*mixture)
        centers, codes_of = _shared_values(x, flat, hard_labels(x, borders, owners), mixture[1])

        self.weights_, self.means_, self.precisions_ = mixture
        self.log_likelihood_trace_ = found.trace
        self.n_iter_ = max(1, found.n_iter)
        self.cluster_centers_ = centers[:, None].astype(X.dtype)
        self.decoder_ = CodebookDecoder(self.cluster_centers_[None], dtype=X.dtype.name)
        used = np.isin(np.arange(len(mixture[0])), np.flatnonzero(codes_of >= 0))
        self._cut = hard_borders(np.where(used, mixture[0], 0.0), *mixture[1:])
        self._codes_of = codes_of
        self.labels_ = self._codes(X)
        self.inertia_ = squared_error(X, self.decoder_, self.labels_, w)
        self.sparsity_ = float(np.mean(self.labels_ == np.flatnonzero(centers == 0)[0]))
        return self

    def transform(self, X):
        """Codes of `X`: for every weight the number of its component's value.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_), dtype uint8, uint16 or int32
        """
        check_is_fitted(self)
        return self._codes(check_matrix(self, X, reset=False))

    def _codes(self, X):
        return self._codes_of[hard_labels(X, *self._cut)].astype(label_dtype(len(self.cluster_centers_)))

    def _given_start(self):
        """Mixture of the parameters, or None."""
        given = [self.weights_init, self.means_init, self.precisions_init]
        if all(g is None for g in given):
            return None
        if any(g is None for g in given):
            raise ValueError("weights_init, means_init and precisions_init must be given together")
        start = tuple(np.asarray(g, dtype=np.float64) for g in given)
        if any(s.shape != start[0].shape or s.ndim != 1 for s in start) or not 1 <= len(start[0]) <= self.n_components:
            raise ValueError(f"weights_init, means_init and precisions_init must have one number for each of at most "
                             f"n_components={self.n_components} components, got shapes {[s.shape for s in start]}")
        return start


def _shared_values(x, w, labels, means):
    """Values of the components that have weights, ascending, with 0; and the code of every component, or -1."""
    mass = np.bincount(labels, w, minlength=len(means)).astype(np.float64)
    total = np.bincount(labels, x if w is None else x * w, minlength=len(means))
    values = np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), means)
    values[0] = 0.0
    used = np.bincount(labels, minlength=len(means)) > 0
    used[0] = True
    order = np.flatnonzero(used)[np.argsort(values[used], kind="stable")]
    codes = np.full(len(means), -1, dtype=np.int32)
    codes[order] = np.arange(len(order))
    return values[order], codes
