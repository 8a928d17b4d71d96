"""Static asymmetric numeral systems (ANS): within a fraction of a bit of the order-0 entropy.

The coder itself is ``constriction``'s; the model here is a histogram of logarithmically rounded counts,
so that it costs a few bits per symbol of the alphabet and any reader rebuilds it from integers, bit for
bit.

References
----------
J. Duda, Asymmetric numeral systems, :arxiv:`1311.2540`; R. Bamler, constriction, :arxiv:`2201.01741`.
"""
# SPDX-License-Identifier: BSD-3-Clause

from functools import lru_cache
from math import isqrt

import constriction
import numpy as np

from skfactor.codec.bitpack import BitReader, read_profile, write_fields, write_profile
from skfactor.exceptions import FormatError

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

MAX_SYMBOLS = 4096
_STEPS = (1, 2, 4, 8)  # levels per octave of a rounded count
_MAX_LEVEL = 8 * 40
_CHUNK = 1 << 20  # symbols decoded at a time


def coder_to_bytes(coder: AnsCoder) -> bytes:
    """Return the coder's state in little-endian bytes, without the zero bytes at its end."""
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def bytes_to_coder(data: bytes) -> AnsCoder:
    """Invert :func:`coder_to_bytes`."""
    if data.endswith(b"\0"):
        raise FormatError("an ANS stream never ends in a zero byte")
    words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
    return AnsCoder(words) if len(words) else AnsCoder()


def check_exhausted(coder: AnsCoder) -> None:
    """Raise FormatError unless the decoder has come to the empty state in which the encoder began."""
    if not coder.is_empty():
        raise FormatError("ANS stream does not end with its last symbol")


@lru_cache(maxsize=8)
def _level_weights(steps: int) -> np.ndarray:
    """Return ``2**(8 + (level - 1) / steps)`` for all levels, 0 for level 0; exact integer square roots."""
    fractions = []
    for i in range(steps):
        # 2**(i / steps) as a 48-bit fixed-point number: repeated square roots of an integer
        value, k = 1 << (i + 48 * steps), steps
        while k > 1:
            value, k = isqrt(value), k // 2
        fractions.append(value)
    weights = [0] + [(fractions[level % steps] << (level // steps + 8)) >> 48 for level in range(_MAX_LEVEL)]
    return np.array([float(w) for w in weights])  # rounded to nearest, the same everywhere


def _model(levels: np.ndarray, steps: int) -> Categorical:
    return Categorical(_level_weights(steps)[levels], perfect=False)


def _plan(counts: np.ndarray):
    """Return (bits, levels, steps, fields) of the rounding that makes header and data together smallest."""
    n = int(counts.sum())
    used = counts > 0
    log_counts = np.log2(counts[used])
    best = None
    for code, steps in enumerate(_STEPS):
        levels = np.zeros(len(counts), dtype=np.int64)
        levels[used] = 1 + np.rint(steps * log_counts).astype(np.int64)
        weights = _level_weights(steps)[levels]
        data_bits = n * np.log2(weights.sum()) - (counts[used] * np.log2(weights[used])).sum()
        values, lengths = write_profile(levels)
        fields = np.concatenate([[code], values]), np.concatenate([[2], lengths])
        bits = data_bits + int(fields[1].sum())
        if best is None or bits < best[0]:
            best = bits, levels, steps, fields
    return best


def encode(symbols: np.ndarray, n_symbols: int) -> bytes:
    """Return header (rounded histogram) and ANS stream of non-empty ``symbols`` in ``[0, n_symbols)``.

    Examples
    --------
    >>> data = np.array([0, 0, 1, 0, 2, 0, 0, 0])
    >>> decode(encode(data, 3), 8, 3)
    array([0, 0, 1, 0, 2, 0, 0, 0], dtype=uint16)
    """
    _, levels, steps, fields = _plan(np.bincount(symbols, minlength=n_symbols))
    coder = AnsCoder()
    coder.encode_reverse(np.ascontiguousarray(symbols, dtype=np.int32), _model(levels, steps))
    return write_fields(*fields) + coder_to_bytes(coder)


def estimated_size(counts: np.ndarray) -> float:
    """Return the bytes of :func:`encode` from the histogram alone, to within about four bytes."""
    return _plan(counts)[0] / 8 + 3


def decode(data: bytes, n_values: int, n_symbols: int) -> np.ndarray:
    """Invert :func:`encode`; return ``uint16`` symbols."""
    if not 2 <= n_symbols <= MAX_SYMBOLS:
        raise FormatError(f"an ANS stream has 2 to {MAX_SYMBOLS} symbols, got {n_symbols}")
    reader = BitReader(data)
    steps = _STEPS[reader.read(2)]
    levels = read_profile(reader, n_symbols, _MAX_LEVEL)
    coder = bytes_to_coder(reader.rest())
    if np.count_nonzero(levels) < 1:
        raise FormatError("ANS histogram is empty")
    model = _model(levels, steps)
    symbols = np.empty(n_values, dtype=np.uint16)
    for first in range(0, n_values, _CHUNK):  # the coder returns int32: bound the memory of that
        symbols[first : first + _CHUNK] = coder.decode(model, min(_CHUNK, n_values - first))
    check_exhausted(coder)
    return symbols
