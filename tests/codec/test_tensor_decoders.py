"""Decoders of tensor decompositions against one einsum each, their files, and what is refused."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from skfactor.codec import tensor_decoders
from skfactor.codec.container import SkfFile, SkfWriter
from skfactor.codec.tensor import CompressedTensor
from skfactor.codec.tensor_decoders import (
    BlockTermDecoder,
    HierarchicalTuckerDecoder,
    TensorTrainDecoder,
    TuckerDecoder,
)
from skfactor.exceptions import FormatError

rng = np.random.default_rng(0)


def array(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def einsum(formula, *operands):
    return np.einsum(formula, *operands, dtype=np.float64)


def tucker():
    core, U, V = array(3, 2, 4, 2), array(6, 2), array(5, 2)
    return TuckerDecoder(core, (U, V), (0, 2)), einsum("rasb,ca,wb->rcsw", core, U, V)


def train():
    cores = array(3, 6, 4), array(4, 4, 2), array(2, 5, 1)
    return TensorTrainDecoder(cores), einsum("rap,pbq,qcx->rabc", *cores)


def blocks():
    a, b, U, V = array(3, 2, 4), array(2, 3, 4), array(6, 2), array(6, 3)
    basis = [einsum("rsh,cs->rch", *pair) for pair in ((a, U), (b, V))]
    return BlockTermDecoder((a, b), (U, V), (0,)), np.concatenate(basis)


def tree_of_four():
    """((codes, 1), (2, 3)): the transfers of (codes, 1) and (2, 3)."""
    frames, transfers = (array(6, 2), array(4, 3), array(5, 2)), (array(3, 2, 4), array(3, 2, 4))
    return (HierarchicalTuckerDecoder(frames, transfers),
            einsum("ca,hb,wd,rap,bdp->rchw", *frames, *transfers))


def tree_of_seven():
    """(((codes, 1), (2, 3)), ((4, 5), 6))."""
    frames = array(2, 2), array(3, 2), array(2, 2), array(3, 2), array(2, 2), array(2, 4)
    transfers = array(3, 2, 4), array(2, 2, 3), array(4, 3, 2), array(2, 2, 3), array(3, 4, 2)
    return (HierarchicalTuckerDecoder(frames, transfers),
            einsum("ai,bj,ck,dl,em,fn,rio,jkp,opq,lms,snq->rabcdef", *frames, *transfers))


def matrix_tree():
    frame = array(6, 3)
    return HierarchicalTuckerDecoder((frame,)), frame.T


MAKERS = [tucker, train, blocks, tree_of_four, tree_of_seven, matrix_tree]


@pytest.mark.parametrize("n_rows", [1, 2000])
@pytest.mark.parametrize("make", MAKERS)
def test_decodes_as_the_formula(make, n_rows):
    """Few rows go through the chain, many through the basis; both are the product with the contraction."""
    decoder, tensor = make()
    basis = tensor.reshape(len(tensor), -1)
    np.testing.assert_allclose(decoder.basis(), basis, rtol=1e-12, atol=1e-12)
    codes = array(n_rows, len(basis))
    X = decoder.decode(codes)
    assert X.dtype == np.float32
    assert X.shape == decoder.decoded_shape(codes.shape)
    np.testing.assert_allclose(X, codes.astype(float) @ basis, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_bits_do_not_depend_on_threads(make):
    decoder, tensor = make()
    codes = array(2000, len(tensor))
    decoded = []
    for n in (1, 2):
        with threadpool_limits(n):
            decoded.append(decoder.decode(codes))
    np.testing.assert_array_equal(*decoded)


def test_chain_in_blocks_of_rows(monkeypatch):
    """A chain cheaper than the basis for any number of rows: many codes, few channels between."""
    core, U = array(40, 2, 3), array(30, 2)
    decoder, codes = TuckerDecoder(core, (U,), (0,)), array(100, 40)
    assert not decoder._through_basis(10**6)
    whole = decoder.decode(codes)
    np.testing.assert_allclose(whole, einsum("nr,rah,ca->nch", codes, core, U).reshape(100, -1), rtol=1e-4,
                               atol=1e-4)
    monkeypatch.setattr(tensor_decoders, "_BLOCK_ELEMENTS", 900)
    np.testing.assert_allclose(decoder.decode(codes), whole, rtol=1e-6)
    assert decoder.workspace(codes.shape) == 900


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("n_rows", [1, 2000])
def test_workspace_is_what_products_make(make, n_rows, monkeypatch):
    decoder, tensor = make()
    sizes = []

    def recording(a, b, dtype):
        product = original(a, b, dtype)
        sizes.append(product.size)
        return product

    original = tensor_decoders.matmul
    monkeypatch.setattr(tensor_decoders, "matmul", recording)
    result = decoder.decode(array(n_rows, len(tensor)))
    if decoder._through_basis(n_rows):
        assert sizes.pop() == result.size
        sizes.append(decoder.basis().size)
    assert max(sizes) == decoder.workspace((n_rows, len(tensor)))


@pytest.mark.parametrize("make", MAKERS)
def test_file_round_trip(make, tmp_path):
    decoder, tensor = make()
    codes = array(7, len(tensor))
    shape = decoder.decoded_shape(codes.shape)
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", CompressedTensor((decoder,), codes, shape))
    np.testing.assert_array_equal(SkfFile(tmp_path / "x.skf").read("x").to_array(), decoder.decode(codes))


def test_small_files_may_not_become_large_arrays(tmp_path):
    """A train of ones has few numbers and a long row: the layout refuses it before anything is allocated."""
    decoder = TensorTrainDecoder((np.ones((1, 2, 1), np.float32),) * 40)
    with SkfWriter(tmp_path / "x.skf") as writer:
        writer.add("x", CompressedTensor((decoder,), np.ones((2, 1), np.float32), (2, 8)))
    with pytest.raises(FormatError, match=r"codes decode to a matrix of shape \(2, 1099511627776\)"):
        SkfFile(tmp_path / "x.skf").read("x")
    wide = TensorTrainDecoder((np.ones((1, 1, 40000), np.float32), np.ones((40000, 8, 1), np.float32)))
    assert wide.workspace((10, 1)) == 40000


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TuckerDecoder(np.ones(3)), "at least 2 dimensions, got 1"),
    (lambda: TuckerDecoder(np.ones((3, 2), int)), "core must be a non-empty float array, got int64"),
    (lambda: TuckerDecoder(np.ones((3, 2)), (np.ones((4, 2)),), ()), "0 modes need as many factors, got 1"),
    (lambda: TuckerDecoder(np.ones((3, 2)), (np.ones((4, 3)),), (0,)), r"mode 0 must have shape \(d, 2\)"),
    (lambda: TuckerDecoder(np.ones((3, 2)), (np.ones((4, 2)),), (1,)), r"different integers in 0..0, got \(1,\)"),
    (lambda: TuckerDecoder(np.ones((3, 2)), (np.ones((4, 2)),), (False,)), "different integers"),
    (lambda: TuckerDecoder(np.ones((3, 2)), dtype="int8"), "dtype must be float32 or float64"),
    (lambda: TensorTrainDecoder(()), "cores must have shapes"),
    (lambda: TensorTrainDecoder((np.ones((2, 3, 2)), np.ones((3, 3, 1)))), "cores must have shapes"),
    (lambda: TensorTrainDecoder((np.ones((2, 3, 2)),)), "cores must have shapes"),
    (lambda: TensorTrainDecoder(3), "cores must be a tuple of arrays, got int"),
    (lambda: BlockTermDecoder(()), "at least one"),
    (lambda: BlockTermDecoder((np.ones((2, 3)), np.ones((2, 3, 1)))), "all of as many dimensions"),
    (lambda: BlockTermDecoder((np.ones((2, 3)), np.ones((2, 4)))), "rows of one shape"),
    (lambda: BlockTermDecoder((np.ones((2, 3)),), (), (0,)), "need 1 factors, got 0"),
    (lambda: BlockTermDecoder((np.ones((2, 3)),), (np.ones((3, 2)),), (0,)), "factor of block 0 of mode 0"),
    (lambda: HierarchicalTuckerDecoder(()), "frames must be 1 to 64"),
    (lambda: HierarchicalTuckerDecoder((np.ones((2, 2)),) * 2), "2 frames need 1 transfers, got 0"),
    (lambda: HierarchicalTuckerDecoder((np.ones(2),)), "frames must have 2 dimensions"),
    (lambda: HierarchicalTuckerDecoder((np.ones((5, 2)), np.ones((4, 3))), (np.ones((2, 3, 3)),)),
     r"ranks \[None, 2\], expected \[2, 3\]"),
    (lambda: HierarchicalTuckerDecoder((np.ones((5, 2)), np.ones((4, 3))), (np.ones((2, 2, 2)),)),
     r"ranks \[2, 3\], expected \[3, 3\]"),
])
def test_inconsistent_parts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", MAKERS)
def test_codes_of_another_width(make):
    decoder, tensor = make()
    with pytest.raises(ValueError, match=f"codes must have {len(tensor)} columns, got {len(tensor) + 1}"):
        decoder.decode(np.ones((2, len(tensor) + 1), np.float32))
