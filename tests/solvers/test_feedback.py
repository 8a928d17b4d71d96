# SPDX-License-Identifier: BSD-3-Clause
"""Error feedback: exact answers on small problems, certificates on large ones, real layers with held-back inputs."""

import itertools

import numpy as np
import pytest
from _data import data_dir, needs_data, real_weights
from numpy.testing import assert_allclose, assert_array_equal

from skfactor.solvers.feedback import (
    ClassLengths,
    assumed_gram,
    feedback_quantize,
    feedback_target,
    output_error,
    refine_codes,
    refit_centers,
)


def make_problem(seed, n=5, d=7, k=5, samples=40):
    rng = np.random.default_rng(seed)
    Z = np.maximum(rng.normal(size=(samples, d)) @ rng.normal(size=(d, d)), 0)
    return rng.normal(size=(n, d)), np.sort(rng.normal(size=k)), Z.T @ Z / samples, rng


def nearest(X, centers):
    return np.abs(X[:, :, None] - centers).argmin(-1)


def objective(X, codes, centers, gram, lengths, lam, row_weight):
    """The module's objective, spelled out with sums."""
    total = 0.0
    for x, q, r in zip(X, codes, row_weight, strict=True):
        e = x - centers[q]
        total += r * e @ gram @ e + lam * lengths[q].sum()
    return total


@pytest.mark.parametrize("gram", [np.eye(7), np.diag(np.arange(1.0, 8.0))], ids=["identity", "diagonal"])
def test_independent_inputs_give_nearest_codes(gram):
    X, centers, _, rng = make_problem(0)
    centers = rng.permutation(centers)
    assert_array_equal(feedback_quantize(X, centers, gram), nearest(X, centers))
    assert_array_equal(refine_codes(X, np.zeros(X.shape, int), centers, gram), nearest(X, centers))


def test_independent_inputs_with_rate_give_the_separable_optimum():
    X, centers, _, rng = make_problem(1)
    power, r, lengths, lam = np.arange(1.0, 8.0), rng.uniform(0.5, 2, 5), rng.uniform(1, 6, 5), 0.3
    cost = r[:, None, None] * power[:, None] * (X[:, :, None] - centers) ** 2 + lam * lengths
    arguments = {"code_lengths": lengths, "entropy_weight": lam, "row_weight": r}
    assert_array_equal(feedback_quantize(X, centers, np.diag(power), damping=0.0, **arguments), cost.argmin(-1))
    start = rng.integers(5, size=X.shape)
    assert_array_equal(refine_codes(X, start, centers, np.diag(power), **arguments), cost.argmin(-1))


@pytest.mark.parametrize("seed", range(8))
def test_against_all_codes_of_a_small_problem(seed):
    """No result beats the best of all codes; descent ends where no single code can improve; most rows are optimal."""
    X, centers, gram, rng = make_problem(seed, n=6, d=5, k=3)
    lengths, lam, r = np.array([2.0, 1.0, 3.0]), 0.05, rng.uniform(0.5, 2, 6)
    arguments = {"code_lengths": lengths, "entropy_weight": lam, "row_weight": r}
    codes = feedback_quantize(X, centers, gram, **arguments)
    refined = refine_codes(X, codes, centers, gram, n_passes=50, **arguments)
    every = np.array(list(itertools.product(range(3), repeat=5)))
    for i in range(6):
        errors = X[i] - centers[every]
        cost = r[i] * np.einsum("aj,jk,ak->a", errors, gram, errors) + lam * lengths[every].sum(1)
        mine = cost[np.flatnonzero((every == refined[i]).all(1))[0]]
        neighbours = (every != refined[i]).sum(1) <= 1
        assert mine <= cost[neighbours].min() * (1 + 1e-9)
        assert mine >= cost.min() * (1 - 1e-12)
    before = objective(X, codes, centers, gram, lengths, lam, r)
    assert objective(X, refined, centers, gram, lengths, lam, r) <= before * (1 + 1e-12)


def test_uniform_codebook_obeys_the_bound_of_successive_rounding():
    """On a grid of step s that covers the values, the damped error is at most s²/4 Σ U_jj⁻² (Babai's bound)."""
    rng = np.random.default_rng(3)
    Z = rng.normal(size=(300, 90)) @ rng.normal(size=(90, 90))
    gram, X, step, damping = Z.T @ Z / 300, rng.normal(size=(20, 90)), 0.5, 0.02
    centers = step * np.arange(-400, 401)
    codes = feedback_quantize(X, centers, gram, damping=damping)
    damped = gram + damping * np.trace(gram) / 90 * np.eye(90)
    order = np.argsort(-np.diag(gram), kind="stable")
    pivots = [_pivot(damped, order, j) for j in range(90)]
    E = X - centers[codes]
    assert np.einsum("ij,jk,ik->i", E, damped, E).max() <= step**2 / 4 * sum(pivots) * (1 + 1e-9)
    assert output_error(X, centers[codes], gram) < output_error(X, centers[nearest(X, centers)], gram)


def test_descent_ends_where_no_code_can_improve_across_blocks():
    X, centers, gram, _ = make_problem(20, n=4, d=150, k=6, samples=400)
    start = feedback_quantize(X, centers, gram)
    codes = refine_codes(X, start, centers, gram, n_passes=200)
    E = X - centers[codes]
    # error after setting entry (i, j) to c: e_j grows by v = x̂_ij - c, so the error grows by 2 v (E G)_ij + v² G_jj
    v = centers[codes][:, :, None] - centers
    growth = 2 * v * (E @ gram)[:, :, None] + v**2 * np.diag(gram)[:, None]
    assert growth.min() >= -1e-9 * output_error(X, centers[codes], gram)
    assert output_error(X, centers[codes], gram) < output_error(X, centers[start], gram)


def _pivot(G, order, j):
    """Variance of input order[j] that the inputs after it cannot explain."""
    me, open_ = order[j], order[j + 1 :]
    if not len(open_):
        return G[me, me]
    return G[me, me] - G[me, open_] @ np.linalg.solve(G[np.ix_(open_, open_)], G[open_, me])


def test_rows_do_not_interact_and_row_weight_divides_the_rate():
    X, centers, gram, rng = make_problem(4, n=6, d=70, k=9, samples=200)
    lengths, r = rng.uniform(1, 6, 9), rng.uniform(0.2, 3, 6)
    whole = feedback_quantize(X, centers, gram, code_lengths=lengths, entropy_weight=0.3, row_weight=r)
    refined = refine_codes(X, whole, centers, gram, code_lengths=lengths, entropy_weight=0.3, row_weight=r)
    for i in range(6):
        alone = {"code_lengths": lengths, "entropy_weight": 0.3 / r[i]}
        assert_array_equal(feedback_quantize(X[i : i + 1], centers, gram, **alone)[0], whole[i])
        assert_array_equal(refine_codes(X[i : i + 1], whole[i : i + 1], centers, gram, **alone)[0], refined[i])


def test_groups_are_separate_layers():
    X, centers, gram, _ = make_problem(5, n=6)
    other = make_problem(6)[2]
    codes = feedback_quantize(X, centers, np.stack([gram, other]))
    assert_array_equal(codes[:3], feedback_quantize(X[:3], centers, gram))
    assert_array_equal(codes[3:], feedback_quantize(X[3:], centers, other))
    both = output_error(X, centers[codes], np.stack([gram, other]))
    parts = [output_error(X[:3], centers[codes[:3]], gram), output_error(X[3:], centers[codes[3:]], other)]
    assert_allclose(both, sum(parts))
    with pytest.raises(ValueError, match="split evenly over the 2 groups"):
        feedback_quantize(X[:5], centers, np.stack([gram, other]))


def test_class_lengths():
    X, centers, gram, rng = make_problem(7)
    lengths = rng.uniform(1, 6, 5)
    one = ClassLengths(lengths[None], np.zeros(X.shape, int))
    assert_array_equal(
        feedback_quantize(X, centers, gram, code_lengths=one, entropy_weight=0.2),
        feedback_quantize(X, centers, gram, code_lengths=lengths, entropy_weight=0.2),
    )
    table, classes = rng.uniform(1, 6, (3, 5)), rng.integers(3, size=X.shape)
    cost = (X[:, :, None] - centers) ** 2 + 0.4 * table[classes]
    many = ClassLengths(table, classes)
    separable = feedback_quantize(X, centers, np.eye(7), code_lengths=many, entropy_weight=0.4, damping=0.0)
    assert_array_equal(separable, cost.argmin(-1))


@pytest.mark.parametrize("weighted", [False, True])
def test_refit_solves_the_normal_equations(weighted):
    X, centers, gram, rng = make_problem(8, n=6, k=4)
    grams, r = np.stack([gram, make_problem(9)[2]]), rng.uniform(0.5, 2, 6) if weighted else None
    codes = nearest(X, centers)
    weight = np.ones(6) if r is None else r
    onehot = np.eye(4)[codes]  # (n, d, k)
    full = np.repeat(grams, 3, axis=0)
    A = np.einsum("i,idk,ide,iel->kl", weight, onehot, full, onehot)
    b = np.einsum("i,idk,ide,ie->k", weight, onehot, full, X)
    assert_allclose(refit_centers(X, codes, centers, grams, row_weight=r), np.linalg.solve(A, b), rtol=1e-7)


def test_refit_is_stationary_and_leaves_unused_centers():
    X, centers, gram, _ = make_problem(10)
    centers = np.append(centers, 77.0)
    codes = nearest(X, centers)
    new = refit_centers(X, codes, centers, gram)
    assert new[-1] == 77.0
    best = output_error(X, new[codes], gram)
    assert best <= output_error(X, centers[codes], gram)
    for k, sign in itertools.product(range(5), (-1, 1)):
        moved = new.copy()
        moved[k] += sign * 1e-3
        assert output_error(X, moved[codes], gram) >= best


def test_feedback_target_is_the_ridge_regression_on_samples():
    rng = np.random.default_rng(11)
    X, x, s = rng.normal(size=(3, 5)), rng.normal(size=(50, 5)), rng.normal(size=(50, 3))
    z = x + 0.3 * rng.normal(size=(50, 5))
    damping = 0.05
    delta = damping * np.trace(z.T @ z / 50) / 5
    # minimise |W z - X x - s|²/50 + δ|W - X|² as one least-squares problem in W
    left = np.vstack([z / np.sqrt(50), np.sqrt(delta) * np.eye(5)])
    right = np.vstack([(x @ X.T + s) / np.sqrt(50), np.sqrt(delta) * X.T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    got = feedback_target(X, z.T @ z / 50, x.T @ z / 50, residual=s.T @ z / 50, damping=damping)
    assert_allclose(got, expected, rtol=1e-8)
    assert_allclose(feedback_target(X, z.T @ z, z.T @ z), X)


@pytest.mark.parametrize("gram", ["zero", "dead inputs", "rank one", "twin inputs"])
def test_singular_grams(gram):
    X, centers, G, _ = make_problem(12)
    if gram == "zero":
        G = np.zeros_like(G)
    elif gram == "dead inputs":
        G[[1, 4]] = 0
        G[:, [1, 4]] = 0
    elif gram == "rank one":
        G = np.ones_like(G)
    else:
        G[1], G[:, 1] = G[0], G[:, 0]
        G[1, 1] = G[0, 1] = G[1, 0] = G[0, 0]
    for damping in (0.01, 0.0):
        codes = feedback_quantize(X, centers, G, damping=damping)
        codes = refine_codes(X, codes, centers, G)
        assert codes.min() >= 0
        assert codes.max() < len(centers)
        assert np.isfinite(refit_centers(X, codes, centers, G)).all()
    if gram in ("zero", "dead inputs"):
        dead = slice(None) if gram == "zero" else [1, 4]
        assert_array_equal(codes[:, dead], nearest(X, centers)[:, dead])


def test_indefinite_gram_is_refused():
    with pytest.raises(ValueError, match="positive semi-definite"):
        feedback_quantize(np.ones((1, 2)), np.array([0.0, 1.0]), np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_inputs_are_not_written():
    X, centers, gram, _ = make_problem(14)
    codes = nearest(X, centers)
    for array in (X, centers, gram, codes):
        array.flags.writeable = False
    refined = refine_codes(X, codes, centers, gram)
    feedback_quantize(X, centers, gram)
    refit_centers(X, refined, centers, gram)
    feedback_target(X, gram, gram)


def test_assumed_gram_entry_by_entry():
    shape, rho, mean = (2, 3, 2), 0.6, 0.3
    gram = assumed_gram(shape, correlation=rho, mean_square=mean)
    places = list(itertools.product(*map(range, shape)))  # the order of a flattened kernel
    for (a, p), (b, q) in itertools.product(enumerate(places), repeat=2):
        distance = np.hypot(p[1] - q[1], p[2] - q[2])
        assert_allclose(gram[a, b], (rho**distance if p[0] == q[0] else 0) + mean)
    assert np.linalg.eigvalsh(gram).min() > 0
    assert_allclose(assumed_gram((4,), mean_square=0), np.eye(4))
    assert_allclose(assumed_gram(shape, correlation=0, mean_square=0), np.eye(12))
    with pytest.raises(ValueError, match="below 1, got 1"):
        assumed_gram(shape, correlation=1)
    with pytest.raises(ValueError, match="negative, got -1"):
        assumed_gram(shape, mean_square=-1)


def _patches(images):
    """3x3 neighbourhoods of (N, c, h, w) as rows (N*h*w/16, c*9), every fourth position in both directions."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::4, ::4]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * 9)


def _layers_with_inputs(n_images):
    """The first two convolutions of ResNet-20 with patches of their real inputs."""
    weights = real_weights("cifar10_resnet20")
    with np.load(data_dir() / "cifar10_test.npz") as archive:
        images = archive["X"][:n_images].transpose(0, 3, 1, 2) / 255.0
    images = (images - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    first = weights["conv1.weight"].astype(float)
    yield first.reshape(16, -1), _patches(images)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    out = np.einsum("nchwij,ocij->nohw", windows, first, optimize=True)
    scale = weights["bn1.weight"] / np.sqrt(weights["bn1.running_var"] + 1e-5)
    shift = weights["bn1.bias"] - weights["bn1.running_mean"] * scale
    out = np.maximum(out * scale[:, None, None] + shift[:, None, None], 0)
    yield weights["layer1.0.conv1.weight"].astype(float).reshape(16, -1), _patches(out)


@needs_data
def test_real_layers_on_held_back_inputs():
    """Each stage lowers the error of the output on images it has not seen; plain nearest codes are the yardstick."""
    for X, Z in _layers_with_inputs(60):
        seen, unseen = Z[: len(Z) // 2], Z[len(Z) // 2 :]
        gram, judge = seen.T @ seen / len(seen), unseen.T @ unseen / len(unseen)
        step = np.abs(X).max() / 8
        centers = step * np.arange(-9, 10)
        plain = nearest(X, centers)
        swept = feedback_quantize(X, centers, gram)
        refined = refine_codes(X, swept, centers, gram)
        refitted = refit_centers(X, refined, centers, gram)
        errors = [
            output_error(X, values, judge)
            for values in (centers[plain], centers[swept], centers[refined], refitted[refined])
        ]
        assert errors[1] < 0.7 * errors[0]
        assert errors[2] < errors[1]
        assert errors[3] < 1.05 * errors[2]


@needs_data
def test_assumed_gram_helps_on_real_inputs_it_has_not_seen():
    """Without calibration: behind a rectifier, codes under the assumed gram lose less output than nearest codes."""
    X, Z = list(_layers_with_inputs(20))[1]
    judge = Z.T @ Z / len(Z)
    centers = np.abs(X).max() / 8 * np.arange(-9, 10)
    gram = assumed_gram((16, 3, 3))
    codes = refine_codes(X, feedback_quantize(X, centers, gram), centers, gram)
    assert output_error(X, centers[codes], judge) < 0.7 * output_error(X, centers[nearest(X, centers)], judge)
