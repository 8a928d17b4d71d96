"""`DictionaryFactorizer`: every row, or sub-vector, a sparse combination of learned atoms."""
# SPDX-License-Identifier: BSD-3-Clause

import math
import warnings
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_gram, check_matrix, check_row_weights
from skfactor.codec.coders import CODERS
from skfactor.codec.linear import ComponentsDecoder
from skfactor.estimators._sparse_codes import SparseCoder, shared_metric, unit_grams
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.dictionary import (
    Coding,
    DictionaryOptions,
    canonical_rows,
    learn_dictionary,
    online_step,
    start_atoms,
    start_online,
    stationarity,
)
from skfactor.solvers.whitening import Whitening

__all__ = ["DictionaryFactorizer"]

# Rows from which mini-batches are used with batch_size="auto", and the rows of one: at least, and for each atom.
_MANY_ROWS, _BATCH, _PER_ATOM = 16384, 1024, 8
# Rows on which a fit by mini-batches is judged.
_N_JUDGED = 16384


class DictionaryFactorizer(ClassNamePrefixFeaturesOutMixin, BaseCompressor):
    r"""Sparse dictionary learning: every row is a combination of a few of K learned atoms.

    Minimises

    .. math:: \tfrac12\|X-UV\|_F^2 + \alpha\|U\|_1, \qquad \|V_k\|_2 = 1,

    over the codes U and the atoms V, by a few sweeps over the codes and one over the atoms in turn (many rows: by
    mini-batches [1]_). `transform` then solves the lasso of each row to a duality gap of at most 1e-6
    of its half squared norm; codes of sub-vectors that meet in an `input_gram` take at most ten rounds. With
    ``code_solver="omp"`` codes have at most `n_nonzero_coefs` non-zeros instead of a price.

    Parameters
    ----------
    n_components : int, default=64
        Atoms (K).
    alpha : float, default=1.0
        Price of a code, in units of `alpha_unit`. Larger is sparser.
    alpha_unit : {"rms", "max", "absolute"}, default="rms"
        "rms": of the root mean square of the elements of `X`, so that one alpha fits data of any scale (the alpha of
        data divided by their standard deviation); with `input_gram`, times the geometric mean of the scales of the
        inputs, so that about as many codes are kept as without it. "max": of `alpha_max_`; 1 makes all codes
        zero. "absolute": of `X` itself, as in scikit-learn. With ``loss="root"`` alpha has no unit, and "rms" and
        "absolute" are the same.
    code_solver : {"lasso", "omp"}, default="lasso"
        "omp": order-recursive orthogonal matching pursuit, and alpha plays no part.
    n_nonzero_coefs : int, default=None
        Most non-zeros of a row or sub-vector with ``code_solver="omp"``; None is a tenth of its columns, at least 1.
        More than there are atoms or columns are taken as that many.
    vector_size : int, default=None
        Columns of the sub-vectors of a row that share the dictionary, 9 for 3 x 3 kernels; must divide the number of
        columns. None takes whole rows, whose atoms are as long and as dear to store as rows.
    positive_code, positive_dict : bool, default=False
        Codes, or atoms, that are nowhere negative.
    loss : {"squared", "root"}, default="squared"
        "root": the course's :math:`\|X-UV\|_F + \alpha\|U\|_1`, the norm not squared.
    batch_size : int, "auto" or None, default="auto"
        Rows (sub-vectors) of a mini-batch. None uses all rows in each iteration; "auto" does so below 16384 rows, and
        takes 1024, or 8 for each atom if that is more, above.
    max_iter : int, default=500
        Most iterations; with mini-batches, most passes over the rows.
    tol : float, default=1e-5
        Iterations end when one lowers the objective by less than this fraction, on average; a mini-batch by less than
        ten times as much.
    n_init : int, default=1
        Starts, of which the best is kept. Not with mini-batches, where starts matter little.
    warm_start : bool, default=False
        Start from the atoms of the last fit where they have the right shape.
    coder : str, default="auto"
        Entropy coder of the codes in a file.
    random_state : int, RandomState instance or None, default=None
        Draws the rows that atoms start from.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, vector_size)
        Atoms V. They have unit norm, with `input_gram` in its (mean) metric.
    decoder_ : ComponentsDecoder
    alpha_ : float
        Price in units of `X`: the :math:`\alpha` of the squared objective.
    alpha_max_ : float
        Norm of the longest row: from this price on all codes are zero whatever the dictionary.
    objective_ : float
        :math:`\frac12\|X-UV\|_F^2 + \alpha\|U\|_1` of the training data.
    course_objective_ : float
        :math:`\|X-UV\|_F + \alpha_c\|U\|_1` with `course_alpha_`.
    course_alpha_ : float
        :math:`\alpha_c = \alpha/\|X-UV\|_F`, with which U and V are stationary for the course's objective.
    objective_trace_ : ndarray of shape (n_iter_,)
        Objective (that of `loss`) after each iteration. It never rises; with mini-batches, of a sample of the rows.
    duality_gap_ : float
        Certificate of the codes: `objective_` is above its minimum over U by at most this fraction. NaN for "omp".
    stationarity_ : float
        Certificate of the atoms: norm of the gradient in V along the unit spheres, relative to :math:`\|U^TX\|_F`.
    density_ : float
        Share of the codes that are not zero.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    n_iter_ : int
        Iterations; with mini-batches, evaluations of the objective.
    n_features_in_ : int

    Notes
    -----
    With mini-batches `objective_`, its two companions, the certificates and `density_` are those of a fixed random
    sample of at most 16384 rows, scaled to all rows where they are sums.

    Rows that occur twice count as one with twice the weight, and the result does not depend on the order of the rows.

    References
    ----------
    .. [1] J. Mairal, F. Bach, J. Ponce, G. Sapiro, "Online learning for matrix factorization and sparse coding", JMLR
       11 (2010), :arxiv:`0908.0050`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import DictionaryFactorizer
    >>> X = np.array([[4.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    >>> factorizer = DictionaryFactorizer(n_components=2, alpha=0.1, alpha_unit="absolute", random_state=0).fit(X)
    >>> factorizer.inverse_transform(factorizer.transform(X)).round(6)
    array([[3.9, 0. ],
           [1.9, 0. ],
           [0. , 2.9],
           [0. , 0.9]])
    >>> factorizer.density_
    0.5
    """

    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "alpha_unit": [StrOptions({"rms", "max", "absolute"})],
        "code_solver": [StrOptions({"lasso", "omp"})],
        "n_nonzero_coefs": [Interval(Integral, 1, None, closed="left"), None],
        "vector_size": [Interval(Integral, 1, None, closed="left"), None],
        "positive_code": ["boolean"],
        "positive_dict": ["boolean"],
        "loss": [StrOptions({"squared", "root"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"}), None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "coder": [StrOptions({"auto", *CODERS})],
        "random_state": ["random_state"],
    }

    def __init__(self, n_components=64, *, alpha=1.0, alpha_unit="rms", code_solver="lasso", n_nonzero_coefs=None,
                 vector_size=None, positive_code=False, positive_dict=False, loss="squared", batch_size="auto",
                 max_iter=500, tol=1e-5, n_init=1, warm_start=False, coder="auto", random_state=None):
        self.n_components = n_components
        self.alpha = alpha
        self.alpha_unit = alpha_unit
        self.code_solver = code_solver
        self.n_nonzero_coefs = n_nonzero_coefs
        self.vector_size = vector_size
        self.positive_code = positive_code
        self.positive_dict = positive_dict
        self.loss = loss
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.warm_start = warm_start
        self.coder = coder
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, input_gram=None):
        r"""Learn the atoms.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment G of the layer's inputs, damped by 0.003 of its mean diagonal and scaled to a mean diagonal
            of 1: :math:`\frac12\operatorname{tr}\,(X-UV)G(X-UV)^T + \alpha\|U\|_1` is minimised instead. Groups of rows
            with grams of their own share the atoms. Sub-vectors share atoms learned in the mean metric of their
            columns; their codes are chosen together, for the output.

        Returns
        -------
        self : DictionaryFactorizer
        """
        X, weights, gram = self._check_fit(X, sample_weight, input_gram)
        task = self._resolve(X, weights, gram)

        report = self._iteration_reporter(None)
        callback = None if report is None else lambda V: report(lambda: self._as_if_fitted(task, V(), X.dtype))
        found = learn_dictionary(task.rows, self.n_components, task.price, rng=task.rng, sample_weight=task.weights,
                                 init=task.start, options=task.options, callback=callback)

        fitted = self._as_if_fitted(task, found.components, X.dtype, found.alpha)
        fitted |= self._judged(X, weights, fitted["_coder"], task, gram)
        for name, value in fitted.items():
            setattr(self, name, value)
        self.alpha_max_ = task.alpha_max
        self.objective_trace_ = found.objective_trace
        self.n_iter_ = max(1, found.n_iter)
        self._alpha_value, self._online = task.unit, None
        if not found.converged and report is None:
            warnings.warn(f"the objective still fell by more than tol={self.tol:g} of itself in one iteration after "
                          f"max_iter={self.max_iter}", ConvergenceWarning, stacklevel=4)
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y=None, sample_weight=None):
        """Learn from one mini-batch of a stream.

        The first call sets the unit of alpha, and draws the atoms from its rows unless there are fitted ones.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        self : DictionaryFactorizer
        """
        first = getattr(self, "_online", None) is None
        fitted = hasattr(self, "components_")
        X, weights, _ = self._check_fit(X, sample_weight, None, reset=not fitted)
        task = self._resolve(X, weights, None)
        if first:
            V = self.components_ if fitted else start_atoms(task.rows, self.n_components, task.rng,
                                                            weights=task.weights, positive=self.positive_dict)
            self._online, self._alpha_value, self.alpha_max_, self.n_iter_ = start_online(V), task.unit, 0.0, 0
        alpha = self.alpha * self._alpha_value
        coding = Coding(alpha, task.options.n_nonzero, self.positive_code)
        self._online = online_step(self._online, task.rows, coding, rng=task.rng, weights=task.weights,
                                   positive_dict=self.positive_dict)
        for name, value in self._as_if_fitted(task, self._online.V, X.dtype, alpha).items():
            setattr(self, name, value)
        for name, value in self._judged(X, weights, self._coder, task).items():
            setattr(self, name, value)
        self.alpha_max_ = max(self.alpha_max_, task.alpha_max)
        self.n_iter_ += 1
        previous = np.zeros(0) if first else self.objective_trace_
        self.objective_trace_ = np.append(previous, self.objective_)
        return self

    def transform(self, X):
        """Codes of `X`.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            After a fit with several grams, rows split evenly over them.

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_ / vector_size * n_components), dtype of `X`
            Most of them exactly 0. The codes of a row's first sub-vector come first.
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        return self._coder.codes(X)

    def alpha_path(self, X, alphas):
        """Codes of `X` for each of `alphas`, with the atoms as they are; each solve starts from the one before.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
        alphas : iterable of float
            In the unit of the parameter `alpha`; falling is fastest.

        Yields
        ------
        codes : ndarray of shape (n_rows, n_codes)

        Examples
        --------
        >>> import numpy as np
        >>> from skfactor import DictionaryFactorizer
        >>> X = np.random.default_rng(0).standard_normal((50, 8))
        >>> factorizer = DictionaryFactorizer(n_components=16, random_state=0).fit(X)
        >>> counts = [np.count_nonzero(codes) for codes in factorizer.alpha_path(X, [2.0, 1.0, 0.5])]
        >>> counts == sorted(counts)
        True
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        alphas = np.asarray(list(alphas), dtype=np.float64)
        if alphas.ndim != 1 or not (np.isfinite(alphas) & (alphas >= 0)).all():
            raise ValueError("alphas must be finite numbers of at least 0")
        if self._coder.n_nonzero is not None:
            raise ValueError("alpha_path needs code_solver='lasso', got 'omp'")
        return self._path(X, alphas * self._alpha_value)

    def _path(self, X, prices):
        codes = None
        for price in prices:
            codes = self._coder._replace(alpha=float(price)).codes(X, codes)
            yield codes

    def _check_fit(self, X, sample_weight, input_gram, reset=True):
        X = check_matrix(self, X, reset=reset)
        weights = check_row_weights(X, sample_weight)
        return X, None if weights is None else weights[:, 0], None if input_gram is None else check_gram(input_gram, X)

    def _resolve(self, X, weights, gram):
        """Turn the parameters and the data into the task of the solver."""
        d = X.shape[1]
        v = self.vector_size or d
        if d % v:
            raise ValueError(f"vector_size must divide the {d} columns of X, got {v}")
        omp = self.code_solver == "omp"
        if omp and self.loss == "root":
            raise ValueError("loss='root' needs code_solver='lasso', got 'omp'")
        if gram is not None and self.positive_dict:
            raise ValueError("input_gram cannot be combined with positive_dict")
        grams = None if gram is None else unit_grams(gram)
        metric = None if gram is None else shared_metric(grams, v)
        rows, counts = canonical_rows(X.reshape(-1, v), None if weights is None else np.repeat(weights, d // v))
        squares = plain = _squares(rows)
        if metric is not None:
            rows = (rows.astype(np.float64) @ metric.root).astype(X.dtype)
            squares = _squares(rows)
        alpha_max, unit = math.sqrt(squares.max()), self._unit(squares, plain, counts, v)
        if grams is not None and self.alpha_unit == "rms" and self.loss == "squared":
            unit *= _mean_scale(grams)
        batch = self.batch_size
        if batch == "auto":
            batch = max(_BATCH, _PER_ATOM * self.n_components) if len(rows) >= _MANY_ROWS else None
        n_nonzero = min(self.n_nonzero_coefs or max(1, v // 10), v, self.n_components) if omp else None
        options = DictionaryOptions(self.max_iter, self.tol, self.n_init, self.positive_code, self.positive_dict,
                                    self.loss == "root", batch, n_nonzero)
        start = getattr(self, "components_", None) if self.warm_start else None
        if start is not None and start.shape == (self.n_components, v):
            start = start if metric is None else start @ metric.root
        else:
            start = None
        return _Task(rows, counts, 0.0 if omp else self.alpha * unit, unit, alpha_max, options, grams, metric, v, start,
                     check_random_state(self.random_state))

    def _unit(self, squares, plain, counts, vector_size):
        """What one unit of the parameter alpha is in units of X (of nothing, with loss='root').

        `squares` are those of the rows in the metric, `plain` without it.
        """
        if self.alpha_unit == "max":
            total = float(squares.sum() if counts is None else squares @ counts)
            top = math.sqrt(squares.max())
            return top / math.sqrt(total) if self.loss == "root" and total > 0 else top
        if self.alpha_unit == "absolute" or self.loss == "root":
            return 1.0
        total, n = (plain.sum(), len(plain)) if counts is None else (plain @ counts, counts.sum())
        return math.sqrt(float(total) / (n * vector_size))

    def _as_if_fitted(self, task, V, dtype, alpha=None):
        """Attributes that make the estimator usable with these atoms."""
        if task.metric is not None:
            V = V.astype(np.float64) @ task.metric.inverse
        V = np.ascontiguousarray(V, dtype=dtype)
        alpha = task.price if alpha is None else alpha
        coder = SparseCoder(V, alpha, task.options.n_nonzero, self.positive_code, task.grams)
        return {"components_": V, "decoder_": ComponentsDecoder(V, dtype.name), "alpha_": alpha, "_coder": coder,
                "_n_features_out": self.n_features_in_ // task.vector_size * self.n_components}

    def _judged(self, X, weights, coder, task, gram=None):
        """Objectives and certificates of the data, with the codes of `transform`."""
        v, scale = task.vector_size, 1.0
        q = X.shape[1] // v
        if task.options.batch_size is not None and task.grams is None and len(X) * q > _N_JUDGED:
            chosen = np.linspace(0, len(X) - 1, max(1, _N_JUDGED // q)).astype(int)
            scale = len(X) / len(chosen) if weights is None else weights.sum() / max(weights[chosen].sum(), 1e-300)
            X, weights = X[chosen], None if weights is None else weights[chosen]
        weights = np.full(len(X), scale) if weights is None else weights * scale
        codes = coder.codes(X)
        costs = coder.costs(X, codes)
        error, norm, gap = (float(weights @ part) for part in costs)
        objective = 0.5 * error + coder.alpha * norm
        course_alpha = coder.alpha / math.sqrt(error) if error > 0 else 0.0
        if self.loss == "root":
            course_alpha = self.alpha * task.unit
        U = codes.reshape(-1, len(coder.V)).astype(np.float64)
        rows, V = X.reshape(-1, v).astype(np.float64), coder.V.astype(np.float64)
        if task.metric is not None:
            rows, V = rows @ task.metric.root, V @ task.metric.root
        weighted = (U * np.repeat(weights, q)[:, None]).T
        used = weights > 0
        output = None if gram is None else float(weights @ coder._replace(grams=gram).costs(X, codes).squared_error)
        return {"objective_": objective, "output_error_": output,
                "course_objective_": math.sqrt(error) + course_alpha * norm, "course_alpha_": course_alpha,
                "duality_gap_": math.nan if coder.n_nonzero else (gap / objective if objective > 0 else 0.0),
                "density_": float(np.count_nonzero(codes[used]) / max(1, codes[used].size)),
                "stationarity_": stationarity(V, weighted @ U, weighted @ rows, positive=self.positive_dict)}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _squares(rows):
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)


def _mean_scale(grams):
    """Geometric mean of the scales of all directions of the inputs.

    A direction of scale s makes its error s times as large. At a given density the least error of independent codes
    grows by the geometric mean of the scales (reverse water-filling), and so must their price.
    """
    return math.exp(0.5 * float(np.linalg.slogdet(grams)[1].mean()) / grams.shape[-1])


class _Task(NamedTuple):
    rows: np.ndarray  # (n, v): different sub-vectors, in the metric
    weights: np.ndarray | None  # (n,)
    price: float  # alpha of the solver
    unit: float
    alpha_max: float
    options: DictionaryOptions
    grams: np.ndarray | None  # (g, d, d)
    metric: Whitening | None  # of the sub-vectors
    vector_size: int
    start: np.ndarray | None  # (K, v)
    rng: np.random.RandomState
