"""The decoder of an autoencoder."""
# SPDX-License-Identifier: BSD-3-Clause

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.decoders import decoder_from_parts
from skfactor.codec.mlp import ACTIVATIONS, MLPDecoder, block_rows
from skfactor.codec.tensor import CompressedTensor
from skfactor.exceptions import FormatError

TORCH = {"relu": torch.relu, "tanh": torch.tanh, "logistic": torch.sigmoid, "identity": lambda h: h}


def decoder(widths=(3, 5, 4, 6), activation="relu", dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal(s).astype(np.float32) for s in zip(widths, widths[1:]))
    biases = tuple(rng.standard_normal(n).astype(np.float32) for n in widths[1:])
    return MLPDecoder(weights, biases, rng.standard_normal(widths[-1]), 0.25, activation, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decodes_as_torch_does(activation, dtype):
    d = decoder(activation=activation, dtype=dtype)
    codes = np.random.default_rng(1).standard_normal((7, 6)).astype(dtype)  # rows of two sub-vectors
    h = torch.from_numpy(codes.reshape(-1, 3)).double()
    for i, (W, b) in enumerate(zip(d.weights, d.biases)):
        h = h @ torch.from_numpy(W).double() + torch.from_numpy(b).double()
        h = TORCH[activation](h) if i < 2 else h
    expected = (0.25 * h.numpy() + d.mean).reshape(7, 12)
    found = d.decode(codes)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)
    assert d.decoded_shape(codes.shape) == found.shape


def test_bits_do_not_depend_on_threads_or_blocks_of_callers():
    d = decoder((16, 300, 200, 64), dtype="float64")
    codes = np.random.default_rng(1).standard_normal((9000, 16))
    assert block_rows(d.weights) < 9000
    found = []
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            found.append(d.decode(codes))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("n_hidden", [0, 1, 12])
def test_file_gives_the_same_decoder_back(tmp_path, n_hidden):
    d = decoder((3, *[4] * n_hidden, 6), activation="tanh")
    codes = np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    tensor = CompressedTensor((d,), codes, (50, 6))
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", tensor)
    found = SkfFile(tmp_path / "x.skf").read("x")
    np.testing.assert_array_equal(found.to_array(), d.decode(codes))
    assert len(found.decoders[0].weights) == n_hidden + 1


def test_workspace_covers_what_decode_allocates():
    d = decoder((4, 700, 8))
    codes = np.zeros((20_000, 4), np.float32)
    d.decode(codes[:10])  # libraries are loaded
    tracemalloc.start()
    d.decode(codes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # at most input and output of a layer and a part of its product at once, in float64, besides the result
    assert peak <= 20_000 * 8 * 4 + 3 * 8 * d.workspace(codes.shape)
    assert d.workspace((1, 4)) == 5600  # the largest matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "as many of the one"),
        ({"biases": (np.zeros(5, np.float32),)}, "as many of the one"),
        ({"weights": (np.ones((3, 5), np.float32), np.ones((4, 4), np.float32), np.ones((4, 6), np.float32))}, "fit"),
        ({"biases": (np.ones(5), np.ones(3), np.ones(6))}, "fit together"),
        ({"mean": np.zeros(5)}, r"mean must have shape \(6,\)"),
        ({"mean": np.zeros(6, int)}, "mean must be a non-empty float"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"scale": "1"}, "scale must be a number"),
        ({"dtype": "float16"}, "dtype must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    params, arrays = decoder().parts()
    fields = {f.name: getattr(decoder(), f.name) for f in dataclasses.fields(MLPDecoder)}
    with pytest.raises(ValueError, match=message):
        MLPDecoder(**(fields | change))
    again = decoder_from_parts("mlp", params, arrays)
    np.testing.assert_array_equal(again.weights[1], fields["weights"][1])
    with pytest.raises(FormatError):
        decoder_from_parts("mlp", params, {k: v for k, v in arrays.items() if k != "weights.1"})
    with pytest.raises(ValueError, match="multiple of 3 columns"):
        again.decode(np.zeros((2, 4)))
