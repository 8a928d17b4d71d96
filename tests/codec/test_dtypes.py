"""Casts and names of dtypes, against torch's casts and numpy's bits."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.codec.dtypes import DTYPES, from_float, host_dtype, is_float, itemsize, to_float

torch = pytest.importorskip("torch")


def _hard_values(rng):
    """Random float32 bit patterns with every kind of special value and rounding tie of bfloat16 among them."""
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 1,
                        0x007FFFFF, 0x00008000, 0x3F808000, 0x3F818000, 0x7F7F8000, 0x3F807FFF], dtype=np.uint32)
    ties = (rng.integers(0, 1 << 16, 1000, dtype=np.uint32) << 16) | np.uint32(0x8000)
    return np.concatenate([bits, special, ties]).view(np.float32)


def test_bfloat16_rounds_as_torch():
    values = _hard_values(np.random.default_rng(0))
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    got = from_float(values, "bfloat16")
    nan = np.isnan(values)
    assert nan.any()
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert np.isnan(to_float(got[nan], "bfloat16")).all()


def test_bfloat16_values_are_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float(bits, "bfloat16")
    np.testing.assert_array_equal(values, torch.from_numpy(bits).view(torch.bfloat16).float().numpy())
    nan = np.isnan(values)
    np.testing.assert_array_equal(from_float(values, "bfloat16")[~nan], bits[~nan])


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_ieee_casts_as_torch(name):
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = _hard_values(np.random.default_rng(1)).astype(np.float64)
    expected = torch.from_numpy(values).to(getattr(torch, name)).numpy()
    np.testing.assert_array_equal(from_float(values, name), expected)
    assert from_float(values, name).dtype == host_dtype(name)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_names_and_sizes_agree_with_torch(name):
    assert torch.empty(0, dtype=getattr(torch, name)).itemsize == itemsize(name) == host_dtype(name).itemsize
    floating = getattr(torch, name).is_floating_point and itemsize(name) > 1
    assert is_float(name) == floating


@pytest.mark.parametrize("name", ["int32", "bool", "float8_e4m3fn", "complex64"])
def test_only_floats_have_values(name):
    with pytest.raises(ValueError, match=f"dtype {name} has no floating-point values"):
        to_float(np.zeros(2, dtype=host_dtype(name)), name)


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float12'"):
        host_dtype("float12")
