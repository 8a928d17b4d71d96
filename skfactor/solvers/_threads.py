"""Threads over parts of an array."""

# SPDX-License-Identifier: BSD-3-Clause
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def usable_threads(n_threads=None):
    """``n_threads``, or as many as there are usable cores where that is None."""
    if n_threads is not None:
        return n_threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parts(function, arrays, n_threads, *, least):
    """Results of ``function(*parts)`` over equal parts of equally long flat arrays, one for each thread, in order.

    There are fewer where parts would have less than ``least`` items.
    """
    size = arrays[0].size
    n_threads = max(1, min(n_threads, size // least))
    if n_threads == 1:
        return [function(*arrays)]
    cuts = np.linspace(0, size, n_threads + 1).astype(np.intp)
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(lambda low, high: function(*(a[low:high] for a in arrays)), cuts[:-1], cuts[1:]))
