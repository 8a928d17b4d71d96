"""Size and error of a fitted estimator or Pipeline, end to end: from the matrix to the file and back."""
# SPDX-License-Identifier: BSD-3-Clause

import io

import numpy as np

from skfactor._validation import check_gram, check_importance, check_matrix, check_row_weights
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.estimators.base import compressed_tensor, steps_of

__all__ = ["distortion", "load_tensor", "measure", "rate", "save_tensor"]

_NAME = "X"  # of the only tensor in a file


def rate(fitted, X, *, codes=None):
    """Bytes of the `.skf` file that `save_tensor` writes: codes, decoders, index, header and footer.

    Parameters
    ----------
    fitted : BaseCompressor, Pipeline of them, or a search that was refit
    X : array-like of shape (n_rows, n_columns)
    codes : array-like, default=None
        `fitted.transform(X)`, where it is known already.

    Returns
    -------
    n_bytes : int

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import KMeansWeightSharer
    >>> from skfactor.selection import rate
    >>> X = np.random.default_rng(0).normal(size=(100, 90))
    >>> few, many = (KMeansWeightSharer(n_clusters=k).fit(X) for k in (4, 64))
    >>> 9000 * 2 / 8 < rate(few, X) < rate(many, X) < 9000 * 8
    True
    """
    return file_bytes(tensor_of(_fitted(fitted), X, codes))


def distortion(fitted, X, *, sample_weight=None, importance=None, input_gram=None, codes=None):
    r"""Relative squared error of the reconstruction, :math:`\|X-\hat X\|^2/\|X\|^2`; 0 is exact, 1 is all zeros.

    Parameters
    ----------
    fitted : BaseCompressor, Pipeline of them, or a search that was refit
    X : array-like of shape (n_rows, n_columns)
    sample_weight : array-like of shape (n_rows,), default=None
        How many rows each row stands for.
    importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
        Weight of each element's squared error.
    input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
        Second moment G of the layer's inputs: the error is then
        :math:`\operatorname{tr}(X-\hat X)G(X-\hat X)^T / \operatorname{tr}XGX^T`, that of the layer's output.
    codes : array-like, default=None
        `fitted.transform(X)`, where it is known already.

    Returns
    -------
    error : float
        Where X is all zeros, the squared error itself.
    """
    fitted = _fitted(fitted)
    X_hat = tensor_of(fitted, X, codes).to_matrix()
    return _relative_error(_matrix(fitted, X), X_hat, None, sample_weight, importance, input_gram)


def measure(fitted, X, *, sample_weight=None, importance=None, input_gram=None, codes=None, rows=None):
    """Everything a search compares, from one encoding.

    Parameters
    ----------
    fitted, X, sample_weight, importance, input_gram, codes
        As in `distortion`.
    rows : array-like of int, default=None
        Rows whose error counts; the size is always that of all of `X`.

    Returns
    -------
    measures : dict
        `bytes` (as `rate`), `distortion`, `bits_per_weight` (8 `bytes` over the elements of X) and `kappa`: the
        course's compression factor 1 - K/N, here one minus the numbers that the decoders hold over the numbers in X.
        For a shared codebook of K scalars or vectors, or a dictionary of K rows, that is K over the N that share it.
    """
    fitted = _fitted(fitted)
    tensor = tensor_of(fitted, X, codes)
    matrix = _matrix(fitted, X)
    n_bytes = file_bytes(tensor)
    n_decoders = sum(a.size for decoder in tensor.decoders for a in decoder.parts()[1].values())
    return {
        "bytes": n_bytes,
        "distortion": _relative_error(matrix, tensor.to_matrix(), rows, sample_weight, importance, input_gram),
        "bits_per_weight": 8.0 * n_bytes / matrix.size,
        "kappa": 1.0 - n_decoders / matrix.size,
    }


def save_tensor(path, fitted, X):
    """Write what a fitted estimator stores of one matrix to a `.skf` file of `rate(fitted, X)` bytes.

    Parameters
    ----------
    path : path-like or binary file object
    fitted : BaseCompressor, Pipeline of them, or a search that was refit
    X : array-like of shape (n_rows, n_columns)

    See Also
    --------
    load_tensor : The inverse.
    skfactor.compress : Whole networks.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from skfactor import KMeansWeightSharer
    >>> from skfactor.selection import load_tensor, rate, save_tensor
    >>> X = np.random.default_rng(0).normal(size=(20, 9))
    >>> sharer = KMeansWeightSharer(n_clusters=4).fit(X)
    >>> path = os.path.join(tempfile.mkdtemp(), "X.skf")
    >>> save_tensor(path, sharer, X)
    >>> os.path.getsize(path) == rate(sharer, X)
    True
    >>> np.array_equal(load_tensor(path), sharer.inverse_transform(sharer.transform(X)))
    True
    """
    tensor = tensor_of(_fitted(fitted), X)
    with SkfWriter(path) as file:
        file.add(_NAME, tensor)


def load_tensor(path):
    """The reconstruction that `save_tensor` stored.

    Parameters
    ----------
    path : path-like or binary file object

    Returns
    -------
    X_hat : ndarray of shape (n_rows, n_columns)

    Raises
    ------
    FormatError
        If the file is damaged or foreign.
    """
    with SkfFile(path) as file:
        return file.read_array(_NAME)


def _fitted(fitted):
    """The fitted estimator itself, also where a search holds it."""
    return getattr(fitted, "best_estimator_", fitted)


def _matrix(fitted, X):
    return check_matrix(steps_of(fitted)[0][1], X, reset=False)


def tensor_of(fitted, X, codes=None):
    """What is stored of `X`, under the dtype in which it comes back."""
    return compressed_tensor(fitted, X, codes=codes, dtype=_dtype_name(X))


def _dtype_name(X):
    """Dtype in which X comes back: its own where numpy has such a float, float32 for bfloat16, else float64."""
    name = str(getattr(X, "dtype", None)).rpartition(".")[2]
    return "float32" if name == "bfloat16" else name if name in ("float32", "float16") else "float64"


def file_bytes(tensor):
    """Size of the file that holds one tensor, to the byte."""
    file = io.BytesIO()
    with SkfWriter(file) as writer:
        writer.add(_NAME, tensor)
    return file.getbuffer().nbytes


def _relative_error(X, X_hat, rows, sample_weight, importance, input_gram):
    error, total = _weighted_squares([X - X_hat.astype(np.float64), X], sample_weight, importance, input_gram, rows)
    return error / total if total > 0 else error


def _weighted_squares(matrices, sample_weight, importance, input_gram, rows):
    """Sum over `rows` of the weighted squares of each of some matrices of one shape."""
    X = matrices[0]
    weights = 1.0
    for given in (check_row_weights(X, sample_weight), check_importance(X, importance)):
        weights = weights if given is None else weights * given
    gram = None if input_gram is None else check_gram(input_gram, X)
    if gram is not None and np.ndim(weights) and weights.shape[1] > 1:
        raise ValueError(f"with input_gram the importance must be one number per row, ({len(X)}, 1), got shape "
                         f"{weights.shape}")
    sums = []
    for matrix in matrices:
        if gram is None:
            squares = np.square(matrix, dtype=np.float64)
        else:
            groups = matrix.astype(np.float64).reshape(len(gram), -1, X.shape[1])
            squares = np.einsum("gij,gij->gi", groups @ gram, groups).reshape(-1, 1)
        squares = squares * weights
        sums.append(float(squares.sum() if rows is None else squares[rows].sum()))
    return sums
