"""Entropy coders: exact round trips, sizes against entropies and independent optima, damaged streams."""
# SPDX-License-Identifier: BSD-3-Clause

import heapq
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skfactor.codec import ans, bitpack, huffman, lossless
from skfactor.codec.coders import (
    CODERS,
    coded_sizes,
    decode_bytes,
    decode_codes,
    empirical_entropy_bits,
    encode_bytes,
    encode_codes,
)
from skfactor.codec.lossless import encode_short
from skfactor.exceptions import FormatError
from tests._data import needs_data, real_layers

ALPHABETS = (1, 2, 3, 16, 255, 256, 257, 5000, 70000)
SHAPES = ((0, 5), (4, 0), (1, 1), (1, 37), (37, 1), (12, 18))


def _codes(kind, shape, n_symbols, rng):
    if kind == "constant":
        return np.full(shape, n_symbols - 1)
    if kind == "uniform":
        return rng.integers(0, n_symbols, shape)
    if kind == "mostly zero":
        return np.where(rng.random(shape) < 0.05, rng.integers(0, n_symbols, shape), n_symbols // 2)
    return np.clip(np.rint(n_symbols / 2 + 2 * rng.laplace(size=shape)), 0, n_symbols - 1).astype(int)


KINDS = ("constant", "uniform", "mostly zero", "peaked")


def _round_trip(codes, n_symbols, coder, **hints):
    name, payload = encode_codes(codes, n_symbols, coder=coder, **hints)
    back = decode_codes(name, payload, codes.shape, n_symbols, **hints)
    assert back.shape == codes.shape
    assert back.dtype == (np.uint8 if n_symbols <= 256 else np.uint16 if n_symbols <= 65536 else np.int32)
    np.testing.assert_array_equal(back, codes)
    return name, payload


# --- round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_symbols", ALPHABETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_coder_round_trips(n_symbols, kind):
    rng = np.random.default_rng(n_symbols)
    for shape in SHAPES:
        codes = _codes(kind, shape, n_symbols, rng)
        for zero in (None, n_symbols // 2):
            sizes = coded_sizes(codes, n_symbols, zero=zero)
            for coder, size in sizes.items():
                assert len(_round_trip(codes, n_symbols, coder, zero=zero)[1]) == size
            _, payload = _round_trip(codes, n_symbols, "auto", zero=zero)
            assert len(payload) == min(sizes.values())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 14),
    st.sampled_from(ALPHABETS),
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 3, 4, 9]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_matrix(n_rows, n_channels, n_symbols, kind, kernel, has_zero, seed):
    rng = np.random.default_rng(seed)
    codes = _codes(kind, (n_rows, n_channels * kernel), n_symbols, rng)
    zero = int(rng.integers(n_symbols)) if has_zero else None
    for coder in coded_sizes(codes, n_symbols, zero=zero, kernel=kernel):
        _round_trip(codes, n_symbols, coder, zero=zero, kernel=kernel)


def test_input_is_not_changed_and_layout_does_not_matter():
    codes = np.random.default_rng(0).integers(0, 9, (20, 30))
    codes.flags.writeable = False
    fortran = np.asfortranarray(codes).astype(np.uint8)
    for coder in CODERS[1:]:
        assert encode_codes(codes, 9, coder=coder, zero=4) == encode_codes(fortran, 9, coder=coder, zero=4)


def test_wrong_use_is_one_clear_error():
    codes = np.zeros((2, 3), dtype=int)
    for kwargs, message in (
        ({"n_symbols": 0}, "n_symbols must be in"),
        ({"n_symbols": 4, "coder": "zip"}, "coder must be 'auto' or one of"),
        ({"n_symbols": 4, "zero": 4}, "zero must be None or in"),
        ({"n_symbols": 4, "kernel": 0}, "kernel must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_codes(codes, **kwargs)
    with pytest.raises(ValueError, match="codes must be integers"):
        encode_codes(codes.astype(float), 4)
    with pytest.raises(ValueError, match="two dimensions"):
        encode_codes(codes[0], 4)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 4\)"):
        encode_codes(codes + 4, 4)
    with pytest.raises(ValueError, match="'huffman' cannot code"):
        encode_codes(codes, 70000, coder="huffman")
    with pytest.raises(FormatError, match="unknown coder"):
        decode_codes("zip", b"", (2, 3), 4)


# --- sizes --------------------------------------------------------------------------------------------


def test_entropy_of_known_histograms():
    assert empirical_entropy_bits(np.repeat([0, 1, 2, 3], 8)[None], 4) == 64.0
    assert empirical_entropy_bits(np.zeros((3, 3), int), 5) == 0.0
    assert empirical_entropy_bits(np.zeros((0, 3), int), 5) == 0.0
    # 1/2, 1/4, 1/8, 1/8: the entropy is 1.75 bits
    assert empirical_entropy_bits(np.repeat([0, 1, 2, 3], [8, 4, 2, 2])[None], 4) == 28.0


@pytest.mark.parametrize("n_symbols", [2, 3, 16, 32, 256, 1000])
@pytest.mark.parametrize("kind", ["uniform", "mostly zero", "peaked"])
def test_ans_is_within_its_bound_of_the_entropy(n_symbols, kind):
    rng = np.random.default_rng(1)
    for shape in ((16, 27), (64, 64), (64, 576)):
        codes = _codes(kind, shape, n_symbols, rng)
        entropy = empirical_entropy_bits(codes, n_symbols) / 8
        size = len(_round_trip(codes, n_symbols, "ans")[1])
        assert size >= entropy - 1
        # A large alphabet needs a larger histogram: at least one bit for every symbol between the extremes.
        assert size <= 1.015 * entropy + (64 if n_symbols <= 64 else n_symbols)


def test_packed_takes_the_bits_it_should():
    for n_symbols in ALPHABETS[1:]:
        bits = int(np.ceil(np.log2(n_symbols)))
        size = coded_sizes(np.arange(77)[None] % n_symbols, n_symbols)["packed"]
        assert size - bits // 8 * 77 == int(np.ceil(77 * (bits % 8) / 8))


def test_huge_streams_skip_the_slow_coders(monkeypatch):
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal((30, 1)))
    codes = np.clip(np.rint(8 + scale * rng.laplace(size=(30, 90))), 0, 15).astype(int)
    assert encode_codes(codes, 16, zero=8)[0] == "context"
    monkeypatch.setattr("skfactor.codec.coders.FAST_ABOVE", 100)
    assert encode_codes(codes, 16, zero=8)[0] in ("ans", "huffman")
    assert encode_codes(codes, 16, zero=8, coder="context")[0] == "context"


# --- Huffman ------------------------------------------------------------------------------------------


def _huffman_cost(counts):
    """Bits of an optimal prefix code: the sum of all merged weights (Huffman's own construction)."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def _limited_cost(counts, limit):
    """Bits of an optimal prefix code of limited length by dynamic programming over levels of the tree.

    ``best[n]``: least cost to place the symbols so far with ``n`` open nodes; one more level costs the weight of all
    symbols not yet placed.
    """
    weights = sorted((int(c) for c in counts if c), reverse=True)
    rest = np.concatenate([np.cumsum(weights[::-1])[::-1], [0]])
    states = {(0, 1): 0}
    best = None
    for _ in range(limit):
        grown = {}
        for (placed, nodes), cost in states.items():
            cost += int(rest[placed])
            for leaves in range(0, min(2 * nodes, len(weights) - placed) + 1):
                key = placed + leaves, 2 * nodes - leaves
                if key[0] == len(weights):
                    best = cost if best is None else min(best, cost)
                elif key[1] and key[1] <= len(weights) - key[0]:
                    grown[key] = min(cost, grown.get(key, cost))
        states = grown
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=2, max_size=60).filter(lambda c: sum(x > 0 for x in c) > 1))
def test_huffman_lengths_are_optimal_and_complete(counts):
    counts = np.array(counts)
    lengths = huffman.code_lengths(counts)
    assert ((lengths > 0) == (counts > 0)).all()
    assert sum(2.0 ** -lengths[lengths > 0]) == 1.0  # Kraft equality
    if lengths.max() < huffman.MAX_LENGTH:
        assert int((counts * lengths).sum()) == _huffman_cost(counts)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=5, max_size=9), st.integers(4, 5))
def test_huffman_with_a_tight_limit_is_optimal(counts, limit):
    counts = np.array(counts) ** 3
    lengths = huffman.code_lengths(counts, limit)
    assert lengths.max() <= limit
    assert int((counts * lengths).sum()) == _limited_cost(counts, limit)


def test_huffman_length_is_limited():
    fibonacci = [1, 1]
    while len(fibonacci) < 24:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() == huffman.MAX_LENGTH  # unlimited, it would be 23
    codes = np.repeat(np.arange(24), np.minimum(fibonacci, 3000))
    _round_trip(np.random.default_rng(0).permutation(codes)[None], 24, "huffman")


def test_huffman_words_are_a_prefix_code():
    counts = np.random.default_rng(0).integers(0, 50, 40)
    lengths = huffman.code_lengths(counts)
    codes = huffman.canonical_codes(lengths)
    words = [format(codes[k], f"0{lengths[k]}b") for k in np.flatnonzero(lengths)]
    assert not any(a != b and b.startswith(a) for a in words for b in words)


@pytest.mark.parametrize("chunk", [3, 64, 1 << 16])
def test_huffman_decodes_across_chunks(monkeypatch, chunk):
    codes = _codes("peaked", (40, 50), 300, np.random.default_rng(0))
    data = huffman.encode(codes.reshape(-1), 300)
    assert len(data) == huffman.coded_size(np.bincount(codes.reshape(-1), minlength=300))
    monkeypatch.setattr(huffman, "_CHUNK", chunk)
    np.testing.assert_array_equal(huffman.decode(data, codes.size, 300), codes.reshape(-1))


def test_ans_decodes_across_chunks(monkeypatch):
    codes = _codes("peaked", (40, 50), 300, np.random.default_rng(0)).reshape(-1)
    data = ans.encode(codes, 300)
    monkeypatch.setattr(ans, "_CHUNK", 7)
    np.testing.assert_array_equal(ans.decode(data, codes.size, 300), codes)


def test_ans_must_end_where_it_began():
    codes = _codes("peaked", (20, 20), 16, np.random.default_rng(0)).reshape(-1)
    data = ans.encode(codes, 16)
    for n, wrong in ((len(codes) - 1, data), (len(codes), data + b"\x01\x02\x03\x04")):
        with pytest.raises(FormatError, match="does not end with its last symbol"):
            ans.decode(wrong, n, 16)


def test_ans_weights_are_powers_of_two():
    for steps in (1, 2, 4, 8):
        weights = ans._level_weights(steps)
        level = np.arange(1, len(weights))
        np.testing.assert_allclose(weights[1:], 2.0 ** (8 + (level - 1) / steps), rtol=2**-7)


# --- bit fields ---------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 2**32 - 1)), max_size=60))
def test_fields_equal_a_string_of_digits(fields):
    lengths = np.array([n for n, _ in fields], dtype=int)
    values = np.array([v & ((1 << n) - 1) for n, v in fields], dtype=np.int64)
    digits = "".join(format(v, f"0{n}b") if n else "" for v, n in zip(values, lengths, strict=True))
    padded = digits + "0" * (-len(digits) % 8)
    data = bitpack.write_fields(values, lengths)
    assert data == bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))
    reader = bitpack.BitReader(data)
    assert [reader.read(int(n)) for n in lengths] == values.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_profile_round_trips(values):
    reader = bitpack.BitReader(bitpack.write_fields(*bitpack.write_profile(np.array(values, dtype=int))))
    assert bitpack.read_profile(reader, len(values), 300).tolist() == values
    assert reader.rest() == b""


# --- raw numbers --------------------------------------------------------------------------------------


def _arrays(rng):
    weights = (0.05 * rng.standard_normal((40, 70))).astype(np.float32)
    yield from (weights, weights.astype(np.float16), weights.astype(np.float64), np.zeros(500, np.float32))
    yield (weights.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
    yield np.where(rng.random(3000) < 0.9, 0, rng.standard_normal(3000)).astype(np.float32)
    yield rng.integers(-5, 5, 800)
    yield rng.integers(0, 255, 801).astype(np.uint8)
    yield np.tile(rng.standard_normal(40).astype(np.float32), 60)  # repeats: LZMA's case
    yield np.array([np.nan, np.inf, -0.0, 5e-324])
    yield np.zeros(0, np.float32)


@pytest.mark.parametrize("effort", ["fast", "auto", "best"])
def test_raw_numbers_round_trip(effort):
    for array in _arrays(np.random.default_rng(0)):
        itemsize = array.dtype.itemsize
        coder, payload = encode_bytes(array, itemsize, effort=effort)
        assert len(payload) <= array.nbytes
        back = decode_bytes(coder, payload, array.nbytes, itemsize)
        assert back.dtype == np.uint8
        assert back.tobytes() == array.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 8]))
def test_any_bytes_round_trip(data, itemsize):
    coder, payload = encode_bytes(data, itemsize)
    assert decode_bytes(coder, payload, len(data), itemsize).tobytes() == data


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.sampled_from([1, 2, 4, 8]), st.integers(0, 255))
def test_short_numbers_round_trip(values, itemsize, planes):
    words = np.array(values, dtype="<u8").view(np.uint8).reshape(-1, 8)[:, :itemsize].copy()
    words[:, [k for k in range(itemsize) if planes >> k & 1]] = 0
    payload = encode_short(words.reshape(-1), itemsize)
    assert len(payload) == 1 + len(words) * sum(bool(words[:, k].any()) for k in range(itemsize))
    assert decode_bytes("short", payload, words.size, itemsize).tobytes() == words.tobytes()


@pytest.mark.parametrize(
    ("data", "nbytes"), [(b"", 4), (b"\x10", 4), (b"\x01", 4), (b"\x03" + bytes(3), 8), (b"\x01ab", 7)]
)
def test_damaged_short_numbers(data, nbytes):
    with pytest.raises(FormatError, match=f"does not hold exactly {nbytes} bytes"):
        decode_bytes("short", data, nbytes, 4)


def test_wrong_arguments_of_raw_numbers():
    with pytest.raises(ValueError, match="itemsize must be one of"):
        encode_bytes(b"123", 3)
    with pytest.raises(ValueError, match="effort must be"):
        encode_bytes(b"123", 1, effort="max")


@needs_data
def test_real_float32_weights_beat_shuffled_deflate():
    for name in ("cifar10_resnet20", "mnist_lenet300100_original"):
        flat = np.concatenate([w.reshape(-1) for w in real_layers(name).values()])
        size = len(encode_bytes(flat, 4)[1])
        planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, 4).T)
        assert size < 0.85 * flat.nbytes
        assert size < len(zlib.compress(planes.tobytes(), 9))


# --- damaged streams ----------------------------------------------------------------------------------


def _damaged(payload, rng, n_copies):
    """Bit flips, truncations, inserted and repeated bytes, noise."""
    for _ in range(n_copies):
        data = bytearray(payload)
        kind = rng.integers(4)
        if kind == 0 and data:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 1:
            data = data[: rng.integers(len(data) + 1)]
        elif kind == 2:
            at = rng.integers(len(data) + 1)
            data[at:at] = rng.bytes(rng.integers(1, 9))
        else:
            data = bytearray(rng.bytes(len(data)))
        yield bytes(data)


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_codes_give_format_error_or_codes(coder):
    rng = np.random.default_rng(CODERS.index(coder))
    n_refused = 0
    for n_symbols, shape, zero in ((16, (6, 18), 7), (300, (5, 9), None), (2, (9, 9), 0), (70000, (3, 5), None)):
        kind = "constant" if coder == "constant" else "peaked"
        codes = _codes(kind, shape, n_symbols, rng)
        if coder not in coded_sizes(codes, n_symbols, zero=zero, kernel=3):
            continue
        _, payload = encode_codes(codes, n_symbols, coder=coder, zero=zero, kernel=3)
        for data in _damaged(payload, rng, 40 if coder == "context" else 150):
            try:
                back = decode_codes(coder, data, shape, n_symbols, zero=zero, kernel=3)
            except FormatError:
                n_refused += 1
            else:
                assert back.shape == shape
                assert back.min() >= 0
                assert back.max() < n_symbols
    assert n_refused or coder == "context"


@pytest.mark.parametrize("coder", CODERS)
def test_a_stream_of_another_coder_is_refused_or_decodes(coder):
    codes = _codes("peaked", (6, 18), 16, np.random.default_rng(0))
    for other in coded_sizes(codes, 16, zero=8):
        _, payload = encode_codes(codes, 16, coder=other, zero=8)
        try:
            back = decode_codes(coder, payload, codes.shape, 16, zero=8)
        except FormatError:
            continue
        assert back.max() < 16


def test_damaged_raw_numbers_give_format_error_or_bytes():
    rng = np.random.default_rng(0)
    for array in _arrays(rng):
        itemsize = array.dtype.itemsize
        for effort in ("auto", "best"):
            coder, payload = encode_bytes(array, itemsize, effort=effort)
            for data in _damaged(payload, rng, 60):
                try:
                    back = decode_bytes(coder, data, array.nbytes, itemsize)
                except FormatError:
                    continue
                assert back.nbytes == array.nbytes


def test_every_kind_of_plane_is_reached_and_refuses_a_wrong_length():
    kinds = set()
    for array in _arrays(np.random.default_rng(0)):
        for plane in array.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T:
            for effort in ("auto", "best"):
                if not len(plane):
                    continue
                kind, data = lossless._code_plane(np.ascontiguousarray(plane), effort)
                kinds.add(kind)
                np.testing.assert_array_equal(lossless._decode_plane(kind, data, len(plane)), plane)
                if kind in (lossless._RAW, lossless._ZLIB, lossless._LZMA):
                    for n in (len(plane) - 1, len(plane) + 1):
                        with pytest.raises(FormatError):
                            lossless._decode_plane(kind, data, n)
    assert kinds == set(range(5))
