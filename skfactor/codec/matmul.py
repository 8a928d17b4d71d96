"""A matrix product whose bits do not depend on the number of BLAS threads."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import threading
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

__all__ = ["matmul"]

_BLOCK_ELEMENTS = 1 << 20

_LOCK = threading.Lock()  # the number of threads belongs to the process


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries, which takes milliseconds: once


def matmul(a: np.ndarray, b: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """`a @ b` in float64, rounded once to `dtype`.

    One BLAS thread and blocks of rows that depend on the shapes alone: the same arrays give the same bits, in
    the process that fitted as in one that loads a file, as long as both run the same BLAS on the same kind of CPU.

    Parameters
    ----------
    a : ndarray of shape (n, m)
    b : ndarray of shape (m, d)
    dtype : dtype

    Returns
    -------
    product : ndarray of shape (n, d)

    Examples
    --------
    >>> matmul(np.float32([[1, 2]]), np.float32([[3], [4]]), "float32")
    array([[11.]], dtype=float32)
    """
    out = np.empty((len(a), b.shape[1]), dtype=dtype)
    b = np.ascontiguousarray(b, dtype=np.float64)
    step = max(1, _BLOCK_ELEMENTS // max(1, *b.shape))
    with _LOCK, _controller().limit(limits=1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(a), step):
            out[start : start + step] = a[start : start + step].astype(np.float64) @ b
    return out
