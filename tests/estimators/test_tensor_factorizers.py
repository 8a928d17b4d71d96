"""Tucker, tensor-train, block-term and hierarchical Tucker factorizers: promises, budgets, shapes, layer outputs."""
# SPDX-License-Identifier: BSD-3-Clause

import math

import numpy as np
import pytest
from sklearn.base import clone

from skfactor import (
    BlockTermFactorizer,
    HierarchicalTuckerFactorizer,
    LowRankFactorizer,
    TensorTrainFactorizer,
    TuckerFactorizer,
)
from skfactor.estimators._tensor_factorizer import least_harm

from .._data import data_dir, needs_data, real_weights
from .._nets import ResNet
from ._outputs import gram_of, output_errors

ALL = [TuckerFactorizer, TensorTrainFactorizer, BlockTermFactorizer, HierarchicalTuckerFactorizer]
BOUNDED = [TuckerFactorizer, TensorTrainFactorizer, HierarchicalTuckerFactorizer]
KERNEL = (6, 3, 3)


def weights(n=16, kernel=KERNEL, seed=0, dtype=np.float64):
    """A low-rank tensor and noise, as rows."""
    rng = np.random.default_rng(seed)
    inputs, pixels = rng.standard_normal((3, kernel[0])), rng.standard_normal((2, math.prod(kernel[1:])))
    T = np.einsum("nrs,rc,sp->ncp", rng.standard_normal((n, 3, 2)), inputs, pixels)
    return (T.reshape(n, -1) + 0.5 * rng.standard_normal((n, math.prod(kernel)))).astype(dtype)


def squared_error(estimator, X):
    return float(np.square(X.astype(float) - estimator.inverse_transform(estimator.transform(X))).sum())


def n_numbers(estimator, X):
    return estimator.transform(X).size + sum(a.size for a in estimator.decoder_.parts()[1].values())


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_at_full_rank(estimator, dtype):
    X = weights(dtype=dtype)
    fitted = estimator(rank=None, kernel_shape=KERNEL).fit(X)
    assert squared_error(fitted, X) < (1e-12 if dtype == np.float32 else 1e-26) * np.square(X).sum()


@pytest.mark.parametrize("estimator", BOUNDED)
@pytest.mark.parametrize("rank", [1, 2, 4, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_keeps_to_its_bound(estimator, rank, weighted):
    X, w = weights(seed=1), np.arange(16.0) if weighted else None
    fitted = estimator(rank=rank, kernel_shape=KERNEL).fit(X, sample_weight=w)
    E = X - fitted.inverse_transform(fitted.transform(X))
    error = float(((1.0 if w is None else w[:, None]) * E**2).sum())
    assert 0 < error <= fitted.error_bound_ * (1 + 1e-12)
    total = float(((1.0 if w is None else w[:, None]) * X**2).sum())
    np.testing.assert_allclose(fitted.relative_error_, error / total)


@pytest.mark.parametrize("estimator", [TensorTrainFactorizer, HierarchicalTuckerFactorizer])
@pytest.mark.parametrize("tol", [0.8, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prescribed_error_is_kept(estimator, tol, dtype):
    X = weights(seed=2, dtype=dtype)
    fitted = estimator(tol=tol, kernel_shape=KERNEL).fit(X)
    assert math.sqrt(squared_error(fitted, X)) <= tol * np.linalg.norm(X.astype(float))
    assert n_numbers(fitted, X) <= n_numbers(estimator(tol=tol / 10, kernel_shape=KERNEL).fit(X), X)


@pytest.mark.parametrize("modes", ["tucker2", "full"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_is_kept(modes, energy):
    X = weights(seed=3)
    fitted = TuckerFactorizer(energy=energy, modes=modes, kernel_shape=KERNEL).fit(X)
    assert fitted.relative_error_ <= 1 - energy + 1e-12


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_share_of_the_numbers_is_kept(estimator, share):
    """What is stored is counted from the arrays; a larger share is never worse here."""
    X = weights(n=24, kernel=(16, 3, 3), seed=4)
    fitted = estimator(rank=share, kernel_shape=(16, 3, 3)).fit(X)
    assert n_numbers(fitted, X) <= share * X.size
    assert n_numbers(fitted, X) > 0.6 * share * X.size
    least = estimator(rank=1e-9, kernel_shape=(16, 3, 3)).fit(X)
    assert set(least.ranks_) <= {1, 3, 16}
    assert least.relative_error_ > fitted.relative_error_


@pytest.mark.parametrize("estimator", ALL)
def test_share_is_kept_where_few_rows_carry_little(estimator):
    """Ranks of rows so low that a factor of the channels would be of nearly full rank, and dearer than none."""
    X = np.random.default_rng(0).standard_normal((64, 64 * 9))
    more = {"n_init": 1, "max_iter": 2} if estimator is BlockTermFactorizer else {}
    for share in (0.3, 0.125, 0.06):
        fitted = estimator(rank=share, kernel_shape=(64, 3, 3), **more).fit(X)
        assert n_numbers(fitted, X) <= share * X.size


@pytest.mark.parametrize("estimator", ALL)
def test_share_counts_weighted_rows(estimator):
    """Two of each row are twice the rows: the same ranks as for the repeated matrix."""
    X = weights(n=12, seed=5)
    once = estimator(rank=0.4, kernel_shape=KERNEL).fit(X, sample_weight=np.full(12, 2.0))
    twice = estimator(rank=0.4, kernel_shape=KERNEL).fit(np.repeat(X, 2, axis=0))
    assert once.ranks_ == twice.ranks_
    np.testing.assert_allclose(once.transform(X), twice.transform(X), rtol=1e-6, atol=1e-8)


def test_ranks_that_lose_least():
    """Against all ranks that fit, for separable errors and one price for all: the greedy choice is optimal."""
    rng = np.random.default_rng(0)
    tails = [np.append(np.cumsum(np.sort(rng.random(n)))[::-1], 0.0) for n in (5, 4, 6)]
    for budget in range(3, 16):
        chosen = least_harm(tails, sum, budget)
        fits = [r for r in np.ndindex(5, 4, 6) if sum(r) + 3 <= budget]
        best = min(sum(t[k + 1] for t, k in zip(tails, r)) for r in fits)
        np.testing.assert_allclose(sum(t[r] for t, r in zip(tails, chosen)), best)


# --- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
def test_shapes_of_rows(estimator):
    X = weights()
    assert estimator(rank=2).fit(X).tensor_shape_ == (9, 6)
    assert estimator(rank=2, kernel_shape=(6, 3, 3)).fit(X).tensor_shape_ == (6, 3, 3)
    assert estimator(rank=2, kernel_shape=(54, 1, 1)).fit(X).tensor_shape_ == (54,)
    assert estimator(rank=2, kernel_shape=(6, 3, 3), tensor_shape=[2, 3, 9]).fit(X).tensor_shape_ == (2, 3, 9)
    with pytest.raises(ValueError, match=r"kernel_shape must be positive integers whose product is the 54 columns"):
        estimator(rank=2, kernel_shape=(6, 3, 4)).fit(X)
    with pytest.raises(ValueError, match=r"tensor_shape must have at most 8 axes longer than 1, got 9"):
        estimator(rank=2, tensor_shape=(2,) * 9).fit(np.ones((2, 512)))
    with pytest.raises(ValueError, match="rank must be an integer, a fraction or"):
        estimator(rank=(2,) * 7, kernel_shape=(6, 3, 3)).fit(X)


@pytest.mark.parametrize("estimator", ALL)
def test_many_axes(estimator):
    X = np.random.default_rng(0).standard_normal((6, 64))
    fitted = estimator(rank=3, tensor_shape=(2,) * 6).fit(X)
    assert fitted.inverse_transform(fitted.transform(X)).shape == X.shape
    assert squared_error(fitted, X) < np.square(X).sum()


def test_rank_excludes_other_rules():
    X = weights()
    with pytest.raises(ValueError, match=r"exclude each other, got rank=2 and energy=0\.5"):
        TuckerFactorizer(rank=2, energy=0.5).fit(X)
    for estimator in (TensorTrainFactorizer, HierarchicalTuckerFactorizer):
        with pytest.raises(ValueError, match=r"exclude each other, got rank=2 and tol=0\.5"):
            estimator(rank=2, tol=0.5).fit(X)


@pytest.mark.parametrize("estimator", ALL)
def test_rows_without_axes_are_the_best_low_rank(estimator):
    """Vectors as rows: the closed form, with and without a gram."""
    rng = np.random.default_rng(6)
    X, G = rng.standard_normal((20, 15)), gram_of(rng, 15, 200)
    for side in ({}, {"input_gram": G}):
        best = LowRankFactorizer(rank=4).fit(X, **side)
        more = {"n_blocks": 1} if estimator is BlockTermFactorizer else {}
        fitted = estimator(rank=4, kernel_shape=(15,), **more).fit(X, **side)
        np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(X)),
                                   best.inverse_transform(best.transform(X)), atol=1e-6)


def test_more_rows_than_columns():
    """Tall matrices are reduced first: the same result as the plain solver's on all rows."""
    from skfactor.solvers.tucker import tucker

    X = weights(n=300)
    fitted = TuckerFactorizer(rank=(4, 3), kernel_shape=KERNEL, tol=1e-9).fit(X)
    np.testing.assert_allclose(squared_error(fitted, X), tucker(X.reshape(-1, *KERNEL), (4, 3), (0, 1), tol=1e-9).error,
                               rtol=1e-6)


def test_block_terms_are_decided_by_the_seed():
    X = weights(seed=7)
    one, same, other = (BlockTermFactorizer(3, 2, kernel_shape=KERNEL, random_state=s, max_iter=15).fit(X)
                        for s in (0, 0, 1))
    np.testing.assert_array_equal(one.transform(X), same.transform(X))
    assert one.relative_error_ < BlockTermFactorizer(1, 2, kernel_shape=KERNEL).fit(X).relative_error_
    assert other.relative_error_ < 1


# --- the output of layers --------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_input_gram_lowers_the_output_error(estimator, n_groups):
    rng = np.random.default_rng(8)
    X = weights(seed=8)
    seen, held_back = ([gram_of(rng, 54, 400, seed) for seed in range(n_groups)] for _ in range(2))
    more = {"n_init": 1, "max_iter": 20} if estimator is BlockTermFactorizer else {}
    plain = estimator(rank=2, kernel_shape=KERNEL, **more).fit(X)
    output = clone(plain).fit(X, input_gram=np.stack(seen))
    for grams in (seen, held_back):
        before, after = output_errors((plain, output), X, grams)
        assert after < before
    np.testing.assert_allclose(output.output_error_, output_errors((output,), X, seen)[0])
    assert output.error_bound_ is None
    assert output.ranks_ == plain.ranks_


@pytest.fixture(scope="module")
def resnet56():
    """Three layers of ResNet-56: weights, second moments of the inputs from 64 training images, and from 64 others."""
    import torch

    from skfactor.bridge.calibrate import collect_moments
    from skfactor.bridge.layers import entries_of_module

    tensors = {k: torch.from_numpy(v.copy()) for k, v in real_weights("cifar10_resnet56").items()}
    model = ResNet(9)
    model.load_state_dict(tensors, strict=False)
    names = ["layer1.3.conv1.weight", "layer2.4.conv2.weight", "layer3.4.conv1.weight"]
    owners = {name: entries_of_module(model).owners[name] for name in names}
    with np.load(data_dir() / "cifar10_train.npz") as file:
        images = torch.from_numpy(file["X"][:128]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    grams = [collect_moments(model.eval(), owners, [((half,), {})]).grams for half in ((images - mean) / std).split(64)]
    return {n: (tensors[n].numpy(), *(g[n].reshape(g[n].shape[-2:]) for g in grams)) for n in names}


@needs_data
@pytest.mark.parametrize("estimator", ALL)
def test_output_of_real_layers(estimator, resnet56):
    """A quarter of the numbers: lower output error on images that calibration has not seen, in every layer."""
    layers = list(resnet56.values())
    for W, seen, held_back in layers[:1] if estimator is BlockTermFactorizer else layers:
        X = W.reshape(len(W), -1)
        more = {"n_init": 1, "max_iter": 20} if estimator is BlockTermFactorizer else {}
        plain = estimator(rank=0.25, kernel_shape=W.shape[1:], **more).fit(X)
        output = clone(plain).fit(X, input_gram=seen)
        before, after = output_errors((plain, output), X, [held_back])
        assert after < 0.9 * before
