# SPDX-License-Identifier: BSD-3-Clause
"""Data of the benchmarks: seeded synthetic weights, and the real networks where a folder of them is found."""

import os
from pathlib import Path

import numpy as np

NETWORKS = ("cifar10_resnet20", "cifar10_resnet56", "mnist_lenet300100_original", "mnist_lenet5_original")
N_WEIGHTS = 2_359_296  # a 512 x 512 x 3 x 3 convolution


def gauss_weights(n=N_WEIGHTS):
    """Normal, standard deviation 0.05."""
    return np.random.default_rng(0).normal(0, 0.05, n).astype(np.float32)


def heavy_weights(n=N_WEIGHTS):
    """90 % Laplace and 10 % Student t with 3 degrees of freedom, both of scale 0.03."""
    rng = np.random.default_rng(1)
    tails = rng.random(n) < 0.1
    return np.where(tails, 0.03 * rng.standard_t(3, n), rng.laplace(0, 0.03, n)).astype(np.float32)


def kernel_vectors(n=262_144):
    """3 x 3 kernels (n, 9): neighbouring taps correlated (0.4 per step), log-normal scale of a kernel."""
    rng = np.random.default_rng(2)
    step = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    root = np.linalg.cholesky(np.kron(0.4**step, 0.4**step))
    scale = 0.03 * rng.lognormal(0, 0.6, (n, 1))
    return (scale * (rng.normal(size=(n, 9)) @ root.T)).astype(np.float32)


def filter_rows(n_rows=512, n_columns=4608, n_groups=48):
    """Rows scattered around a few common filters, as in an over-complete layer."""
    rng = np.random.default_rng(3)
    common = rng.normal(0, 0.03, (n_groups, n_columns))
    return (common[rng.integers(0, n_groups, n_rows)] + rng.normal(0, 0.02, (n_rows, n_columns))).astype(np.float32)


def networks_folder():
    """Folder of the real networks: $SKFACTOR_DATA, or `shared/data` beside the checkout; None if absent."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    for folder in (os.environ.get("SKFACTOR_DATA"), beside):
        if folder and (Path(folder) / "weights").is_dir():
            return Path(folder)
    return None


def network_layers(name):
    """Tensors of at least two dimensions of a real network as (c_out, rest) matrices; None if it is not there."""
    folder = networks_folder()
    if folder is None:
        return None
    from safetensors.numpy import load_file

    tensors = load_file(folder / "weights" / f"{name}.safetensors")
    return {key: np.ascontiguousarray(w.reshape(len(w), -1)) for key, w in tensors.items() if w.ndim >= 2}
