"""Pruning against brute force: which weights go, and what the others become."""
# SPDX-License-Identifier: BSD-3-Clause

from itertools import combinations

import numpy as np
import pytest

from skfactor.solvers.feedback import output_error
from skfactor.solvers.pruning import keep_largest, keep_pattern, prune_by_steps, refit_kept, surgeon_scale
from skfactor.solvers.whitening import damped_grams


def gram_of(rng, d):
    Z = rng.standard_normal((3 * d, d)) @ rng.standard_normal((d, d))
    return Z.T @ Z / len(Z)


@pytest.mark.parametrize("n_pruned", [0, 1, 7, 29, 30])
def test_exact_number_also_among_equals(n_pruned):
    rng = np.random.default_rng(0)
    for saliency in (rng.random((5, 6)), rng.integers(0, 3, (5, 6)).astype(float), np.ones((5, 6))):
        mask, threshold = keep_largest(saliency, n_pruned)
        assert (~mask).sum() == n_pruned
        assert saliency[~mask].sum() == np.sort(saliency, axis=None)[:n_pruned].sum()
        assert (saliency[mask] >= threshold).all()
        assert (saliency[~mask] <= threshold).all()


@pytest.mark.parametrize(("n_kept", "m", "d"), [(2, 4, 12), (1, 3, 9), (2, 4, 10), (3, 4, 2), (4, 4, 8)])
def test_pattern(n_kept, m, d):
    S = np.random.default_rng(1).random((7, d))
    mask = keep_pattern(S, n_kept, m)
    for row, kept in zip(S, mask):
        for start in range(0, d, m):
            part = row[start : start + m]
            assert sorted(part[kept[start : start + m]]) == sorted(part)[max(0, len(part) - n_kept):]


def test_refit_solves_least_squares_of_every_row():
    rng = np.random.default_rng(2)
    X, mask = rng.standard_normal((6, 8)), rng.random((6, 8)) < 0.5
    grams = np.stack([gram_of(rng, 8), gram_of(rng, 8)])
    Z = refit_kept(X, mask, grams, tol=1e-12)
    for i, (x, kept) in enumerate(zip(X, mask)):
        G = damped_grams(grams)[i // 3]
        exact = np.zeros(8)
        exact[kept] = np.linalg.solve(G[np.ix_(kept, kept)], (G @ x)[kept])
        np.testing.assert_allclose(Z[i], exact, atol=1e-8)


def test_refit_never_raises_the_error_however_few_steps():
    rng = np.random.default_rng(3)
    X, G = rng.standard_normal((10, 20)), gram_of(rng, 20)
    mask = rng.random(X.shape) < 0.3
    errors = [output_error(X, refit_kept(X, mask, G, max_iter=k, tol=0.0), damped_grams(G)) for k in range(8)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(errors, errors[1:]))


def test_surgeon_scale_is_the_cost_of_a_removal():
    """Optimal Brain Surgeon's formula against the removal and the refit themselves."""
    rng = np.random.default_rng(4)
    x, G = rng.standard_normal((1, 7)), gram_of(rng, 7)
    for j in range(7):
        mask = np.arange(7)[None] != j
        cost = output_error(x, refit_kept(x, mask, G, tol=1e-12), damped_grams(G))
        np.testing.assert_allclose(cost, (x[0, j] * surgeon_scale(G)[j]) ** 2)


def test_steps_choose_better_masks():
    """All masks of a row tried: steps miss the best by less than pruning at once does."""
    rng = np.random.default_rng(5)
    at_once, by_steps, best = 0.0, 0.0, 0.0
    for _ in range(30):
        x, G = rng.standard_normal((1, 8)), gram_of(rng, 8)
        G_damped = damped_grams(G)
        masks = [np.isin(np.arange(8), kept)[None] for kept in combinations(range(8), 5)]
        best += min(output_error(x, refit_kept(x, mask, G), G_damped) for mask in masks)
        mask, _ = keep_largest(np.abs(x), 3)
        at_once += output_error(x, refit_kept(x, mask, G), G_damped)
        Z, mask = prune_by_steps(x, G, lambda s, t: keep_largest(s, round(3 * t))[0], 3)
        assert mask.sum() == np.count_nonzero(Z) == 5
        by_steps += output_error(x, Z, G_damped)
    assert best <= by_steps < (best + at_once) / 2
