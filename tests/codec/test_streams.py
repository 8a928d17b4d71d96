"""Tensors to streams and back, and the exact grids of uniform codebooks."""
# SPDX-License-Identifier: BSD-3-Clause

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skfactor.codec import streams
from skfactor.codec.coders import coded_sizes, encode_codes
from skfactor.codec.container import SkfWriter
from skfactor.codec.decoders import CodebookDecoder, Decoder, IdentityDecoder, register_decoder
from skfactor.codec.floats import bits_of, find_grid, find_line, grid_values, line_values
from skfactor.codec.streams import decode_tensor, encode_tensor
from skfactor.codec.tensor import CompressedTensor, RawTensor
from skfactor.exceptions import FormatError

from ._tensors import assert_same_bits, assert_same_tensor, compressed_cases, raw_cases, shared

_RNG = np.random.default_rng(0)
_CASES = {**raw_cases(_RNG), **compressed_cases(_RNG)}


@register_decoder
@dataclass(frozen=True, eq=False)
class _EverythingDecoder(Decoder):
    """Parameters and arrays of every allowed kind."""

    name: ClassVar[str] = "test-everything"

    table: np.ndarray
    flags: np.ndarray
    counts: np.ndarray
    half: np.ndarray
    large: np.ndarray
    mode: str = "ä\n"
    scale: float = 0.1
    rank: int | None = None
    exact: bool = True
    shape: tuple = ()

    def decode(self, codes):
        return codes * self.scale + self.table.sum()

    def decoded_shape(self, codes_shape):
        return codes_shape[0], int(np.prod(codes_shape[1:]))


def _everything(codes, **params):
    decoder = _EverythingDecoder(
        table=np.arange(12.0).reshape(3, 4), flags=np.array([True, False, True]), counts=np.array([-5, 1 << 40]),
        half=np.array([[1.5, np.nan]], dtype=np.float16),
        large=np.random.default_rng(3).standard_normal((130, 140)).astype(np.float32), **params)
    return CompressedTensor((decoder,), codes, codes.shape)


@pytest.mark.parametrize("name", _CASES)
def test_round_trip(name):
    encoded = encode_tensor(_CASES[name])
    assert_same_tensor(decode_tensor(encoded.entry, encoded.streams), _CASES[name])


@pytest.mark.parametrize("name", _CASES)
def test_round_trip_in_pieces(name, monkeypatch):
    """Payload above the chunk sizes is coded in pieces; here everything is."""
    monkeypatch.setattr(streams, "CHUNK_CODES", 100)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(streams, "SMALL_BYTES", 32)
    encoded = encode_tensor(_CASES[name])
    assert_same_tensor(decode_tensor(encoded.entry, encoded.streams), _CASES[name])


def test_pieces_are_made(monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_CODES", 100)
    tensor = shared(np.random.default_rng(0), (50, 20), 16)
    assert len(encode_tensor(tensor).streams) == 50 * 20 // 100 + 1  # and the pack of the codebook


def test_large_tensors_get_fast_coders(monkeypatch):
    """Above the codec's limit the slow coders are left out; blocks of one symbol fall back to the search."""
    monkeypatch.setattr(streams, "FAST_ABOVE", 1000)
    monkeypatch.setattr(streams, "CHUNK_CODES", 1000)
    tensor = shared(np.random.default_rng(0), (100, 40), 16)
    tensor.codes[:25] = 3
    tensor.codes[70:95] = 5
    encoded = encode_tensor(tensor)
    used = {streams.coder_name(number) for number in encoded.entry["codes"][-1]}
    assert "constant" in used
    assert used <= {"constant", "packed", "ans", "sparse"}
    assert_same_tensor(decode_tensor(encoded.entry, encoded.streams), tensor)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_pieces_get_the_context_coder_where_it_pays(spread, monkeypatch):
    """A matrix in several pieces: context where rows differ in scale, which static coders cannot see, else not."""
    monkeypatch.setattr(streams, "CHUNK_CODES", 40_000)
    rng = np.random.default_rng(0)
    tensor = shared(rng, (400, 400), 16)
    scale = np.exp(spread * rng.standard_normal((400, 1)))
    tensor.codes[:] = np.clip(np.rint(8 + 1.5 * scale * rng.laplace(size=(400, 400))), 0, 15)
    encoded = encode_tensor(tensor)
    used = [streams.coder_name(number) for number in encoded.entry["codes"][-1]]
    zero = tensor.decoders[-1].code_hints()["zero"]
    sizes = coded_sizes(tensor.codes[:100], 16, zero=zero)
    gain = 1 - sizes["context"] / min(sizes["ans"], sizes["sparse"])
    assert len(used) == 4
    assert (gain > 0.01) == (spread > 0)
    assert (set(used) == {"context"}) == (spread > 0)
    assert_same_tensor(decode_tensor(encoded.entry, encoded.streams), tensor)


@pytest.mark.parametrize("name", _CASES)
def test_nbytes_is_what_a_file_grows_by(name, tmp_path):
    with SkfWriter(tmp_path / "one.skf") as file:
        file.add("", _CASES[name])
    size = os.path.getsize(tmp_path / "one.skf")
    header = 8 + int.from_bytes((tmp_path / "one.skf").read_bytes()[:8], "little")
    footer = 9
    assert encode_tensor(_CASES[name]).nbytes == size - header - footer


@pytest.mark.parametrize("codes", [
    np.random.default_rng(0).integers(-128, 128, (50, 60)).astype(np.int8),
    np.random.default_rng(1).integers(-3, 4, (50, 60)),
    np.random.default_rng(2).integers(1 << 63, (1 << 63) + 9, (5, 6), dtype=np.uint64),
    np.random.default_rng(3).integers(-(1 << 62), 1 << 62, (50, 60)),
    np.random.default_rng(4).integers(1000, 1010, (5, 6, 7)).astype(np.uint16),
    np.random.default_rng(5).standard_normal((5, 6)),
    np.random.default_rng(6).random((40, 40)) < 0.1,
], ids=["int8", "signed", "uint64", "wide", "3-D", "float", "bool"])
def test_any_decoder_and_any_codes(codes):
    """A decoder without hints: integers of any range, floats, and parameters of every JSON kind."""
    tensor = _everything(codes, mode="x", scale=1e-300, rank=1 << 60, exact=False, shape=(1, (2, None)))
    encoded = encode_tensor(tensor)
    back = decode_tensor(encoded.entry, encoded.streams)
    assert_same_bits(back.codes, codes)
    for key, array in tensor.decoders[0].parts()[1].items():
        assert_same_bits(getattr(back.decoders[0], key), array)
    assert back.decoders[0].parts()[0] == tensor.decoders[0].parts()[0] | {"shape": (1, [2, None])}


def test_codes_get_the_hints_of_the_last_decoder():
    rng = np.random.default_rng(0)
    tensor = shared(rng, (16, 8, 3, 3), 16)
    hints = tensor.decoders[-1].code_hints()
    expected = encode_codes(tensor.codes, 16, zero=hints["zero"], kernel=9)
    assert encode_tensor(tensor).streams[0] == expected[1]


def test_sparse_floats_cost_mask_and_values():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 500)).astype(np.float32)
    pruned = np.where(rng.random(values.shape) < 0.9, np.float32(0), values)
    n = encode_tensor(CompressedTensor((IdentityDecoder(),), pruned, pruned.shape)).nbytes
    entropy = 0.1 * np.log2(10) + 0.9 * np.log2(1 / 0.9)  # bits of the mask per weight
    assert n < 1.02 * pruned.size * (entropy / 8 + 0.1 * 4)


@pytest.mark.parametrize("share", [0.04, 0.1])
def test_few_zeros_pay_for_their_mask(share):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((400, 500)).astype(np.float32)
    dense, pruned = (encode_tensor(RawTensor(np.where(rng.random(values.shape) < p, np.float32(0), values), "float32"))
                     for p in (0.0, share))
    entropy = share * np.log2(1 / share) + (1 - share) * np.log2(1 / (1 - share))  # bits of the mask per weight
    assert pruned.entry["data"][0] == "mask"
    assert pruned.nbytes < 1.01 * ((1 - share) * dense.nbytes + values.size * entropy / 8)


def test_constants_cost_nothing():
    zeros = encode_tensor(RawTensor(np.zeros((512, 512, 3, 3), dtype=np.float32), "float32"))
    assert sum(map(len, zeros.streams)) == 1
    assert zeros.nbytes < 60


def test_uniform_codebook_costs_two_numbers():
    codes = np.random.default_rng(0).integers(0, 201, (30, 40)).astype(np.uint8)
    step = np.float32(0.0123)
    book = step * np.arange(-100, 101, dtype=np.float32)
    uniform = CompressedTensor((CodebookDecoder(book[None, :, None]),), codes, (30, 40))
    other = book.copy()
    other[7] = np.nextafter(other[7], np.float32(1))
    jittered = CompressedTensor((CodebookDecoder(other[None, :, None]),), codes, (30, 40))
    assert encode_tensor(uniform).nbytes < encode_tensor(jittered).nbytes - 300
    encoded = encode_tensor(jittered)
    assert_same_tensor(decode_tensor(encoded.entry, encoded.streams), jittered)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(-300, 300), st.integers(3, 400), st.booleans(),
       st.sampled_from(["<f4", "<f8"]))
def test_planted_grid_is_found(step, k0, n, negative, dtype):
    step = np.float32(-step if negative else step)
    planted = grid_values(k0, step, n, dtype)
    found = find_grid(planted)
    assert found is not None
    np.testing.assert_array_equal(bits_of(grid_values(*found, n, dtype)), bits_of(planted))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-6, 1e6), st.integers(-100, 100), st.integers(3, 200))
def test_grid_of_a_double_step_in_float32(step, k0, n):
    """Codebooks of a step computed in float64, rounded to float32, are found too."""
    planted = (step * np.arange(k0, k0 + n)).astype(np.float32)
    found = find_grid(planted)
    if found is None:  # a step of -0.0 * k would differ in the sign of zero only
        assert (bits_of(planted) == 1 << 31).any()
    else:
        np.testing.assert_array_equal(bits_of(grid_values(*found, n, np.float32)), bits_of(planted))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=0, max_size=12))
def test_grid_and_line_are_exact_or_none(values):
    array = np.array(values, dtype=np.float32)
    for find, rebuild in ((find_grid, grid_values), (find_line, line_values)):
        found = find(array)
        if found is not None:
            np.testing.assert_array_equal(bits_of(rebuild(*found, len(array), array.dtype)), bits_of(array))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e3, 1e3, width=32), st.floats(2.0**-10, 2.0**10, width=32), st.integers(4, 300))
def test_planted_line_is_found(first, step, n):
    planted = line_values(np.float32(first), np.float32(step), n, np.float32)
    assume(step >= 256 * np.spacing(np.abs(planted).max()))  # a step that float32 resolves
    found = find_line(planted)
    assert found is not None
    np.testing.assert_array_equal(bits_of(line_values(*found, n, np.float32)), bits_of(planted))


def test_linspace_is_a_line():
    ends = np.float32([-0.37, 1.91]).tolist()
    assert find_line(np.linspace(*ends, 33).astype(np.float32)) is not None
    assert find_line(np.linspace(*ends, 33)) is not None


def test_wrong_use():
    with pytest.raises(TypeError, match="CompressedTensor or a RawTensor, got ndarray"):
        encode_tensor(np.zeros(3))
    with pytest.raises(TypeError, match="JSON values, got set"):
        encode_tensor(_everything(np.zeros((2, 2)), shape=({1},)))
    with pytest.raises(ValueError, match="below 2\\*\\*61"):
        encode_tensor(_everything(np.zeros((2, 2)), rank=1 << 70))
    with pytest.raises(ValueError, match="coder must be"):
        encode_tensor(shared(np.random.default_rng(0), (4, 4), 3, coder="zip"))


def test_missing_or_extra_streams():
    encoded = encode_tensor(_CASES["conv"])
    for some in (encoded.streams[:-1], [*encoded.streams, b""]):
        with pytest.raises(FormatError, match="streams"):
            decode_tensor(encoded.entry, some)
    entry = {**encoded.entry, "decoders": [["nonesuch", {}, {}]], "packs": []}
    with pytest.raises(FormatError, match="unknown decoder 'nonesuch'"):
        decode_tensor(entry, encoded.streams[:1])
