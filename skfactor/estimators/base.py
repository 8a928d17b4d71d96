"""`BaseCompressor`, and how a fitted estimator or Pipeline becomes a `CompressedTensor`."""
# SPDX-License-Identifier: BSD-3-Clause

from inspect import signature

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import CallbackSupport, check_feature_names_in
from skfactor._validation import check_matrix
from skfactor.codec.linear import LinearDecoder
from skfactor.codec.tensor import CompressedTensor, Layout

__all__ = ["BaseCompressor", "CentroidCodes", "compressed_tensor", "decoder_chain", "fit_chain", "fit_params",
           "steps_of", "with_kernel_shape"]


class BaseCompressor(CallbackSupport, TransformerMixin, BaseEstimator):
    """Base of all estimators: `fit`, `transform` to codes, `inverse_transform` by the frozen decoder.

    A subclass sets in `fit` the attribute `decoder_`, a `skfactor.codec.decoders.Decoder` that turns the codes
    of `transform` back into `X` and needs nothing else of the estimator.
    """

    def inverse_transform(self, codes):
        """Reconstruct the matrix from its codes: `decoder_.decode(codes)`.

        Parameters
        ----------
        codes : array-like of shape (n_rows, n_codes)
            What `transform` returned.

        Returns
        -------
        X_hat : ndarray of shape (n_rows, n_features_in_)
        """
        check_is_fitted(self)
        return self.decoder_.decode(np.asarray(codes))

    def score(self, X, y=None, sample_weight=None):
        r"""Minus the relative squared error, :math:`-\sum w\|x-\hat x\|^2 / \sum w\|x\|^2`; 0 is perfect.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        score : float
        """
        X_hat = self.inverse_transform(self.transform(X))
        X = check_matrix(self, X, reset=False)
        w = 1.0 if sample_weight is None else np.asarray(sample_weight, dtype=float)[:, None]
        error = float((w * np.square(X - X_hat, dtype=np.float64)).sum())
        total = float((w * np.square(X, dtype=np.float64)).sum())
        return -error / total if total > 0 else -error

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # codes are integers
        return tags


class CentroidCodes:
    """What estimators have in common whose codes are numbers of centroids.

    `fit` sets `decoder_`, which holds the codebooks, and `labels_`, the codes of its data; `coder` is a parameter.
    """

    @property
    def kappa_(self):
        check_is_fitted(self)
        n_books, n_clusters, _ = self.decoder_.codebooks.shape
        return 1.0 - n_books * n_clusters / self.labels_.size

    @property
    def rate_(self):
        check_is_fitted(self)
        shape = (len(self.labels_), self.n_features_in_)
        return CompressedTensor((self.decoder_,), self.labels_, shape, self.decoder_.dtype, coder=self.coder).nbytes

    def get_feature_names_out(self, input_features=None):
        """Names of the codes: those of the columns, or of their blocks where a centroid is more than a number.

        Parameters
        ----------
        input_features : array-like of str, default=None

        Returns
        -------
        names : ndarray of str
        """
        check_is_fitted(self)
        names = check_feature_names_in(self, input_features)
        if self.decoder_.codebooks.shape[2] == 1:
            return names
        prefix = type(self).__name__.lower()
        return np.asarray([f"{prefix}{i}" for i in range(self.labels_.shape[1])], dtype=object)


def steps_of(estimator):
    """(name, step) of a Pipeline without its pass-throughs; a lone estimator is one step with the name ''."""
    if isinstance(estimator, Pipeline):
        return [(name, step) for name, step in estimator.steps if step is not None and step != "passthrough"]
    return [("", estimator)]


def decoder_chain(fitted):
    """Decoders of a fitted estimator or Pipeline, in the order of its steps."""
    chain = []
    for name, step in steps_of(fitted):
        if not hasattr(step, "inverse_transform"):
            raise TypeError(f"step {name or type(step).__name__!r} cannot be stored: {type(step).__name__} is not "
                            "a skfactor compressor (it has no decoder_)")
        check_is_fitted(step)
        if not hasattr(step, "decoder_"):
            raise TypeError(f"step {name or type(step).__name__!r} cannot be stored: {type(step).__name__} is not "
                            "a skfactor compressor (it has no decoder_)")
        chain.append(step.decoder_)
    if not chain:
        raise ValueError("a Pipeline to be stored needs at least one step, got only pass-throughs")
    return tuple(chain)


def compressed_tensor(fitted, X, *, codes=None, shape=None, dtype="float32", layout=None):
    """What is stored of `X`: the decoders of `fitted` and the codes of `X`.

    Parameters
    ----------
    fitted : BaseCompressor or Pipeline of them
    X : array-like of shape (n_rows, n_columns)
    codes : array-like, default=None
        Codes of `X` as `fit_transform` returned them; `fitted.transform(X)` when None. They differ where the fit
        weighed the elements of `X` (`importance` with an entropy constraint).
    shape : tuple of int, default=None
        Shape of the tensor that `X` is the matrix of; the shape of `X` when None.
    dtype : str, default="float32"
        Dtype of the tensor.
    layout : Layout, default=None
        How the tensor became `X`; rows first when None.

    Returns
    -------
    tensor : CompressedTensor

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import KMeansWeightSharer
    >>> X = np.float32([[0.1, 0.9], [0.8, 0.2]])
    >>> compressed_tensor(KMeansWeightSharer(n_clusters=2).fit(X), X).to_array()
    array([[0.15, 0.85],
           [0.85, 0.15]], dtype=float32)
    """
    codes = np.ascontiguousarray(fitted.transform(X) if codes is None else codes)
    shape = tuple(np.shape(X)) if shape is None else tuple(int(s) for s in shape)
    coder = getattr(steps_of(fitted)[-1][1], "coder", "auto")
    return CompressedTensor(decoder_chain(fitted), codes, shape, dtype, layout or Layout.rows_first(shape), coder)


def fit_params(estimator, **params):
    """Those of `params` that are not None and that `fit` accepts, under the names a Pipeline's `fit` wants.

    Every step of a Pipeline that accepts a parameter gets it, except that `importance` and `input_gram` describe
    `X` itself and so reach the steps only as long as the codes before them are still values of `X`. `fit_chain`
    takes them further.

    >>> from skfactor import KMeansWeightSharer
    >>> sorted(fit_params(KMeansWeightSharer(), sample_weight=[1.0], input_gram=None))
    ['sample_weight']
    """
    found = {}
    for name, step in steps_of(estimator):
        accepted = signature(step.fit).parameters
        for key, value in params.items():
            if value is not None and key in accepted:
                found[f"{name}__{key}" if name else key] = value
        params = {k: v for k, v in params.items() if k == "sample_weight" or _keeps_values(step)}
    return found


def _keeps_values(step):
    """Whether the codes of a step are values in the place of those of `X`, as a pruner's are."""
    return bool(getattr(step, "codes_are_values", False))


def fit_chain(estimator, X, **side):
    """Fit an estimator, or the steps of a Pipeline one after the other, each for what its codes mean to the layer.

    A Pipeline's `fit` gives a step nothing of what the steps before it have learnt. Behind a step that is linear in its
    codes, `X = C B`, an error E of the codes costs tr(E B G Bᵀ Eᵀ) at the layer's output: the next step gets B G Bᵀ as
    its `input_gram` (with G = I where none is given, unless the rows of B are orthogonal and of one length). Codes that
    are mostly zeros keep them: then only a step with `preserve_zeros=True` gets it. A step whose parameters do not go
    with such a gram is fitted without.

    Parameters
    ----------
    estimator : estimator or Pipeline
        Fitted in place.
    X : array-like of shape (n_rows, n_columns)
    **side : array-like or None
        `sample_weight`, `importance` and `input_gram`, as for a single estimator. Each step gets those that its `fit`
        accepts; `importance` one number per row behind a step that is linear in its codes.

    Returns
    -------
    estimator : estimator or Pipeline

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.pipeline import make_pipeline
    >>> from skfactor import KMeansWeightSharer, LowRankFactorizer
    >>> X = np.random.default_rng(0).standard_normal((8, 6))
    >>> pipeline = make_pipeline(LowRankFactorizer(2), KMeansWeightSharer(4))
    >>> fit_chain(pipeline, X, input_gram=np.diag([3.0, 1, 1, 1, 1, 1]))[-1].output_error_ is not None
    True
    """
    steps = steps_of(estimator)
    plain = not isinstance(estimator, Pipeline) or estimator.memory is not None
    if plain or len(steps) < 2 or getattr(estimator, "_skl_callbacks", None):
        return estimator.fit(X, **fit_params(estimator, **side))
    codes, derived = X, False
    for (_, step), (_, following) in zip(steps, steps[1:]):
        codes = _fitted(step.fit_transform, step, codes, side, derived)
        side = _side_behind(step, np.asarray(codes), side, following)
        derived = derived or not _keeps_values(step)
    _fitted(steps[-1][1].fit, steps[-1][1], codes, side, derived)
    return estimator


def _fitted(method, step, X, side, derived):
    """`method(X, **side)` with what the step accepts; without a derived gram that its parameters do not go with."""
    params = fit_params(step, **side)
    try:
        return method(X, **params)
    except ValueError:
        if not (derived and "input_gram" in params):
            raise
    return method(X, **{k: v for k, v in params.items() if k != "input_gram"})


def _side_behind(step, codes, side, following):
    """What is known of the codes of a fitted step, in the terms in which `side` knows its input."""
    if _keeps_values(step):
        return side
    found = {k: v for k, v in side.items() if k == "sample_weight"}
    decoder = getattr(step, "decoder_", None)
    if not isinstance(decoder, LinearDecoder):
        return found
    importance = side.get("importance")
    if importance is not None and not np.ptp(importance, axis=1).any():
        found["importance"] = np.asarray(importance)[:, :1]
    if 2 * np.count_nonzero(codes) >= codes.size or getattr(following, "preserve_zeros", False):
        found["input_gram"] = _gram_of_codes(decoder.basis(), side.get("input_gram"), codes.shape[1])
    return found


def _gram_of_codes(basis, gram, n_codes):
    """B G Bᵀ for rows of one or several sub-vectors C B; None where it is a multiple of the identity."""
    m, d = basis.shape
    parts = n_codes // m
    if gram is None:
        square = np.kron(np.eye(parts), basis @ basis.T)
    else:
        gram = np.asarray(gram, dtype=np.float64)
        blocks = gram.reshape(-1, parts, d, parts, d)
        blocks = np.einsum("kv,gpvqw,lw->gpkql", basis, blocks, basis, optimize=True)
        square = blocks.reshape(*gram.shape[:-2], n_codes, n_codes)
    mean = np.einsum("...ii->...", square).mean() / n_codes
    return None if np.abs(square - mean * np.eye(n_codes)).max() <= 1e-4 * mean else square


def with_kernel_shape(estimator, kernel_shape):
    """Clone of an estimator whose `kernel_shape=None` is replaced by that of a layer.

    In a Pipeline that of the steps that see values in the places of the weights; in a search, of what it searches.

    >>> from skfactor import SeparableFactorizer
    >>> with_kernel_shape(SeparableFactorizer(2), (16, 3, 3)).kernel_shape
    (16, 3, 3)
    """
    estimator = clone(estimator)
    for _, step in steps_of(estimator):
        params = step.get_params(deep=False) if hasattr(step, "get_params") else {}
        if "kernel_shape" in params and params["kernel_shape"] is None and params.get("tensor_shape") is None:
            step.set_params(kernel_shape=tuple(kernel_shape))
        elif isinstance(params.get("estimator"), BaseEstimator):
            step.set_params(estimator=with_kernel_shape(params["estimator"], kernel_shape))
        if not _keeps_values(step):
            break
    return estimator
