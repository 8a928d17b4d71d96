"""The project's own common checks: what scikit-learn's suite does not see."""
# SPDX-License-Identifier: BSD-3-Clause

import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline

from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.estimators import compressed_tensor, fit_params

N_ROWS, N_COLUMNS = 12, 16


def weights_matrix(dtype=np.float32, scale=0.05):
    """Weights with a few exact zeros, as a pruned layer has them."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N_ROWS, N_COLUMNS)) * scale
    X[np.abs(X) < 0.2 * scale] = 0.0
    return X.astype(dtype)


def quiet_fit(estimator, X, **params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **params)


def reconstruct(estimator, X):
    return estimator.inverse_transform(estimator.transform(X))


def check_round_trip(case):
    X = weights_matrix()
    estimator = clone(case.estimator)
    codes = estimator.fit_transform(X)
    np.testing.assert_array_equal(codes, estimator.transform(X))
    X_hat = estimator.inverse_transform(codes)
    assert X_hat.shape == X.shape
    assert X_hat.dtype == X.dtype
    np.testing.assert_array_equal(X_hat, estimator.decoder_.decode(np.asarray(codes)))
    np.testing.assert_array_equal(X_hat, compressed_tensor(estimator, X).to_array())


def check_file_round_trip(case, tmp_path):
    X = weights_matrix()
    estimator = clone(case.estimator).fit(X)
    tensor = compressed_tensor(estimator, X)
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", tensor)
    file = SkfFile(tmp_path / "x.skf")
    np.testing.assert_array_equal(file.read("x").to_array(), tensor.to_array())
    # the second source of the rate is the file: what an empty file weighs less
    with SkfWriter(tmp_path / "empty.skf"):
        pass
    grown = (tmp_path / "x.skf").stat().st_size - (tmp_path / "empty.skf").stat().st_size
    assert abs(tensor.nbytes - grown) <= 64
    assert file.nbytes("x") <= (tmp_path / "x.skf").stat().st_size


def check_in_pipeline(case):
    X = weights_matrix()
    pipeline = Pipeline([("first", clone(case.estimator))]).fit(X)
    alone = clone(case.estimator).fit(X)
    np.testing.assert_array_equal(pipeline.inverse_transform(pipeline.transform(X)), reconstruct(alone, X))
    np.testing.assert_array_equal(compressed_tensor(pipeline, X).to_array(), reconstruct(alone, X))
    weights = np.linspace(1, 2, N_ROWS)
    assert set(fit_params(pipeline, sample_weight=weights)) <= {"first__sample_weight"}
    pipeline.fit(X, **fit_params(pipeline, sample_weight=weights))


def check_budget(case):
    X = weights_matrix()
    name, values = case.budget
    errors = [-quiet_fit(clone(case.estimator).set_params(**{name: v}), X).score(X) for v in values]
    if case.optimal:
        assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:]))
    assert errors[-1] < errors[0]


def check_exact_at_full_budget(case):
    if case.full is None:
        return
    X = weights_matrix()
    estimator = quiet_fit(clone(case.estimator).set_params(**case.full), X)
    np.testing.assert_allclose(reconstruct(estimator, X), X, rtol=1e-6, atol=1e-9 + case.rounding * np.abs(X).max())


def check_inputs_untouched(case):
    X, weights = weights_matrix(), np.linspace(0.5, 2, N_ROWS)
    copies = X.copy(), weights.copy()
    for array in (X, weights):
        array.flags.writeable = False
    estimator = clone(case.estimator)
    params = estimator.get_params()
    estimator.fit(X, **fit_params(estimator, sample_weight=weights))
    reconstruct(estimator, X)
    estimator.score(X)
    np.testing.assert_array_equal(X, copies[0])
    np.testing.assert_array_equal(weights, copies[1])
    assert estimator.get_params() == params


def check_global_state_untouched(case):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    estimator = clone(case.estimator)
    if "random_state" in estimator.get_params():
        estimator.set_params(random_state=3)
    estimator.fit(weights_matrix())
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def check_fitted_state_is_numpy(case):
    estimator = clone(case.estimator).fit(weights_matrix())
    assert not any(isinstance(v, torch.Tensor | torch.nn.Module) for v in vars(estimator).values())


def check_dtypes_agree(case):
    X = weights_matrix(np.float32)
    single, double = (clone(case.estimator).fit(X.astype(t)) for t in (np.float32, np.float64))
    # the same values in either precision: errors agree to single precision, whatever ties decide
    np.testing.assert_allclose(single.score(X), double.score(X.astype(np.float64)), rtol=1e-4, atol=1e-10)


def check_half_precision(case):
    half = weights_matrix(np.float16)
    bfloat = torch.from_numpy(weights_matrix()).bfloat16()
    for X, values in ((half, half.astype(np.float32)), (bfloat, bfloat.float().numpy())):
        from_half, from_single = (quiet_fit(clone(case.estimator), A) for A in (X, values))
        assert reconstruct(from_half, X).dtype == np.float32
        np.testing.assert_array_equal(reconstruct(from_half, X), reconstruct(from_single, values))


def check_any_scale(case):
    X = weights_matrix(np.float64)
    relative = [-clone(case.estimator).fit(X * s).score(X * s) for s in (2.0**-27, 1.0, 2.0**27)]
    np.testing.assert_allclose(relative, relative[1], rtol=1e-6)


def check_degenerate(case):
    zeros, ones = np.zeros((N_ROWS, N_COLUMNS), np.float32), np.ones((N_ROWS, N_COLUMNS), np.float32)
    two_values = np.float32(weights_matrix() > 0)
    given = [(zeros, {})] if case.shrinks else [(zeros, {}), (ones, {}), (-3e-12 * ones, case.full or {})]
    if case.full is not None:
        given.append((two_values, case.full))
    for X, params in given:
        estimator = quiet_fit(clone(case.estimator).set_params(**params), X)
        np.testing.assert_allclose(reconstruct(estimator, X), X, rtol=1e-6, atol=case.rounding * np.abs(X).max())
        assert np.isfinite(estimator.score(X))
    small = [weights_matrix()[:1]]
    if getattr(case.estimator, "kernel_shape", None) is None and getattr(case.estimator, "tensor_shape", None) is None:
        small.append(weights_matrix()[:3, :8])
        if getattr(case.estimator, "vector_size", 1) == 1:
            small.append(weights_matrix()[:, :1])
    for X in small:
        estimator = quiet_fit(clone(case.estimator), X)
        assert reconstruct(estimator, X).shape == X.shape


def check_refit(case):
    X, other = weights_matrix(), np.random.default_rng(1).standard_normal((N_ROWS, N_COLUMNS))
    refitted = clone(case.estimator).fit(other).fit(X)
    fresh = clone(case.estimator).fit(X)
    np.testing.assert_array_equal(reconstruct(refitted, X), reconstruct(fresh, X))
    assert set(vars(refitted)) == set(vars(fresh))


def check_pickle_and_clone(case):
    X = weights_matrix()
    estimator = clone(case.estimator).fit(X)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(reconstruct(again, X), reconstruct(estimator, X))
    assert clone(estimator).get_params() == case.estimator.get_params()


def check_bad_input(case):
    X = weights_matrix(np.float64)
    nan, inf = X.copy(), X.copy()
    nan[3, 4], inf[3, 4] = np.nan, -np.inf
    words = X.astype(object)
    words[0, 0] = {"a": 1}
    bad = {
        "NaN or inf": [nan, inf],
        "minimum of 1 is required": [X[:0], X[:, :0]],
        "argument must be": [words],
        "Complex data not supported": [X + 1j],
        "[Ss]parse": [sparse.csr_array(X)],
        "2-D": [X[0], X[None]],
    }
    fitted = clone(case.estimator).fit(X)
    for message, arrays in bad.items():
        for array in arrays:
            for method in (clone(case.estimator).fit, fitted.transform):
                with pytest.raises((ValueError, TypeError), match=message) as caught:
                    method(array)
                if "arse" not in message:  # scikit-learn's own two sentences on sparse data
                    assert "\n" not in str(caught.value).strip()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
