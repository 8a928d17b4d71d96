"""Threads over blocks of rows."""
# SPDX-License-Identifier: BSD-3-Clause

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

# Rows from which another thread pays.
_ROWS_PER_THREAD = 4096


@cache
def _controller():
    return ThreadpoolController()


@contextmanager
def row_map(n_threads, n_rows):
    """`map`, or that of a pool of threads; None means one for each usable core.

    BLAS keeps to one thread: its products are too small here for more, and its waiting threads would burn a core.
    """
    if n_threads is None:
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = min(n_threads, n_rows // _ROWS_PER_THREAD)
    with _controller().limit(limits=1, user_api="blas"):
        if n_threads < 2:
            yield map
        else:
            with ThreadPoolExecutor(n_threads) as pool:
                yield pool.map
