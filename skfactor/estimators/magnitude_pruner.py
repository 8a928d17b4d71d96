"""`MagnitudePruner`: small weights become zero, and the others make up for them."""
# SPDX-License-Identifier: BSD-3-Clause

import hashlib
import re
from numbers import Integral, Real

import numpy as np
from sklearn.base import OneToOneFeatureMixin
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_gram, check_importance, check_matrix
from skfactor.codec.decoders import IdentityDecoder
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.feedback import output_error
from skfactor.solvers.pruning import keep_largest, keep_pattern, prune_by_steps, refit_kept
from skfactor.solvers.whitening import row_groups

__all__ = ["MagnitudePruner"]


class MagnitudePruner(OneToOneFeatureMixin, BaseCompressor):
    r"""Set the least important weights to zero.

    The codes are the pruned weights, so that decompositions and weight sharing go on from them; in a file the zeros
    cost an entropy-coded mask. A weight is as important as its magnitude :math:`|x_{ij}|`, times the root of
    `importance` where that is given.

    With `input_gram` the error of the layer's output, :math:`\operatorname{tr}\,(X-\hat X)\,G\,(X-\hat X)^T`, is
    lowered: weights are pruned in `n_steps` by what their removal costs after all others have made up for it,
    :math:`x_{ij}^2 / [G^{-1}]_{jj}` [1]_, and those that stay are refitted, row by row a least-squares problem. The
    result is never worse in that error than pruning by magnitude.

    Parameters
    ----------
    amount : float, default=0.5
        Share of the elements (rows, columns) that become zero, hit exactly; elements that are zero already count. Of
        equal ones the first go first.
    threshold : float, default=None
        Prune what is not larger in magnitude, instead of `amount`; of rows and columns the root mean square counts.
    pattern : str, default=None
        "N:M", such as "2:4": of every M neighbouring columns at most N stay [2]_, instead of `amount`.
    granularity : {"element", "row", "column"}, default="element"
        What is pruned at once.
    n_steps : int, default=8
        Steps of pruning and refitting with `input_gram`.

    Attributes
    ----------
    mask_ : ndarray of bool of shape (n_rows, n_columns)
        What stays of the training data.
    sparsity_ : float
        Share of zeros in the codes of the training data.
    threshold_ : float
        Largest importance that was pruned by `amount` or `threshold`; -1 if none was, None with `pattern`.
    relative_error_ : float
        Squared error of `X` relative to its squared norm.
    output_error_ : float or None
        Squared error of the layer's output, when `input_gram` was given.
    decoder_ : IdentityDecoder
    n_features_in_ : int

    References
    ----------
    .. [1] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992
    .. [2] A. Mishra et al., "Accelerating sparse deep neural networks", 2021, :arxiv:`2104.08378`
    .. [3] S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for efficient neural networks",
       NIPS 2015, :arxiv:`1506.02626`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import MagnitudePruner
    >>> MagnitudePruner(amount=0.5).fit_transform(np.array([[0.1, -2.0, 0.3, 1.0]]))
    array([[ 0., -2.,  0.,  1.]])
    """

    codes_are_values = True

    _parameter_constraints: dict = {
        "amount": [Interval(Real, 0, 1, closed="both")],
        "threshold": [Interval(Real, 0, None, closed="left"), None],
        "pattern": [str, None],
        "granularity": [StrOptions({"element", "row", "column"})],
        "n_steps": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(self, amount=0.5, *, threshold=None, pattern=None, granularity="element", n_steps=8):
        self.amount = amount
        self.threshold = threshold
        self.pattern = pattern
        self.granularity = granularity
        self.n_steps = n_steps

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, importance=None, input_gram=None):
        """Choose what stays of `X`.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
            Weight of each element's squared error relative to the others; (n_rows, 1) with `input_gram`.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs. With several, the rows are split evenly over the groups, as in a
            grouped convolution.

        Returns
        -------
        self : MagnitudePruner
        """
        X = check_matrix(self, X, reset=True)
        importance = check_importance(X, importance)
        gram = None if input_gram is None else check_gram(input_gram, X)
        if gram is not None and importance is not None and np.ptp(importance, axis=1).any():
            raise ValueError("with input_gram the importance must be one number per row, (n_rows, 1), got different "
                             "values within a row")
        pattern = self._checked_pattern()

        scale = None if importance is None else np.sqrt(importance)
        saliency = _saliency(X, scale, self.granularity)
        mask, threshold = self._kept(saliency, pattern)
        mask = np.ascontiguousarray(np.broadcast_to(mask, X.shape))
        codes, error = None, None
        if gram is not None:
            codes, mask, error = self._for_output(X, mask, gram, scale, pattern)

        self.mask_ = mask
        self.threshold_ = threshold
        self.decoder_ = IdentityDecoder()
        self._digest, self._codes, self._gram = _digest(X), codes, gram
        codes = np.where(mask, X, X.dtype.type(0)) if codes is None else codes
        self.sparsity_ = 1 - np.count_nonzero(codes) / codes.size
        lost, total = (float(np.square(A, dtype=np.float64).sum()) for A in (X - codes, X))
        self.relative_error_ = lost / total if total > 0 else lost
        self.output_error_ = error
        return self

    def transform(self, X):
        """The pruned weights.

        The data of `fit` are recognised and get `mask_`. In other rows, the pattern or the threshold that was fitted
        decides (of columns, those pruned in `fit`), and with `input_gram` what stays is refitted.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        fitted = X.shape == self.mask_.shape and _digest(X) == self._digest
        if fitted and self._codes is not None:
            return self._codes.astype(X.dtype)
        mask = self.mask_ if fitted else self._mask_of(X)
        if self._gram is not None:
            return refit_kept(X, mask, self._gram).astype(X.dtype)
        return np.where(mask, X, X.dtype.type(0))

    def _checked_pattern(self):
        """(N, M) or None."""
        if self.pattern is None:
            return None
        if self.threshold is not None or self.granularity != "element":
            raise ValueError("pattern prunes elements and needs no threshold, got "
                             f"granularity={self.granularity!r} and threshold={self.threshold}")
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"pattern must be 'N:M' with 1 <= N <= M, got {self.pattern!r}")
        return int(found[1]), int(found[2])

    def _kept(self, saliency, pattern):
        """Mask of a saliency, and the threshold that makes it."""
        if pattern is not None:
            return keep_pattern(saliency, *pattern), None
        if self.threshold is not None:
            mask = saliency > self.threshold
            return mask, float(saliency[~mask].max(initial=-1.0))
        return keep_largest(saliency, round(self.amount * saliency.size))

    def _mask_of(self, X):
        """What stays of rows that were not in `fit`."""
        if self.granularity == "column":
            return np.broadcast_to(self.mask_.any(axis=0), X.shape)
        saliency = _saliency(X, None, self.granularity)
        pattern = self._checked_pattern()
        return keep_pattern(saliency, *pattern) if pattern else np.broadcast_to(saliency > self.threshold_, X.shape)

    def _for_output(self, X, mask, gram, scale, pattern):
        """Codes, mask and error of the better of two: the mask given, refitted, and pruning by steps."""
        found = [(refit_kept(X, mask, gram), mask)]
        if self.threshold is None and self.granularity != "row":
            found.append(prune_by_steps(X, gram, self._chooser(X, mask, pattern), self.n_steps, row_scale=scale))
        if self.threshold is None and self.granularity == "row":
            found.append(self._rows_by_output(X, gram, scale))
        weight = None if scale is None else np.square(scale[:, 0])
        errors = [output_error(X, codes, gram, row_weight=weight) for codes, _ in found]
        best = int(np.argmin(errors))
        codes, mask = found[best]
        return codes.astype(X.dtype), mask, errors[best]

    def _chooser(self, X, mask, pattern):
        """What `prune_by_steps` keeps at each step: in the end as much as `mask`."""
        if pattern is not None:
            n_kept, m = pattern
            return lambda saliency, t: keep_pattern(saliency, m - int(t * (m - n_kept)), m)
        if self.granularity == "column":
            n_columns = round(self.amount * X.shape[1])

            def choose(saliency, t):
                kept, _ = keep_largest(_rms(saliency, axis=0), _at_step(t, n_columns, X.shape[1]))
                return np.broadcast_to(kept, X.shape)
            return choose
        n_pruned = int((~mask).sum())
        return lambda saliency, t: keep_largest(saliency, _at_step(t, n_pruned, X.size))[0]

    def _rows_by_output(self, X, gram, scale):
        """The rows whose output is weakest become zero; nothing can make up for them."""
        grams = list(zip(row_groups(len(X), len(gram)), gram, strict=True))
        power = np.concatenate([np.einsum("ij,ij->i", X[rows] @ G, X[rows]) for rows, G in grams])
        power = power if scale is None else power * np.square(scale[:, 0])
        kept, _ = keep_largest(power, round(self.amount * len(X)))
        mask = np.ascontiguousarray(np.broadcast_to(kept[:, None], X.shape))
        return np.where(mask, X, 0), mask

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _saliency(X, scale, granularity):
    """Magnitudes times `scale`: of elements, or the root mean square of rows (n, 1) or columns (1, d)."""
    saliency = np.abs(X) if scale is None else np.abs(X) * scale
    if granularity == "element":
        return saliency
    return _rms(saliency, axis=1 if granularity == "row" else 0)


def _rms(A, axis):
    return np.sqrt(np.mean(np.square(A, dtype=np.float64), axis=axis, keepdims=True))


def _at_step(t, n_pruned, size):
    """Elements pruned when the share t of the steps is done: each leaves the same share of what it finds."""
    return n_pruned if t == 1 else round(size * (1 - (1 - n_pruned / size) ** t))


def _digest(X):
    return hashlib.blake2b(np.ascontiguousarray(X), digest_size=16).digest()
