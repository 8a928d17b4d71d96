"""Scorers that see the whole way: X through all steps to the file and back, never the last step alone."""
# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass
from numbers import Real

from skfactor.selection.measures import distortion, measure, rate

__all__ = ["CompressionScorer", "compression_scorer", "distortion_scorer", "rate_distortion_scorer", "rate_scorer"]


@dataclass(frozen=True)
class CompressionScorer:
    """`scorer(estimator, X, y=None, sample_weight=None)` of a fitted estimator or Pipeline of compressors.

    Parameters
    ----------
    kind : {"all", "rate", "distortion", "lagrangian"}
        "all" gives the dict of `measure`, the others one number of which more is better.
    lam : float
        Price of one bit per weight, for "lagrangian".
    """

    kind: str
    lam: float = 0.0

    def __call__(self, estimator, X, y=None, sample_weight=None):
        if self.kind == "rate":
            return -float(rate(estimator, X))
        if self.kind == "distortion":
            return -distortion(estimator, X, sample_weight=sample_weight)
        return self.of(measure(estimator, X, sample_weight=sample_weight))

    def of(self, measures):
        """The score of what `measure` gave."""
        if self.kind == "rate":
            return -float(measures["bytes"])
        if self.kind == "distortion":
            return -measures["distortion"]
        if self.kind == "lagrangian":
            return -(measures["distortion"] + self.lam * measures["bits_per_weight"])
        return dict(measures)


#: Minus the bytes of the file, everything counted.
rate_scorer = CompressionScorer("rate")

#: Minus the relative squared error of the reconstruction.
distortion_scorer = CompressionScorer("distortion")

#: All measures at once: `cv_results_` gets `mean_test_bytes`, `mean_test_distortion`, `mean_test_bits_per_weight` and
#: `mean_test_kappa`. They are costs as they are, not negated: choose with a rule of `skfactor.selection`.
compression_scorer = CompressionScorer("all")


def rate_distortion_scorer(lam):
    r"""Scorer of minus :math:`\|X-\hat X\|^2/\|X\|^2 + \lambda\,` bits per weight.

    A price that is too high makes the empty file the best: with constraints instead of prices
    (`smallest_within`, `best_under`) that cannot happen.

    Parameters
    ----------
    lam : float
        Price of one bit per weight, in units of the relative squared error.

    Returns
    -------
    scorer : CompressionScorer

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import KMeansWeightSharer
    >>> from skfactor.selection import rate_distortion_scorer
    >>> X = np.repeat([[1.0], [-1.0]], 500, axis=0)
    >>> sharer = KMeansWeightSharer(n_clusters=2).fit(X)
    >>> rate_distortion_scorer(0.0)(sharer, X) == 0.0
    True
    """
    if not (isinstance(lam, Real) and lam >= 0):
        raise ValueError(f"lam must be a number of at least 0, got {lam!r}")
    return CompressionScorer("lagrangian", float(lam))
