"""Canonical, length-limited Huffman coding: the third stage of Deep Compression.

References
----------
D. A. Huffman, :doi:`10.1109/JRPROC.1952.273898`; L. L. Larmore and D. S. Hirschberg (package-merge),
:doi:`10.1145/79147.79150`; S. Han et al., Deep Compression, :arxiv:`1510.00149`.
"""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.codec.bitpack import BitReader, read_profile, write_fields, write_profile
from skfactor.exceptions import FormatError

MAX_LENGTH = 15
MAX_SYMBOLS = 4096  # the decoding table has 2**MAX_LENGTH entries
_CHUNK = 1 << 16  # bytes decoded at a time
_LOOKAHEAD = 2  # bytes beyond its first byte that a code word can reach
_DOUBLINGS = 6  # one jump crosses 2**6 symbols


def code_lengths(counts: np.ndarray, limit: int = MAX_LENGTH) -> np.ndarray:
    """Return the lengths ``l`` that minimise ``sum(counts * l)`` with ``l <= limit`` over the prefix codes.

    Package-merge: ``limit`` rounds of pairing; the number of leaves among the first items of each round,
    walked back, says how many symbols are at least that deep. Symbols with count 0 get length 0.

    Parameters
    ----------
    counts : ndarray of shape (n_symbols,)
        Occurrences; at least two must be positive, and at most ``2**limit``.
    limit : int, default=15
        Longest code in bits.

    Examples
    --------
    >>> code_lengths(np.array([5, 1, 1, 0, 2]))
    array([1, 3, 3, 0, 2])
    """
    counts = np.asarray(counts, dtype=np.int64)
    used = np.flatnonzero(counts)
    if not 2 <= len(used) <= 1 << limit:
        raise ValueError(f"number of symbols in use must be in [2, {1 << limit}], got {len(used)}")
    used = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[used]
    rounds = []  # for each round, which of the sorted items are leaves
    items, is_leaf = leaves, np.ones(len(leaves), dtype=bool)
    for _ in range(limit):
        rounds.append(is_leaf)
        even = len(items) // 2 * 2
        packages = items[0:even:2] + items[1:even:2]
        merged = np.concatenate([leaves, packages])
        order = np.argsort(merged, kind="stable")
        items, is_leaf = merged[order], order < len(leaves)
    lengths = np.zeros(len(counts), dtype=np.int64)
    take = 2 * (len(leaves) - 1)
    for is_leaf in reversed(rounds):
        n_leaves = int(is_leaf[:take].sum())
        lengths[used[:n_leaves]] += 1
        take = 2 * (take - n_leaves)
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Return the canonical code words (by length, then by symbol) of a complete set of lengths.

    Raises
    ------
    FormatError
        If the Kraft sum ``sum(2**-l)`` over the used symbols is not 1.
    """
    used = np.flatnonzero(lengths)
    kraft = int((1 << (MAX_LENGTH - lengths[used])).sum())
    if kraft != 1 << MAX_LENGTH:
        raise FormatError(f"Huffman code lengths must have Kraft sum 1, got {kraft / (1 << MAX_LENGTH):.6g}")
    order = used[np.argsort(lengths[used], kind="stable")]
    widths = 1 << (MAX_LENGTH - lengths[order])
    starts = np.cumsum(widths) - widths
    codes = np.zeros(len(lengths), dtype=np.int64)
    codes[order] = starts >> (MAX_LENGTH - lengths[order])
    return codes


def encode(symbols: np.ndarray, n_symbols: int) -> bytes:
    """Return header (the code lengths) and code words of ``symbols`` with at least two different values."""
    lengths = code_lengths(np.bincount(symbols, minlength=n_symbols))
    codes = canonical_codes(lengths)
    return write_fields(*write_profile(lengths)) + write_fields(codes[symbols], lengths[symbols])


def coded_size(counts: np.ndarray) -> int:
    """Return ``len(encode(...))`` from the histogram alone."""
    lengths = code_lengths(counts)
    return (int(write_profile(lengths)[1].sum()) + 7) // 8 + (int((counts * lengths).sum()) + 7) // 8


def decode(data: bytes, n_values: int, n_symbols: int) -> np.ndarray:
    """Invert :func:`encode`; return ``uint16`` symbols.

    The symbol and the length at *every* bit position are looked up at once; pointer doubling then gives jumps
    over 64 symbols, a short loop follows those, and the 64 symbols of all jumps are read side by side.
    """
    if n_symbols > MAX_SYMBOLS:
        raise FormatError(f"a Huffman stream has at most {MAX_SYMBOLS} symbols, got {n_symbols}")
    reader = BitReader(data)
    lengths = read_profile(reader, n_symbols, MAX_LENGTH)
    codes = canonical_codes(lengths)
    body = np.frombuffer(reader.rest(), dtype=np.uint8)
    used = np.flatnonzero(lengths)
    used = used[np.argsort(codes[used] << (MAX_LENGTH - lengths[used]))]
    table = np.repeat(used, 1 << (MAX_LENGTH - lengths[used])).astype(np.uint16)
    lengths = lengths.astype(np.uint8)

    out = np.empty(n_values, dtype=np.uint16)
    done, bit = 0, 0
    while done < n_values:
        first = bit >> 3
        if first >= len(body):
            raise FormatError(f"Huffman stream ends after {done} of {n_values} symbols")
        chunk = body[first : first + _CHUNK + _LOOKAHEAD]  # so that code words may cross the end of a chunk
        symbols, bit = _decode_chunk(chunk, bit & 7, n_values - done, table, lengths)
        bit += 8 * first
        out[done : done + len(symbols)] = symbols
        done += len(symbols)
    if (bit + 7) // 8 != len(body):
        raise FormatError(f"Huffman stream has {len(body)} bytes, its symbols fill {(bit + 7) // 8}")
    return out


def _decode_chunk(chunk, start, n_wanted, table, lengths):
    """Decode the symbols that start in ``chunk``; return them and the bit after the last one."""
    n_bytes = min(len(chunk), _CHUNK)
    n_bits = 8 * n_bytes
    wide = np.zeros(n_bytes + _LOOKAHEAD, dtype=np.uint32)
    wide[: len(chunk)] = chunk
    window = (wide[:-2] << np.uint32(16)) | (wide[1:-1] << np.uint32(8)) | wide[2:]
    shifts = (24 - MAX_LENGTH - np.arange(8)).astype(np.uint32)
    peek = (window[:, None] >> shifts) & np.uint32((1 << MAX_LENGTH) - 1)  # (n_bytes, 8)
    symbol_at = table[peek].reshape(-1)
    next_at = np.arange(n_bits + MAX_LENGTH + 1)
    next_at[:n_bits] += lengths[symbol_at]
    jump = np.minimum(next_at, n_bits + MAX_LENGTH)
    one = jump
    for _ in range(_DOUBLINGS):
        jump = jump[jump]
    anchors, bit, leap, n_steps = [], start, jump.tolist(), 1 << _DOUBLINGS
    while bit < n_bits and len(anchors) * n_steps < n_wanted:
        anchors.append(bit)
        bit = leap[bit]
    positions = np.empty((len(anchors), n_steps + 1), dtype=np.int64)
    positions[:, 0] = anchors
    for k in range(n_steps):
        positions[:, k + 1] = one[positions[:, k]]
    chain = positions[:, :-1].reshape(-1)
    ends = positions[:, 1:].reshape(-1)
    # Positions grow along the chain until they leave the chunk.
    n_found = min(int(np.count_nonzero(chain < n_bits)), n_wanted)
    return symbol_at[chain[:n_found]], int(ends[n_found - 1])
