"""`KMeansWeightSharer`: weight sharing by optimal k-means."""
# SPDX-License-Identifier: BSD-3-Clause

import warnings
from numbers import Integral, Real

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_matrix
from skfactor.codec.coders import CODERS
from skfactor.codec.decoders import CodebookDecoder
from skfactor.estimators._codebooks import (
    Plan,
    assign_codes,
    known_inertia,
    row_importance,
    solve_books,
    split_books,
    squared_error,
    weighted_square_sum,
)
from skfactor.estimators._output import CodebookCompressor, OutputProblem, fit_for_output
from skfactor.estimators.base import CentroidCodes
from skfactor.solvers.feedback import output_error
from skfactor.solvers.kmeans1d import elbow_1d

__all__ = ["KMeansWeightSharer"]

_DEEP_COMPRESSION_INITS = ("linear", "density", "random")


class KMeansWeightSharer(CentroidCodes, CodebookCompressor):
    r"""Weight sharing: every weight is replaced by one of `n_clusters` shared values.

    Minimises the squared error of the reconstruction,

    .. math:: \sum_{ij} w_{ij}\,(x_{ij} - c_{a(ij)})^2 + \lambda \sum_{ij} \mathrm{bits}(a(ij)),

    over the centroids :math:`c` and the codes :math:`a`; the weights :math:`w` come from `sample_weight` and
    `importance`, and :math:`\lambda` is 0 unless `entropy_weight` is set. With `input_gram` it is the error of the
    layer's output instead, :math:`\operatorname{tr}\,(X-\hat X)\,G\,(X-\hat X)^T`, that codes and centroids lower.
    For scalars (`vector_size=1`) the default finds the globally optimal centroids of weights to about 1e-7 of their
    error, deterministically and at any scale of the data [1]_; values in many narrow clumps can leave it some 1e-4
    above, which `certify=True` closes. Deep Compression's three starts followed by Lloyd's iterations [2]_ are there
    for comparison.

    Parameters
    ----------
    n_clusters : int, default=16
        Centroids of each codebook (K). Where there are fewer distinct values, fewer are used, with a
        `ConvergenceWarning`.
    granularity : {"tensor", "row", "column", "group"}, default="tensor"
        One codebook for everything, one per row, one per column, or one per block of `group_size` rows.
    group_size : int, default=None
        Rows that share a codebook; needed by and only allowed with `granularity="group"`.
    vector_size : int, default=1
        Cluster sub-vectors of this many neighbouring columns instead of scalars (product quantisation);
        `vector_size=n_features` is k-means on whole rows. Must divide the number of columns.
    preserve_zeros : bool, default=False
        Keep weights that are exactly zero exactly zero: one of the `n_clusters` centroids is 0. Scalars only.
    entropy_weight : float, default=0.0
        Entropy-constrained sharing [3]_: price of one bit of the (ideal) entropy code of a weight, in units of
        the mean weighted square of `X` (of the layer's output per weight, with `input_gram`). Clusters that do
        not earn their bits disappear.
    init : {"auto", "optimal", "linear", "density", "random", "k-means++"}, default="auto"
        "auto" is "optimal" for scalars and "k-means++" for sub-vectors. "linear", "density" and "random" start
        Lloyd's iterations as in Deep Compression.
    max_iter : int, default=300
        Most iterations of Lloyd's algorithm, of the entropy-constrained one, and of the vector one. With
        `max_iter=0` the Deep Compression starts are used as they are.
    tol : float, default=1e-4
        Relative decrease of the objective below which these iterations stop (twenty times this for sub-vectors,
        whose iterations have momentum: about one percent of inertia above where they would end).
    n_init : int, default=1
        Number of random starts, of which the best is kept ("k-means++" and "random").
    certify : bool, default=False
        Prove the optimality of the scalar codebook: closes the duality gap, so that `inertia_` equals
        `lower_bound_` to rounding. Takes some seconds for millions of weights.
    coder : str, default="auto"
        Entropy coder of the codes in a file; "auto" takes the smallest (of more than 2**19 codes the slow context coder
        only where it saves one percent), "huffman" is Deep Compression's third stage.
    random_state : int, RandomState instance or None, default=None
        For "k-means++" and "random"; the optimal solution needs none.

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, vector_size) or (n_codebooks, n_clusters, vector_size)
        Centroids; those of scalars ascend.
    labels_ : ndarray of shape (n_rows, n_columns // vector_size)
        Codes of the training data.
    inertia_ : float
        Weighted squared error of the training data.
    output_error_ : float or None
        Weighted squared error of the layer's output, when `input_gram` was given.
    lower_bound_ : float
        Certificate: no codebook of this size has a smaller `inertia_`. 0 where nothing better is known.
    code_lengths_ : ndarray of shape (n_codebooks, n_clusters) or None
        Bits of each code that the entropy constraint assumed.
    decoder_ : CodebookDecoder
    kappa_ : float
        The course's compression factor :math:`1 - K/N`, K centroids for N shared values.
    rate_ : int
        Bytes of codes and codebooks when stored, everything counted.
    bits_per_weight_ : float
        `rate_` in bits per element of `X`.
    n_iter_ : int
    n_features_in_ : int

    References
    ----------
    .. [1] X. Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991),
       :doi:`10.1016/0196-6774(91)90039-2`
    .. [2] S. Han, H. Mao, W. Dally, "Deep Compression", ICLR 2016, :arxiv:`1510.00149`
    .. [3] P. Chou, T. Lookabaugh, R. Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP 37 (1989),
       :doi:`10.1109/29.17498`
    .. [4] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ", ICLR 2023, :arxiv:`2210.17323`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import KMeansWeightSharer
    >>> W = np.array([[-1.0, -0.9, 0.0], [0.1, 2.0, 2.2]])
    >>> sharer = KMeansWeightSharer(n_clusters=3).fit(W)
    >>> sharer.transform(W)
    array([[0, 0, 1],
           [1, 2, 2]], dtype=uint8)
    >>> sharer.inverse_transform(sharer.labels_)
    array([[-0.95, -0.95,  0.05],
           [ 0.05,  2.1 ,  2.1 ]])
    """

    _parameter_constraints: dict = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "granularity": [StrOptions({"tensor", "row", "column", "group"})],
        "group_size": [Interval(Integral, 1, None, closed="left"), None],
        "vector_size": [Interval(Integral, 1, None, closed="left")],
        "preserve_zeros": ["boolean"],
        "entropy_weight": [Interval(Real, 0, None, closed="left")],
        "init": [StrOptions({"auto", "optimal", "k-means++", *_DEEP_COMPRESSION_INITS})],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "certify": ["boolean"],
        "coder": [StrOptions({"auto", *CODERS})],
        "random_state": ["random_state"],
    }

    def __init__(self, n_clusters=16, *, granularity="tensor", group_size=None, vector_size=1, preserve_zeros=False,
                 entropy_weight=0.0, init="auto", max_iter=300, tol=1e-4, n_init=1, certify=False, coder="auto",
                 random_state=None):
        self.n_clusters = n_clusters
        self.granularity = granularity
        self.group_size = group_size
        self.vector_size = vector_size
        self.preserve_zeros = preserve_zeros
        self.entropy_weight = entropy_weight
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.certify = certify
        self.coder = coder
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None, importance=None, input_gram=None):
        """Find the codebooks.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
            Weights of a layer, rows are filters or units; or data, rows are samples.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
            Weight of each element's squared error, a Fisher diagonal for example; it does not change what a bit
            costs. With `vector_size > 1` a sub-vector counts with the mean of its elements. With `input_gram` it
            is the importance of each row's output, (n_rows, 1).
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            Second moment of the layer's inputs, :math:`G = E[uu^T]`; one matrix per group of rows for a grouped
            convolution. Codes are then chosen by error feedback [4]_ and coordinate descent, and centroids refit in
            closed form; the result is never worse in output error than without.

        Returns
        -------
        self : KMeansWeightSharer
        """
        X, weights, gram = self._check_fit(X, sample_weight, importance, input_gram)
        plan = self._resolve(X, weights, gram)

        # without the gram a bit is weighed against the error of the weights: the mean input power makes them one unit
        start = plan if gram is None else plan._replace(lagrangian=plan.lagrangian / _mean_power(gram))
        solution = solve_books(X, weights, start)
        codes = solution.codes
        if codes is None:
            codes = assign_codes(X, solution.codebooks, start, code_lengths=solution.code_lengths,
                                 importance=weights.importance)
        inertia = known_inertia(X, solution, weights.of_error()) if gram is None else None
        lower_bound, problem, error = solution.lower_bound, None, None
        if gram is not None:
            problem = OutputProblem(gram, row_importance(weights), plan._replace(rng=None))
            counts = None if weights.counts is None else weights.counts[:, 0]
            solution, codes, uses_feedback, error = fit_for_output(X, solution, codes, problem, counts)
            problem, plan = (problem, plan) if uses_feedback else (None, start)

        self.decoder_ = CodebookDecoder(solution.codebooks, self.granularity, self.group_size, X.dtype.name)
        self.labels_ = codes
        self.cluster_centers_ = solution.codebooks[0] if len(solution.codebooks) == 1 else solution.codebooks
        self.code_lengths_ = solution.code_lengths
        self.inertia_ = inertia
        if inertia is None:
            self.inertia_ = squared_error(X, self.decoder_, codes, weights.of_error())
        self.output_error_ = error
        self.lower_bound_ = min(lower_bound, self.inertia_)
        self.n_iter_ = max(1, solution.n_iter)
        self._solution, self._plan, self._problem = solution, plan._replace(rng=None), problem
        self._warn_of_fewer()
        return self

    def transform(self, X):
        """Codes of `X`: for every weight the number of its centroid.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            With one codebook per row or group of rows, `n_rows` must be the one of `fit`.

        Returns
        -------
        codes : ndarray of shape (n_rows, n_features_in_ // vector_size), dtype uint8, uint16 or int32
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        if self.granularity in ("row", "group") and len(X) != len(self.labels_):
            raise ValueError(f"with granularity={self.granularity!r} X must have the {len(self.labels_)} rows of fit, "
                             f"got {len(X)}")
        return self._codes(X)

    def elbow_curve(self, X, k_max=64, *, sample_weight=None, importance=None):
        """Inertia of the optimal codebook of every size up to `k_max`, in one pass.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        k_max : int, default=64
        sample_weight, importance : array-like, default=None
            As in `fit`.

        Returns
        -------
        inertia : ndarray of shape (k_max,)
            `inertia[k - 1]` belongs to k clusters; with several codebooks, the sum over them.
        """
        if not isinstance(k_max, Integral) or k_max < 1:
            raise ValueError(f"k_max must be an integer of at least 1, got {k_max!r}")
        probe = type(self)(**self.get_params())  # validates X and leaves this estimator as it is
        X, weights, _ = probe._check_fit(X, sample_weight, importance, None)
        plan = probe._resolve(X, weights, None)
        if plan.vector_size > 1:
            raise ValueError(f"elbow_curve needs vector_size=1, got {plan.vector_size}")
        books = split_books(X, plan)
        book_weights = [None] * len(books)
        if weights.of_error() is not None:
            book_weights = split_books(np.broadcast_to(weights.of_error(), X.shape), plan)
        return sum(elbow_1d(book[:, 0], k_max, weights=None if w is None else w[:, 0])
                   for book, w in zip(books, book_weights))

    def course_error(self, X):
        r"""The course's error :math:`\sum\|x - \Omega_q(x)\|_2`, norms of scalars or sub-vectors, not squared.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        error : float
        """
        X_hat = self.inverse_transform(self.transform(X))
        X = check_matrix(self, X, reset=False)
        difference = (X - X_hat).astype(np.float64).reshape(-1, self.vector_size)
        return float(np.linalg.norm(difference, axis=1).sum())

    @property
    def bits_per_weight_(self):
        return 8.0 * self.rate_ / (len(self.labels_) * self.n_features_in_)

    def _resolve(self, X, weights, gram):
        """Turn the parameters into locals of the fit; raise on combinations that mean nothing."""
        vector = self.vector_size > 1
        init = self.init if self.init != "auto" else ("k-means++" if vector else "optimal")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size must be given with granularity='group' and only then, got "
                             f"granularity={self.granularity!r}, group_size={self.group_size}")
        if X.shape[1] % self.vector_size:
            raise ValueError(f"vector_size must divide the {X.shape[1]} columns of X, got {self.vector_size}")
        if vector:
            for name, neutral in (("preserve_zeros", False), ("entropy_weight", 0.0), ("certify", False)):
                if getattr(self, name) != neutral:
                    raise ValueError(f"{name} needs vector_size=1, got vector_size={self.vector_size}")
        if vector != (init == "k-means++"):
            allowed = "'auto' or 'k-means++'" if vector else "'auto', 'optimal', 'linear', 'density' or 'random'"
            raise ValueError(f"init must be {allowed} with vector_size={self.vector_size}, got {self.init!r}")
        if self.entropy_weight > 0 and init != "optimal":
            raise ValueError(f"entropy_weight needs init='auto' or 'optimal', got {self.init!r}")
        if self.certify and init != "optimal":
            raise ValueError(f"certify needs init='auto' or 'optimal', got {self.init!r}")
        if gram is not None:
            self._check_output_mode()
        lagrangian = self.entropy_weight and self.entropy_weight * _mean_square(X, weights, gram)
        return Plan(self.n_clusters, self.granularity, self.group_size or 1, self.vector_size, self.preserve_zeros,
                    lagrangian, init, self.max_iter, self.tol, self.n_init, self.certify,
                    check_random_state(self.random_state))

    def _check_output_mode(self):
        if self.granularity == "column":
            raise ValueError("input_gram needs granularity='tensor', 'row' or 'group', got 'column'")
        special = [name for name, on in (("vector_size", self.vector_size > 1), ("preserve_zeros", self.preserve_zeros),
                                         ("entropy_weight", self.entropy_weight > 0)) if on]
        if special and self.granularity != "tensor":
            raise ValueError(f"input_gram with {special[0]} needs granularity='tensor', got {self.granularity!r}")

    def _warn_of_fewer(self):
        found = self.decoder_.codebooks.shape[1]
        if found < self.n_clusters and self.code_lengths_ is None:
            kind = "values" if self.vector_size == 1 else "sub-vectors"
            warnings.warn(f"X gives only {found} distinct {kind} to share for n_clusters={self.n_clusters}; "
                          f"{found} clusters are used",
                          ConvergenceWarning, stacklevel=4)


def _mean_power(gram):
    return float(np.einsum("gii->", gram)) / (len(gram) * gram.shape[1]) or 1.0


def _mean_square(X, weights, gram):
    """Mean weighted square of an element of `X`, or of its part in the output of the layer."""
    w = weights.of_error()
    if gram is None:
        total = weighted_square_sum(X, w)
    else:
        row_weight = None if w is None else np.ascontiguousarray(w[:, 0])
        total = output_error(X, np.zeros_like(X), gram, row_weight=row_weight)
    n_elements = X.size if weights.counts is None else weights.counts.sum() * X.shape[1]
    return total / n_elements
