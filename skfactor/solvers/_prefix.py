"""Sorted weighted samples with two-level prefix sums: the data structure of every 1-D solver.

An interval of sorted samples costs O(1): its k-means cost needs only the sum, the weight and (once, at the
end) the sum of squares. Storing one prefix sum per block of samples instead of one per sample keeps the extra
memory at a quarter of the data, and a position inside a block costs one gather of the block.
"""

# SPDX-License-Identifier: BSD-3-Clause
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

_BLOCK = 32
_FIRST = np.tri(_BLOCK, _BLOCK, -1, dtype=np.float32)  # row i marks the first i samples of a block
_FEW = 2
_DIGITS = 1e-5  # part of the sum of squares that is exact enough as a difference of sums
_SMALL = 1 << 14  # below this every prefix sum is stored
_LARGE = 1 << 22
_CHUNK = 1 << 15  # samples per pass of a streaming loop: temporaries stay in the cache


class SortedSamples(NamedTuple):
    """Sorted samples ``x`` (shifted by ``shift``), their weights and prefix sums at multiples of ``block``.

    ``s[b]`` is the sum of ``w * (x - origin)`` and ``t[b]`` the sum of ``w`` over the first ``b * block``
    samples; ``t`` and ``w`` are None when every weight is 1.
    """

    x: np.ndarray
    w: np.ndarray | None
    s: np.ndarray
    t: np.ndarray | None
    origin: float
    shift: float
    block: int

    @property
    def size(self):
        return self.x.shape[0]

    @property
    def total_weight(self):
        return float(self.size) if self.t is None else float(self.t[-1])


def sort_samples(x, weights=None, n_threads=1):
    """Sort ``x`` and drop samples of zero weight; returns ``(sorted x, sorted weights or None, shift)``.

    A common offset is subtracted where that is exact (all samples of one sign and within a factor of two,
    Sterbenz' lemma), so that sums of squares do not cancel.
    """
    if weights is None:
        x, w = _sorted(x, n_threads), None
    else:
        keep = weights > 0
        if not keep.all():
            x, weights = x[keep], weights[keep]
        order = np.argsort(x)
        x, w = x[order], np.asarray(weights, dtype=np.float64)[order]
        if w.size and w[0] == w.min() == w.max():
            w = None if w[0] == 1.0 else w
    shift = 0.0
    if x.size and ((x[0] > 0 and x[-1] <= 2 * x[0]) or (x[-1] < 0 and x[0] >= 2 * x[-1])):
        shift = float(x[x.size // 2])
        x -= x.dtype.type(shift)
    return x, w, shift


def _sorted(x, n_threads):
    """Sorted copy of ``x``: halved at the median until every thread has a part to sort, of 2**19 samples at least."""
    x = x.copy()
    if n_threads < 2 or x.size < 1 << 20:
        x.sort()
        return x
    parts = [x]
    with ThreadPoolExecutor(n_threads) as pool:
        while len(parts) < n_threads and parts[0].size >= 1 << 20:
            list(pool.map(lambda part: part.partition(part.size // 2), parts))
            parts = [half for part in parts for half in (part[: part.size // 2], part[part.size // 2 :])]
        list(pool.map(np.ndarray.sort, parts))
    return x


def merge_duplicates(x, w):
    """Distinct values of sorted ``x`` with the sum of their weights (their counts if ``w`` is None)."""
    starts = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    if w is None:
        merged = np.diff(starts, append=x.size).astype(np.float64)
    else:
        merged = np.add.reduceat(w, starts)
    return x[starts], merged


def has_heavy_duplicates(x, fraction=0.12, probes=4096):
    """Whether sorted ``x`` has an atom of about 1/4096 of the samples, or more than ``fraction`` of repeats."""
    if x.size <= 4 * probes:
        return np.count_nonzero(x[1:] == x[:-1]) > fraction * x.size
    if x.size > _LARGE:
        # millions of float32 repeat for want of digits; merging such pairs would only cost memory
        fraction = 0.75
    at = np.linspace(0, x.size - 2, probes).astype(np.intp)
    knots = x[at]
    return bool((knots[1:] == knots[:-1]).any() or np.mean(knots == x[at + 1]) > fraction)


def build_prefix(x, w=None, shift=0.0):
    """Prefix sums of sorted ``x`` with weights ``w`` -> :class:`SortedSamples`."""
    n = x.size
    block = 1 if n <= _SMALL else _BLOCK
    if block == 1:
        x64 = x.astype(np.float64)
        origin = float(np.mean(x64) if w is None else np.average(x64, weights=w))
        x64 -= origin
        s = np.concatenate(([0.0], np.cumsum(x64 if w is None else x64 * w)))
        t = None if w is None else np.concatenate(([0.0], np.cumsum(w)))
        return SortedSamples(x, w, s, t, origin, shift, block)
    sums, wsums = _block_sums(x, w)
    total = float(n) if w is None else float(wsums.sum())
    origin = float(sums.sum()) / total
    if w is None:
        counts = np.full(sums.size, float(block))
        counts[-1] = n - block * (sums.size - 1)
    else:
        counts = wsums
    sums -= origin * counts
    s = np.concatenate(([0.0], np.cumsum(sums)))
    t = None if w is None else np.concatenate(([0.0], np.cumsum(wsums)))
    return SortedSamples(x, w, s, t, origin, shift, block)


def _block_sums(x, w):
    """Sums of ``w * x`` and of ``w`` over blocks of 32 samples, in float64."""
    n_full, rest = divmod(x.size, _BLOCK)
    n_blocks = n_full + (rest > 0)
    head = x[: n_full * _BLOCK].reshape(n_full, _BLOCK)
    sums = np.empty(n_blocks)
    if w is None:
        np.einsum("ij->i", head, dtype=np.float64, out=sums[:n_full])
        if rest:
            sums[-1] = x[n_full * _BLOCK :].sum(dtype=np.float64)
        return sums, None
    wsums = np.empty(n_blocks)
    w_head = w[: n_full * _BLOCK].reshape(n_full, _BLOCK)
    np.einsum("ij,ij->i", head, w_head, dtype=np.float64, out=sums[:n_full])
    np.einsum("ij->i", w_head, out=wsums[:n_full])
    if rest:
        sums[-1] = np.dot(x[n_full * _BLOCK :].astype(np.float64), w[n_full * _BLOCK :])
        wsums[-1] = w[n_full * _BLOCK :].sum()
    return sums, wsums


def sums_at(data, p):
    """Sum of ``w * (x - origin)`` and of ``w`` over the first ``p`` samples, for an integer array ``p``."""
    if data.block == 1:
        return data.s[p], (p.astype(np.float64) if data.t is None else data.t[p])
    q = p // _BLOCK
    s = data.s[q]
    t = p.astype(np.float64) if data.t is None else data.t[q]
    inside = p - q * _BLOCK
    rows = np.flatnonzero(inside)
    if rows.size == 0:
        return s, t
    s, t = s.reshape(-1), t.reshape(-1)
    q, inside = q.reshape(-1)[rows], inside.reshape(-1)[rows]
    n_full = data.size // _BLOCK
    last = q == n_full  # the block that is shorter
    if last.any():
        here = slice(n_full * _BLOCK, None)
        v = data.x[here].astype(np.float64) - data.origin
        wv = v if data.w is None else v * data.w[here]
        s[rows[last]] += np.cumsum(wv)[inside[last] - 1]
        if data.w is not None:
            t[rows[last]] += np.cumsum(data.w[here])[inside[last] - 1]
        rows, q, inside = rows[~last], q[~last], inside[~last]
    blocks = data.x[: n_full * _BLOCK].reshape(n_full, _BLOCK)
    for lo in range(0, rows.size, 4096):
        r, q_r, inside_r = (a[lo : lo + 4096] for a in (rows, q, inside))
        part = _FIRST.take(inside_r, axis=0)
        v = blocks.take(q_r, axis=0)
        if data.w is None:
            v *= part
            s[r] += np.einsum("ij->i", v, dtype=np.float64) - data.origin * inside_r
        else:
            wv = data.w[: n_full * _BLOCK].reshape(n_full, _BLOCK).take(q_r, axis=0) * part
            s[r] += np.einsum("ij,ij->i", v.astype(np.float64) - data.origin, wv)
            t[r] += wv.sum(axis=1)
    return s.reshape(p.shape), t.reshape(p.shape)


def cell_means(data, borders):
    """Means of the cells ``borders[k]:borders[k+1]`` (k,), about the data's own zero."""
    s, t = sums_at(data, borders)
    means = data.origin + np.diff(s) / np.diff(t)
    for k in np.flatnonzero(np.diff(borders) <= _FEW):  # differences of long sums are too coarse for few samples
        cell = slice(borders[k], borders[k + 1])
        means[k] = np.average(data.x[cell].astype(np.float64), weights=None if data.w is None else data.w[cell])
    return means


def _square_sum(d, w):
    """``sum w d^2`` in float64, without BLAS, whose threads would go on spinning between calls this short."""
    d = d.astype(np.float64, copy=False)
    return float(np.einsum("i,i->", d, d) if w is None else np.einsum("i,i,i->", d, d, w))


def interval_inertia(data, borders, centers):
    """``sum_i w_i (x_i - c_k)^2`` where cell k is ``borders[k]:borders[k+1]`` and c_k its mean; one streaming pass."""
    total = 0.0
    counts = np.diff(borders)
    if data.size <= _CHUNK:
        d = data.x - np.repeat(centers, counts)
        return _square_sum(d, data.w)
    if data.w is None:
        squares = sum(_square_sum(data.x[lo : lo + _CHUNK], None) for lo in range(0, data.size, _CHUNK))
        total = squares - float((counts * centers**2).sum())
        if total > _DIGITS * squares:
            return total
        total = 0.0
    for lo in range(0, data.size, _CHUNK):
        hi = min(lo + _CHUNK, data.size)
        k0, k1 = np.searchsorted(borders, (lo, hi - 1), side="right") - 1
        edges = np.clip(borders[k0 : k1 + 2], lo, hi)
        d = data.x[lo:hi] - np.repeat(centers[k0 : k1 + 1], np.diff(edges))
        total += _square_sum(d, None if data.w is None else data.w[lo:hi])
    return total
