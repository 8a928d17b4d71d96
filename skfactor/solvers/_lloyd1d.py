"""Lloyd's algorithm on sorted scalars, and the starting codebooks of Deep Compression.

References
----------
.. [1] Han, Mao & Dally, "Deep Compression", arXiv:1510.00149, section 3.1.
"""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from skfactor.solvers._optimal1d import KMeans1DResult, check_samples, prepare
from skfactor.solvers._prefix import cell_means, interval_inertia
from skfactor.solvers._windows1d import cut

INIT_METHODS = ("linear", "density", "random")


def init_1d(x, n_clusters, *, method, weights=None, rng=None):
    """Starting centres for weight sharing [1]_.

    Parameters
    ----------
    x : ndarray of shape (n,)
    n_clusters : int
    method : {'linear', 'density', 'random'}
        Evenly spaced from the smallest to the largest value, evenly spaced quantiles, or distinct values drawn
        at random (with probability proportional to their weight).
    weights : ndarray of shape (n,), default=None
    rng : numpy.random.Generator or RandomState, default=None
        Needed by ``method='random'``.

    Returns
    -------
    centers : ndarray of shape (n_clusters,), sorted

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import init_1d
    >>> init_1d(np.array([0.0, 1.0, 1.0, 8.0]), 3, method="linear").tolist()
    [0.0, 4.0, 8.0]
    """
    if method not in INIT_METHODS:
        raise ValueError(f"method must be one of {', '.join(INIT_METHODS)}, got {method!r}")
    x, weights = check_samples(x, weights, n_clusters)
    if weights is not None:
        x, weights = x[weights > 0], weights[weights > 0]
    if method == "linear":
        return np.linspace(float(x.min()), float(x.max()), n_clusters)
    if method == "density":
        order = np.argsort(x, kind="stable")
        mass = np.ones(x.size) if weights is None else weights[order]
        cdf = np.cumsum(mass)
        wanted = (np.arange(n_clusters) + 0.5) * (cdf[-1] / n_clusters)
        return x[order[np.searchsorted(cdf, wanted)]].astype(np.float64)
    if rng is None:
        raise ValueError("method='random' needs rng")
    values, inverse = np.unique(x, return_inverse=True)
    share = np.bincount(inverse, weights=weights)
    size = min(n_clusters, values.size)
    picked = rng.choice(values.size, size=size, replace=False, p=share / share.sum())
    return np.sort(values[picked]).astype(np.float64)


def lloyd_1d(x, centers, *, weights=None, max_iter=300, tol=0.0):
    """Lloyd's algorithm from ``centers``: alternate nearest-centre cells and cell means.

    An iteration costs O(K log n) on sorted values with prefix sums; the inertia never rises. A cell that is empty
    is moved to the value with the largest weighted distance among the ends of all cells.

    Parameters
    ----------
    x : ndarray of shape (n,), float32 or float64
    centers : ndarray of shape (k,)
    weights : ndarray of shape (n,), default=None
    max_iter : int, default=300
    tol : float, default=0.0
        Stop when the inertia falls by no more than ``tol`` relative to itself; 0 runs to a fixed point.

    Returns
    -------
    KMeans1DResult
        ``lower_bound`` is 0.
    """
    x, weights = check_samples(x, weights)
    data, exponent = prepare(x, weights)
    centers = np.unique(np.ldexp(np.asarray(centers, dtype=np.float64), -exponent) - data.shift)
    borders, previous, n_iter = None, np.inf, 0
    while n_iter < max_iter:
        n_iter += 1
        edges = cut(data.x, centers)
        if borders is not None and np.array_equal(edges, borders):
            break
        borders = _repair_empty(data, edges)
        centers = cell_means(data, borders)
        if tol > 0:
            inertia = interval_inertia(data, borders, centers)
            if previous - inertia <= tol * inertia:
                break
            previous = inertia
    scale = 2.0**exponent
    inertia = interval_inertia(data, borders, centers) * scale * scale
    return KMeans1DResult((centers + data.shift) * scale, inertia, 0.0, n_iter)


def _repair_empty(data, borders):
    """Borders with every empty cell moved: the ends of cells farthest from their means become cells of their own."""
    cells = borders.size - 1
    borders = np.unique(borders)
    while borders.size - 1 < cells:
        centers = cell_means(data, borders)
        first, last = borders[:-1], borders[1:] - 1
        reach = np.concatenate((centers - data.x[first], data.x[last] - centers)) ** 2
        if data.w is not None:
            reach *= np.concatenate((data.w[first], data.w[last]))
        # Both ends of a two-sample cell are the same split; a cell of equal values has none.
        apart = np.tile(data.x[last] > data.x[first], 2) & np.concatenate((last > first, last > first + 1))
        order = np.argsort(-np.where(apart, reach, -1.0))[: min(cells + 1 - borders.size, np.count_nonzero(apart))]
        if order.size == 0:
            break
        borders = np.unique(np.concatenate((borders, np.concatenate((first + 1, last))[order])))
    return borders
