"""Decoders that are linear in the codes, tuples of arrays in decoders, and the reproducible product."""
# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.decoders import Decoder, decoder_from_parts, register_decoder
from skfactor.codec.linear import ComponentsDecoder
from skfactor.codec.matmul import matmul
from skfactor.codec.tensor import CompressedTensor
from skfactor.exceptions import FormatError


@register_decoder
@dataclass(frozen=True, eq=False)
class Stack(Decoder):
    """Adds arrays; asks for as much room as it is told."""

    name: ClassVar[str] = "test-stack"

    layers: tuple
    scales: tuple = (1, 2)
    room: int = 0

    def decode(self, codes):
        return codes + sum(s * a for s, a in zip(self.scales, self.layers))

    def decoded_shape(self, codes_shape):
        return codes_shape

    def workspace(self, codes_shape):
        return self.room


def saved(path, tensor):
    with SkfWriter(path) as writer:
        writer.add("x", tensor)
    return SkfFile(path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_product_does_not_depend_on_threads(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((700, 300)).astype(dtype), rng.standard_normal((300, 500)).astype(dtype)
    products = []
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            products.append(matmul(a, b, dtype))
    np.testing.assert_array_equal(*products)
    np.testing.assert_allclose(products[0], np.einsum("ij,jk->ik", a, b, dtype=np.float64), rtol=1e-5, atol=1e-5)
    assert products[0].dtype == dtype


def test_components_decode_sub_vectors(tmp_path):
    rng = np.random.default_rng(0)
    V, U = np.float32(rng.standard_normal((3, 4))), np.float32(rng.standard_normal((5, 6)))
    decoder = ComponentsDecoder(V)
    expected = np.hstack([U[:, :3] @ V, U[:, 3:] @ V])
    np.testing.assert_allclose(decoder.decode(U), expected, rtol=1e-5)
    assert decoder.decoded_shape((5, 6)) == (5, 8)
    tensor = CompressedTensor((decoder,), U, (5, 8))
    np.testing.assert_array_equal(saved(tmp_path / "x.skf", tensor).read("x").to_array(), decoder.decode(U))


def test_tuples_of_arrays_are_stored(tmp_path):
    layers = tuple(np.full((3, 4), i, np.float32) for i in (1, 10, 100))
    decoder = Stack(layers, (1, 2, 3))
    params, arrays = decoder.parts()
    assert params == {"scales": (1, 2, 3), "room": 0}
    assert list(arrays) == ["layers.0", "layers.1", "layers.2"]
    tensor = CompressedTensor((decoder,), np.zeros((3, 4), np.float32), (3, 4))
    np.testing.assert_array_equal(saved(tmp_path / "x.skf", tensor).read("x").to_array(),
                                  np.full((3, 4), 321, np.float32))
    with pytest.raises(FormatError, match=r"'layers.2' is out of order"):
        decoder_from_parts("test-stack", {}, {"layers.0": layers[0], "layers.2": layers[2]})


def test_decoding_may_not_ask_for_more_room_than_the_file_justifies(tmp_path):
    tensor = CompressedTensor((Stack((np.ones((3, 4), np.float32),), (1,), 1 << 30),),
                              np.zeros((3, 4), np.float32), (3, 4))
    with pytest.raises(FormatError, match="asks for 1073741824 elements at once"):
        saved(tmp_path / "x.skf", tensor).read("x")


@pytest.mark.parametrize(("components", "message"), [
    (np.ones((2, 3), np.int8), "non-empty float array, got int8"),
    (np.ones((0, 3)), "non-empty float array"),
    (np.ones(3), "2 dimensions, got 1"),
])
def test_damaged_components(components, message):
    with pytest.raises(ValueError, match=message):
        ComponentsDecoder(components)
    with pytest.raises(ValueError, match="multiple of 2 columns, got 3"):
        ComponentsDecoder(np.ones((2, 3))).decode(np.ones((1, 3)))
