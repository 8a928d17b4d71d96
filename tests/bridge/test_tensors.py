"""Bits of tensors, for every dtype a file can hold."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch

from skfactor.bridge.tensors import dtype_name, from_bits, to_bits
from skfactor.codec.dtypes import DTYPES, host_dtype, is_float, to_float


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 4)])
def test_round_trip(name, shape):
    dtype = getattr(torch, name)
    if dtype.is_floating_point or dtype.is_complex:
        tensor = torch.randn(shape).to(dtype)
    else:
        tensor = torch.randint(0, 2, shape).to(dtype)
    bits = to_bits(tensor)
    assert dtype_name(tensor) == name
    assert bits.dtype == host_dtype(name)
    assert bits.shape == shape
    assert not bits.flags.writeable
    back = from_bits(bits, name)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert to_bits(back).tobytes() == bits.tobytes()
    if is_float(name):
        np.testing.assert_array_equal(to_float(bits, name), tensor.double().numpy())


def test_no_copy_of_a_contiguous_cpu_tensor_and_a_copy_back():
    tensor = torch.randn(4, 5)
    assert np.shares_memory(to_bits(tensor), tensor.numpy())
    assert not np.shares_memory(from_bits(to_bits(tensor), "float32").numpy(), tensor.numpy())
    np.testing.assert_array_equal(to_bits(tensor.t()), tensor.numpy().T)


def test_foreign_dtype():
    with pytest.raises(ValueError, match="dtype must be one of"):
        to_bits(torch.zeros(2, dtype=torch.complex128))
