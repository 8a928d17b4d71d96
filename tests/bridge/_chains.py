"""Hand-made compressed weights of every family, for layers of any shape."""
# SPDX-License-Identifier: BSD-3-Clause

import math

import numpy as np

from skfactor.bridge.layers import layer_specs
from skfactor.bridge.tensors import dtype_name
from skfactor.codec.decoders import CodebookDecoder, IdentityDecoder
from skfactor.codec.linear import ComponentsDecoder
from skfactor.codec.separable import DepthwiseSeparableDecoder, SpatialSeparableDecoder
from skfactor.codec.tensor import CompressedTensor
from skfactor.codec.tensor_decoders import TensorTrainDecoder, TuckerDecoder

FAMILIES = {}


def family(function):
    """Register `function(kernel_shape, n_rows, rng, rank, dtype) -> (decoders, codes)`."""
    FAMILIES[function.__name__] = function
    return function


@family
def low_rank(shape, n_rows, rng, rank, dtype):
    return (ComponentsDecoder(rng.normal(size=(rank, math.prod(shape))), dtype),), rng.normal(size=(n_rows, rank))


@family
def pruned_low_rank(shape, n_rows, rng, rank, dtype):
    decoders, codes = low_rank(shape, n_rows, rng, rank, dtype)
    return (IdentityDecoder(), *decoders, IdentityDecoder()), codes


@family
def shared_low_rank(shape, n_rows, rng, rank, dtype):
    decoders, _ = low_rank(shape, n_rows, rng, rank, dtype)
    book = CodebookDecoder(rng.normal(size=(1, 4, 1)), dtype=dtype)
    return (*decoders, book), rng.integers(0, 4, size=(n_rows, rank))


@family
def kernels(shape, n_rows, rng, rank, dtype):
    """Every kernel of a filter has codes of its own."""
    decoder = ComponentsDecoder(rng.normal(size=(rank, math.prod(shape[1:]))), dtype)
    return (decoder,), rng.normal(size=(n_rows, shape[0] * rank))


@family
def half_filters(shape, n_rows, rng, rank, dtype):
    """Every half of a filter has codes of its own."""
    decoder = ComponentsDecoder(rng.normal(size=(rank, math.prod(shape) // 2)), dtype)
    return (decoder,), rng.normal(size=(n_rows, 2 * rank))


@family
def tucker2(shape, n_rows, rng, rank, dtype):
    core = rng.normal(size=(rank, 2, *shape[1:]))
    return (TuckerDecoder(core, (rng.normal(size=(shape[0], 2)),), (0,), dtype),), rng.normal(size=(n_rows, rank))


@family
def tucker(shape, n_rows, rng, rank, dtype):
    core = rng.normal(size=(rank, *(2 for _ in shape)))
    factors = tuple(rng.normal(size=(d, 2)) for d in shape)
    return (TuckerDecoder(core, factors, tuple(range(len(shape))), dtype),), rng.normal(size=(n_rows, rank))


@family
def tensor_train(shape, n_rows, rng, rank, dtype):
    ranks = [rank, *(2 for _ in shape[1:]), 1]
    cores = tuple(rng.normal(size=(ranks[i], d, ranks[i + 1])) for i, d in enumerate(shape))
    return (TensorTrainDecoder(cores, dtype),), rng.normal(size=(n_rows, rank))


@family
def spatial(shape, n_rows, rng, rank, dtype):
    width = math.prod(shape[2:])
    decoder = SpatialSeparableDecoder(rng.normal(size=(rank, *shape[:2])), width, dtype)
    return (decoder,), rng.normal(size=(n_rows, rank * width))


@family
def depthwise(shape, n_rows, rng, rank, dtype):
    decoder = DepthwiseSeparableDecoder(rng.normal(size=(shape[0], rank, *shape[1:])), dtype)
    return (decoder,), rng.normal(size=(n_rows, shape[0] * rank))


def families_of(kernel_shape):
    """Names of the families that a row of this shape can have."""
    pixels = len(kernel_shape) - 1
    return [name for name in FAMILIES
            if not ((name in ("spatial", "kernels", "depthwise") and pixels == 0)
                    or (name == "half_filters" and kernel_shape[0] % 2))]


def compressed(layer, name, *, rank=2, seed=0):
    """CompressedTensor of the family `name` for a layer's weight."""
    weight = layer.weight
    layout = layer_specs(layer)[0].layout(layer, tuple(weight.shape))
    stored = dtype_name(weight)
    dtype = "float64" if stored == "float64" else "float32"
    rng = np.random.default_rng(seed)
    decoders, codes = FAMILIES[name](layout.kernel_shape, layout.n_rows, rng, rank, dtype)
    return CompressedTensor(decoders, codes if codes.dtype.kind == "i" else codes.astype(dtype), tuple(weight.shape),
                            stored, layout)
