"""`LinearFactorizer`: what all factorisations `X = C B` share once their basis is known."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import Any, NamedTuple

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import fit_context
from skfactor._validation import check_gram, check_matrix, check_row_weights
from skfactor.codec.linear import LinearDecoder
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.whitening import apply_operators, code_operators

__all__ = ["Factors", "LinearFactorizer", "factor_errors", "rank_within"]

_BLOCK_ELEMENTS = 1 << 21


class Factors(NamedTuple):
    """What `LinearFactorizer._factorize` returns.

    Attributes
    ----------
    decoder : LinearDecoder
    error_bound : float or None
        Upper bound of the weighted squared error (of the output error with a gram), where the method has one.
    attributes : dict
        Further fitted attributes by name, such as `rank_`.
    """

    decoder: LinearDecoder
    error_bound: float | None = None
    attributes: dict[str, Any] = {}


class LinearFactorizer(ClassNamePrefixFeaturesOutMixin, BaseCompressor):
    r"""Base of factorisations: a subclass finds a basis, and the codes are the best ones for it.

    A subclass defines `_factorize(X, weights, gram) -> Factors` for validated `X` (n, d) in float32 or float64, row
    weights (n,) in float64 or None, and gram (n_groups, d, d) in float64 or None. Everything else is here:

    * `transform` gives :math:`\arg\min_C \operatorname{tr}\,(X-CB)\,G\,(X-CB)^T` with the basis B of `decoder_`;
    * `fit` sets `decoder_`, `relative_error_`, `output_error_`, `error_bound_` and what `Factors.attributes` names.
    """

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, input_gram=None):
        """Find the basis.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs: the error of its output is lowered instead of that of `X`. With
            several, the rows are split evenly over the groups, as in a grouped convolution.

        Returns
        -------
        self : estimator
        """
        X = check_matrix(self, X, reset=True)
        weights = check_row_weights(X, sample_weight)
        weights = None if weights is None else weights[:, 0]
        gram = None if input_gram is None else check_gram(input_gram, X)
        factors = self._factorize(X, weights, gram)

        operators = code_operators(factors.decoder.basis(), gram)
        plain, output = factor_errors(X, factors.decoder, operators, weights=weights, gram=gram)
        total = _squared_norm(X, weights)
        for name, value in factors.attributes.items():
            setattr(self, name, value)
        self.decoder_ = factors.decoder
        self.relative_error_ = plain / total if total > 0 else plain
        self.output_error_ = output
        self.error_bound_ = factors.error_bound
        self._operators = operators
        self._n_features_out = operators.shape[2]
        return self

    def transform(self, X):
        """Best codes of `X` for the basis that was found; with a gram, those of least output error.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            With several grams, rows split evenly over them.

        Returns
        -------
        codes : ndarray of shape (n_rows, n_codes), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        return apply_operators(X, self._operators)

    def _factorize(self, X, weights, gram):
        raise TypeError(f"{type(self).__name__} does not define _factorize(X, weights, gram)")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def factor_errors(X, decoder, operators, *, weights=None, gram=None):
    """Weighted squared errors of `X`, and of the layer's output (None without a gram).

    Both are those of what is stored: the codes `X P` in the dtype of `X`, decoded by `decoder`.
    """
    codes = apply_operators(X, operators)
    plain, output = 0.0, None if gram is None else 0.0
    step = max(1, _BLOCK_ELEMENTS // X.shape[1])
    size = len(X) if gram is None else len(X) // len(gram)
    for first in range(0, len(X), size):
        for start in range(first, first + size, step):
            rows = slice(start, min(start + step, first + size))
            E = X[rows].astype(np.float64) - decoder.decode(codes[rows])
            w = 1.0 if weights is None else weights[rows]
            plain += float((w * np.einsum("ij,ij->i", E, E)).sum())
            if gram is not None:
                output += float((w * np.einsum("ij,ij->i", E @ gram[first // size], E)).sum())
    return plain, output


def rank_within(rank, n_numbers, per_rank, most):
    """Rank that a parameter `rank` asks for: an integer itself, a fraction the largest that keeps to its budget.

    A fraction f allows `f * n_numbers` numbers where one unit of rank takes `per_rank`. At least 1, at most `most`;
    None is `most`.

    >>> rank_within(0.5, 64 * 64, 64 + 64, 64), rank_within(100, 64 * 64, 64 + 64, 64)
    (16, 64)
    """
    if rank is None:
        return most
    if isinstance(rank, (float, np.floating)):
        rank = int(rank * n_numbers / per_rank * (1 + 1e-12))
    return int(max(1, min(rank, most)))


def _squared_norm(X, weights):
    step = max(1, _BLOCK_ELEMENTS // X.shape[1])
    total = 0.0
    for start in range(0, len(X), step):
        block = X[start : start + step].astype(np.float64)
        per_row = np.einsum("ij,ij->i", block, block)
        total += float(per_row.sum() if weights is None else per_row @ weights[start : start + step])
    return total
