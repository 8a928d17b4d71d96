"""What the steps of a Pipeline are told of the layer, and what they are told of its kernels."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline

from skfactor import (
    KMeansWeightSharer,
    LowRankFactorizer,
    MagnitudePruner,
    MantissaRounder,
    SeparableFactorizer,
    UniformQuantizer,
)
from skfactor.codec.decoders import IdentityDecoder
from skfactor.codec.linear import ComponentsDecoder
from skfactor.estimators.base import BaseCompressor, fit_chain, fit_params, with_kernel_shape

from ._outputs import gram_of, output_errors

SHAPE = (4, 3, 2)


class Recorder(BaseCompressor):
    """Passes values on and remembers what it was given."""

    def __init__(self, preserve_zeros=False):
        self.preserve_zeros = preserve_zeros

    def fit(self, X, y=None, sample_weight=None, importance=None, input_gram=None):
        self.given_ = {"sample_weight": sample_weight, "importance": importance, "input_gram": input_gram}
        self.decoder_ = IdentityDecoder()
        return self

    def transform(self, X):
        return np.asarray(X)


class Fixed(BaseCompressor):
    """Codes 1, 2, ... of a fixed basis; a share of them is zero."""

    def __init__(self, basis, parts=1, zeros=0.0):
        self.basis = basis
        self.parts = parts
        self.zeros = zeros

    def fit(self, X, y=None):
        self.decoder_ = ComponentsDecoder(self.basis, "float64")
        return self

    def transform(self, X):
        codes = np.arange(1.0, 1 + len(X) * len(self.basis) * self.parts)
        codes[: int(self.zeros * codes.size)] = 0
        return codes.reshape(len(X), -1)


def filters(n=16):
    return np.random.default_rng(0).standard_normal((n, 24))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("groups", [None, 2])
def test_an_error_of_the_codes_costs_what_it_does_at_the_output(parts, groups):
    rng = np.random.default_rng(1)
    B, X = rng.standard_normal((5, 24 // parts)), filters()
    G = np.stack([gram_of(rng, 24, 60, seed) for seed in range(groups or 1)])
    G = G if groups else G[0]
    recorder = fit_chain(make_pipeline(Fixed(B, parts), Recorder()), X, input_gram=G)[-1]
    E = rng.standard_normal((16, 5 * parts))
    decoded = ComponentsDecoder(B, "float64").decode(E)
    of_codes = np.reshape(recorder.given_["input_gram"], (-1, 5 * parts, 5 * parts))
    blocks = (np.split(A, groups or 1) for A in (E, decoded))
    for G_codes, G_rows, e, x in zip(of_codes, np.reshape(G, (-1, 24, 24)), *blocks, strict=True):
        np.testing.assert_allclose(np.trace(e @ G_codes @ e.T), np.trace(x @ G_rows @ x.T))


def test_without_a_gram_only_a_basis_that_is_not_orthogonal_counts():
    X, Q = filters(), np.linalg.qr(np.random.default_rng(2).standard_normal((24, 4)))[0].T
    assert fit_chain(make_pipeline(Fixed(3 * Q), Recorder()), X)[-1].given_["input_gram"] is None
    B = Q * np.array([[1.0], [2], [1], [1]])
    np.testing.assert_allclose(fit_chain(make_pipeline(Fixed(B), Recorder()), X)[-1].given_["input_gram"], B @ B.T)


def test_codes_of_zeros_keep_them():
    B, X = np.random.default_rng(3).standard_normal((4, 24)), filters()
    for zeros, preserve_zeros, given in ((0.6, False, False), (0.6, True, True), (0.3, False, True)):
        recorder = fit_chain(make_pipeline(Fixed(B, zeros=zeros), Recorder(preserve_zeros)), X)[-1]
        assert (recorder.given_["input_gram"] is not None) == given


class NoGram(Recorder):
    """Its parameters do not go with a gram."""

    def fit(self, X, y=None, input_gram=None):
        if input_gram is not None:
            raise ValueError("no input_gram, please")
        return super().fit(X)


def test_a_step_that_cannot_use_a_derived_gram_is_fitted_without():
    B, X = np.random.default_rng(5).standard_normal((4, 24)), filters()
    fit_chain(make_pipeline(Fixed(B), NoGram()), X)
    fit_chain(make_pipeline(Fixed(B), NoGram()), X, input_gram=np.eye(24))
    with pytest.raises(ValueError, match="no input_gram, please"):  # the user's own is not dropped
        fit_chain(make_pipeline(NoGram(), Recorder()), X, input_gram=np.eye(24))
    with pytest.raises(ValueError, match="no input_gram, please"):
        fit_chain(make_pipeline(MagnitudePruner(), NoGram()), X, input_gram=np.eye(24))


def test_importance_and_weights():
    X, G = filters(), np.eye(24)
    rows, elements, weights = np.linspace(1, 2, 16)[:, None], np.abs(X), np.ones(16)
    side = {"importance": elements, "input_gram": G, "sample_weight": weights}
    pruned = fit_chain(make_pipeline(MagnitudePruner(), MantissaRounder(), Recorder()), X,
                       importance=rows, input_gram=G)
    assert pruned[-1].given_["input_gram"] is G  # values all along
    assert pruned[-1].given_["importance"] is rows
    linear = fit_chain(make_pipeline(Fixed(np.eye(24)[:3]), Recorder()), X, **side | {"importance": rows})[-1]
    np.testing.assert_array_equal(linear.given_["importance"], rows)
    assert linear.given_["sample_weight"] is weights
    linear = fit_chain(make_pipeline(Fixed(np.eye(24)[:3]), Recorder()), X, **side)[-1]
    assert linear.given_["importance"] is None
    opaque = fit_chain(make_pipeline(UniformQuantizer(), Recorder()), X, **side | {"importance": rows})[-1]
    assert opaque.given_ == {"sample_weight": weights, "importance": None, "input_gram": None}


@pytest.mark.parametrize("estimator", [
    KMeansWeightSharer(4),
    make_pipeline(KMeansWeightSharer(4)),
    make_pipeline(LowRankFactorizer(3), KMeansWeightSharer(4)),
    Pipeline([("a", "passthrough"), ("b", MagnitudePruner()), ("c", None), ("d", KMeansWeightSharer(4))]),
], ids=["alone", "one", "two", "passthrough"])
def test_without_anything_to_tell_it_is_fit(estimator):
    X, weights = filters(), np.linspace(1, 2, 16)
    chain, plain = clone(estimator), clone(estimator)
    assert fit_chain(chain, X, sample_weight=weights) is chain
    plain.fit(X, **fit_params(plain, sample_weight=weights))
    np.testing.assert_array_equal(chain.inverse_transform(chain.transform(X)),
                                  plain.inverse_transform(plain.transform(X)))


@pytest.mark.parametrize("last", [KMeansWeightSharer(8), UniformQuantizer(0.5)], ids=["kmeans", "uniform"])
@pytest.mark.parametrize("kind", ["spatial", "depthwise"])
def test_codes_are_quantised_for_the_output(kind, last):
    rng = np.random.default_rng(4)
    X, seen, held_back = filters(40), gram_of(rng, 24, 2000), gram_of(rng, 24, 2000)
    pipeline = make_pipeline(SeparableFactorizer(3, kernel_shape=SHAPE, kind=kind), last)
    chain, plain = clone(pipeline), clone(pipeline)
    fit_chain(chain, X, input_gram=seen)
    plain.fit(X, **fit_params(plain, input_gram=seen))
    for G in (seen, held_back):
        better, worse = output_errors((chain, plain), X, [G])
        assert better < worse


def test_kernel_shape_is_filled_in_where_it_is_that_of_the_layer():
    given = SeparableFactorizer(2, kernel_shape=(8, 3))
    assert with_kernel_shape(given, SHAPE).kernel_shape == (8, 3)
    pipeline = make_pipeline(MagnitudePruner(), SeparableFactorizer(2), SeparableFactorizer(1))
    filled = with_kernel_shape(pipeline, SHAPE)
    assert [step.kernel_shape for step in filled[1:]] == [SHAPE, None]
    assert pipeline[1].kernel_shape is None
    search = GridSearchCV(SeparableFactorizer(), {"rank": [1, 2]})
    assert with_kernel_shape(search, SHAPE).estimator.kernel_shape == SHAPE
    assert with_kernel_shape(KMeansWeightSharer(3), SHAPE).get_params() == KMeansWeightSharer(3).get_params()
