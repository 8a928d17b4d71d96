"""`CoupledCPDFactorizer`: clusters of filters that share their channel factor (CoDeC)."""
# SPDX-License-Identifier: BSD-3-Clause

import math
import warnings
from numbers import Integral, Real

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, RealNotInt, fit_context
from skfactor._validation import check_gram, check_kernel_shape, check_matrix
from skfactor.codec.coupled_cp import CoupledCPDecoder
from skfactor.estimators._linear import rank_within
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.coupled_cp import coupled_cp, encode_coupled, most_terms, refit_coupled
from skfactor.solvers.feedback import output_error

__all__ = ["CoupledCPDFactorizer"]


class CoupledCPDFactorizer(ClassNamePrefixFeaturesOutMixin, BaseCompressor):
    r"""Coupled CP decomposition: filters of a cluster share their channel factor, each has its own spatial factors.

    Each filter (row of `X`) with kernel :math:`c \times h \times w` belongs to a cluster k,

    .. math:: \min \sum_n \|W_n - \sum_r a^{k(n)}_r \circ b_{nr} \circ c_{nr}\|_F^2,

    by alternating least squares [1]_. The pointwise convolution to the channels of all clusters is computed once, and
    every filter reads those of its own. At equal numbers of parameters this leaves room for more terms than separate CP
    decompositions, since the channel factor is what costs.

    The source names the steps and leaves open how filters are clustered and where the iterations start. Here filters
    are clustered as by k-means with subspaces of channels for centres, the iterations start from the principal
    directions of a cluster and the leading rank-one images behind them, and filters move between clusters afterwards
    where another holds them better.

    The codes of a filter have a block for every cluster and are zero in all but its own: a row says by itself which
    cluster it is of. So a quantiser behind this one has to keep zeros, as ``KMeansWeightSharer(preserve_zeros=True)``
    does.

    Parameters
    ----------
    rank : int, float or None, default=0.5
        R, of every cluster. A float in (0, 1] is the share of the numbers of `X` that channel and spatial factors may
        hold together. None is as many as represent every filter exactly.
    n_clusters : int, default=2
        Most clusters; those that no filter needs are left out.
    kernel_shape : tuple of int, default=None
        What one row of `X` is: (c_in, \*spatial) with any number of spatial axes. None: the bridge fills in the
        layer's; rows without spatial axes are clustered by linear subspaces of R dimensions.
    tol : float, default=1e-5
        Iterations end when a sweep lowers the error by less than this part of the squared norm of `X`.
    max_iter : int, default=200
        Most sweeps between two assignments.
    n_init : int, default=4
        Starts of the clustering, the first deterministic.
    random_state : int, RandomState or None, default=0
        For the other starts.

    Attributes
    ----------
    channels_ : ndarray of shape (n_clusters_, c_in, rank_)
        A of every cluster, columns of unit norm.
    factors_ : tuple of ndarray of shape (n, k, rank_)
        Factors of the filters, one for each spatial axis.
    labels_ : ndarray of shape (n,)
        Cluster of every filter.
    rank_, n_clusters_ : int
    pays_ : bool
        Whether the factors hold fewer numbers than `X`.
    rel_error_ : ndarray of shape (n,)
        ‖W − Ŵ‖ / ‖W‖ of each filter.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
    decoder_ : CoupledCPDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] V. T. Pham, Y. Zniyed, T. P. Nguyen, "Coupled tensor decomposition for compact network representation", IEEE
       Trans. Neural Networks and Learning Systems, 2025, :doi:`10.1109/TNNLS.2025.3609797`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import CoupledCPDFactorizer
    >>> X = np.random.default_rng(0).standard_normal((8, 16 * 3 * 3))
    >>> factorizer = CoupledCPDFactorizer(rank=4, kernel_shape=(16, 3, 3)).fit(X)
    >>> factorizer.channels_.shape, factorizer.factors_[0].shape, factorizer.transform(X).shape
    ((2, 16, 4), (8, 3, 4), (8, 48))
    """

    _parameter_constraints: dict = {
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(RealNotInt, 0, 1, closed="right"), None],
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "kernel_shape": ["array-like", None],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(self, rank=0.5, *, n_clusters=2, kernel_shape=None, tol=1e-5, max_iter=200, n_init=4, random_state=0):
        self.rank = rank
        self.n_clusters = n_clusters
        self.kernel_shape = kernel_shape
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, input_gram=None):
        """Cluster and decompose the filters.

        Parameters
        ----------
        X : array-like of shape (n_filters, n_columns)
        y : None
            Ignored.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs: all factors are refitted to its output. With several, the rows are
            split evenly over the groups, as in a grouped convolution.

        Returns
        -------
        self : CoupledCPDFactorizer
        """
        X = check_matrix(self, X, reset=True)
        gram = None if input_gram is None else check_gram(input_gram, X)
        shape = check_kernel_shape(self.kernel_shape, X.shape[1])
        spatial = shape[1:] or (1,)
        n_clusters = min(self.n_clusters, len(X))
        rank = rank_within(self.rank, X.size, n_clusters * shape[0] + len(X) * sum(spatial), most_terms(shape))

        rng = np.random.default_rng(check_random_state(self.random_state).randint(1 << 31))
        found = coupled_cp(X, shape, rank, n_clusters, tol=self.tol, max_iter=self.max_iter, n_init=self.n_init,
                           rng=rng)
        if gram is not None:
            found = refit_coupled(X, found, gram)
        decoder = CoupledCPDecoder(found.channels.astype(X.dtype), tuple(shape[1:]), X.dtype.name)
        codes = _codes(decoder, found.labels, found.spatial, X.dtype)

        X_hat = decoder.decode(codes)
        squares = np.square(X, dtype=np.float64).sum(axis=1)
        errors = np.square(X.astype(np.float64) - X_hat).sum(axis=1)
        self.rel_error_ = np.sqrt(np.divide(errors, squares, out=np.zeros(len(X)), where=squares > 0))
        self.relative_error_ = float(errors.sum() / squares.sum() if squares.sum() > 0 else errors.sum())
        self.output_error_ = None if gram is None else output_error(X, X_hat, gram)
        self.channels_, self.labels_, self.decoder_ = decoder.channels, found.labels, decoder
        self.factors_ = tuple(F.astype(X.dtype) for F in found.spatial)
        self.n_clusters_, _, self.rank_ = decoder.channels.shape
        self.n_iter_ = found.n_iter
        self.pays_ = self.rank_ * (self.n_clusters_ * shape[0] + len(X) * sum(spatial)) < X.size
        if not self.pays_ and shape[1:]:
            warnings.warn(f"rank {self.rank_} does not pay for {len(X)} kernels of {'x'.join(map(str, shape))} in "
                          f"{self.n_clusters_} clusters: the factors hold no fewer numbers than X", stacklevel=2)
        self._rows, self._codes = X.copy(), codes
        self._n_features_out = codes.shape[1]
        return self

    def fit_transform(self, X, y=None, input_gram=None):
        """Fit and return the codes of `X`; see `fit`."""
        return self.fit(X, y, input_gram=input_gram)._codes.copy()

    def transform(self, X):
        """Codes of filters: for rows of `fit` those that were found, for others the best cluster and factors in it.

        Parameters
        ----------
        X : array-like of shape (n_filters, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_filters, n_codes), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        places = {row.tobytes(): i for i, row in enumerate(self._rows)}
        known = np.array([places.get(row.astype(self._rows.dtype).tobytes(), -1) for row in X])
        codes = np.empty((len(X), self._n_features_out), dtype=X.dtype)
        codes[known >= 0] = self._codes[known[known >= 0]]
        new = known < 0
        if new.any():
            shape = (len(self.channels_[0]), *self.decoder_.kernel)
            labels, spatial, _ = encode_coupled(X[new], shape, self.channels_)
            codes[new] = _codes(self.decoder_, labels, spatial, X.dtype)
        return codes

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _codes(decoder, labels, spatial, dtype):
    """Rows with the factors of each filter in the block of its cluster."""
    n, rank = len(labels), decoder.channels.shape[2]
    own = np.concatenate([F.reshape(n, -1) for F in spatial], axis=1)
    codes = np.zeros((n, len(decoder.channels), math.prod((rank, sum(decoder.axes)))), dtype=dtype)
    codes[np.arange(n), labels] = own
    return codes.reshape(n, -1)
