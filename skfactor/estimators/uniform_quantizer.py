"""`UniformQuantizer`: a uniform step whose codes are chosen for error and rate together."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from numbers import Integral, Real

import numpy as np
from sklearn.base import OneToOneFeatureMixin
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_matrix
from skfactor.codec.coders import CODERS
from skfactor.codec.decoders import CodebookDecoder
from skfactor.estimators._codebooks import (
    Plan,
    Solution,
    assign_codes,
    row_importance,
    squared_error,
    weighted_square_sum,
)
from skfactor.estimators._output import DAMPING, CodebookCompressor, OutputProblem, fit_for_output, with_lengths
from skfactor.solvers.feedback import conditional_power

__all__ = ["UniformQuantizer"]

_MOST_LEVELS = 1 << 12  # of either sign


class UniformQuantizer(OneToOneFeatureMixin, CodebookCompressor):
    r"""Uniform quantisation: every weight becomes an integer multiple of one step.

    Minimises

    .. math:: \sum_{ij} w_{ij}\,(x_{ij} - \Delta a_{ij})^2 + \lambda \sum_{ij} \mathrm{bits}(a_{ij})

    over the integer codes :math:`a` for a given step :math:`\Delta`, alternating with the code lengths that the codes
    imply. At more than about one bit per weight an entropy-coded uniform step is nearly the best scalar codebook there
    is [1]_, and all that is stored beside the codes is the step. With `input_gram` it is the error of the layer's
    output that the codes lower.

    Parameters
    ----------
    step : float, default=0.25
        The step, in units of `unit`.
    unit : {"rms", "absolute"}, default="rms"
        "rms": of the root mean square of `X`, so that one step fits weights of any scale. "absolute": of `X` itself.
    entropy_weight : float, default=0.1
        Price of one bit in units of :math:`\Delta^2` (times the conditional power of the inputs with `input_gram`);
        :math:`\ln 2 / 6 = 0.116` is the price at which a finer step and a dearer code cost the same at high rate.
    max_iter : int, default=3
        Rounds in which codes and code lengths are fitted to each other.
    coder : str, default="auto"
        Entropy coder of the codes in a file.

    Attributes
    ----------
    step_ : float
        The step in units of `X`.
    labels_ : ndarray of shape (n_rows, n_columns)
        Codes of the training data.
    code_lengths_ : ndarray of shape (1, n_levels)
        Bits of each level that the choice of codes assumed.
    inertia_ : float
        Weighted squared error of the training data.
    output_error_ : float or None
        Weighted squared error of the layer's output, when `input_gram` was given.
    decoder_ : CodebookDecoder
    n_iter_ : int
    n_features_in_ : int

    References
    ----------
    .. [1] H. Gish, J. Pierce, "Asymptotically efficient quantizing", IEEE Trans. IT 14 (1968),
       :doi:`10.1109/TIT.1968.1054193`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import UniformQuantizer
    >>> quantizer = UniformQuantizer(step=0.5, unit="absolute", entropy_weight=0.0)
    >>> quantizer.inverse_transform(quantizer.fit_transform(np.array([[0.1, 0.6, -1.2]])))
    array([[ 0. ,  0.5, -1. ]])
    """

    _parameter_constraints: dict = {
        "step": [Interval(Real, 0, None, closed="neither")],
        "unit": [StrOptions({"rms", "absolute"})],
        "entropy_weight": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "coder": [StrOptions({"auto", *CODERS})],
    }

    def __init__(self, step=0.25, *, unit="rms", entropy_weight=0.1, max_iter=3, coder="auto"):
        self.step = step
        self.unit = unit
        self.entropy_weight = entropy_weight
        self.max_iter = max_iter
        self.coder = coder

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, importance=None, input_gram=None):
        """Choose the codes of `X` and with them the code lengths.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
            Weight of each element's squared error relative to the others; (n_rows, 1) with `input_gram`.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs, as for `KMeansWeightSharer`.

        Returns
        -------
        self : UniformQuantizer
        """
        X, weights, gram = self._check_fit(X, sample_weight, importance, input_gram)
        counts = None if weights.counts is None else weights.counts[:, 0]
        step = self._absolute_step(X, weights)
        power = 1.0 if gram is None else conditional_power(gram, damping=DAMPING)
        mean_importance = 1.0 if weights.importance is None else _weighted_mean(weights)
        plan = _plan(self.entropy_weight * step**2 * power * mean_importance)

        solution, codes = self._by_weights(X, weights, counts, plan, step)
        problem, error = None, None
        if gram is not None:
            problem = OutputProblem(gram, row_importance(weights), plan)
            solution, codes, uses_feedback, error = fit_for_output(X, solution, codes, problem, counts,
                                                                   n_rounds=self.max_iter, fixed_centers=True)
            problem = problem if uses_feedback else None
        solution, codes = _trimmed(solution, codes)

        self.step_ = step
        self.decoder_ = CodebookDecoder(solution.codebooks, dtype=X.dtype.name)
        self.labels_ = codes
        self.code_lengths_ = solution.code_lengths
        self.inertia_ = squared_error(X, self.decoder_, codes, weights.of_error())
        self.output_error_ = error
        self.n_iter_ = self.max_iter
        self._solution, self._plan, self._problem = solution, plan, problem
        return self

    def transform(self, X):
        """Codes of `X`; values beyond the levels of `fit` take the outermost.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_), dtype uint8 or uint16
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        return self._codes(X)

    def _absolute_step(self, X, weights):
        if self.unit == "absolute":
            step = float(self.step)
        else:
            n = X.size if weights.counts is None else weights.counts.sum() * X.shape[1]
            step = self.step * math.sqrt(weighted_square_sum(X, weights.counts) / n) or 1.0
        # a step of few digits: multiples of it are stored as a grid
        step = float(np.float32(step)) or step
        largest = float(np.abs(X).max())
        if not largest / step < _MOST_LEVELS:
            raise ValueError(f"step must be at least {largest / _MOST_LEVELS:.3g} for the largest weight "
                             f"({_MOST_LEVELS} levels of either sign), got {step:.3g}")
        return step

    def _by_weights(self, X, weights, counts, plan, step):
        """Codes for the error of the weights, fitted together with their lengths."""
        used = X if counts is None else X[counts > 0]
        reach = math.ceil(float(np.abs(used).max()) / step) + 2
        levels = (np.arange(-reach, reach + 1) * step).astype(X.dtype)[None, :, None]
        codes = assign_codes(X, levels, plan)
        solution = with_lengths(Solution(levels, np.zeros(levels.shape[:2]), 0.0, 1), codes, counts)
        if plan.lagrangian > 0:
            for _ in range(self.max_iter):
                codes = assign_codes(X, levels, plan, code_lengths=solution.code_lengths, importance=weights.importance)
                previous, solution = solution, with_lengths(solution, codes, counts)
            solution = previous  # the lengths under which these codes were chosen
        return solution, codes


def _plan(lagrangian):
    """One fixed scalar codebook at this price of a bit."""
    return Plan(n_clusters=0, granularity="tensor", group_size=1, vector_size=1, preserve_zeros=False,
                lagrangian=lagrangian, init="optimal", max_iter=0, tol=0.0, n_init=1, certify=False, rng=None)


def _weighted_mean(weights):
    counts = None if weights.counts is None else np.broadcast_to(weights.counts, weights.importance.shape)
    return float(np.average(weights.importance, weights=counts))


def _trimmed(solution, codes):
    """Without the levels below and above all codes."""
    low, high = int(codes.min()), int(codes.max()) + 1
    solution = solution._replace(codebooks=np.ascontiguousarray(solution.codebooks[:, low:high]),
                                 code_lengths=np.ascontiguousarray(solution.code_lengths[:, low:high]))
    return solution, (codes - codes.dtype.type(low)).astype(np.uint8 if high - low <= 256 else np.uint16)
