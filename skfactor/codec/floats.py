"""Float arrays that are an exact uniform grid, and bit-level questions about arrays."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import numpy as np

__all__ = ["bits_of", "find_grid", "find_line", "grid_values", "line_values"]

_MAX_MULTIPLE = 1 << 22  # float32 resolves neighbouring multiples of a step up to about here


def bits_of(array: np.ndarray) -> np.ndarray:
    """Flat view of an array as unsigned integers, so that -0.0 differs from 0.0 and a NaN equals itself."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"<u{flat.dtype.itemsize}")


def grid_values(k0: int, step: np.floating, n: int, dtype) -> np.ndarray:
    """`fl(step * k)` for k = k0, ..., k0 + n - 1, multiplied in float64 and rounded once to `dtype`."""
    with np.errstate(over="ignore"):
        return (np.float64(step) * (k0 + np.arange(n, dtype=np.float64))).astype(dtype)


def line_values(first: np.floating, last: np.floating, n: int, dtype) -> np.ndarray:
    """`n` values from `first` to `last`, both exact: `fl(first + k * ((last - first) / (n - 1)))`."""
    with np.errstate(over="ignore"):
        step = (np.float64(last) - np.float64(first)) / (n - 1)
        values = (np.float64(first) + step * np.arange(n, dtype=np.float64)).astype(dtype)
    values[-1] = last
    return values


def _steps(values: np.ndarray, k: np.ndarray, dtype: np.dtype):
    """Candidates for the step b of `values = fl(b * k)`: float32 ones first, they are stored in half the bytes."""
    if dtype == np.float32:
        # b * k must lie in the rounding interval of every value: intersect the intervals over k
        narrow = values.astype(np.float32)
        below = (values + np.nextafter(narrow, np.float32(-np.inf)).astype(np.float64)) / 2
        above = (values + np.nextafter(narrow, np.float32(np.inf)).astype(np.float64)) / 2
        on = k != 0
        lower = np.minimum(below[on] / k[on], above[on] / k[on]).max()
        upper = np.maximum(below[on] / k[on], above[on] / k[on]).min()
        middle = np.float64((lower + upper) / 2)
        single = np.float32(middle)
        yield from (single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(np.inf)), middle)
    at_one = values[np.abs(k) == 1]
    if len(at_one):
        yield np.float64(at_one[-1])
    yield np.float64((values[-1] - values[0]) / (len(values) - 1))
    yield np.float64(values[np.abs(k).argmax()] / k[np.abs(k).argmax()])


def find_grid(array: np.ndarray) -> tuple[int, np.floating] | None:
    """Return `(k0, step)` with `array.ravel() == grid_values(k0, step, n, dtype)` bit for bit, or None.

    A uniform codebook, consecutive multiples of a step, is stored as two numbers. For float32 values the set of
    admissible steps is an interval, found exactly up to float64 rounding; every candidate is verified.

    Examples
    --------
    >>> k0, step = find_grid(np.float32(0.1) * np.arange(-3, 5, dtype=np.float32))
    >>> int(k0), float(step) == float(np.float32(0.1))
    (-3, True)
    """
    flat = array.reshape(-1)
    if len(flat) < 3 or flat.dtype not in (np.float32, np.float64) or not np.isfinite(flat).all():
        return None
    values = flat.astype(np.float64)
    with np.errstate(all="ignore"):
        step = (values[-1] - values[0]) / (len(values) - 1)
        if not np.isfinite(step) or step == 0 or abs(values[0] / step) > _MAX_MULTIPLE:
            return None
        k0 = round(float(values[0] / step))
        k = k0 + np.arange(len(values), dtype=np.float64)
        if np.abs(values - step * k).max() > 0.01 * abs(step):
            return None
        target = bits_of(flat)
        for candidate in _steps(values, k, flat.dtype):
            if np.isfinite(candidate) and (bits_of(grid_values(k0, candidate, len(flat), flat.dtype)) == target).all():
                return k0, candidate
    return None


def find_line(array: np.ndarray) -> tuple[np.floating, np.floating] | None:
    """Return `(first, last)` with `array.ravel() == line_values(first, last, n, dtype)` bit for bit, or None.

    Examples
    --------
    >>> find_line(np.linspace(-1, 2.5, 9, dtype=np.float32)) is None
    False
    """
    flat = array.reshape(-1)
    if len(flat) < 4 or flat.dtype not in (np.float32, np.float64) or not np.isfinite(flat).all():
        return None
    with np.errstate(all="ignore"):
        same = (bits_of(line_values(flat[0], flat[-1], len(flat), flat.dtype)) == bits_of(flat)).all()
    return (flat[0], flat[-1]) if same else None
