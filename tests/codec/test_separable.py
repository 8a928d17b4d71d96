"""Decoders of separable kernels: their formulas as einsum, their bases, their files, damaged arrays."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest

from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.separable import DepthwiseSeparableDecoder, SpatialSeparableDecoder
from skfactor.codec.tensor import CompressedTensor


def spatial(rng, dtype="float32"):
    vertical, codes = rng.standard_normal((4, 3, 5)), rng.standard_normal((6, 4 * 2))
    expected = np.einsum("rci,nrj->ncij", vertical, codes.reshape(6, 4, 2)).reshape(6, -1)
    return SpatialSeparableDecoder(vertical.astype(dtype), 2, dtype), codes.astype(dtype), expected


def depthwise(rng, dtype="float32"):
    kernels, codes = rng.standard_normal((3, 2, 5, 2)), rng.standard_normal((6, 3 * 2))
    expected = np.einsum("cmij,ncm->ncij", kernels, codes.reshape(6, 3, 2)).reshape(6, -1)
    return DepthwiseSeparableDecoder(kernels.astype(dtype), dtype), codes.astype(dtype), expected


@pytest.mark.parametrize("make", [spatial, depthwise])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decode(make, dtype, tmp_path):
    decoder, codes, expected = make(np.random.default_rng(0), dtype)
    decoded = decoder.decode(codes)
    assert decoded.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(decoded, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(codes @ decoder.basis(), expected, rtol=tolerance, atol=tolerance)
    assert decoder.decoded_shape(codes.shape) == decoded.shape
    tensor = CompressedTensor((decoder,), codes, (6, 3, 5, 2), dtype)
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", tensor)
    np.testing.assert_array_equal(SkfFile(tmp_path / "x.skf").read_array("x"), tensor.to_array())


def test_blocks_of_rows_do_not_show(monkeypatch):
    decoder, codes, _ = depthwise(np.random.default_rng(1))
    whole = decoder.decode(codes)
    monkeypatch.setattr("skfactor.codec.separable._BLOCK_ELEMENTS", 40)
    np.testing.assert_array_equal(decoder.decode(codes), whole)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: SpatialSeparableDecoder(np.ones((2, 3)), 2), "3 dimensions, got 2"),
    (lambda: SpatialSeparableDecoder(np.ones((2, 3, 3)), 0), "width must be an integer of at least 1, got 0"),
    (lambda: SpatialSeparableDecoder(np.ones((2, 3, 3)), 1 << 40), "width must be"),
    (lambda: SpatialSeparableDecoder(np.ones((2, 3, 3)), 2.0), "width must be"),
    (lambda: DepthwiseSeparableDecoder(np.ones((2, 3))), "3 dimensions at least, got 2"),
    (lambda: DepthwiseSeparableDecoder(np.ones((2, 3, 0))), "non-empty float array"),
    (lambda: SpatialSeparableDecoder(np.ones((2, 3, 3)), 2).decode(np.ones((1, 5))), "4 columns, got 5"),
    (lambda: DepthwiseSeparableDecoder(np.ones((2, 3, 9))).decode(np.ones((1, 5))), "6 columns, got 5"),
])
def test_damaged_parts(build, message):
    with pytest.raises(ValueError, match=message):
        build()
