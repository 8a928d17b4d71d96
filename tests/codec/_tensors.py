"""Tensors of all kinds that files must hold, and bit-for-bit comparison."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.codec.decoders import CodebookDecoder, IdentityDecoder
from skfactor.codec.dtypes import DTYPES, host_dtype
from skfactor.codec.tensor import CompressedTensor, Layout, RawTensor


def random_bits(rng, dtype, shape):
    """A raw tensor of any bits at all: NaN payloads, -0.0, infinities and denormals come by themselves."""
    if dtype == "bool":
        return RawTensor(np.asarray(rng.random(shape) < 0.3), dtype)
    host = host_dtype(dtype)
    data = rng.integers(0, 256, int(np.prod(shape)) * host.itemsize, dtype=np.uint8)
    return RawTensor(data.view(host).reshape(shape), dtype)


def raw_cases(rng):
    """Name -> raw tensor."""
    cases = {f"bits.{dtype}.{i}": random_bits(rng, dtype, shape)
             for dtype in DTYPES for i, shape in enumerate([(), (1,), (7,), (0, 3), (5, 4, 3), (40, 37)])}
    normal = rng.standard_normal((300, 80)).astype(np.float32)
    cases["normal"] = RawTensor(normal, "float32")
    cases["normal.half"] = RawTensor(normal.astype(np.float16), "float16")
    cases["pruned"] = RawTensor(np.where(rng.random(normal.shape) < 0.8, np.float32(0), normal), "float32")
    cases["pruned.small"] = RawTensor(cases["pruned"].array[:6, :40], "float32")
    cases["minus.zero"] = RawTensor(np.where(rng.random(500) < 0.5, np.float32(0), np.float32(-0.0)), "float32")
    cases["zeros"] = RawTensor(np.zeros((64, 3, 3, 3), dtype=np.float32), "float32")
    cases["nan"] = RawTensor(np.full(9, 0x7FC12345, dtype=np.uint32).view(np.float32), "float32")
    cases["ones.double"] = RawTensor(np.ones(1000), "float64")
    cases["transposed"] = RawTensor(normal[:20, :30].T, "float32")
    cases["count"] = RawTensor(np.array(12345, dtype=np.int64), "int64")
    cases["line"] = RawTensor(np.linspace(-1, 1, 77, dtype=np.float32), "float32")
    cases["mask.large"] = RawTensor(np.tril(np.ones((300, 300), dtype=bool)), "bool")
    return cases


def shared(rng, shape, n_clusters, *, dtype="float32", books=1, granularity="tensor", group_size=None, vector=1,
           uniform=False, code_dtype=np.uint8, layout=None, coder="auto", book_dtype=np.float32):
    """A tensor shared by k-means, with any codebook and any codes."""
    layout = Layout.rows_first(shape) if layout is None else layout
    n_columns = int(np.prod(layout.kernel_shape))
    book = rng.standard_normal((books, n_clusters, vector)).astype(book_dtype)
    if uniform:
        step = np.float32(rng.uniform(0.01, 0.1))
        book = (step * np.arange(-(n_clusters // 2), n_clusters - n_clusters // 2)).astype(np.float32)[None, :, None]
    p = rng.dirichlet(np.ones(n_clusters))
    codes = rng.choice(n_clusters, size=(layout.n_rows, n_columns // vector), p=p).astype(code_dtype)
    decoder = CodebookDecoder(book, granularity, group_size)
    return CompressedTensor((decoder,), codes, shape, dtype, layout, coder)


def compressed_cases(rng):
    """Name -> compressed tensor."""
    values = rng.standard_normal((30, 50)).astype(np.float32)
    sparse = np.where(rng.random((200, 100)) < 0.9, 0, rng.standard_normal((200, 100)))
    transposed = Layout(2 * 5, (4, 3, 3), (2, 4, 5, 3, 3), (0, 2, 1, 3, 4))
    return {
        "conv": shared(rng, (16, 8, 3, 3), 16),
        "conv.uniform": shared(rng, (16, 8, 3, 3), 21, uniform=True),
        "linear.double": shared(rng, (40, 30), 300, dtype="float64", code_dtype=np.int64, book_dtype=np.float64),
        "linear.half": shared(rng, (40, 30), 7, dtype="float16", book_dtype=np.float16),
        "linear.bfloat": shared(rng, (40, 30), 5, dtype="bfloat16", code_dtype=np.int32),
        "rows": shared(rng, (12, 40), 8, books=12, granularity="row"),
        "columns": shared(rng, (12, 40), 8, books=40, granularity="column"),
        "groups": shared(rng, (12, 40), 8, books=3, granularity="group", group_size=4),
        "product": shared(rng, (20, 36), 32, vector=9),
        "one.cluster": shared(rng, (20, 36), 1),
        "vector": shared(rng, (50,), 4),
        "scalar": shared(rng, (), 1),
        "empty": shared(rng, (0, 5), 3),
        "transposed": shared(rng, (8, 5, 3, 3), 9, layout=transposed),
        "embedding": shared(rng, (30, 8), 6, layout=Layout(30, (8,), zero_rows=(0, 7))),
        "huffman": shared(rng, (40, 30), 16, coder="huffman"),
        "identity": CompressedTensor((IdentityDecoder(),), values, (30, 50)),
        "identity.sparse": CompressedTensor((IdentityDecoder(),), sparse, (200, 100), "float64"),
        "chain": CompressedTensor((IdentityDecoder(), CodebookDecoder(values[:, :6].reshape(1, -1, 1))),
                                  rng.integers(0, 180, (7, 9)), (7, 9)),
    }


def assert_same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def assert_same_tensor(a, b):
    """Every field equal, arrays bit for bit."""
    assert type(a) is type(b)
    assert a.dtype == b.dtype
    assert tuple(a.shape) == tuple(b.shape)
    if isinstance(a, RawTensor):
        assert_same_bits(a.array, b.array)
        return
    assert a.layout == b.layout
    assert a.coder == b.coder
    assert_same_bits(a.codes, b.codes)
    assert [d.name for d in a.decoders] == [d.name for d in b.decoders]
    for one, other in zip(a.decoders, b.decoders):
        (params, arrays), (others, other_arrays) = one.parts(), other.parts()
        assert params == others
        assert arrays.keys() == other_arrays.keys()
        for key in arrays:
            assert_same_bits(arrays[key], other_arrays[key])
    assert_same_bits(a.to_array(), b.to_array())
