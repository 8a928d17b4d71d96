# SPDX-License-Identifier: BSD-3-Clause
"""How far the default scalar k-means is above the proven optimum, over every layer of the real networks.

The reference is the lower bound of `kmeans_1d(certify=True)`, checked against the exact dynamic programmes of kmeans1d
and ckwrap where their N x K table is small enough.
"""

import numpy as np
from datasets import NETWORKS, gauss_weights, heavy_weights, network_layers
from harness import Benchmark

SIZES = (2, 4, 16, 64, 256)
SIZES_OF_MILLIONS = (2, 16, 256)
VARIANTS = {
    "float32": lambda x: (x, None),
    "float64": lambda x: (x.astype(np.float64), None),
    "float32, weighted": lambda x: (x, np.random.default_rng(0).gamma(0.5, size=x.size)),
    "float64, weighted": lambda x: (x.astype(np.float64), np.random.default_rng(0).gamma(0.5, size=x.size)),
    "float64 at scale 1e-8": lambda x: (x.astype(np.float64) * (1e-8 / x.std()), None),
    "float64 at scale 1e8": lambda x: (x.astype(np.float64) * (1e8 / x.std()), None),
    "float32 at scale 1e-8": lambda x: (x * np.float32(1e-8 / x.std()), None),
    "float32 at scale 1e8": lambda x: (x * np.float32(1e8 / x.std()), None),
}
bench = Benchmark(
    "kmeans_optimality",
    __doc__,
    cases=[{"dataset": d, "variant": v} for d in (*NETWORKS, "gauss", "heavy") for v in VARIANTS],
    tiny_cases=[{"dataset": "gauss", "variant": v} for v in VARIANTS],
)


def _register_network(name):
    def layers(tiny):
        return network_layers(name)

    bench.datasets[name] = layers


for _name in NETWORKS:
    _register_network(_name)


@bench.dataset
def gauss(tiny):
    return {"gauss": gauss_weights(20_000) if tiny else gauss_weights()}


@bench.dataset
def heavy(tiny):
    return {"heavy": heavy_weights(20_000) if tiny else heavy_weights()}


@bench.objective
def excess(data, result, variant):
    return result


def _cases(data, variant):
    for x in data.values():
        x, weights = VARIANTS[variant](x.ravel())
        n_distinct = len(np.unique(x))
        for k in SIZES if x.size < 1_000_000 else SIZES_OF_MILLIONS:
            if k < n_distinct:
                yield x, weights, k


@bench.solver("skfactor default against its certificate")
def against_certificate():
    from skfactor.solvers.kmeans1d import kmeans_1d

    def run(data, variant):
        found, gaps = [], []
        for x, weights, k in _cases(data, variant):
            certified = kmeans_1d(x, k, weights=weights, certify=True)
            found.append(kmeans_1d(x, k, weights=weights).inertia / certified.lower_bound - 1)
            gaps.append(certified.inertia / certified.lower_bound - 1)
        return {"cases": len(found), "worst_excess": max(found), "above_1e-6": int(np.sum(np.array(found) > 1e-6)),
                "worst_duality_gap": max(gaps)}

    return run


def _against(labels_of, weighted):
    """Excess over an exact dynamic programme, where it needs at most 2**18 entries of its N x K table, or K = 2."""
    from skfactor.solvers.kmeans1d import kmeans_1d

    def run(data, variant):
        excess = []
        for x, weights, k in _cases(data, variant):
            if (weights is None or weighted) and (k == 2 or x.size * k <= 1 << 18):
                exact = _inertia(x, weights, labels_of(x, k, weights))
                excess.append(kmeans_1d(x, k, weights=weights).inertia / exact - 1)
        if not excess:
            return {"cases": 0}
        return {"cases": len(excess), "worst_excess": max(excess), "best_excess": min(excess),
                "above_1e-6": int(np.sum(np.array(excess) > 1e-6))}

    return run


@bench.solver("skfactor default against kmeans1d")
def against_kmeans1d():
    """It knows no weights."""
    from kmeans1d import cluster

    return _against(lambda x, k, weights: np.asarray(cluster(x, k).clusters), weighted=False)


@bench.solver("skfactor default against ckwrap")
def against_ckwrap():
    from ckwrap import ckmeans

    return _against(lambda x, k, weights: ckmeans(x, k, weights).labels, weighted=True)


def _inertia(x, weights, labels):
    """Inertia in float64 of a partition, about the means of its cells."""
    x = x.astype(np.float64)
    w = np.ones_like(x) if weights is None else weights
    mass = np.bincount(labels, w)
    means = np.bincount(labels, w * x) / np.where(mass > 0, mass, 1)
    return float(np.dot(w, np.square(x - means[labels])))


if __name__ == "__main__":
    bench.main()
