"""`DeepKMeansRegularizer`: k-means of the rows of kernels, as a penalty in training and as an estimator."""
# SPDX-License-Identifier: BSD-3-Clause

import math
import warnings
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_importance, check_matrix, check_row_weights
from skfactor.codec.coders import CODERS
from skfactor.codec.decoders import CodebookDecoder
from skfactor.estimators._codebooks import MOMENTUM_TOL, squared_error
from skfactor.estimators.base import BaseCompressor, CentroidCodes
from skfactor.estimators.kmeans_sharer import KMeansWeightSharer
from skfactor.solvers._assign1d import label_dtype
from skfactor.solvers.kmeans import assign, lloyd
from skfactor.solvers.kmeans1d import assign_1d

__all__ = ["DeepKMeansRegularizer", "cluster_penalty", "spectral_penalty"]

_FEW_SAMPLES = 1 << 16
#: Times `tol`: clusters near their end, since a refresh goes on from them and should move few rows.
_STEP_TOL = 4


def cluster_penalty(rows, labels, lam, *, n_clusters, zero=False):
    r"""Un-relaxed penalty :math:`\frac{\lambda}{2} \sum_i \|w_i - c_{a(i)}\|^2`, centres the means of their members.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
    labels : LongTensor of shape (n,)
    lam : float
    n_clusters : int
    zero : bool, default=False
        Whether the centre of label 0 is 0 instead of a mean.

    Returns
    -------
    penalty : Tensor
        A scalar; its gradient is :math:`\lambda (w_i - c_{a(i)})`.

    Examples
    --------
    >>> import torch
    >>> cluster_penalty(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]), 1.0, n_clusters=2)
    tensor(1.)
    """
    sums = rows.new_zeros(n_clusters, rows.shape[1]).index_add(0, labels, rows)
    centers = sums / torch.bincount(labels, minlength=n_clusters).clamp(min=1)[:, None]
    if zero:
        centers = torch.cat([torch.zeros_like(centers[:1]), centers[1:]])
    return 0.5 * lam * (rows - centers[labels]).square().sum()


def spectral_penalty(rows, subspace, lam):
    r"""Published relaxation :math:`\frac{\lambda}{2} (\operatorname{tr} W^TW - \operatorname{tr} F^TW^TWF)`, W = rowsᵀ.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
    subspace : Tensor of shape (n, k)
        F, with orthonormal columns.
    lam : float

    Returns
    -------
    penalty : Tensor
        A scalar; its gradient is :math:`\lambda (I - FF^T)\,\mathrm{rows}`.
    """
    # as one square: the difference of the two traces would lose all digits where it is near zero
    return 0.5 * lam * (rows - subspace @ (subspace.T @ rows)).square().sum()


class DeepKMeansRegularizer(CentroidCodes, BaseCompressor):
    r"""Deep k-Means [1]_: training pulls the rows of a layer's kernels together, then k-means shares them.

    During training `penalty` is added to the loss,

    .. math:: \frac{\lambda}{2} \sum_i \|w_i - c_{a(i)}\|^2,

    with :math:`w_i` the samples of the weight, :math:`a` their clusters at the last `fit` or `refresh`, and
    :math:`c_k` the mean of the present members of cluster k, so that only the spread within clusters costs something.
    The paper relaxes the clusters to an orthonormal F, `relaxation="spectral"`:
    :math:`\frac{\lambda}{2}(\operatorname{tr} W^TW - \operatorname{tr} F^TW^TWF)`, where the columns of W are the
    samples. The best F spans the leading k right singular vectors of W, and W has no more of them than a sample has
    values: **from `n_clusters` = length of a sample on, three for the rows of 3x3 kernels, the relaxed penalty and its
    gradient are zero** at every refresh. The paper's own settings (6 to 144 clusters) are all of this kind, and a
    warning says so.

    As an estimator it is k-means of the samples: codes by nearest centre, one codebook. `skfactor.DeepKMeansTraining`
    uses it as the rule of a layer.

    Parameters
    ----------
    n_clusters : int, default=16
        Clusters, the zero cluster included. Where there are fewer distinct samples, fewer are used.
    lam : float, default=1e-3
        Weight :math:`\lambda` of the penalty beside a loss that is a mean over examples.
    update_every : int, default=1
        Epochs between two refreshes of the clusters; the paper has 5.
    relaxation : {None, "spectral"}, default=None
    vector_size : {"kernel_row", "kernel", "row"} or int, default="kernel_row"
        What a sample is: the rows of kernels as in the paper, whole kernels, whole rows of `X` (filters), or that many
        neighbouring columns. Where there are no kernels (`kernel_shape` None or of one axis), rows of `X`.
    kernel_shape : tuple of int, default=None
        What a row of `X` is, (c_in, kh, kw) for a convolution; `skfactor.compress` and `DeepKMeansTraining` fill it in.
    zero_fraction : float, default=0.0
        Share of the samples, those of the smallest norm, whose centre is 0; the other clusters share the rest.
    init : "k-means++" or array-like of shape (n_centers, vector_size), default="k-means++"
        Start of Lloyd's iterations; centres without the one that is 0. Scalars get the optimal centres from any start.
    n_init : int, default=1
        Starts of "k-means++".
    max_iter : int, default=300
    tol : float, default=1e-4
        As in `KMeansWeightSharer`.
    coder : str, default="auto"
        Entropy coder of the codes in a file.
    random_state : int, RandomState instance or None, default=None
        For "k-means++".

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, vector_size_)
        The first one is 0 where `zero_fraction` is positive.
    labels_ : ndarray of shape (n_rows, n_columns // vector_size_)
    inertia_ : float
        Weighted squared error of the training data.
    subspace_ : ndarray of shape (n_samples, rank) or None
        F of the spectral relaxation.
    vector_size_ : int
        Length of a sample.
    zero_threshold_ : float or None
        Largest squared norm of the samples that are 0; None without them.
    decoder_ : CodebookDecoder
    kappa_ : float
        The course's compression factor :math:`1 - K/N`, K centres for N samples.
    rate_ : int
        Bytes of codes and codebook when stored, everything counted.
    n_iter_ : int
    n_features_in_ : int

    See Also
    --------
    KMeansWeightSharer : The same codebooks chosen for a layer's output, without training.

    References
    ----------
    .. [1] J. Wu et al., "Deep k-Means: Re-Training and Parameter Sharing with Harder Cluster Assignments for
       Compressing Deep Convolutions", ICML 2018, :arxiv:`1806.09228`

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skfactor import DeepKMeansRegularizer
    >>> W = np.float32([[0.0, 0.2], [5.0, 5.0], [0.2, 0.0], [5.0, 5.2]])
    >>> regularizer = DeepKMeansRegularizer(n_clusters=2, lam=1.0, random_state=0).fit(W)
    >>> regularizer.inverse_transform(regularizer.transform(W)).round(3)
    array([[0.1, 0.1],
           [5. , 5.1],
           [0.1, 0.1],
           [5. , 5.1]], dtype=float32)
    >>> weight = torch.tensor(W, requires_grad=True)
    >>> regularizer.penalty(weight).backward()
    >>> weight.grad[0]
    tensor([-0.1000,  0.1000])
    """

    _parameter_constraints: dict = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "lam": [Interval(Real, 0, None, closed="left")],
        "update_every": [Interval(Integral, 1, None, closed="left")],
        "relaxation": [StrOptions({"spectral"}), None],
        "vector_size": [StrOptions({"kernel_row", "kernel", "row"}), Interval(Integral, 1, None, closed="left")],
        "kernel_shape": ["array-like", None],
        "zero_fraction": [Interval(Real, 0, 1, closed="left")],
        "init": [StrOptions({"k-means++"}), "array-like"],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "coder": [StrOptions({"auto", *CODERS})],
        "random_state": ["random_state"],
    }

    def __init__(self, n_clusters=16, *, lam=1e-3, update_every=1, relaxation=None, vector_size="kernel_row",
                 kernel_shape=None, zero_fraction=0.0, init="k-means++", n_init=1, max_iter=300, tol=1e-4,
                 coder="auto", random_state=None):
        self.n_clusters = n_clusters
        self.lam = lam
        self.update_every = update_every
        self.relaxation = relaxation
        self.vector_size = vector_size
        self.kernel_shape = kernel_shape
        self.zero_fraction = zero_fraction
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.coder = coder
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, importance=None):
        """Find the clusters.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
            Weight of each element's squared error; a sample counts with the mean of its elements.

        Returns
        -------
        self : DeepKMeansRegularizer
        """
        X = check_matrix(self, X, reset=True)
        size = self._sample_length(X.shape[1], self.kernel_shape)
        start = None if isinstance(self.init, str) else self._checked_init(size)
        self._solve(X, size, check_row_weights(X, sample_weight), check_importance(X, importance), start)
        if warning := self._spectral_warning():
            warnings.warn(warning, UserWarning, stacklevel=3)
        return self

    def refresh(self, weight):
        """Go on from the present clusters to those of a weight that has moved; fits where there are none yet.

        Parameters
        ----------
        weight : Tensor or ndarray of shape (n_rows, ...)
            With more than two axes and no `kernel_shape`, the axes after the first are it.

        Returns
        -------
        self : DeepKMeansRegularizer
        """
        self._validate_params()
        shape = tuple(weight.shape[1:]) if self.kernel_shape is None and weight.ndim > 2 else self.kernel_shape
        X = check_matrix(self, weight.reshape(len(weight), -1), reset=True)
        size = self._sample_length(X.shape[1], shape)
        start = None
        if hasattr(self, "labels_") and (self.labels_.size, self.vector_size_) == (X.size // size, size):
            start = self.cluster_centers_[int(self.zero_threshold_ is not None) :]
        self._solve(X, size, None, None, start)
        return self

    def penalty(self, weight):
        """Differentiable penalty of a weight under the clusters of the last `fit` or `refresh`.

        Parameters
        ----------
        weight : Tensor
            With as many samples as the one of `fit`; the first call fits where nothing did.

        Returns
        -------
        penalty : Tensor
            A scalar.
        """
        if not hasattr(self, "labels_"):
            self.refresh(weight)
        if weight.numel() != self.labels_.size * self.vector_size_:
            raise ValueError(f"weight must have the {self.labels_.size * self.vector_size_} elements of fit, "
                             f"got {weight.numel()}")
        rows = weight.reshape(-1, self.vector_size_)
        if self.relaxation == "spectral":
            return spectral_penalty(rows, torch.as_tensor(self.subspace_).to(rows), self.lam)
        labels = torch.as_tensor(self.labels_.reshape(-1).astype(np.int64), device=rows.device)
        return cluster_penalty(rows, labels, self.lam, n_clusters=len(self.cluster_centers_),
                               zero=self.zero_threshold_ is not None)

    def transform(self, X):
        """Codes of `X`: for every sample the number of its centre.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_ // vector_size_), dtype uint8, uint16 or int32
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        samples = np.ascontiguousarray(X).reshape(-1, self.vector_size_)
        return _codes(samples, self.cluster_centers_, self.zero_threshold_).reshape(len(X), -1)

    def _solve(self, X, size, counts, importance, start):
        """Clusters of validated `X` in samples of `size` values, from the centres `start` or from k-means++."""
        samples = np.ascontiguousarray(X).reshape(-1, size)
        counts = None if counts is None else np.repeat(counts[:, 0], X.shape[1] // size)
        weights = counts
        if importance is not None:
            per_sample = np.broadcast_to(importance, X.shape).reshape(-1, size).mean(axis=1)
            weights = per_sample if counts is None else per_sample * counts
        threshold, kept = self._zero_samples(samples, counts)
        centers, n_iter = self._cluster(samples[kept], None if weights is None else weights[kept], start,
                                        self.n_clusters - (threshold is not None))
        if threshold is not None:
            centers = np.concatenate([np.zeros((1, size)), centers])
        centers = np.ascontiguousarray(centers, dtype=X.dtype)

        self.decoder_ = CodebookDecoder(centers[None], dtype=X.dtype.name)
        self.cluster_centers_ = centers
        self.zero_threshold_ = threshold
        self.vector_size_ = size
        self.labels_ = _codes(samples, centers, threshold).reshape(len(X), -1)
        self.subspace_ = _leading_subspace(samples, self.n_clusters) if self.relaxation == "spectral" else None
        self.inertia_ = squared_error(samples, self.decoder_, self.labels_.reshape(-1, 1),
                                      None if weights is None else weights[:, None])
        self.n_iter_ = n_iter

    def _cluster(self, samples, weights, start, n_clusters):
        """Centres of the samples, and iterations; none where there are no samples."""
        if len(samples) == 0 or n_clusters == 0:
            return np.empty((0, samples.shape[1])), 1
        if start is not None and len(start) and samples.shape[1] > 1:
            found = lloyd(samples, start, sample_weight=weights, max_iter=self.max_iter, tol=_STEP_TOL * self.tol)
            return found.centers, found.n_iter
        samples, weights = _merged(samples, weights)
        sharer = KMeansWeightSharer(n_clusters, vector_size=samples.shape[1], n_init=self.n_init,
                                    max_iter=self.max_iter, tol=self.tol * _STEP_TOL / MOMENTUM_TOL,
                                    random_state=check_random_state(self.random_state))
        sharer.fit(samples, importance=None if weights is None else weights[:, None])
        return sharer.cluster_centers_, sharer.n_iter_

    def _zero_samples(self, samples, counts):
        """Largest squared norm of the samples that are 0, or None; and which samples are not."""
        if self.zero_fraction == 0:
            return None, slice(None)
        if self.n_clusters < 2:
            raise ValueError("zero_fraction needs at least two clusters, got n_clusters=1")
        norms = _square_norms(samples)
        order = np.argsort(norms, kind="stable")
        mass = np.arange(1, len(norms) + 1) if counts is None else np.cumsum(counts[order])
        last = np.searchsorted(mass, self.zero_fraction * mass[-1])
        threshold = float(norms[order[min(last, len(norms) - 1)]])
        return threshold, norms > threshold

    def _checked_init(self, size):
        init = np.asarray(self.init, dtype=np.float64)
        if init.ndim != 2 or init.shape[1] != size or not 1 <= len(init) <= self.n_clusters:
            raise ValueError(f"init must be 'k-means++' or at most n_clusters={self.n_clusters} centres of {size} "
                             f"values, got shape {init.shape}")
        return init

    def _sample_length(self, n_columns, kernel_shape):
        """Length of a sample of a row of `n_columns` values."""
        shape = (n_columns,) if kernel_shape is None else tuple(kernel_shape)
        if not all(isinstance(s, Integral) and s > 0 for s in shape) or math.prod(shape) != n_columns:
            raise ValueError(f"kernel_shape must be (c_in, *spatial), integers with the product {n_columns} of the "
                             f"columns of X, got {kernel_shape!r}")
        if len(shape) == 1 or self.vector_size == "row":
            length = n_columns if isinstance(self.vector_size, str) else self.vector_size
        else:
            named = {"kernel_row": shape[-1], "kernel": math.prod(shape[1:])}
            length = named.get(self.vector_size, self.vector_size)
        if n_columns % length:
            raise ValueError(f"vector_size must divide the {n_columns} columns of X, got {length}")
        return length

    def _spectral_warning(self):
        """What is wrong with the relaxation for the fitted samples, or an empty string."""
        rank = min(self.vector_size_, self.labels_.size)
        if self.relaxation != "spectral" or self.n_clusters < rank:
            return ""
        return (f"relaxation='spectral' does nothing with n_clusters={self.n_clusters}: for samples of length "
                f"{self.vector_size_} the relaxed penalty is identically zero from n_clusters={rank} on; "
                "relaxation=None has the penalty that it relaxes")


def _codes(samples, centers, threshold):
    """Number of the nearest centre of every sample; 0 for those of a squared norm up to `threshold`."""
    first = int(threshold is not None)
    dtype = label_dtype(len(centers))
    if len(centers) == first:
        return np.zeros(len(samples), dtype=dtype)
    if samples.shape[1] == 1:
        codes = assign_1d(samples[:, 0], centers[first:, 0]).astype(dtype)
    else:
        codes = assign(samples, centers[first:]).astype(dtype)
    if threshold is not None:
        codes += 1
        codes[_square_norms(samples) <= threshold] = 0
    return codes


def _merged(samples, weights):
    """Distinct samples with their total weights, so that a weight means what a repetition means to random starts.

    Among many samples a random start is a draw of few of them anyway, and sorting them is not worth its time.
    """
    if samples.shape[1] == 1 or len(samples) > _FEW_SAMPLES:
        return samples, weights
    distinct, inverse = np.unique(samples, axis=0, return_inverse=True)
    mass = np.bincount(inverse.reshape(-1), weights, minlength=len(distinct)).astype(np.float64)
    return distinct[mass > 0], mass[mass > 0]


def _square_norms(samples):
    return np.einsum("ij,ij->i", samples, samples, dtype=np.float64)


def _leading_subspace(samples, n_components):
    """Leading right singular vectors of W = samplesᵀ, those of singular values above rounding, as columns."""
    U, sigma, _ = np.linalg.svd(samples, full_matrices=False)
    rank = int((sigma > sigma[0] * max(samples.shape) * np.finfo(samples.dtype).eps).sum())
    return np.ascontiguousarray(U[:, : min(n_components, rank)])
