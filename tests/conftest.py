"""Workers of pytest-xdist share the cores: each gets one thread, or they would wait for each other in spin locks."""
# SPDX-License-Identifier: BSD-3-Clause

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")  # read when numpy and torch are imported, after this
