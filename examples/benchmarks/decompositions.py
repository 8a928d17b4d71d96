# SPDX-License-Identifier: BSD-3-Clause
"""Tucker-2, Tucker and tensor train beside TensorLy at the same ranks.

Data are the convolutions of ResNet-56 and one large layer, 512 x 512 x 3 x 3: a Tucker-2 tensor of ranks (128, 128) and
noise of half its standard deviation. Ranks of ResNet-56 are half of the channels (Tucker: 2 x 2 of the pixels; tensor
train: 5 and 3 behind the first). The error is the squared error of all layers over their squared norm. The estimator
takes and gives float32, refits the codes, and lowers the error of a train by alternating least squares.
"""

import numpy as np
from datasets import network_layers
from harness import Benchmark

METHODS = ("Tucker-2", "Tucker", "tensor train")

bench = Benchmark(
    "decompositions",
    __doc__,
    cases=[{"dataset": d, "method": m} for d in ("large", "resnet56") for m in METHODS],
    tiny_cases=[{"dataset": "large", "method": m} for m in METHODS],
    warm_up=lambda layers: {"first": next(iter(layers.values()))[:16]},
)


@bench.dataset
def large(tiny):
    n, r = (32, 8) if tiny else (512, 128)
    rng = np.random.default_rng(0)
    rows, columns = rng.standard_normal((2, n, r))
    core = rng.standard_normal((r, r, 9))
    T = np.tensordot(np.tensordot(rows, core, (1, 0)), columns, (1, 1)).swapaxes(1, 2)
    T = 0.05 * T / T.std() + 0.025 * rng.standard_normal(T.shape)
    return {"w": T.reshape(n, n, 3, 3).astype(np.float32)}


@bench.dataset
def resnet56(tiny):
    layers = network_layers("cifar10_resnet56")
    if layers is None:
        return None
    found = {name: X.reshape(len(X), -1, 3, 3) for name, X in layers.items() if X.shape[1] % 9 == 0}
    return {name: W for name, W in found.items() if W.shape[1] > 3}


def ranks_of(shape, method):
    """The ranks of a layer for a method; of the planted one those that were planted."""
    n, c = (128, 128) if shape[0] == 512 else (shape[0] // 2, shape[1] // 2)
    return {"Tucker-2": (n, c), "Tucker": (n, c, 2, 2), "tensor train": (n, 5, 3)}[method]


@bench.objective
def relative_error(layers, found, method):
    error = sum(squared_sum(W - found[name].reshape(W.shape)) for name, W in layers.items())
    return {"relative_error": error / sum(map(squared_sum, layers.values()))}


def squared_sum(A):
    return float(np.square(A, dtype=np.float64).sum())


@bench.solver("skfactor solver")
def skfactor_solver():
    from skfactor.solvers.tensor_train import tensor_train
    from skfactor.solvers.tucker import tucker

    def one(W, method):
        T, ranks = W.astype(np.float64), ranks_of(W.shape, method)
        if method == "tensor train":
            cores = tensor_train(T, ranks).cores
            return train_to_tensor(cores)
        found = tucker(T, ranks, tuple(range(len(ranks))))
        return multiplied(found.core, found.frames)

    return lambda layers, method: {name: one(W, method) for name, W in layers.items()}


@bench.solver("skfactor estimator")
def skfactor_estimator():
    from skfactor import TensorTrainFactorizer, TuckerFactorizer

    def one(W, method):
        options = {"rank": ranks_of(W.shape, method), "kernel_shape": W.shape[1:]}
        if method == "tensor train":
            estimator = TensorTrainFactorizer(**options)
        else:
            estimator = TuckerFactorizer(modes="full" if method == "Tucker" else "tucker2", **options)
        X = W.reshape(len(W), -1)
        return estimator.fit(X).inverse_transform(estimator.transform(X))

    return lambda layers, method: {name: one(W, method) for name, W in layers.items()}


@bench.solver("TensorLy")
def tensorly():
    """Its defaults: at most 100 sweeps, stopped by a change of the relative error below 1e-4."""
    from tensorly.decomposition import partial_tucker, tensor_train

    def one(W, method):
        T, ranks = W.astype(np.float64), ranks_of(W.shape, method)
        if method == "tensor train":
            return train_to_tensor([np.asarray(core) for core in tensor_train(T, (1, *ranks, 1))])
        (core, factors), _ = partial_tucker(T, list(ranks), modes=list(range(len(ranks))))
        return multiplied(core, factors)

    return lambda layers, method: {name: one(W, method) for name, W in layers.items()}


def multiplied(core, factors):
    for axis, factor in enumerate(factors):
        core = np.moveaxis(np.tensordot(factor, core, (1, axis)), 0, axis)
    return core


def train_to_tensor(cores):
    found = cores[0][0]
    for core in cores[1:]:
        found = np.tensordot(found, core, 1)
    return found[..., 0]


if __name__ == "__main__":
    bench.main()
