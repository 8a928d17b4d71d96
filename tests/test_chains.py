"""Every Pipeline of two or three estimators of the list comes back from its file bit for bit."""
# SPDX-License-Identifier: BSD-3-Clause

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from _checks import weights_matrix
from _estimators import CASES
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.estimators import compressed_tensor, fit_chain

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

CLASSES = sorted({type(case.estimator) for case in CASES}, key=lambda cls: cls.__name__)
#: Their codes are numbers of symbols: a step behind them would do arithmetic with names.
ENDS = {"DeepKMeansRegularizer", "KMeansWeightSharer", "SoftWeightSharer", "UniformQuantizer"}
MATRICES = {
    "weights": weights_matrix(),
    "double": weights_matrix(np.float64),
    "zeros": np.zeros((12, 16), np.float32),
    "minus zero": np.where(weights_matrix() == 0, np.float32(-0.0), weights_matrix()),
    "sparse": np.where(np.abs(weights_matrix()) < 0.08, 0, weights_matrix()).astype(np.float32),
    "large": np.float32(1e12) * weights_matrix(),
}


def refusal(estimator, X):
    """What the estimator alone says against this matrix (its width, its number of rows), or None."""
    try:
        quiet(clone(estimator).fit, X)
    except ValueError as error:
        return str(error)
    return None


def quiet(f, *args, **params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **params)


@st.composite
def chains(draw):
    """Classes first, then a setting of each: a class with many settings is not drawn more often."""
    n_steps = draw(st.integers(2, 3))
    steps = []
    for i in range(n_steps):
        allowed = [c for c in CLASSES if i == n_steps - 1 or c.__name__ not in ENDS]
        cls = draw(st.sampled_from(allowed))
        steps.append(draw(st.sampled_from([case.estimator for case in CASES if type(case.estimator) is cls])))
    return [(f"s{i}", clone(step)) for i, step in enumerate(steps)], draw(st.sampled_from(sorted(MATRICES)))


def check_chain(steps, X):
    pipeline = Pipeline(steps)
    try:
        quiet(fit_chain, pipeline, X)
    except ValueError as error:
        # a step may refuse the codes before it, in one line; then it refuses them alone as well
        codes = X
        for _, step in steps:
            if refusal(step, codes) == str(error) and "\n" not in str(error).strip():
                hypothesis.reject()
            codes = quiet(clone(step).fit_transform, codes)
        raise
    codes = pipeline.transform(X)
    tensor = compressed_tensor(pipeline, X, codes=codes, dtype=X.dtype.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.skf"
        with SkfWriter(path) as writer:
            writer.add("x", tensor)
        file = SkfFile(path)
        again = file.read("x")
        size = path.stat().st_size
        with SkfWriter(path):
            pass
        assert abs(tensor.nbytes - (size - path.stat().st_size)) <= 64
    assert again.codes.dtype == tensor.codes.dtype
    assert again.codes.tobytes() == np.ascontiguousarray(codes).tobytes()
    assert again.to_array().tobytes() == tensor.to_array().tobytes()
    assert tensor.to_array().tobytes() == pipeline.inverse_transform(codes).tobytes()
    assert again.to_array().shape == X.shape
    assert np.isfinite(again.to_array()).all()


@hypothesis.settings(derandomize=True, deadline=None, max_examples=40, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(chains())
def test_chain(chain):
    steps, name = chain
    check_chain(steps, MATRICES[name])


@pytest.mark.slow
@hypothesis.settings(derandomize=True, deadline=None, max_examples=1500, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(chains())
def test_many_chains(chain):
    steps, name = chain
    check_chain(steps, MATRICES[name])
