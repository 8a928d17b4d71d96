# SPDX-License-Identifier: BSD-3-Clause
"""Autoencoders: seconds for one pass over the data, and the share of the variance that is lost after the same passes.

The time of a pass is the difference between a long and a short fit, so that start, standardisation and PCA do not count
(`setup_s` has them). All solvers train the same layers with Adam on batches of the same size.
"""

import time
import warnings

import numpy as np
from datasets import kernel_vectors
from harness import Benchmark

_SHORT, _LONG = 1, 4

bench = Benchmark(
    "autoencoder",
    __doc__,
    cases=[{"dataset": "kernels_9", "hidden": h, "latent": r, "batch_size": b}
           for h, r in ((32, 4), (128, 4)) for b in (4096, 256)]
    + [{"dataset": "digits", "hidden": 128, "latent": 16, "batch_size": 256}],
    tiny_cases=[{"dataset": "digits", "hidden": 16, "latent": 4, "batch_size": 256}],
    warm_up=lambda X: X[:512],
)


@bench.dataset
def kernels_9(tiny):
    return kernel_vectors(2048 if tiny else 262_144)


@bench.dataset
def digits(tiny):
    from sklearn.datasets import load_digits

    return np.float32(load_digits().data[: 512 if tiny else None])


@bench.objective
def lost_variance(X, X_hat, **params):
    residual = X.astype(np.float64) - X_hat
    return {"lost": float(np.square(residual).sum() / np.square(X - X.mean(axis=0, dtype=np.float64)).sum())}


def _timed(fit):
    """Fit for few and for many passes; the reconstruction of the long fit, and the CPU and wall time of one pass."""
    cpu, wall = [], []
    for n_passes in (_SHORT, _LONG):
        start = time.process_time(), time.perf_counter()
        reconstruct = fit(n_passes)
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    per_pass = [(t[1] - t[0]) / (_LONG - _SHORT) for t in (cpu, wall)]
    return reconstruct(), {"pass_cpu_s": per_pass[0], "pass_wall_s": per_pass[1],
                           "setup_cpu_s": cpu[0] - _SHORT * per_pass[0], "passes": _LONG}


def _skfactor(init):
    from skfactor import AutoencoderCompressor

    def run(X, hidden, latent, batch_size):
        def fit(n_passes):
            model = AutoencoderCompressor((hidden,), latent, batch_size=batch_size, max_iter=n_passes, init=init,
                                          learning_rate_init=0.001, learning_rate="constant", device="cpu",
                                          n_iter_no_change=_LONG, random_state=0).fit(X)
            return lambda: model.inverse_transform(model.transform(X))

        return _timed(fit)

    return run


@bench.solver("skfactor")
def skfactor():
    return _skfactor("pca")


@bench.solver("skfactor, random start")
def skfactor_random():
    return _skfactor("random")


@bench.solver("torch modules, autograd")
def torch_modules():
    """A plain training loop: nn.Sequential, rows indexed in place, fused Adam, loss read once a pass."""
    import torch
    from torch import nn

    def run(X, hidden, latent, batch_size):
        S, mean, scale = _standardised(X)
        S = torch.from_numpy(S)

        def fit(n_passes):
            torch.manual_seed(0)
            d = S.shape[1]
            model = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, latent),
                                  nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, d))
            optimizer = torch.optim.Adam(model.parameters(), fused=True)
            for _ in range(n_passes):
                total = torch.zeros(())
                for batch in torch.randperm(len(S)).split(batch_size):
                    optimizer.zero_grad()
                    rows = S[batch]
                    loss = nn.functional.mse_loss(model(rows), rows)
                    loss.backward()
                    optimizer.step()
                    total += loss.detach()
                total.item()
            return lambda: model(S).detach().numpy() * scale + mean

        return _timed(fit)

    return run


@bench.solver("scikit-learn MLPRegressor")
def mlp_regressor():
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    def run(X, hidden, latent, batch_size):
        S, mean, scale = _standardised(X)

        def fit(n_passes):
            model = MLPRegressor(hidden_layer_sizes=(hidden, latent, hidden), batch_size=min(batch_size, len(S)),
                                 max_iter=n_passes, alpha=0.0, tol=0.0, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(S, S)
            return lambda: model.predict(S) * scale + mean

        return _timed(fit)

    return run


def _standardised(X):
    mean = X.mean(axis=0)
    scale = float((X - mean).std())
    return (X - mean) / scale, mean, scale


if __name__ == "__main__":
    bench.main()
