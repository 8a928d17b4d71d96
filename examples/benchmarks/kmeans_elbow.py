# SPDX-License-Identifier: BSD-3-Clause
"""The inertia of every number of clusters up to 256 in one pass; a peer has to be fitted once for each."""

from datasets import gauss_weights, heavy_weights
from harness import Benchmark

bench = Benchmark(
    "kmeans_elbow",
    __doc__,
    cases=[{"dataset": d, "k_max": 256} for d in ("gauss", "heavy")],
    tiny_cases=[{"dataset": "gauss", "k_max": 16}],
    warm_up=lambda x: x[:4096],
)


@bench.dataset
def gauss(tiny):
    return gauss_weights(20_000) if tiny else gauss_weights()


@bench.dataset
def heavy(tiny):
    return heavy_weights(20_000) if tiny else heavy_weights()


@bench.objective
def excess(x, curve, k_max):
    """Largest excess of the curve over the optimum of that number of clusters, for a few of them."""
    from skfactor.solvers.kmeans1d import kmeans_1d

    sizes = [k for k in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256) if k <= k_max]
    return {"worst_excess": max(float(curve[k - 1]) / kmeans_1d(x, k).inertia - 1 for k in sizes)}


@bench.solver("skfactor solver")
def skfactor_solver():
    from skfactor.solvers.kmeans1d import elbow_1d

    return elbow_1d


@bench.solver("skfactor estimator")
def skfactor_estimator():
    from skfactor import KMeansWeightSharer

    def run(x, k_max):
        return KMeansWeightSharer().elbow_curve(x.reshape(-1, 16), k_max)

    return run


if __name__ == "__main__":
    bench.main()
