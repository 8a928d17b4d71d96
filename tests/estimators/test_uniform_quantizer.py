"""`UniformQuantizer` and `MantissaRounder` against brute force, theory and the bits of other dtypes."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch

from skfactor import MantissaRounder, UniformQuantizer
from skfactor.estimators import compressed_tensor
from skfactor.solvers.feedback import conditional_power, output_error


def matrix(n=48, d=36, seed=0):
    return np.random.default_rng(seed).laplace(0, 0.03, (n, d)).astype(np.float32)


def gram_of(d, seed=1, n=400):
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d), 0)
    return inputs.T @ inputs / n


def ideal_bits(codes):
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum())


def test_without_price_it_rounds():
    X = matrix()
    quantizer = UniformQuantizer(0.01, unit="absolute", entropy_weight=0.0).fit(X)
    np.testing.assert_allclose(quantizer.inverse_transform(quantizer.labels_), np.rint(X / 0.01) * 0.01, atol=1e-7)
    assert quantizer.step_ == pytest.approx(0.01)
    relative = UniformQuantizer(0.5).fit(X)
    assert relative.step_ == pytest.approx(0.5 * np.sqrt(np.square(X).mean()), rel=1e-6)


def test_codes_are_the_best_for_their_lengths():
    X = matrix()
    quantizer = UniformQuantizer(0.4, entropy_weight=0.2).fit(X)
    levels, lengths = quantizer.decoder_.codebooks[0, :, 0], quantizer.code_lengths_[0]
    cost = (X[:, :, None] - levels) ** 2 + 0.2 * quantizer.step_**2 * lengths
    np.testing.assert_array_equal(quantizer.labels_, cost.argmin(-1))
    # bits bought with error: fewer than rounding needs
    plain = UniformQuantizer(0.4, entropy_weight=0.0).fit(X)
    assert ideal_bits(quantizer.labels_) < ideal_bits(plain.labels_)
    assert quantizer.inertia_ > plain.inertia_


def test_high_rate_theory():
    X = np.random.default_rng(0).standard_normal((400, 400))
    quantizer = UniformQuantizer(0.1, entropy_weight=0.0).fit(X)
    assert quantizer.inertia_ / X.size == pytest.approx(quantizer.step_**2 / 12, rel=0.01)
    # entropy of a gaussian in steps
    assert ideal_bits(quantizer.labels_) / X.size == pytest.approx(0.5 * np.log2(2 * np.pi * np.e / 0.01), abs=0.01)


def test_output_error_with_a_gram():
    X, gram = matrix(), gram_of(36)
    plain, kept = (UniformQuantizer(0.3, entropy_weight=0.0).fit(X, input_gram=g) for g in (None, gram))
    errors = [output_error(X, q.inverse_transform(q.labels_), gram) for q in (plain, kept)]
    assert errors[1] == pytest.approx(kept.output_error_, rel=1e-9)
    assert errors[1] < 0.7 * errors[0]
    np.testing.assert_array_equal(kept.transform(X), kept.labels_)
    # the promise of conditional_power: step^2 / 12 of it per weight, up to the damping and the refinement
    expected = X.size * kept.step_**2 / 12 * conditional_power(gram)
    assert 0.5 * expected < errors[1] < 1.5 * expected


def test_the_step_is_all_that_is_stored_beside_the_codes():
    X = matrix(64, 64)
    fine, coarse = (UniformQuantizer(s, entropy_weight=0.0).fit(X) for s in (0.05, 0.5))
    tensors = [compressed_tensor(q, X) for q in (fine, coarse)]
    assert len(fine.decoder_.codebooks[0]) > 100
    for tensor in tensors:
        assert tensor.nbytes < ideal_bits(tensor.codes) / 8 * 1.05 + 100


def test_too_fine_a_step():
    with pytest.raises(ValueError, match=r"step must be at least .* for the largest weight"):
        UniformQuantizer(1e-6).fit(matrix())


@pytest.mark.parametrize(("n_bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16)])
def test_significant_bits_are_those_of_short_floats(n_bits, dtype):
    X = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    short = torch.from_numpy(X).to(dtype).float().numpy()
    np.testing.assert_array_equal(MantissaRounder(n_bits).fit_transform(X), short)


def test_rounding_is_stored_in_fewer_bytes():
    X = np.random.default_rng(0).standard_normal((1, 400)).astype(np.float32)
    sizes = [compressed_tensor(MantissaRounder(b).fit(X), X).nbytes for b in (24, 8)]
    assert sizes[1] < 0.6 * sizes[0]


def test_extreme_values_stay_finite():
    X = np.array([[np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45, 0.0]], np.float32)
    rounded = MantissaRounder(4).fit_transform(X)
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded, X, rtol=2.0**-4)
