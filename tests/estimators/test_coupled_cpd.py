"""CoupledCPDFactorizer: codes, chains, files, real layers."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline

from skfactor import (
    CoupledCPDFactorizer,
    CPDFilterPruner,
    KMeansWeightSharer,
    LowRankFactorizer,
    SeparableFactorizer,
    TuckerFactorizer,
)
from tests._data import needs_data, real_weights


def filters(n=14, shape=(6, 3, 3), seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, int(np.prod(shape)))).astype(dtype)


def test_rows_decode_to_the_sum_of_their_clusters_terms():
    X = filters()
    factorizer = CoupledCPDFactorizer(rank=3, n_clusters=3, kernel_shape=(6, 3, 3)).fit(X)
    expected = np.einsum("ncr,nir,njr->ncij", factorizer.channels_[factorizer.labels_].astype(float),
                         *(F.astype(float) for F in factorizer.factors_))
    got = factorizer.inverse_transform(factorizer.transform(X))
    np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=1e-5, atol=1e-6)


def test_codes_are_zero_outside_the_own_cluster_and_a_sharer_keeps_them_so():
    X = filters()
    pipeline = make_pipeline(CoupledCPDFactorizer(rank=2, kernel_shape=(6, 3, 3)),
                             KMeansWeightSharer(n_clusters=32, preserve_zeros=True)).fit(X)
    factorizer = pipeline[0]
    codes = factorizer.transform(X).reshape(len(X), factorizer.n_clusters_, -1)
    np.testing.assert_array_equal(codes.any(axis=2).argmax(axis=1), factorizer.labels_)
    assert (codes.any(axis=2).sum(axis=1) == 1).all()
    shared = pipeline[1].inverse_transform(pipeline[1].transform(factorizer.transform(X))).reshape(codes.shape)
    assert not shared[codes == 0].any()
    error = np.square(X - factorizer.decoder_.decode(shared.reshape(len(X), -1))).sum() / np.square(X).sum()
    assert error < factorizer.relative_error_ + 0.05


def test_a_share_of_the_numbers_is_kept_to():
    X = filters(32, (16, 3, 3))
    factorizer = CoupledCPDFactorizer(rank=0.5, kernel_shape=(16, 3, 3)).fit(X)
    held = factorizer.channels_.size + sum(F.size for F in factorizer.factors_)
    per_rank = held // factorizer.rank_
    assert held <= 0.5 * X.size < held + per_rank
    assert factorizer.pays_
    with pytest.warns(UserWarning, match="rank 21 does not pay"):  # 21 * (2 * 16 + 32 * 6) > 32 * 144
        assert not CoupledCPDFactorizer(rank=21, kernel_shape=(16, 3, 3)).fit(X).pays_


def test_rows_of_fit_keep_their_codes_wherever_they_stand():
    X = filters()
    factorizer = CoupledCPDFactorizer(rank=3, kernel_shape=(6, 3, 3)).fit(X)
    codes = factorizer.transform(X)
    np.testing.assert_array_equal(factorizer.transform(X[[5, 2]]), codes[[5, 2]])
    mixed = factorizer.transform(np.vstack([X[:1], X[1:2] + 0.01]))
    np.testing.assert_array_equal(mixed[0], codes[0])
    assert np.abs(mixed[1] - codes[1]).max() > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_the_output_error_is_lower_with_the_gram(groups):
    X = filters(12, (4, 3, 3), dtype=np.float64)
    rng = np.random.default_rng(1)
    Z = rng.standard_normal((groups, 300, 36)) @ rng.standard_normal((36, 36))
    G = np.matmul(Z.transpose(0, 2, 1), Z) / 300
    G = G[0] if groups == 1 else G
    with_gram = CoupledCPDFactorizer(rank=3, kernel_shape=(4, 3, 3)).fit(X, input_gram=G)
    E = X - CoupledCPDFactorizer(rank=3, kernel_shape=(4, 3, 3)).fit(X).decoder_.decode(
        CoupledCPDFactorizer(rank=3, kernel_shape=(4, 3, 3)).fit_transform(X))
    plain = sum(np.einsum("nd,nd->", e @ g, e) for e, g in zip(np.split(E, groups), np.reshape(G, (-1, 36, 36))))
    assert with_gram.output_error_ < 0.9 * plain


def test_unknown_columns_are_refused():
    with pytest.raises(ValueError, match="codes must have"):
        CoupledCPDFactorizer(rank=2, kernel_shape=(6, 3, 3)).fit(filters()).decoder_.decode(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="kernel_shape must be"):
        CoupledCPDFactorizer(kernel_shape=(5, 3, 3)).fit(filters())


@needs_data
@pytest.mark.parametrize("layer", ["layer1.2.conv1", "layer2.2.conv1", "layer3.2.conv1"])
def test_least_error_of_all_formats_at_half_of_the_parameters(layer):
    W = real_weights("cifar10_resnet56")[f"{layer}.weight"]
    X, shape = W.reshape(len(W), -1), W.shape[1:]
    others = [CPDFilterPruner(0.5, kernel_shape=shape), SeparableFactorizer(0.5, kernel_shape=shape),
              SeparableFactorizer(0.5, kernel_shape=shape, kind="depthwise"), TuckerFactorizer(0.5, kernel_shape=shape),
              LowRankFactorizer(0.5)]
    least = min(other.fit(X).relative_error_ for other in others)
    assert CoupledCPDFactorizer(0.5, kernel_shape=shape).fit(X).relative_error_ < least
