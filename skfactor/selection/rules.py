"""Rules that choose one candidate of a search by size and error: `GridSearchCV(..., refit=rule)`.

A rule is a callable of `cv_results_` that returns the index of the chosen candidate. It reads the columns of
`compression_scorer` (`mean_test_bytes`, `mean_test_distortion`, `mean_test_bits_per_weight`), or those of
`scoring={"rate": rate_scorer, "distortion": distortion_scorer}`. Candidates that failed are left out.
"""
# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass
from numbers import Real

import numpy as np

from skfactor.plotting import pareto_front

__all__ = ["best_under", "elbow", "smallest_within"]

_COLUMNS = {  # cost -> columns that hold it, or its negative
    "bytes": ("mean_test_bytes", "mean_test_rate"),
    "distortion": ("mean_test_distortion",),
    "bits per weight": ("mean_test_bits_per_weight",),
}


def _cost(cv_results, name):
    """A cost of every candidate, infinite where it failed."""
    for column in _COLUMNS[name]:
        if column in cv_results:
            # scorers give the negative of a cost
            cost = np.abs(np.asarray(cv_results[column], dtype=np.float64))
            return np.where(np.isfinite(cost), cost, np.inf)
    raise ValueError(f"the rule needs {' or '.join(map(repr, _COLUMNS[name]))} in cv_results_, got "
                     f"{sorted(c for c in cv_results if c.startswith('mean_test_'))}; search with "
                     "scoring=compression_scorer")


def _first_best(*costs, among=None):
    """Index of the least of the first cost, ties by the next ones and then by position; infinite ones never win."""
    allowed = np.isfinite(costs).all(axis=0)
    if not allowed.any():
        raise ValueError("every candidate of the search failed; there is nothing to choose from")
    if among is not None:
        allowed &= among
    order = np.lexsort(costs[::-1])
    return int(order[allowed[order]][0])


@dataclass(frozen=True)
class _SmallestWithin:
    distortion: float
    rate: float | None = None

    def __call__(self, cv_results):
        size, error = _cost(cv_results, "bytes"), _cost(cv_results, "distortion")
        small = np.isfinite(size) if self.rate is None else size <= self.rate
        allowed = small & (error <= self.distortion)
        if not allowed.any():
            nearest = _first_best(error, size, among=small) if small.any() else _first_best(size, error)
            limit = "" if self.rate is None else f" in at most {self.rate:.0f} bytes"
            raise ValueError(f"no candidate reaches a distortion of at most {self.distortion:.4g}{limit}; the nearest "
                             f"has {error[nearest]:.4g} in {size[nearest]:.0f} bytes: {cv_results['params'][nearest]}")
        return _first_best(size, error, among=allowed)

    def explain(self, cv_results, index):
        limit = "" if self.rate is None else f" and at most {self.rate:.0f} bytes"
        return f"the fewest bytes with a distortion of at most {self.distortion:.4g}{limit}"


@dataclass(frozen=True)
class _BestUnder:
    rate: float | None = None
    bits_per_weight: float | None = None

    def __call__(self, cv_results):
        name, limit = self._limit()
        size, error = _cost(cv_results, name), _cost(cv_results, "distortion")
        if not (size <= limit).any():
            nearest = _first_best(size, error)
            raise ValueError(f"no candidate takes at most {limit:.6g} {name}; the smallest takes {size[nearest]:.6g}: "
                             f"{cv_results['params'][nearest]}")
        return _first_best(error, size, among=size <= limit)

    def _limit(self):
        return ("bytes", self.rate) if self.rate is not None else ("bits per weight", self.bits_per_weight)

    def explain(self, cv_results, index):
        name, limit = self._limit()
        return f"the least distortion with at most {limit:.6g} {name}"


@dataclass(frozen=True)
class _Elbow:
    """Rule: the candidate that lies farthest below the chord of the front of size and error.

    The front holds the candidates that no other beats in both bytes and distortion; both are scaled to [0, 1] over the
    front, and the chord joins its ends. The answer depends on those ends: a wider grid moves the elbow, and curves that
    follow a power law have none of their own. Where a tolerable error or a size is known, use `smallest_within` or
    `best_under`. On a front that lies nowhere below its chord, the end of the smaller error is chosen.

    Examples
    --------
    >>> from skfactor.selection import elbow
    >>> elbow({"mean_test_bytes": [100, 200, 300, 400], "mean_test_distortion": [0.4, 0.1, 0.08, 0.05]})
    1
    """

    def __call__(self, cv_results):
        size, error = _cost(cv_results, "bytes"), _cost(cv_results, "distortion")
        front = self._front(size, error)
        x, y = (_unit(v[front]) for v in (size, error))
        # below the chord from (0, 1) to (1, 0), up to a factor of sqrt(2); ties go to the smaller error
        below = 1.0 - x - y
        return int(front[len(front) - 1 - np.argmax(below[::-1])])

    @staticmethod
    def _front(size, error):
        _first_best(size, error)
        usable = np.flatnonzero(np.isfinite(size) & np.isfinite(error))
        return usable[pareto_front(size[usable], error[usable], higher_is_better=False)]

    def explain(self, cv_results, index):
        size, error = _cost(cv_results, "bytes"), _cost(cv_results, "distortion")
        front = self._front(size, error)
        first, last = front[0], front[-1]
        return (f"the elbow of {len(front)} candidates on the front from {size[first]:.0f} bytes (distortion "
                f"{error[first]:.4g}) to {size[last]:.0f} bytes ({error[last]:.4g})")

    def __repr__(self):
        return "elbow"


def _unit(values):
    """Values moved and scaled to [0, 1]."""
    reach = np.ptp(values)
    return (values - values.min()) / reach if reach > 0 else np.zeros(len(values))


elbow = _Elbow()


def smallest_within(distortion, rate=None):
    """Rule: the fewest bytes among the candidates whose distortion is small enough.

    Parameters
    ----------
    distortion : float
        Largest relative squared error allowed.
    rate : float, default=None
        Largest number of bytes allowed.

    Returns
    -------
    rule : callable
        Takes `cv_results_` and returns an index; raises ValueError, naming the nearest candidate, where none fits.

    Examples
    --------
    >>> from skfactor.selection import smallest_within
    >>> cv_results = {"mean_test_bytes": [100, 200, 300], "mean_test_distortion": [0.3, 0.05, 0.01],
    ...               "params": [{"n_clusters": k} for k in (2, 4, 8)]}
    >>> smallest_within(distortion=0.1)(cv_results)
    1
    >>> smallest_within(distortion=0.001)(cv_results)
    Traceback (most recent call last):
    ...
    ValueError: no candidate reaches a distortion of at most 0.001; the nearest has 0.01 in 300 bytes: {'n_clusters': 8}
    """
    return _SmallestWithin(_limit_of("distortion", distortion), None if rate is None else _limit_of("rate", rate))


def best_under(rate=None, *, bits_per_weight=None):
    """Rule: the least distortion among the candidates that are small enough.

    Parameters
    ----------
    rate : float, default=None
        Largest number of bytes allowed.
    bits_per_weight : float, default=None
        Largest number of bits per weight allowed; give either this or `rate`.

    Returns
    -------
    rule : callable
        Takes `cv_results_` and returns an index; raises ValueError, naming the smallest candidate, where none fits.

    Examples
    --------
    >>> from skfactor.selection import best_under
    >>> cv_results = {"mean_test_bytes": [100, 200, 300], "mean_test_distortion": [0.3, 0.05, 0.01]}
    >>> best_under(rate=250)(cv_results)
    1
    """
    if (rate is None) == (bits_per_weight is None):
        raise ValueError(f"give either rate or bits_per_weight, got rate={rate!r} and "
                         f"bits_per_weight={bits_per_weight!r}")
    if rate is not None:
        return _BestUnder(rate=_limit_of("rate", rate))
    return _BestUnder(bits_per_weight=_limit_of("bits_per_weight", bits_per_weight))


def _limit_of(name, value):
    if not isinstance(value, Real) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return value
