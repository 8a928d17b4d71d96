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
    """`fl(step * k)` for k = k0, ..., k0 + n - 1, computed in float64 and rounded once to `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.float64(step) * (k0 + np.arange(n, dtype=np.float64))).astype(dtype)


def line_values(first: np.floating, step: np.floating, n: int, dtype) -> np.ndarray:
    """`fl(first + step * k)` for k = 0, ..., n - 1, computed in float64 and rounded once to `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.float64(first) + np.float64(step) * np.arange(n, dtype=np.float64)).astype(dtype)


def _steps(flat: np.ndarray, k: np.ndarray, offset: np.float64):
    """Candidates for the step b of `flat = fl(offset + b * k)`; float32 ones first, they cost half the bytes."""
    values = flat.astype(np.float64) - offset
    on = k != 0
    if flat.dtype == np.float32:
        # offset + b * k must lie in the rounding interval of every value: intersect the intervals of b over k
        below = (flat.astype(np.float64) + np.nextafter(flat, np.float32(-np.inf)).astype(np.float64)) / 2 - offset
        above = (flat.astype(np.float64) + np.nextafter(flat, np.float32(np.inf)).astype(np.float64)) / 2 - offset
        one_end, other_end = below[on] / k[on], above[on] / k[on]
        middle = np.float64((np.minimum(one_end, other_end).max() + np.maximum(one_end, other_end).min()) / 2)
        single = np.float32(middle)
        yield from (single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(np.inf)), middle)
    far = np.abs(k).argmax()
    yield np.float64((values[-1] - values[0]) / (len(values) - 1))
    yield np.float64(values[far] / k[far])
    near = np.abs(np.where(on, k, np.inf)).argmin()
    yield np.float64(values[near] / k[near])


def _searchable(flat: np.ndarray) -> bool:
    return len(flat) >= 3 and flat.dtype in (np.float32, np.float64) and bool(np.isfinite(flat).all())


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
    if not _searchable(flat):
        return None
    with np.errstate(all="ignore"):
        first = np.float64(flat[0])
        step = (np.float64(flat[-1]) - first) / (len(flat) - 1)
        if not np.isfinite(step) or step == 0 or abs(first / step) > _MAX_MULTIPLE:
            return None
        k0 = round(float(first / step))
        k = k0 + np.arange(len(flat), dtype=np.float64)
        if np.abs(flat - step * k).max() > 0.01 * abs(step):
            return None
        for candidate in _steps(flat, k, np.float64(0)):
            if (bits_of(grid_values(k0, candidate, len(flat), flat.dtype)) == bits_of(flat)).all():
                return k0, candidate
    return None


def find_line(array: np.ndarray) -> tuple[np.floating, np.floating] | None:
    """Return `(first, step)` with `array.ravel() == line_values(first, step, n, dtype)` bit for bit, or None.

    Examples
    --------
    >>> find_line(np.linspace(-1, 2.5, 9, dtype=np.float32))
    (np.float32(-1.0), np.float32(0.4375))
    """
    flat = array.reshape(-1)
    if not _searchable(flat) or len(flat) < 4:
        return None
    with np.errstate(all="ignore"):
        first = np.float64(flat[0])
        k = np.arange(len(flat), dtype=np.float64)
        step = (np.float64(flat[-1]) - first) / k[-1]
        if np.abs(flat - (first + step * k)).max() > 0.01 * abs(step):
            return None
        for candidate in _steps(flat, k, first):
            if (bits_of(line_values(flat[0], candidate, len(flat), flat.dtype)) == bits_of(flat)).all():
                return flat[0], candidate
    return None
