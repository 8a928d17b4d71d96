"""Exact nearest-centre labels of scalars, by table instead of by search.

The top 16 bits of a float32 cut the real line into 65,536 buckets. A bucket that holds at most one border of the
codebook needs one look-up and one comparison per value; the few buckets with more borders go through a binary
search. The result is exactly that of comparing every value with every border in float64.
"""

# SPDX-License-Identifier: BSD-3-Clause
from functools import partial

import numpy as np

from skfactor.solvers._threads import in_parts, usable_threads

_CHUNK = 1 << 16
_FEW_BORDERS = 32
_TABLE_FROM = 1 << 14  # values; below it a binary search is faster than filling the table


def label_dtype(n_clusters):
    """Smallest of uint8, uint16 and int32 that holds labels 0..n_clusters - 1."""
    return np.dtype(np.uint8 if n_clusters <= 256 else np.uint16 if n_clusters <= 65536 else np.int32)


def round_down(v, dtype):
    """Largest values of ``dtype`` not above float64 ``v``: ``x <= v`` and ``x <= round_down(v)`` agree."""
    v = np.asarray(v, dtype=np.float64) + 0.0  # -0.0 becomes 0.0
    if dtype == np.float64:
        return v
    with np.errstate(over="ignore"):
        down = v.astype(dtype)
    return np.where(down > v, np.nextafter(down, dtype.type(-np.inf)), down)


def assign_1d(x, centers, *, n_threads=None):
    """Index of the nearest centre of every value.

    ``labels = argmin_k (x - c_k)^2``; a value on the border ``(c_k + c_{k+1}) / 2``, computed in float64, goes to
    the lower index.

    Parameters
    ----------
    x : ndarray of any shape, float16, float32 or float64
        Values without NaN.
    centers : ndarray of shape (k,)
        Sorted ascending.
    n_threads : int, default=None
        Threads that share large arrays; None means as many as there are usable cores.

    Returns
    -------
    labels : ndarray of the shape of ``x``, uint8 (k <= 256), uint16 (k <= 65536) or int32

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.solvers.kmeans1d import assign_1d
    >>> assign_1d(np.array([-1.0, 0.5, 0.6, 7.0]), np.array([0.0, 1.0, 5.0])).tolist()
    [0, 0, 1, 2]
    """
    centers = np.asarray(centers, dtype=np.float64).reshape(-1)
    if centers.size == 0:
        raise ValueError("centers must hold at least one value, got an empty array")
    return cut_labels(x, midpoints(centers), n_threads=usable_threads(n_threads))


def midpoints(centers):
    """Borders ``(c_k + c_{k+1}) / 2`` in float64, safe at the end of its range."""
    if max(abs(centers[0]), abs(centers[-1])) < 8e307:
        return (centers[:-1] + centers[1:]) / 2
    return centers[:-1] / 2 + centers[1:] / 2


def cut_labels(x, borders, *, n_threads=1):
    """Number of ``borders`` (sorted, float64) strictly below every value of ``x``."""
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32 if x.dtype == np.float16 else np.float64)
    flat = np.ascontiguousarray(x).reshape(-1)
    borders = round_down(borders, flat.dtype)
    labels = np.empty(flat.size, dtype=label_dtype(borders.size + 1))
    if borders.size == 0:
        labels.fill(0)
    elif flat.size < _TABLE_FROM or borders.size > 4096:
        labels[:] = np.searchsorted(borders, flat, side="left")
    else:
        table = _bucket_table(borders, labels.dtype)
        fill = partial(_label_by_bucket, borders, table)
        in_parts(fill, [flat, labels], n_threads, least=1 << 18)
    return labels.reshape(x.shape)


def _bucket(x32):
    """Bucket of a float32 in increasing order of value, 0..65535."""
    key = np.ascontiguousarray(x32).view(np.uint32) >> 16
    return np.where(key < 0x8000, key + 0x8000, 0xFFFF - key).astype(np.intp)


def _in_key_order(table):
    """From increasing order of value to the order of the raw 16-bit keys."""
    return np.concatenate((table[0x8000:], table[0x7FFF::-1]))


def _bucket_table(borders, dtype):
    """For every 16-bit key: the lowest label, the border inside (or +inf), whether more borders are inside; and the
    labels again with the largest integer where there is a border, None where there are too many for that to pay."""
    with np.errstate(over="ignore"):
        bucket = _bucket(borders.astype(np.float32))
    counts = np.bincount(bucket, minlength=1 << 16)
    first = (np.cumsum(counts) - counts).astype(dtype)
    border = np.full(1 << 16, np.inf, dtype=borders.dtype)
    border[bucket[::-1]] = borders[::-1]
    several = counts > 1
    marked, mark = None, np.iinfo(dtype).max
    if borders.size <= _FEW_BORDERS:
        marked = _in_key_order(np.where(counts > 0, mark, first).astype(dtype))
    return _in_key_order(first), _in_key_order(border), _in_key_order(several) if several.any() else None, marked


def _label_by_bucket(borders, table, x, labels):
    first, border, several, marked = table
    mark = np.iinfo(labels.dtype).max
    high = 1 if np.little_endian else 0
    index = np.empty(_CHUNK, dtype=np.intp)
    inside = np.empty(_CHUNK, dtype=border.dtype)
    for lo in range(0, x.size, _CHUNK):
        part = x[lo : lo + _CHUNK]
        if part.dtype == np.float32:
            x32 = part
        else:
            with np.errstate(over="ignore"):
                x32 = part.astype(np.float32)
        key, edge, out = index[: part.size], inside[: part.size], labels[lo : lo + _CHUNK]
        key[:] = x32.view(np.uint16)[high::2]
        if marked is not None and several is None:  # one lookup decides for most values
            np.take(marked, key, out=out, mode="clip")
            open_ = np.flatnonzero(out == mark)
            if open_.size < part.size // 4:
                at = key[open_]
                out[open_] = first[at] + (part[open_] > border[at])
                continue
        np.take(first, key, out=out, mode="clip")
        np.take(border, key, out=edge, mode="clip")
        out += part > edge
        if several is not None:
            crowded = np.flatnonzero(several[key])
            out[crowded] = np.searchsorted(borders, part[crowded], side="left")
