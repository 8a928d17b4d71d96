# SPDX-License-Identifier: BSD-3-Clause
"""One-dimensional Gaussian mixtures with a pinned zero component, by EM on a histogram; merging; hard assignment.

Responsibilities depend on the value alone, so millions of values are some ten thousand points: bins that know their
mass, mean and scatter. With one responsibility per bin EM maximises a lower bound of the log-likelihood (the scatter
enters it exactly), and what it guarantees for values it guarantees for bins: the bound never falls.
"""

from typing import NamedTuple

import numpy as np

from skfactor.solvers._assign1d import cut_labels

__all__ = ["GaussianMixture1DResult", "PrecisionPrior", "gaussian_mixture_1d", "hard_borders", "hard_labels",
           "merge_components", "spread_start"]

_FEW = 1 << 15  # distinct values up to which every value is its own point
_BINS = 1 << 14
_NOTHING = 1e-12
_LOG_2PI = float(np.log(2 * np.pi))


class PrecisionPrior(NamedTuple):
    """Gamma densities of the precisions, ``log p(t) = (shape - 1) log t - rate t + const``, one for each component.

    Attributes
    ----------
    shape : ndarray of shape (k,)
        At least 1.
    rate : ndarray of shape (k,)
        Positive, in squared units of the values.
    """

    shape: np.ndarray
    rate: np.ndarray


class GaussianMixture1DResult(NamedTuple):
    """A mixture; component 0 has the mean 0.

    Attributes
    ----------
    weights, means, precisions : ndarray of shape (k,)
    trace : ndarray of shape (n_iter + 1,)
        Penalised log-likelihood (its lower bound where values share bins) before every step and after the last one;
        it never falls.
    n_iter : int
    converged : bool
    """

    weights: np.ndarray
    means: np.ndarray
    precisions: np.ndarray
    trace: np.ndarray
    n_iter: int
    converged: bool


class _Points(NamedTuple):
    """Values with their masses; a bin has the mean of its values, and their variance about it as scatter."""

    x: np.ndarray
    mass: np.ndarray
    scatter: np.ndarray


def gaussian_mixture_1d(x, start, prior, *, weights=None, zero_weight=0.999, max_iter=300, tol=1e-6):
    r"""Fit a mixture by EM.

    Maximises :math:`\sum_i w_i \log \sum_j \pi_j N(x_i | \mu_j, 1/t_j) + \sum_j \log p_j(t_j)` with :math:`\mu_0 = 0`
    over the other means, the precisions and the mixing weights, those with :math:`\pi_0` pinned.

    Parameters
    ----------
    x : ndarray of shape (n,)
        Finite.
    start : tuple of ndarray
        (weights, means, precisions), each of shape (k,); component 0 is the one at zero.
    prior : PrecisionPrior
    weights : ndarray of shape (n,), default=None
        Non-negative; None means 1.
    zero_weight : float or None, default=0.999
        Mixing weight of component 0; None learns it as the others.
    max_iter : int, default=300
    tol : float, default=1e-6
        EM stops when the mean of the log-likelihood rises by less than this.

    Returns
    -------
    GaussianMixture1DResult

    References
    ----------
    S. Nowlan, G. Hinton, "Simplifying neural networks by soft weight-sharing", Neural Computation 4 (1992),
    doi:10.1162/neco.1992.4.4.473.
    K. Ullrich, E. Meeds, M. Welling, ICLR 2017, arXiv:1702.04008.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.gaussian_mixture1d import PrecisionPrior, gaussian_mixture_1d
    >>> x = np.array([-0.1, 0.0, 0.1, 2.9, 3.0, 3.1])
    >>> start = np.array([0.5, 0.5]), np.array([0.0, 1.0]), np.array([1.0, 1.0])
    >>> prior = PrecisionPrior(np.ones(2), np.full(2, 1e-3))
    >>> gaussian_mixture_1d(x, start, prior, zero_weight=None).means.round(3)
    array([0., 3.])
    """
    points = _as_points(np.asarray(x, dtype=np.float64).reshape(-1), weights)
    pi, mu, precision = _checked(start, prior, zero_weight)
    total = points.mass.sum()
    log_joint = _log_joint(points, pi, mu, precision)
    norm = _log_sum(log_joint)
    trace, converged = [_objective(points, norm, precision, prior)], False
    while len(trace) <= max_iter and not converged:
        pi, mu, precision = _m_step(points, log_joint, norm, (pi, mu, precision), prior, zero_weight)
        log_joint = _log_joint(points, pi, mu, precision)
        norm = _log_sum(log_joint)
        trace.append(_objective(points, norm, precision, prior))
        converged = trace[-1] - trace[-2] < tol * total
    return GaussianMixture1DResult(pi, mu, precision, np.array(trace), len(trace) - 1, converged)


def _checked(start, prior, zero_weight):
    pi, mu, precision = (np.array(a, dtype=np.float64) for a in start)
    k = len(pi)
    if not (pi.shape == mu.shape == precision.shape == np.shape(prior.shape) == np.shape(prior.rate) == (k,)) or k == 0:
        raise ValueError("start and prior must have one number for each component, got shapes "
                         f"{[np.shape(a) for a in (*start, *prior)]}")
    if mu[0] != 0:
        raise ValueError(f"the first component must have the mean 0, got {mu[0]}")
    if not (precision > 0).all() or (pi < 0).any() or not np.isfinite(mu).all():
        raise ValueError("start must have positive precisions, non-negative weights and finite means")
    if (np.asarray(prior.shape) < 1).any() or (np.asarray(prior.rate) <= 0).any():
        raise ValueError("prior must have shapes of at least 1 and positive rates")
    if zero_weight is not None:
        rest = pi[1:].sum()
        pi[1:] *= (1 - zero_weight) / rest if rest > 0 else 0.0
        pi[0] = zero_weight
    return pi, mu, precision


def _as_points(x, weights):
    """Every distinct value is a point, or every bin; exact zeros are always a point of their own."""
    if x.size == 0:
        raise ValueError("x must hold at least one value, got an empty array")
    if x.size <= _FEW:
        values, inverse = np.unique(x, return_inverse=True)
        mass = np.bincount(inverse.reshape(-1), weights, minlength=len(values)).astype(np.float64)
        kept = mass > 0
        return _Points(values[kept], mass[kept], np.zeros(np.count_nonzero(kept)))
    kept = x != 0 if weights is None else (x != 0) & (weights > 0)
    w = None if weights is None else weights[kept]
    zeros = float((x == 0).sum() if weights is None else weights[x == 0].sum())
    binned = _bins(x[kept], w)
    if zeros == 0:
        return binned
    return _Points(np.append(binned.x, 0.0), np.append(binned.mass, zeros), np.append(binned.scatter, 0.0))


def _bins(x, w):
    """Bins of equal width in asinh(x / rms): fine where the values are, and wider towards the outliers."""
    if x.size == 0:
        return _Points(np.empty(0), np.empty(0), np.empty(0))
    unit = float(np.sqrt(np.mean(np.square(x))))
    u = np.arcsinh(x / unit)
    low, high = float(u.min()), float(u.max())
    width = (high - low) / _BINS or 1.0
    index = np.minimum(((u - low) / width).astype(np.intp), _BINS - 1)
    center = np.sinh(low + width * (np.arange(_BINS) + 0.5)) * unit
    d = x - center[index]  # about the middle of the bin: no digits are lost in the scatter
    mass = np.bincount(index, w, minlength=_BINS).astype(np.float64)
    first = np.bincount(index, d if w is None else d * w, minlength=_BINS)
    second = np.bincount(index, d * d if w is None else d * d * w, minlength=_BINS)
    kept = mass > 0
    mean = first[kept] / mass[kept]
    return _Points(center[kept] + mean, mass[kept], np.maximum(second[kept] / mass[kept] - mean**2, 0.0))


def _log_joint(points, pi, mu, precision):
    """log pi_j + E log N(x | j) of every point, (n_points, k)."""
    with np.errstate(divide="ignore"):
        constant = np.log(pi) + 0.5 * np.log(precision) - 0.5 * _LOG_2PI
    square = np.square(points.x[:, None] - mu)
    square += points.scatter[:, None]
    square *= -0.5 * precision
    square += constant
    return square


def _log_sum(log_joint):
    top = log_joint.max(axis=1)
    return top + np.log(np.exp(log_joint - top[:, None]).sum(axis=1))


def _objective(points, norm, precision, prior):
    return float(points.mass @ norm + ((prior.shape - 1) * np.log(precision) - prior.rate * precision).sum())


def _m_step(points, log_joint, norm, old, prior, zero_weight):
    """Maximiser of the expected log-likelihood: means, then precisions about them, and mixing weights."""
    pi, mu, precision = (a.copy() for a in old)
    share = np.exp(log_joint - norm[:, None])
    share *= points.mass[:, None]
    counts = share.sum(axis=0)
    full = counts > _NOTHING * points.mass.sum()  # a component that vanishes keeps what it has
    moved = full.copy()
    moved[0] = False
    mu[moved] = (points.x @ share)[moved] / counts[moved]
    spread = np.einsum("ij,ij->j", share, np.square(points.x[:, None] - mu) + points.scatter[:, None])
    known = full | (prior.shape > 1)
    precision[known] = ((0.5 * counts + prior.shape - 1) / (0.5 * spread + prior.rate))[known]
    if zero_weight is None:
        pi = counts / counts.sum()
    elif counts[1:].sum() > 0:
        pi[1:] = (1 - zero_weight) * counts[1:] / counts[1:].sum()
    return pi, mu, precision


def spread_start(x, n_components, *, zero_weight=0.999, zero_std):
    """Start of Ullrich et al.: means evenly spread over the range of the values, equal weights, one standard deviation.

    Parameters
    ----------
    x : ndarray of shape (n,)
    n_components : int
        The one at zero included; at least 1.
    zero_weight : float or None, default=0.999
    zero_std : float
        Standard deviation of component 0, and the least one of the others.

    Returns
    -------
    weights, means, precisions : ndarray of shape (n_components,)

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.gaussian_mixture1d import spread_start
    >>> spread_start(np.array([-1.0, 3.0]), 4, zero_weight=0.7, zero_std=0.1)[1]
    array([ 0., -1.,  1.,  3.])
    """
    low, high, others = float(x.min()), float(x.max()), n_components - 1
    means = np.zeros(n_components)
    means[1:] = np.linspace(low, high, others) if others != 1 else (low + high) / 2
    std = np.full(n_components, max(zero_std, (high - low) / (2 * max(others, 1))))
    std[0] = zero_std
    first = 1 / n_components if zero_weight is None else zero_weight
    weights = np.full(n_components, (1 - first) / max(others, 1))
    weights[0] = first if others else 1.0
    return weights, means, std**-2.0


def merge_components(weights, means, precisions, max_divergence):
    """Merge the nearest two components as long as their mean Kullback-Leibler divergence is below a bound.

    A merged component has mass, mean and variance of the two; one merged with component 0 keeps the mean 0.

    Parameters
    ----------
    weights, means, precisions : ndarray of shape (k,)
        Component 0 is the one at zero.
    max_divergence : float
        Of ``(KL(a|b) + KL(b|a)) / 2``, in nats.

    Returns
    -------
    weights, means, precisions : ndarray of shape (m,), m <= k

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.gaussian_mixture1d import merge_components
    >>> mixture = np.array([0.5, 0.25, 0.25]), np.array([0.0, 1.0, 1.001]), np.array([100.0, 100.0, 100.0])
    >>> merge_components(*mixture, 0.01)[1]
    array([0.    , 1.0005])
    """
    pi, mu, var = (np.array(a, dtype=np.float64) for a in (weights, means, 1 / np.asarray(precisions)))
    while len(pi) > 1:
        # the logarithms of the variances cancel in the sum of both directions
        ratio = var[:, None] / var
        divergence = 0.25 * (ratio + 1 / ratio - 2 + np.square(mu[:, None] - mu) * (1 / var[:, None] + 1 / var))
        divergence[np.tril_indices(len(pi))] = np.inf
        a, b = np.unravel_index(divergence.argmin(), divergence.shape)
        if divergence[a, b] >= max_divergence:
            break
        mass = pi[a] + pi[b]
        share = np.array([pi[a], pi[b]]) / mass if mass > 0 else np.array([0.5, 0.5])
        center = share @ mu[[a, b]] if a else 0.0
        var[a] = share @ (var[[a, b]] + np.square(mu[[a, b]] - center))
        pi[a], mu[a] = mass, center
        pi, mu, var = (np.delete(v, b) for v in (pi, mu, var))
    return pi, mu, 1 / var


def hard_borders(weights, means, precisions):
    """Intervals of the real line in which one component has the largest responsibility.

    Returns
    -------
    borders : ndarray of shape (m,)
        Ascending.
    owners : ndarray of shape (m + 1,)
        Component of every interval; a wide component may have several.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.gaussian_mixture1d import hard_borders
    >>> hard_borders(np.array([0.5, 0.5]), np.array([0.0, 1.0]), np.array([1.0, 1.0]))
    (array([0.5]), array([0, 1]))
    """
    kept = np.flatnonzero(weights > 0)
    pi, mu, precision = weights[kept], means[kept], precisions[kept]
    constant = np.log(pi) + 0.5 * np.log(precision)
    a, b = np.triu_indices(len(pi), 1)
    # half the difference of the logarithms is A x^2 + B x + C
    A = 0.5 * (precision[b] - precision[a])
    B = precision[a] * mu[a] - precision[b] * mu[b]
    C = constant[a] - constant[b] + 0.5 * (precision[b] * mu[b] ** 2 - precision[a] * mu[a] ** 2)
    crossings = np.unique(_roots(A, B, C))
    inside = (crossings[:-1] + crossings[1:]) / 2
    reach = 1.0 + np.abs(crossings).max(initial=0.0)
    probes = np.concatenate([[-2 * reach], inside, [2 * reach]]) if len(crossings) else np.zeros(1)
    owner = (constant - 0.5 * precision * np.square(probes[:, None] - mu)).argmax(axis=1)
    changes = np.flatnonzero(owner[1:] != owner[:-1])
    return crossings[changes], kept[np.append(owner[changes], owner[-1])]


def _roots(A, B, C):
    """Real roots of ``A x^2 + B x + C``, without cancellation."""
    discriminant = B * B - 4 * A * C
    real = discriminant >= 0
    A, B, C = A[real], B[real], C[real]
    q = -0.5 * (B + np.where(B < 0, -1.0, 1.0) * np.sqrt(discriminant[real]))
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = np.concatenate([q / A, C / q])
    return roots[np.isfinite(roots)]


def hard_labels(x, borders, owners):
    """Component of every value, by `hard_borders`; values that are exactly 0 belong to component 0.

    Parameters
    ----------
    x : ndarray of any shape
    borders, owners : ndarray

    Returns
    -------
    labels : ndarray of the shape of ``x``, the dtype of ``owners``

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.gaussian_mixture1d import hard_labels
    >>> hard_labels(np.array([-3.0, 0.0, 0.6]), np.array([0.5]), np.array([0, 1]))
    array([0, 0, 1])
    """
    labels = owners[cut_labels(x, borders)]
    labels[x == 0] = 0
    return labels
