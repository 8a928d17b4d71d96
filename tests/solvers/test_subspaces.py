"""Angles between subspaces against SciPy, elimination by brute force, and the published selection written out."""
# SPDX-License-Identifier: BSD-3-Clause

import math

import numpy as np
import pytest
from scipy.linalg import subspace_angles as scipy_angles

from skfactor.solvers.subspaces import (
    eliminate_similar,
    orthonormal_bases,
    published_selection,
    subspace_angles,
    subspace_distances,
    vbd_distances,
)


def factors(n=12, m=20, rank=3):
    rng = np.random.default_rng(0)
    F = rng.standard_normal((n, m, rank))
    F[1] = F[0] @ rng.standard_normal((rank, rank))  # the same subspace
    F[3] = F[2] + 1e-6 * rng.standard_normal((m, rank))  # nearly the same
    return F


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_angles_are_those_of_scipy(rank):
    F = factors(rank=rank)
    angles = subspace_angles(orthonormal_bases(F))
    for i in range(len(F)):
        for j in range(len(F)):
            np.testing.assert_allclose(angles[i, j], np.sort(scipy_angles(F[i], F[j]))[::-1], atol=1e-8)


@pytest.mark.parametrize("kind", ["chordal", "geodesic", "largest"])
def test_distances_follow_from_the_angles(kind):
    F = factors()
    D = subspace_distances(orthonormal_bases(F), kind)
    for i in range(len(F)):
        for j in range(len(F)):
            theta = scipy_angles(F[i], F[j])
            expected = {"chordal": math.sqrt((np.sin(theta) ** 2).mean()), "largest": theta.max() / (np.pi / 2),
                        "geodesic": math.sqrt((theta**2).mean()) / (np.pi / 2)}[kind]
            np.testing.assert_allclose(D[i, j], expected, atol=1e-7)
    np.testing.assert_array_equal(D, D.T)


def test_a_zero_factor_is_far_from_all_and_breaks_nothing():
    F = factors()
    F[5] = 0
    D = subspace_distances(orthonormal_bases(F))
    np.testing.assert_allclose(np.delete(D[5], 5), 1)
    assert np.isfinite(subspace_angles(orthonormal_bases(F))).all()


def brute_elimination(D, n_removed):
    alive, removed = list(range(len(D))), []
    for _ in range(n_removed):
        i, j = min(((a, b) for a in alive for b in alive if a < b), key=lambda p: D[p])
        out = j if sum(D[j, k] for k in alive) < sum(D[i, k] for k in alive) else i
        alive.remove(out)
        removed.append(out)
    return removed


def test_elimination_is_that_of_all_pairs():
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((15, 3))
        D = np.linalg.norm(x[:, None] - x[None], axis=-1)
        assert eliminate_similar(D, 13).tolist() == brute_elimination(D, 13)  # of two left, both are as near


def published_code(heads, n_kept):
    """The saliency of the published code for one factor, loop by loop: what it does, not what it should do."""
    n = len(heads)
    D = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        qi = np.linalg.qr(heads[i].astype(np.float32))[0]
        for j in range(n):
            qj = np.linalg.qr(heads[j].astype(np.float32))[0]
            s = min(np.float32(1), np.linalg.norm(qj - qi @ (qi.T @ qj)))
            D[i, j] = abs(np.arcsin(s)) % np.float32(np.pi / 2)
    np.fill_diagonal(D, np.inf)
    saliency = np.zeros(n, dtype=int)
    gone = set()
    for step in range(n - 1):
        i, j = divmod(int(D.argmin()), n)
        sums = [np.where(np.isfinite(D[k]), D[k], 0).sum() for k in (i, j)]
        out = i if sums[0] < sums[1] else j
        saliency[step] = out  # a filter where a rank belongs
        gone.add(out)
        D[out], D[:, out] = np.inf, np.inf
    saliency[n - 1] = next(k for k in range(n) if k not in gone)
    return sorted(np.argsort(saliency, kind="stable")[n - n_kept :])


def test_published_selection_is_that_of_the_published_code():
    heads = np.random.default_rng(1).standard_normal((10, 12, 1))
    assert published_selection([heads], 6).tolist() == published_code(heads, 6)


def test_published_distance_of_orthogonal_subspaces_is_zero():
    # the first of its defects: with R ≥ 2 nearly all pairs saturate, and π/2 mod π/2 is 0
    heads = np.random.default_rng(2).standard_normal((6, 64, 4))
    assert (subspace_distances(orthonormal_bases(heads))[np.triu_indices(6, 1)] > 0.8).all()
    kept = published_selection([heads], 3)
    assert len(kept) == 3


def test_variance_based_distance():
    x = np.random.default_rng(3).standard_normal((6, 9))
    D = vbd_distances(x)
    for i in range(6):
        for j in range(6):
            np.testing.assert_allclose(D[i, j], np.var(x[i] - x[j]) / (np.var(x[i]) + np.var(x[j])), atol=1e-12)
