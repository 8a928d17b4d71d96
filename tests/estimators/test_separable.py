"""`SeparableFactorizer`: what is its own, beside the common checks."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skfactor import LowRankFactorizer, SeparableFactorizer

from ._outputs import gram_of, output_errors

KINDS = ["spatial", "depthwise"]
SHAPE = (3, 3, 3)


def filters(n=20, shape=SHAPE, dtype=np.float64):
    return np.random.default_rng(0).standard_normal((n, int(np.prod(shape)))).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 100])
def test_error_equals_its_bound(kind, rank):
    X = filters()
    factorizer = SeparableFactorizer(rank, kernel_shape=SHAPE, kind=kind).fit(X)
    X_hat = factorizer.inverse_transform(factorizer.transform(X))
    np.testing.assert_allclose(np.square(X - X_hat).sum(), factorizer.error_bound_, atol=1e-10)
    if rank == 100:
        np.testing.assert_allclose(X_hat, X, atol=1e-12)
        assert factorizer.rank_ == 9


def test_the_two_convolutions_give_the_same_output():
    """torch's convolutions, of the parts and of the whole."""
    X = filters(5)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spatial = SeparableFactorizer(2, kernel_shape=SHAPE).fit(X)
    whole = F.conv2d(x, torch.from_numpy(spatial.inverse_transform(spatial.transform(X)).reshape(5, *SHAPE)))
    columns = torch.from_numpy(spatial.kernels_)[:, :, :, None]
    rows = torch.from_numpy(spatial.transform(X).reshape(5, 2, 1, 3))
    torch.testing.assert_close(F.conv2d(F.conv2d(x, columns), rows), whole)
    depthwise = SeparableFactorizer(2, kernel_shape=SHAPE, kind="depthwise").fit(X)
    whole = F.conv2d(x, torch.from_numpy(depthwise.inverse_transform(depthwise.transform(X)).reshape(5, *SHAPE)))
    kernels = torch.from_numpy(depthwise.kernels_).reshape(6, 1, 3, 3)
    mixing = torch.from_numpy(depthwise.transform(X)).reshape(5, 6, 1, 1)
    torch.testing.assert_close(F.conv2d(F.conv2d(x, kernels, groups=3), mixing), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_input_gram_lowers_the_output_error(kind, n_groups):
    rng = np.random.default_rng(1)
    X = filters()
    seen, held_back = ([gram_of(rng, 27, 2000, seed) for seed in range(n_groups)] for _ in range(2))
    make = lambda: SeparableFactorizer(2, kernel_shape=SHAPE, kind=kind)  # noqa: E731
    plain, output = make().fit(X), make().fit(X, input_gram=np.stack(seen))
    for grams in (seen, held_back):
        before, after = output_errors((plain, output), X, grams)
        assert after < before
    np.testing.assert_allclose(output.output_error_, output_errors((output,), X, seen)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_axes(kind):
    line, volume = filters(8, (4, 5)), filters(8, (2, 3, 2, 2))
    for X, shape in ((line, (4, 5)), (volume, (2, 3, 2, 2))):
        factorizer = SeparableFactorizer(100, kernel_shape=shape, kind=kind).fit(X)
        np.testing.assert_allclose(factorizer.inverse_transform(factorizer.transform(X)), X, atol=1e-10)
    # one spatial axis: a row of positions is one position
    spatial = SeparableFactorizer(2, kernel_shape=(4, 5)).fit(line)
    np.testing.assert_allclose(spatial.relative_error_, LowRankFactorizer(2).fit(line).relative_error_)


def test_a_share_of_the_numbers():
    X = filters(40, (8, 3, 3))
    for kind in KINDS:
        factorizer = SeparableFactorizer(0.5, kernel_shape=(8, 3, 3), kind=kind).fit(X)
        numbers = factorizer.transform(X).size + factorizer.kernels_.size
        more = SeparableFactorizer(factorizer.rank_ + 1, kernel_shape=(8, 3, 3), kind=kind).fit(X)
        assert numbers <= X.size / 2 < more.transform(X).size + more.kernels_.size


@pytest.mark.parametrize("kernel_shape", [(3, 3), (27.0,), (), (3, 9, 0), (-3, -9)])
def test_kernel_shape_must_fit(kernel_shape):
    with pytest.raises(ValueError, match=r"kernel_shape must be \(c_in, \*spatial\), integers with the product 27"):
        SeparableFactorizer(kernel_shape=kernel_shape).fit(filters())
