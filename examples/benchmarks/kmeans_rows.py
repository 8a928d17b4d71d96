# SPDX-License-Identifier: BSD-3-Clause
"""One scalar codebook for each row of a matrix (per-channel sharing): 4096 rows of 576 weights, 16 centroids."""

import numpy as np
from datasets import gauss_weights
from harness import Benchmark

bench = Benchmark(
    "kmeans_rows",
    __doc__,
    cases=[{"dataset": "gauss_rows", "n_clusters": 16}],
    tiny_cases=[{"dataset": "gauss_rows", "n_clusters": 16}],
    warm_up=lambda X: X[:8],
)


@bench.dataset
def gauss_rows(tiny):
    n_rows = 64 if tiny else 4096
    return gauss_weights(n_rows * 576).reshape(n_rows, 576)


@bench.objective
def squared_error(X, X_hat, n_clusters):
    return {"inertia": float(np.square(X.astype(np.float64) - X_hat).sum())}


@bench.solver("skfactor solver")
def skfactor_solver():
    from skfactor.solvers.kmeans1d_rows import assign_1d_rows, kmeans_1d_rows

    def run(X, n_clusters):
        centers = kmeans_1d_rows(X, n_clusters).centers.astype(X.dtype)
        return np.take_along_axis(centers, assign_1d_rows(X, centers).astype(np.intp), axis=1)

    return run


@bench.solver("skfactor estimator")
def skfactor_estimator():
    from skfactor import KMeansWeightSharer

    def run(X, n_clusters):
        sharer = KMeansWeightSharer(n_clusters, granularity="row").fit(X)
        return sharer.inverse_transform(sharer.labels_)

    return run


@bench.solver("kmeans1d (exact), row by row")
def kmeans1d():
    """Exact: the reference of the column "above the optimum"."""
    from kmeans1d import cluster

    def run(X, n_clusters):
        fits = [cluster(x, n_clusters) for x in X]
        return np.stack([np.asarray(f.centroids).take(f.clusters) for f in fits])

    return run


@bench.solver("ckwrap (exact), row by row")
def ckwrap():
    from ckwrap import ckmeans

    def run(X, n_clusters):
        fits = [ckmeans(x, n_clusters) for x in X]
        return np.stack([f.centers.take(f.labels) for f in fits])

    return run


@bench.solver("flash1dkmeans, row by row")
def flash1dkmeans():
    from flash1dkmeans import kmeans_1d

    def run(X, n_clusters):
        fits = [kmeans_1d(x, n_clusters, random_state=0) for x in X]
        return np.stack([centers.take(labels) for centers, labels in fits])

    return run


@bench.solver("coremltools, fast mode, row by row")
def coremltools_fast():
    import torch
    from coremltools.optimize.torch._utils.k_means import KMeans, KMeansConfig

    def run(X, n_clusters):
        config = KMeansConfig(n_bits=int(np.log2(n_clusters)), enable_fast_kmeans_mode=True)
        fits = [KMeans._cluster_weights_1d(torch.from_numpy(x), None, config) for x in X]
        return np.stack([centers[labels].numpy() for centers, labels in fits])

    return run


@bench.solver("scikit-learn KMeans, row by row")
def sklearn_kmeans():
    """On one thread: OpenMP's overhead on so small problems would double its time."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    def run(X, n_clusters):
        with threadpool_limits(1):
            return fit_rows(X, n_clusters)

    def fit_rows(X, n_clusters):
        fits = [KMeans(n_clusters, n_init=1, random_state=0).fit(x[:, None]) for x in X]
        return np.stack([f.cluster_centers_[:, 0].take(f.labels_) for f in fits])

    return run


if __name__ == "__main__":
    bench.main()
