"""`MantissaRounder`: values of fewer significant bits, for the vectors beside the weights."""
# SPDX-License-Identifier: BSD-3-Clause

from numbers import Integral

import numpy as np
from sklearn.base import OneToOneFeatureMixin
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, fit_context
from skfactor._validation import check_matrix
from skfactor.codec.decoders import IdentityDecoder
from skfactor.estimators.base import BaseCompressor

__all__ = ["MantissaRounder"]


class MantissaRounder(OneToOneFeatureMixin, BaseCompressor):
    r"""Round every value to `n_bits` significant bits.

    The relative error of a value is at most :math:`2^{-n_\mathrm{bits}}`. The bits that are left out are zeros, which a
    file does not pay for. Meant for biases and scales, of which there are too few for a codebook.

    Parameters
    ----------
    n_bits : int, default=8
        Significant bits that stay, the leading one counted; 8 are those of bfloat16, 11 of float16.

    Attributes
    ----------
    decoder_ : IdentityDecoder
        The codes are the rounded values.
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import MantissaRounder
    >>> MantissaRounder(n_bits=3).fit_transform(np.array([[1.1, 3.3, -100.0]]))
    array([[  1. ,   3.5, -96. ]])
    """

    codes_are_values = True

    _parameter_constraints: dict = {"n_bits": [Interval(Integral, 1, 53, closed="both")]}

    def __init__(self, n_bits=8):
        self.n_bits = n_bits

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Check `X`; there is nothing to learn.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.

        Returns
        -------
        self : MantissaRounder
        """
        check_matrix(self, X, reset=True)
        self.decoder_ = IdentityDecoder()
        return self

    def transform(self, X):
        """The rounded values.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        mantissa, exponent = np.frexp(X.astype(np.float64))
        scaled = np.ldexp(mantissa, self.n_bits)
        with np.errstate(over="ignore"):
            rounded = np.ldexp(np.rint(scaled), exponent - self.n_bits).astype(X.dtype)
        # the largest values would round up to infinity: they round towards zero
        inwards = np.ldexp(np.trunc(scaled), exponent - self.n_bits)
        return np.where(np.isfinite(rounded), rounded, inwards).astype(X.dtype)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
