"""`MagnitudePruner`: what is its own, beside the common checks."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor import MagnitudePruner
from skfactor.estimators import compressed_tensor

from ._outputs import gram_of, output_errors


def weights(shape=(20, 16), dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_amount_is_hit_exactly(amount, kind):
    X = weights() if kind == "normal" else np.ones((20, 16))
    pruner = MagnitudePruner(amount)
    codes = pruner.fit_transform(X)
    assert (codes == 0).sum() == round(amount * X.size)
    np.testing.assert_allclose(pruner.sparsity_, (codes == 0).mean())
    np.testing.assert_array_equal(codes[pruner.mask_], X[pruner.mask_])
    np.testing.assert_array_equal(pruner.transform(X), codes)


@pytest.mark.parametrize(("granularity", "axis"), [("element", None), ("row", 0), ("column", 1)])
def test_agrees_with_torch(granularity, axis):
    torch = pytest.importorskip("torch")
    prune = pytest.importorskip("torch.nn.utils.prune")
    X = weights(dtype=np.float32)
    layer = torch.nn.Linear(16, 20)
    layer.weight.data = torch.from_numpy(X.copy())
    if axis is None:
        prune.l1_unstructured(layer, "weight", amount=0.25)
    else:
        prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=axis)
    np.testing.assert_array_equal(MagnitudePruner(0.25, granularity=granularity).fit_transform(X),
                                  layer.weight.detach().numpy())


def test_threshold_and_rows_that_were_not_fitted():
    X, Y = weights(), np.random.default_rng(1).standard_normal((5, 16))
    pruner = MagnitudePruner(threshold=0.7).fit(X)
    np.testing.assert_array_equal(pruner.mask_, np.abs(X) > 0.7)
    fitted = MagnitudePruner(0.6).fit(X)
    np.testing.assert_array_equal(fitted.transform(Y) != 0, np.abs(Y) > fitted.threshold_)
    columns = MagnitudePruner(0.5, granularity="column").fit(X)
    np.testing.assert_array_equal((columns.transform(Y) != 0).all(axis=0), columns.mask_[0])
    np.testing.assert_array_equal(MagnitudePruner(threshold=0.0).fit_transform(X), X)


def test_pattern():
    X = weights((6, 18))
    codes = MagnitudePruner(pattern="2:4").fit_transform(X)
    assert ((codes[:, :16].reshape(6, 4, 4) != 0).sum(axis=2) == 2).all()
    np.testing.assert_array_equal(codes[:, 16:], X[:, 16:])
    for wrong in ("4:2", "0:4", "2/4", "2:4:8"):
        with pytest.raises(ValueError, match=f"pattern must be 'N:M' with 1 <= N <= M, got '{wrong}'"):
            MagnitudePruner(pattern=wrong).fit(X)
    with pytest.raises(ValueError, match="pattern prunes elements"):
        MagnitudePruner(pattern="2:4", granularity="row").fit(X)


def test_importance():
    X, importance = weights(), np.random.default_rng(2).random((20, 16))
    pruner = MagnitudePruner(0.5)
    pruner.fit(X, importance=importance)
    cost = X**2 * importance
    assert cost[~pruner.mask_].max() <= cost[pruner.mask_].min()
    np.testing.assert_array_equal(pruner.transform(X), np.where(pruner.mask_, X, 0))


SETTINGS = [{}, {"amount": 0.9}, {"pattern": "2:4"}, {"pattern": "1:4"}, {"granularity": "row"},
            {"granularity": "column"}, {"threshold": 0.5}]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("importance", [None, "rows"])
def test_input_gram_lowers_the_output_error(params, n_groups, importance):
    rng = np.random.default_rng(3)
    X = weights()
    side = {} if importance is None else {"importance": np.linspace(0.5, 2, 20)[:, None]}
    seen, held_back = ([gram_of(rng, 16, 3000, seed) for seed in range(n_groups)] for _ in range(2))
    plain = MagnitudePruner(**params).fit(X)
    output = MagnitudePruner(**params).fit(X, input_gram=np.stack(seen), **side)
    if params != {"granularity": "row"} or not importance:
        for grams in (seen, held_back):
            before, after = output_errors((plain, output), X, grams)
            assert after < before
    if "threshold" not in params:
        assert output.mask_.sum() == plain.mask_.sum()
    np.testing.assert_array_equal(output.transform(X) != 0, output.mask_)
    if importance is None:
        np.testing.assert_allclose(output.output_error_, output_errors((output,), X, seen)[0])
    if "pattern" in params:
        kept = int(params["pattern"][0])
        assert (output.mask_.reshape(20, 4, 4).sum(axis=2) == kept).all()
    # rows that were not fitted: the same rule, and the best values for what stays
    Y = rng.standard_normal((4 * n_groups, 16))
    codes = output.transform(Y)
    G = np.repeat(np.stack(seen), 4, axis=0)
    damped = G + 0.003 * np.trace(G, axis1=1, axis2=2)[:, None, None] / 16 * np.eye(16)
    slope = np.einsum("nd,nde->ne", Y - codes, damped)
    np.testing.assert_allclose(slope[codes != 0], 0, atol=1e-2 * np.abs(slope).max())


def test_importance_within_rows_and_a_gram_exclude_each_other():
    with pytest.raises(ValueError, match="one number per row"):
        MagnitudePruner().fit(weights(), importance=np.arange(320.0).reshape(20, 16), input_gram=np.eye(16))


def test_zeros_cost_a_mask():
    """The file holds the values that stay, uncompressible here, and the entropy of the mask."""
    X = weights((200, 300), np.float32)
    for amount in (0.5, 0.9, 0.99):
        pruner = MagnitudePruner(amount).fit(X)
        entropy = -(amount * np.log2(amount) + (1 - amount) * np.log2(1 - amount)) * X.size / 8
        values = 4 * (1 - amount) * X.size
        assert compressed_tensor(pruner, X).nbytes < 1.01 * (values + entropy) + 300
