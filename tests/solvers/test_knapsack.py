"""The multiple-choice knapsack against all choices there are."""
# SPDX-License-Identifier: BSD-3-Clause

import itertools

import numpy as np
import pytest

from skfactor.solvers.knapsack import choose


def problem(seed, n_groups=5, n_options=4, convex=False):
    rng = np.random.default_rng(seed)
    weights = [np.sort(rng.uniform(1, 10, n_options)) for _ in range(n_groups)]
    costs = [rng.uniform(0.5, 5) * w ** -rng.uniform(0.5, 2) if convex else rng.uniform(0, 10, n_options)
             for w in weights]
    return costs, weights


def brute_force(costs, weights, capacity):
    best = np.inf
    for index in itertools.product(*(range(len(c)) for c in costs)):
        if sum(w[i] for w, i in zip(weights, index)) <= capacity:
            best = min(best, sum(c[i] for c, i in zip(costs, index)))
    return best


@pytest.mark.parametrize("convex", [True, False])
def test_close_to_the_best_of_all_choices(convex):
    ratios = []
    for seed in range(40):
        costs, weights = problem(seed, convex=convex)
        low, high = sum(w.min() for w in weights), sum(w.max() for w in weights)
        capacity = low + np.random.default_rng(seed).uniform(0.1, 0.9) * (high - low)
        found, best = choose(costs, weights, capacity), brute_force(costs, weights, capacity)
        assert found.weight <= capacity
        assert found.cost == pytest.approx(sum(c[i] for c, i in zip(costs, found.index)))
        assert found.lower_bound <= best * (1 + 1e-12)
        assert found.cost >= best * (1 - 1e-12)
        ratios.append(found.cost / best)
    assert np.median(ratios) == pytest.approx(1.0)
    assert max(ratios) < 1.15


def test_never_worse_than_a_start():
    for seed in range(20):
        costs, weights = problem(seed, n_groups=30, n_options=6)
        starts = [np.full(30, i) for i in range(6)]
        for start in starts:
            capacity = sum(w[i] for w, i in zip(weights, start))
            assert choose(costs, weights, capacity, starts=starts).cost <= sum(c[i] for c, i in zip(costs, start))


def test_full_and_too_small_capacity():
    costs, weights = problem(0)
    assert choose(costs, weights, 1e9).cost == pytest.approx(sum(c.min() for c in costs))
    assert choose(costs, weights, 1e9).lower_bound == pytest.approx(sum(c.min() for c in costs))
    lightest = sum(w.min() for w in weights)
    assert choose(costs, weights, lightest).weight == pytest.approx(lightest)
    assert choose(costs, weights, lightest - 1e-6) is None


def test_options_of_equal_weight_and_groups_of_different_length():
    costs = [np.array([3.0, 2.0, 5.0]), np.array([1.0])]
    weights = [np.array([2.0, 2.0, 2.0]), np.array([4.0])]
    assert choose(costs, weights, 6.0).index.tolist() == [1, 0]
