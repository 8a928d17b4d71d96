"""Finds the optional folder of real data and networks; tests that need it skip where it is absent."""
# SPDX-License-Identifier: BSD-3-Clause

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest


def data_dir():
    """Folder of real data: $SKFACTOR_DATA, or `../shared/data` beside the checkout; else None."""
    candidates = [os.environ.get("SKFACTOR_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for folder in filter(None, candidates):
        if (Path(folder) / "weights").is_dir():
            return Path(folder)
    return None


needs_data = pytest.mark.skipif(
    data_dir() is None, reason="real data not found: set SKFACTOR_DATA or put it in ../shared/data"
)


@cache
def real_weights(name):
    """All tensors of `weights/<name>.safetensors` as a dict of numpy arrays."""
    from safetensors.numpy import load_file

    return load_file(data_dir() / "weights" / f"{name}.safetensors")


def real_layers(name):
    """The tensors of at least two dimensions as read-only 2-D float arrays (c_out, rest)."""
    layers = {k: w.reshape(len(w), -1) for k, w in real_weights(name).items() if w.ndim >= 2}
    for w in layers.values():
        w.flags.writeable = False
    assert layers
    assert all(np.isfinite(w).all() for w in layers.values())
    return layers
