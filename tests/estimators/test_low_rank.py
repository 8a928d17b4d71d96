"""`LowRankFactorizer`: what is its own, beside the common checks."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD

from skfactor import LowRankFactorizer

from ._outputs import gram_of, output_errors


def test_agrees_with_scikit_learn():
    X = np.random.default_rng(0).standard_normal((40, 25))
    mine, theirs = LowRankFactorizer(rank=5), TruncatedSVD(5, algorithm="arpack", random_state=0)
    np.testing.assert_allclose(mine.inverse_transform(mine.fit_transform(X)),
                               theirs.inverse_transform(theirs.fit_transform(X)), atol=1e-9)
    np.testing.assert_allclose(mine.singular_values_, theirs.singular_values_)


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_equals_its_bound(rank, dtype):
    X = np.random.default_rng(1).standard_normal((12, 30)).astype(dtype)
    factorizer = LowRankFactorizer(rank=rank).fit(X)
    error = np.square(X.astype(float) - factorizer.inverse_transform(factorizer.transform(X))).sum()
    total = np.square(X.astype(float)).sum()
    tolerance = 1e-10 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(error, factorizer.error_bound_, atol=tolerance * total)
    np.testing.assert_allclose(factorizer.relative_error_, error / total, rtol=1e-6)
    np.testing.assert_allclose(factorizer.energy_, 1 - factorizer.error_bound_ / total)


def test_rank_as_a_share_of_the_numbers():
    X = np.random.default_rng(2).standard_normal((32, 96))
    for share in (0.5, 0.25, 0.125):
        factorizer = LowRankFactorizer(rank=share).fit(X)
        numbers = factorizer.transform(X).size + factorizer.components_.size
        assert numbers <= share * X.size < numbers + 32 + 96
    assert LowRankFactorizer(rank=1e-6).fit(X).rank_ == 1
    assert LowRankFactorizer(rank=1000).fit(X).rank_ == 32


def test_rank_and_energy_exclude_each_other():
    with pytest.raises(ValueError, match=r"exclude each other, got rank=2 and energy=0\.5"):
        LowRankFactorizer(rank=2, energy=0.5).fit(np.eye(3))


@pytest.mark.parametrize("n_groups", [1, 3])
def test_input_gram_lowers_the_output_error(n_groups):
    """On the inputs it was fitted with never more; on others from the same source less."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((24, 10))
    seen, held_back = ([gram_of(rng, 10, 400, seed) for seed in range(n_groups)] for _ in range(2))
    plain, output = LowRankFactorizer(rank=3).fit(X), LowRankFactorizer(rank=3).fit(X, input_gram=np.stack(seen))
    for grams in (seen, held_back):
        before, after = output_errors((plain, output), X, grams)
        assert after < before
    np.testing.assert_allclose(output.output_error_, output_errors((output,), X, seen)[0])
    assert (output.error_bound_ is None) == (n_groups > 1)
    if n_groups == 1:
        assert output.output_error_ <= output.error_bound_


def test_transform_of_other_rows_uses_the_metric():
    rng = np.random.default_rng(4)
    X, Y, G = rng.standard_normal((10, 6)), rng.standard_normal((4, 6)), gram_of(rng, 6, 50, 0)
    factorizer = LowRankFactorizer(rank=2).fit(X, input_gram=G)
    E = Y - factorizer.inverse_transform(factorizer.transform(Y))
    damped = G + 0.003 * np.trace(G) / 6 * np.eye(6)
    np.testing.assert_allclose(E @ damped @ factorizer.components_.T, 0, atol=1e-9)
