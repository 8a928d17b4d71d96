"""`CPDFilterPruner`: every filter as a sum of few outer products, and the filters most like others removed (NORTON)."""
# SPDX-License-Identifier: BSD-3-Clause

import math
import warnings
from numbers import Integral, Real

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.utils.validation import check_is_fitted, check_random_state

from skfactor._sklearn import Interval, RealNotInt, StrOptions, fit_context
from skfactor._validation import check_gram, check_kernel_shape, check_matrix
from skfactor.codec.cp import CPDecoder
from skfactor.estimators._linear import rank_within
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.cp import cp_filters
from skfactor.solvers.cp_output import refit_cp
from skfactor.solvers.feedback import output_error
from skfactor.solvers.subspaces import (
    DISTANCES,
    eliminate_similar,
    orthonormal_bases,
    published_selection,
    subspace_distances,
    vbd_distances,
)

__all__ = ["CPDFilterPruner"]

_CRITERIA = ("norm", "principal_angles", "norton-2024", "vbd", "random")


class CPDFilterPruner(ClassNamePrefixFeaturesOutMixin, BaseCompressor):
    r"""CP decomposition of every filter, then removal of filters that resemble others (NORTON).

    Each filter (row of `X`) with kernel :math:`c \times h \times w` is approximated by R outer products,

    .. math:: \min \|W_n - \sum_r a_{nr} \circ b_{nr} \circ c_{nr}\|_F^2,

    by alternating least squares for all filters at once [1]_. The codes of a filter are its factors. Filters are
    removed by the distances of the subspaces that their factors span,
    :math:`D = \alpha D^A + \beta D^B + \gamma D^C`: of the closest pair the one nearer to the rest goes, again and
    again.
    Filters that are removed decode to zeros; `skfactor.prune_filters` takes them out of a network for good.

    With `input_gram` the factors are refitted to the layer's output,
    :math:`\operatorname{tr}\,(X-\hat X)\,G\,(X-\hat X)^T`, factor after factor in closed form; the result is
    never worse in that error (under the damped gram) than without.

    Parameters
    ----------
    rank : int, float, "auto" or None, default=4
        R, the same for all filters. A float in (0, 1] is the share of the numbers of `X` that the factors may hold
        together. "auto" is the least rank with at most `target_error`. None, and ranks above h·w, are h·w, which
        is exact.
    kernel_shape : tuple of int, default=None
        What one row of `X` is: (c_in, \*spatial) with any number of spatial axes. None: the bridge fills in the
        layer's; a row without spatial axes (a linear layer) is kept as it is.
    target_error : float, default=0.1
        For ``rank="auto"``: the largest squared error of `X` relative to its squared norm.
    prune_ratio : float, default=0.0
        Share of the filters that is removed; int(n · (1 − ratio)) stay, at least one.
    n_filters : int, default=None
        Number of filters that stay, instead of `prune_ratio`.
    criterion : {"norm", "principal_angles", "norton-2024", "vbd", "random"}, default="norm"
        Which go: those of least norm; the most similar ones by true principal angles, as the paper describes; those
        that the published code of the paper removes, defects included [2]_; by the variance-based distance of the
        channel factors; or any. The norm is the default since it is the one that keeps networks accurate.
    distance : {"chordal", "geodesic", "largest"}, default="chordal"
        For "principal_angles": the root of Σ sin² θ, the root of Σ θ², or the largest angle θ; each divided by its
        maximum.
    weights : tuple of float, default=(1/3, 1/3, 1/3)
        α, β, γ: of the channel factor, then of the spatial axes in order (the last one holds for all that follow). A
        factor whose rank fills its space is the same subspace for all filters: its weight counts as 0.
    tol : float, default=1e-5
        A filter's iterations end when a sweep lowers its squared relative error by less.
    max_iter : int, default=300
    random_state : int, RandomState or None, default=None
        For ``criterion="random"``.

    Attributes
    ----------
    factors_ : tuple of ndarray
        A (n, c_in, R) with the norms of the terms, then (n, k, R) with columns of unit norm for each spatial axis.
    support_ : ndarray of bool of shape (n_filters,)
        Filters that stay.
    distances_ : ndarray of shape (n, n) or None
        D, where the criterion has one.
    rank_ : int
    pays_ : bool
        Whether the factors hold fewer numbers than the filters: R (c_in + h + w) < c_in h w.
    rel_error_ : ndarray of shape (n,)
        ‖W − Ŵ‖ / ‖W‖ of each filter, before any is removed.
    svd_bound_ : ndarray of shape (n,)
        No sum of R outer products has a smaller relative error.
    component_norm_ : ndarray of shape (n, R)
        Norm of each term relative to its filter's; much above 1 means that terms cancel.
    relative_error_ : float
        Squared error of `X`, removed filters included, relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
    decoder_ : CPDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] V. T. Pham, Y. Zniyed, T. P. Nguyen, "Enhanced network compression through tensor decompositions and
       pruning", IEEE TNNLS 2024, :doi:`10.1109/TNNLS.2024.3370294`
    .. [2] What that selection does is described in :func:`skfactor.solvers.subspaces.published_selection`.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import CPDFilterPruner
    >>> W = np.random.default_rng(0).standard_normal((8, 16, 3, 3))
    >>> pruner = CPDFilterPruner(rank=4, kernel_shape=(16, 3, 3), prune_ratio=0.25).fit(W.reshape(8, -1))
    >>> [factor.shape for factor in pruner.factors_], int(pruner.support_.sum())
    ([(8, 16, 4), (8, 3, 4), (8, 3, 4)], 6)
    >>> bool((pruner.rel_error_ >= pruner.svd_bound_).all())
    True
    """

    _parameter_constraints: dict = {
        "rank": [Interval(Integral, 1, None, closed="left"), Interval(RealNotInt, 0, 1, closed="right"),
                 StrOptions({"auto"}), None],
        "kernel_shape": ["array-like", None],
        "target_error": [Interval(Real, 0, 1, closed="left")],
        "prune_ratio": [Interval(Real, 0, 1, closed="left")],
        "n_filters": [Interval(Integral, 1, None, closed="left"), None],
        "criterion": [StrOptions(set(_CRITERIA))],
        "distance": [StrOptions(set(DISTANCES))],
        "weights": ["array-like"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(self, rank=4, *, kernel_shape=None, target_error=0.1, prune_ratio=0.0, n_filters=None,
                 criterion="norm", distance="chordal", weights=(1 / 3, 1 / 3, 1 / 3), tol=1e-5, max_iter=300,
                 random_state=None):
        self.rank = rank
        self.kernel_shape = kernel_shape
        self.target_error = target_error
        self.prune_ratio = prune_ratio
        self.n_filters = n_filters
        self.criterion = criterion
        self.distance = distance
        self.weights = weights
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, input_gram=None):
        """Decompose the filters and choose which stay.

        Parameters
        ----------
        X : array-like of shape (n_filters, n_columns)
        y : None
            Ignored.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs. With several, the rows are split evenly over the groups, as in a
            grouped convolution.

        Returns
        -------
        self : CPDFilterPruner
        """
        X = check_matrix(self, X, reset=True)
        gram = None if input_gram is None else check_gram(input_gram, X)
        shape = check_kernel_shape(self.kernel_shape, X.shape[1])
        weights = self._checked_weights(len(shape))
        n_kept = self._n_kept(len(X))

        cp, rank = self._decompose(X, shape)
        factors = _stored(cp, X, gram)
        support, distances = self._select(factors, n_kept, weights)
        decoder = CPDecoder(shape, rank, X.dtype.name)
        codes = _codes(factors, len(shape))

        self._set_errors(X, decoder.decode(codes), support, gram)
        self.factors_, self.support_, self.distances_ = factors, support, distances
        self.decoder_, self.rank_, self.svd_bound_, self.n_iter_ = decoder, rank, cp.svd_bound, cp.n_iter
        self.pays_ = len(shape) == 1 or rank * sum(shape) < math.prod(shape)
        self._codes, self._gram = codes * support[:, None], gram
        self._n_features_out = codes.shape[1]
        if not self.pays_:
            warnings.warn(f"rank {rank} does not pay for kernels of {'x'.join(map(str, shape))}: the factors of a "
                          f"filter hold {rank * sum(shape)} numbers, the filter {math.prod(shape)}", stacklevel=2)
        return self

    def fit_transform(self, X, y=None, input_gram=None):
        """Fit and return the codes of `X`; see `fit`."""
        return self.fit(X, y, input_gram=input_gram)._codes

    def transform(self, X):
        """Factors of every filter, flattened: A (c_in, R), then (k, R) for each spatial axis; zeros where removed.

        Parameters
        ----------
        X : array-like of shape (n_filters, n_features_in_)
            As many rows as in `fit` where filters are removed, or several grams were given.

        Returns
        -------
        codes : ndarray of shape (n_filters, n_codes), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        if len(X) != len(self.support_) and not (self.support_.all() and (self._gram is None or len(self._gram) == 1)):
            raise ValueError(f"X must have the {len(self.support_)} rows of fit, since filters of those are removed "
                             f"or belong to groups, got {len(X)}")
        shape = self.decoder_.kernel_shape
        cp = cp_filters(X, shape, self.rank_, tol=self.tol, max_iter=self.max_iter)
        codes = _codes(_stored(cp, X, self._gram), len(shape))
        return codes if self.support_.all() else codes * self.support_[:, None]

    def _checked_weights(self, n_axes):
        weights = np.asarray(self.weights, dtype=float)
        if weights.ndim != 1 or not len(weights) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"weights must be non-negative numbers, one for each factor, got {self.weights!r}")
        return np.concatenate([weights, np.full(max(0, n_axes - len(weights)), weights[-1])])[:n_axes]

    def _n_kept(self, n_rows):
        if self.n_filters is not None:
            if self.n_filters > n_rows:
                raise ValueError(f"n_filters must be at most the {n_rows} rows of X, got {self.n_filters}")
            return int(self.n_filters)
        return max(1, int(n_rows * (1 - self.prune_ratio) + 1e-9))

    def _decompose(self, X, shape):
        """CP of the rank asked for, and that rank."""
        most = math.prod(shape[1:])
        given = {"tol": self.tol, "max_iter": self.max_iter}
        if not isinstance(self.rank, str):
            rank = rank_within(self.rank, X.shape[1], sum(shape), most)
            return cp_filters(X, shape, rank, **given), rank
        squares = np.square(X, dtype=np.float64).sum(axis=1)
        for rank in range(1, most + 1):
            allowed = self.target_error * squares.sum()
            if rank < most and (cp_filters(X, shape, rank, tol=1.0, max_iter=1).svd_bound**2 @ squares) > allowed:
                continue  # the bound says no before any iteration
            cp = cp_filters(X, shape, rank, **given)
            if cp.rel_error**2 @ squares <= allowed:
                break
        return cp, rank

    def _select(self, factors, n_kept, weights):
        """Which filters stay, and the distances that decided."""
        n = len(factors[0])
        support = np.ones(n, dtype=bool)
        distances = None
        if n_kept < n and self.criterion in ("principal_angles", "vbd"):
            distances = vbd_distances(factors[0]) if self.criterion == "vbd" else self._angles(factors, weights)
            support[eliminate_similar(distances, n - n_kept)] = False
        elif n_kept < n and self.criterion == "norton-2024":
            support[:] = False
            support[published_selection(factors, n_kept)] = True
        elif n_kept < n and self.criterion == "random":
            support[check_random_state(self.random_state).permutation(n)[n_kept:]] = False
        elif n_kept < n:
            support[np.argsort(_squared_norms(factors), kind="stable")[: n - n_kept]] = False
        return support, distances

    def _angles(self, factors, weights):
        total = np.zeros((len(factors[0]),) * 2)
        for F, weight, axis in zip(factors, weights, ("channel", *("spatial",) * (len(factors) - 1)), strict=True):
            if F.shape[2] >= F.shape[1]:
                if weight:
                    warnings.warn(f"rank {F.shape[2]} fills the space of a {axis} factor with {F.shape[1]} entries: "
                                  "its subspaces are all the same, and its weight counts as 0", stacklevel=3)
            elif weight:
                total += weight * subspace_distances(orthonormal_bases(F), self.distance)
        return total

    def _set_errors(self, X, X_hat, support, gram):
        """Errors of the decomposition, filter by filter, and of all with some filters removed."""
        squares = np.square(X, dtype=np.float64).sum(axis=1)
        errors = np.square(X.astype(np.float64) - X_hat).sum(axis=1)
        self.rel_error_ = np.sqrt(np.divide(errors, squares, out=np.zeros(len(X)), where=squares > 0))
        left, total = np.where(support, errors, squares).sum(), squares.sum()
        self.relative_error_ = float(left / total if total > 0 else left)
        self.output_error_ = None if gram is None else output_error(X, X_hat * support[:, None], gram)

    @property
    def component_norm_(self):
        """Norm of each term relative to that of its decomposed filter."""
        check_is_fitted(self)
        terms = math.prod(np.linalg.norm(F.astype(np.float64), axis=1) for F in self.factors_)
        norms = np.sqrt(_squared_norms(self.factors_))[:, None]
        return np.divide(terms, norms, out=np.zeros(terms.shape), where=norms > 0)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _stored(cp, X, gram):
    """Factors in the dtype of `X`, refitted to the output where there is a gram; the largest entries positive."""
    pointwise, spatial = cp.pointwise, cp.spatial
    if gram is not None and spatial:
        pointwise, spatial, _ = refit_cp(X, pointwise, spatial, gram)
    stored = []
    for F in spatial:
        norm = np.linalg.norm(F, axis=1, keepdims=True)
        lead = np.take_along_axis(F, np.abs(F).argmax(axis=1, keepdims=True), axis=1)
        scale = np.where(norm > 0, norm, 1.0) * np.where(lead < 0, -1.0, 1.0)
        stored.append((F / scale).astype(X.dtype))
        pointwise = pointwise * scale
    return (pointwise.astype(X.dtype), *stored)


def _codes(factors, n_axes):
    n = len(factors[0])
    return np.ascontiguousarray(np.concatenate([F.reshape(n, -1) for F in factors[:n_axes]], axis=1))


def _squared_norms(factors):
    """Squared norm of every decomposed filter."""
    return math.prod(np.matmul(F.transpose(0, 2, 1), F.astype(np.float64)) for F in factors).sum(axis=(1, 2))
