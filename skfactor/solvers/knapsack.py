"""One choice for each group at the least total cost within a capacity: the multiple-choice knapsack problem."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

__all__ = ["Choice", "choose"]

_MAX_MOVES = 4096  # above, exchanges between two groups are not searched: they take memory quadratic in the moves
_MAX_EXCHANGES = 200


class Choice(NamedTuple):
    """Result of `choose`.

    Attributes
    ----------
    index : ndarray of shape (n_groups,)
        Option taken in each group.
    cost, weight : float
        Totals.
    lower_bound : float
        No choice within the capacity costs less: the value of the Lagrangian dual.
    """

    index: np.ndarray
    cost: float
    weight: float
    lower_bound: float


def choose(costs, weights, capacity, *, starts=()):
    r"""Minimise :math:`\sum_g c_{g,i_g}` subject to :math:`\sum_g w_{g,i_g} \le` `capacity`.

    The options on the lower convex hull of each group are taken in the order of their slopes (equal-slope allocation:
    Shoham and Gersho 1988, doi:10.1109/29.90373), then single moves and exchanges between two groups use up what
    is left. The answer is never worse than any of `starts`.

    Parameters
    ----------
    costs, weights : list of ndarray of shape (n_options,)
        One array for each group; groups may have different numbers of options.
    capacity : float
    starts : iterable of ndarray of shape (n_groups,)
        Choices to start from as well; those above the capacity are left out.

    Returns
    -------
    choice : Choice or None
        None when even the lightest options exceed the capacity.

    Examples
    --------
    >>> costs = [np.array([9.0, 4.0, 1.0]), np.array([8.0, 1.0])]
    >>> weights = [np.array([1.0, 2.0, 6.0]), np.array([1.0, 3.0])]
    >>> choose(costs, weights, 5.0).index
    array([1, 1])
    """
    lightest = np.array([np.lexsort((c, w))[0] for c, w in zip(costs, weights, strict=True)])
    if _total(weights, lightest) > capacity:
        return None
    first, bound = _by_slope(costs, weights, capacity, lightest)
    tried = [first, *(np.asarray(s) for s in starts if _total(weights, s) <= capacity)]
    best = min((_improved(costs, weights, capacity, start) for start in tried), key=lambda i: _total(costs, i))
    return Choice(best, _total(costs, best), _total(weights, best), bound)


def _total(values, index):
    return float(sum(v[i] for v, i in zip(values, index, strict=True)))


def _hull(cost, weight):
    """Options on the lower convex hull of (weight, cost), from the lightest to the cheapest."""
    hull = []
    for i in np.lexsort((cost, weight)):
        if hull and cost[i] >= cost[hull[-1]]:
            continue
        while len(hull) > 1 and (cost[hull[-1]] - cost[hull[-2]]) * (weight[i] - weight[hull[-1]]) >= (
                cost[i] - cost[hull[-1]]) * (weight[hull[-1]] - weight[hull[-2]]):
            hull.pop()
        hull.append(i)
    return hull


def _by_slope(costs, weights, capacity, lightest):
    """Steps along the hulls, steepest first; and the dual bound, where the first step that does not fit is split."""
    index = lightest.copy()
    steps = []
    for g, (c, w) in enumerate(zip(costs, weights, strict=True)):
        hull = _hull(c, w)
        steps += [((c[b] - c[a]) / (w[b] - w[a]), g, a, b) for a, b in zip(hull, hull[1:])]
    left = capacity - _total(weights, index)
    bound = None
    for slope, g, a, b in sorted(steps, key=lambda s: s[0]):
        if index[g] != a:
            continue  # the step before it did not fit
        need = weights[g][b] - weights[g][a]
        if need <= left:
            index[g], left = b, left - need
        elif bound is None:
            bound = _total(costs, index) + slope * left
    return index, _total(costs, index) if bound is None else bound


def _improved(costs, weights, capacity, start):
    """Local search: the best single move, or where there is none the best exchange of two groups, until none helps."""
    index = np.array(start)
    group = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    option = np.concatenate([np.arange(len(c)) for c in costs])
    cost, weight = np.concatenate(costs).astype(float), np.concatenate(weights).astype(float)
    offset = np.concatenate([[0], np.cumsum([len(c) for c in costs])[:-1]])
    for _ in range(_MAX_EXCHANGES):
        now = offset + index
        left = capacity - weight[now].sum()
        gain, need = cost[now][group] - cost, weight - weight[now][group]
        tiny = 1e-12 * max(1.0, abs(cost[now].sum()))
        fits = (need <= left) & (gain > tiny)
        if fits.any():
            best = np.where(fits, gain, -np.inf).argmax()
            index[group[best]] = option[best]
            continue
        pair = None if len(cost) > _MAX_MOVES else _best_exchange(gain, need, group, left, tiny)
        if pair is None:
            break
        for move in pair:
            index[group[move]] = option[move]
    return index


def _best_exchange(gain, need, group, left, tiny):
    """Two moves of different groups that fit together and gain most; None when no two gain."""
    total = gain[:, None] + gain[None, :]
    total[(need[:, None] + need[None, :] > left) | (group[:, None] == group[None, :])] = -np.inf
    i, j = np.unravel_index(int(total.argmax()), total.shape)
    return (i, j) if total[i, j] > tiny else None
