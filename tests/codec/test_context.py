"""The context-adaptive coder: gains where there is structure, little loss where there is none, exact arithmetic."""
# SPDX-License-Identifier: BSD-3-Clause

import math
from fractions import Fraction

import numpy as np
import pytest

from skfactor.codec import ans, context
from skfactor.codec.coders import empirical_entropy_bits
from skfactor.exceptions import FormatError
from tests._data import needs_data, real_layers, real_weights


def _size(codes, n_symbols, zero, kernel=1):
    payload = context.encode(codes, n_symbols, zero, kernel)
    np.testing.assert_array_equal(context.decode(payload, codes.shape, n_symbols, zero, kernel), codes)
    return len(payload)


def _lloyd_codes(X, n_clusters):
    """Codes of a 1-D k-means (Lloyd on the sorted values) and the code nearest to zero."""
    x = np.sort(X.reshape(-1).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(x)])
    centers = np.quantile(x, (np.arange(n_clusters) + 0.5) / n_clusters)
    centers = 0.5 * (centers + np.linspace(x[0], x[-1], n_clusters))
    for _ in range(100):
        edges = np.concatenate([[0], np.searchsorted(x, 0.5 * (centers[1:] + centers[:-1])), [len(x)]])
        n = np.diff(edges)
        centers = np.where(n > 0, (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(n, 1), centers)
    codes = np.searchsorted(0.5 * (centers[1:] + centers[:-1]), X)
    return codes, int(np.abs(centers).argmin())


def _network(name):
    """Yield (2-D weights, kernel size) of all layers."""
    shapes = {k: w.shape for k, w in real_weights(name).items()}
    for key, X in real_layers(name).items():
        yield X, math.prod(shapes[key][2:])


def _scaled_codes(rng, shape, row_spread, column_spread, n_symbols=31):
    """Rounded Laplace numbers with log-normal scales of rows and columns."""
    scale = np.exp(row_spread * rng.standard_normal((shape[0], 1)) + column_spread * rng.standard_normal(shape[1]))
    return np.clip(np.rint(n_symbols // 2 + scale * rng.laplace(size=shape)), 0, n_symbols - 1).astype(int)


# --- round trips of shapes and alphabets --------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 9, 25, 49, 100])
def test_round_trip_of_kernels(kernel):
    rng = np.random.default_rng(kernel)
    for shape in ((1, kernel), (7, 3 * kernel), (20, 2 * kernel), (3, 3 * kernel + 1)):
        _size(_scaled_codes(rng, shape, 0.5, 0.5), 31, 15, kernel)


@pytest.mark.parametrize("n_symbols", [2, 3, 4, 17, 40, 300, 4096])
def test_round_trip_of_alphabets_and_zeros(n_symbols):
    rng = np.random.default_rng(n_symbols)
    codes = rng.integers(0, n_symbols, (6, 20))
    for zero in sorted({0, 1, n_symbols // 2, n_symbols - 1}):
        _size(codes, n_symbols, zero)
    for code in (0, n_symbols - 1):
        _size(np.full((5, 7), code), n_symbols, 0)


def test_blocks_cover_every_kernel_position_once():
    for n_kernels, kernel in ((1, 1), (5, 9), (4096, 9), (600_000, 1)):
        for position in range(kernel):
            edges = [b[1:] for b in context._blocks(n_kernels, kernel) if b[0] == position]
            assert edges[0][0] == 0
            assert edges[-1][1] == n_kernels
            assert all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
            assert max(b - a for a, b in edges) <= context._MAX_BLOCK
    order = context._lattice_order(13, 17)
    np.testing.assert_array_equal(np.sort(order), np.arange(13 * 17))


# --- gains --------------------------------------------------------------------------------------------


def test_scale_of_rows_and_columns_is_worth_bits():
    """The ideal code knows the scale of every code: the coder comes near to it, order 0 does not."""
    rng = np.random.default_rng(0)
    shape, n_symbols = (64, 400), 63
    rows, columns = 0.7 * rng.standard_normal((64, 1)), 0.4 * rng.standard_normal(400)
    scale = 2.0 * np.exp(rows + columns)
    codes = np.clip(np.rint(31 + scale * rng.laplace(size=shape)), 0, 62).astype(int)

    def upper_tail(x):  # P(Laplace > x)
        return np.where(x > 0, 0.5 * np.exp(-np.abs(x)), 1 - 0.5 * np.exp(-np.abs(x)))

    low = np.where(codes == 0, 1.0, upper_tail((codes - 31.5) / scale))
    high = np.where(codes == 62, 0.0, upper_tail((codes - 30.5) / scale))
    ideal = -np.log2(low - high).sum() / 8
    order_0 = empirical_entropy_bits(codes, n_symbols) / 8
    size = _size(codes, n_symbols, 31)
    # 464 unknown scales cost about half of log2(n) bits each: 3 to 5 bits.
    assert ideal - 40 <= size <= 1.03 * ideal + 464 * 4.5 / 8
    assert size < 0.96 * order_0


def test_order_of_channels_does_not_matter_much_but_kernels_do():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((32, 32, 3, 3))
    smooth = smooth + np.roll(smooth, 1, axis=2) + np.roll(smooth, 1, axis=3)  # correlated neighbours
    codes = np.clip(np.rint(1.2 * smooth), -15, 15).astype(int).reshape(32, 288) + 15
    with_kernel, without = _size(codes, 31, 15, 9), _size(codes, 31, 15, 1)
    assert with_kernel < 0.97 * without


def test_no_structure_costs_little():
    rng = np.random.default_rng(0)
    for n_symbols, spread in ((16, 2.0), (32, 4.0), (3, 0.3)):
        zero = n_symbols // 2
        codes = np.clip(np.rint(zero + spread * rng.laplace(size=(64, 576))), 0, n_symbols - 1).astype(int)
        assert _size(codes, n_symbols, zero, 9) <= 1.01 * empirical_entropy_bits(codes, n_symbols) / 8 + 40


def test_dead_rows_and_columns_are_nearly_free():
    rng = np.random.default_rng(0)
    alive = _scaled_codes(rng, (20, 45), 0.0, 0.0)
    codes = np.full((400, 900), 15)
    rows, channels = np.sort(rng.choice(400, 20, replace=False)), np.sort(rng.choice(100, 5, replace=False))
    columns = (9 * channels[:, None] + np.arange(9)).reshape(-1)
    codes[np.ix_(rows, columns)] = alive
    # What names the survivors cannot take less than log2(400 choose 20) + log2(100 choose 5) bits.
    names = math.log2(math.comb(400, 20)) / 8 + math.log2(math.comb(100, 5)) / 8
    assert _size(codes, 31, 15, 9) <= _size(alive, 31, 15, 9) + 1.15 * names + 4


def test_tiny_streams_have_no_header():
    assert _size(np.array([[1]]), 2, 0) <= 1
    assert _size(np.zeros((1, 1), int), 2, 0) <= 1
    assert _size(np.full((40, 40), 3), 7, 3) <= 1
    bits = np.random.default_rng(0).integers(0, 2, (10, 16))
    assert _size(bits, 2, 0) <= 20 + 6


@needs_data
@pytest.mark.parametrize("n_clusters", [16, 32])
def test_beats_order_0_entropy_on_resnet20(n_clusters):
    _check_network("cifar10_resnet20", n_clusters)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("n_clusters", [16, 32])
def test_beats_order_0_entropy_on_resnet56(n_clusters):
    _check_network("cifar10_resnet56", n_clusters)


def _check_network(name, n_clusters):
    entropy = size = 0
    for X, kernel in _network(name):
        codes, zero = _lloyd_codes(X, n_clusters)
        h = empirical_entropy_bits(codes, n_clusters) / 8
        assert len(ans.encode(codes.reshape(-1), n_clusters)) <= 1.015 * h + 64
        payload = context.encode(codes, n_clusters, zero, kernel)
        if len(X) == 16:
            np.testing.assert_array_equal(context.decode(payload, codes.shape, n_clusters, zero, kernel), codes)
        entropy, size = entropy + h, size + len(payload)
    assert size <= 0.96 * entropy


@needs_data
def test_beats_mask_and_values_on_pruned_networks():
    for name in ("mnist_lenet5_sparse", "mnist_lenet300100_sparse"):
        size = mask_and_values = 0
        for X, kernel in _network(name):
            codes, _ = _lloyd_codes(X[X != 0], 15)
            full = np.full(X.shape, 7)
            full[X != 0] = codes + (codes >= 7)
            size += len(context.encode(full, 16, 7, kernel))
            mask = ans.encode((X != 0).reshape(-1).astype(int), 2)
            mask_and_values += len(mask) + len(ans.encode(codes, 15))
        assert size < 0.8 * mask_and_values


# --- exact arithmetic ---------------------------------------------------------------------------------


def test_tables_are_correctly_rounded():
    squash, log, exp, ln2 = context._tables()
    logits = np.arange(-768, 769) / 64
    np.testing.assert_allclose(squash, 2.0**20 / (1 + np.exp(-logits)), atol=0.5 + 1e-9)
    assert squash.min() >= 1
    assert squash.max() <= 2**20 - 1
    np.testing.assert_allclose(log, 64 * np.log((2 * np.arange(1024, 2048) + 1) / 4096), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(exp, np.exp(np.arange(-512, 513) / 64), rtol=1e-15)
    assert ln2 == 64 * math.log(2)


def test_log_is_near_the_logarithm():
    x = np.exp(np.random.default_rng(0).uniform(-20, 20, 2000))
    np.testing.assert_allclose(context._log(x) / 64, np.log(x), atol=2.0**-11)


def test_solve_inverts_positive_definite_matrices():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((5, 12, 30))
    matrices = factors @ factors.transpose(0, 2, 1) + np.eye(12)
    right = rng.standard_normal((5, 12))
    np.testing.assert_allclose(
        context._solve(matrices, right), np.linalg.solve(matrices, right[:, :, None])[:, :, 0], rtol=1e-9
    )


def test_sums_over_a_block_are_exact_in_any_order():
    """At the limits of every feature, what BLAS adds up equals exact rational arithmetic, forwards and backwards."""
    rng = np.random.default_rng(0)
    n = 4096  # of 2**18: the largest terms, so that a block's sum stays below 2**53 by the same factor
    features = rng.integers(-512, 513, (12, n)).astype(float)
    probability = rng.integers(7, 2**20 - 6, n).astype(float)
    bits = rng.random(n) < 0.5
    states = []
    for order in (slice(None), slice(None, None, -1)):
        models = context._Regressions(3)
        models.observe(1, np.ascontiguousarray(features[:, order]), probability[order], bits[order])
        states.append((models.gradient.copy(), models.hessian.copy()))
    np.testing.assert_array_equal(states[0][0], states[1][0])
    np.testing.assert_array_equal(states[0][1], states[1][1])
    p = [Fraction(int(v), 2**20) for v in probability]
    exact = sum((int(b) - q) * int(f) for b, q, f in zip(bits, p, features[3], strict=True)) / 64
    assert Fraction(float(states[0][0][1, 3])) == exact
    assert context._MAX_BLOCK * context._CLIP**2 * 2**16 < 2**53
    assert context._MAX_BLOCK * context._CLIP * context._PROB_ONE < 2**53
    assert 12 * context._CLIP * 32 * context._WEIGHT_ONE < 2**53


def test_payload_does_not_depend_on_layout_or_dtype_of_the_input():
    codes = _scaled_codes(np.random.default_rng(0), (30, 45), 0.5, 0.5)
    payload = context.encode(codes, 31, 15, 9)
    for other in (np.asfortranarray(codes), codes.astype(np.uint8), codes[::-1][::-1]):
        assert context.encode(other, 31, 15, 9) == payload


def test_end_of_stream_is_as_short_as_it_can_be():
    """No shorter prefix of the stream, nor its successor, decodes to the same codes."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        codes = rng.integers(0, 5, (3, 6))
        payload = context.encode(codes, 5, 2)
        shorter = payload[:-1].rstrip(b"\0")
        assert (context.decode(shorter, codes.shape, 5, 2) != codes).any()


def test_shortened_stream_decodes_to_all_decisions():
    """Also where the last decisions are nearly certain, so that the end of the stream was decided long before."""
    rng = np.random.default_rng(0)
    for trial in range(400):
        probabilities = [rng.integers(7, 2**20 - 6, rng.integers(1, 150)).astype(float) for _ in range(3)]
        probabilities += [np.full(rng.integers(1, 40), 8.0) for _ in range(trial % 12)]
        decisions = [rng.random(len(p)) < p / 2**20 for p in probabilities]
        writer = context._BitWriter()
        for p, bits in zip(probabilities, decisions, strict=True):
            writer.code(p, bits)
        reader = context._BitReader(writer.payload())
        for p, bits in zip(probabilities, decisions, strict=True):
            np.testing.assert_array_equal(reader.code(p, None), bits)


def test_foreign_streams_are_refused_or_decode_to_codes():
    rng = np.random.default_rng(0)
    with pytest.raises(FormatError, match="zero byte"):
        context.decode(b"\x01\0", (3, 3), 4, 1)
    with pytest.raises(FormatError, match="2 to 4096 symbols"):
        context.decode(b"\x01", (3, 3), 5000, 1)
    for n_symbols, zero in ((40, 3), (16, 8)):
        for _ in range(60):
            data = rng.bytes(rng.integers(1, 60)).rstrip(b"\0")
            try:
                codes = context.decode(data, (5, 18), n_symbols, zero, 9)
            except FormatError:
                continue
            assert codes.max() < n_symbols
