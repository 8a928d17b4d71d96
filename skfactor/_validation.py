"""Checks of what users pass in: one clear line (what, allowed, got), and nothing is fixed silently."""
# SPDX-License-Identifier: BSD-3-Clause

import difflib
import math
from numbers import Integral

import numpy as np
from sklearn.utils.validation import check_array, validate_data

__all__ = ["check_gram", "check_importance", "check_kernel_shape", "check_matrix", "check_row_weights", "did_you_mean"]


def did_you_mean(name, allowed):
    """The clause '; did you mean ...?' for a misspelt name, or an empty string.

    >>> did_you_mean("kmean", ["kmeans", "prune"])
    "; did you mean 'kmeans'?"
    """
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _host_array(X):
    """Bring float16, bfloat16 and torch tensors to float32 on the CPU, as a copy; leave everything else alone."""
    if type(X).__module__.partition(".")[0] == "torch":
        X = X.detach().to("cpu")
        if str(X.dtype) in ("torch.float16", "torch.bfloat16"):
            X = X.float()
        return X.clone().numpy()
    if getattr(X, "dtype", None) is not None and str(X.dtype) in ("float16", "bfloat16"):
        return np.asarray(X).astype(np.float32)
    return X


def _one_line(error, X):
    """What scikit-learn says of shape and complex numbers, in one line with the remedy."""
    text = str(error)
    if text.startswith(("Expected 2D array", "Found array with dim")):
        return (f"X must be 2-D with rows as samples (Expected 2D array), got shape {np.shape(X)}. Reshape your data: "
                "X.reshape(1, -1) is one row, X.reshape(-1, 1) one column")
    if text.startswith("Complex data not supported"):
        return f"X must be real, got dtype {np.asarray(X).dtype} (Complex data not supported)"
    return None


def check_matrix(estimator, X, *, reset, min_samples=1):
    """Validate `X` (n_rows, n_columns): dense, 2-D, real, finite; float32 stays, everything else becomes float64.

    Records or checks `n_features_in_` and feature names on `estimator`. float16, bfloat16 and torch tensors are
    taken as float32. Never copies a float32/float64 array and never writes to it.
    """
    X_in = _host_array(X)
    try:
        X = validate_data(estimator, X_in, dtype=[np.float64, np.float32], reset=reset, ensure_all_finite=False,
                          ensure_min_samples=min_samples)
    except ValueError as error:
        line = _one_line(error, X_in)
        if line is None:
            raise
        raise ValueError(line) from None
    _check_finite(X, "X")
    return X


def _check_finite(A, name):
    # one pass without a mask; an overflowing sum is decided by the mask
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(A.sum(dtype=A.dtype)):
            return
    finite = np.isfinite(A)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"{name} must be finite, got {int((~finite).sum())} NaN or inf, the first is {A[where]} "
                         f"at {where}")


def check_row_weights(X, sample_weight):
    """`sample_weight` as float64 (n_rows, 1), or None."""
    if sample_weight is None:
        return None
    weights = _check_weights(sample_weight, (len(X),), "sample_weight")[:, None]
    if not weights.any():
        raise ValueError("at least one sample_weight must be positive, got only zeros")
    return weights


def check_importance(X, importance):
    """`importance` as float64 (n_rows, n_columns), or (n_rows, 1) where it was given so, or None."""
    if importance is None:
        return None
    importance = _host_array(importance)
    shape = (len(X), 1) if np.shape(importance) == (len(X), 1) else X.shape
    importance = _check_weights(importance, shape, "importance")
    if not importance.any():
        raise ValueError("at least one importance must be positive, got only zeros")
    return importance


def _check_weights(weights, shape, name):
    weights = check_array(weights, dtype=np.float64, ensure_2d=False, allow_nd=True, ensure_all_finite=False,
                          input_name=name, ensure_min_samples=0, ensure_min_features=0)
    if weights.ndim == 0:
        weights = np.full(shape, float(weights))
    if weights.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {weights.shape}")
    _check_finite(weights, name)
    if (weights < 0).any():
        raise ValueError(f"{name} must not be negative, got a minimum of {weights.min()}")
    return weights


def check_gram(input_gram, X):
    """Second moment of a layer's inputs as float64 (n_groups, d, d), symmetric; rows of X split over the groups.

    `input_gram` is (d, d) with d the columns of X, or (n_groups, d, d) for a grouped convolution.
    """
    gram = check_array(_host_array(input_gram), dtype=np.float64, ensure_2d=False, allow_nd=True,
                       ensure_all_finite=False, input_name="input_gram")
    gram = gram[None] if gram.ndim == 2 else gram
    n_rows, d = X.shape
    if gram.ndim != 3 or gram.shape[1:] != (d, d):
        raise ValueError(f"input_gram must have shape ({d}, {d}) or (n_groups, {d}, {d}), got {np.shape(input_gram)}")
    if n_rows % len(gram):
        raise ValueError(f"input_gram has {len(gram)} groups, which must divide the {n_rows} rows of X")
    _check_finite(gram, "input_gram")
    diagonal = np.einsum("gii->gi", gram)
    if (diagonal < 0).any() or not np.allclose(gram, gram.transpose(0, 2, 1), rtol=1e-4, atol=1e-6 * diagonal.max()):
        raise ValueError("input_gram must be a second moment: symmetric with a non-negative diagonal")
    return gram


def check_kernel_shape(kernel_shape, n_columns):
    """Tuple of ints (c_in, *spatial) whose product is the number of columns."""
    if kernel_shape is None:
        return (n_columns,)
    shape = tuple(kernel_shape)
    if not shape or not all(isinstance(s, Integral) and s >= 1 for s in shape) or math.prod(shape) != n_columns:
        raise ValueError(f"kernel_shape must be (c_in, *spatial), integers with the product {n_columns} of the columns "
                         f"of X, got {kernel_shape!r}")
    return tuple(int(s) for s in shape)
