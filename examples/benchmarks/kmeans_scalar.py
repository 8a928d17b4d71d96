# SPDX-License-Identifier: BSD-3-Clause
"""Scalar k-means of one weight tensor: centroids, codes and reconstruction, against every peer that is installed."""

import numpy as np
from datasets import gauss_weights, heavy_weights, network_layers
from harness import Benchmark

SIZES = (16, 256)
bench = Benchmark(
    "kmeans_scalar",
    __doc__,
    cases=[{"dataset": d, "n_clusters": k} for d in ("gauss", "heavy", "resnet56") for k in SIZES],
    tiny_cases=[{"dataset": "gauss", "n_clusters": 16}],
    warm_up=lambda x: x[:4096],
)


@bench.dataset
def gauss(tiny):
    return gauss_weights(20_000) if tiny else gauss_weights()


@bench.dataset
def heavy(tiny):
    return heavy_weights(20_000) if tiny else heavy_weights()


@bench.dataset
def resnet56(tiny):
    layers = network_layers("cifar10_resnet56")
    return None if layers is None else np.concatenate([w.ravel() for w in layers.values()])


@bench.objective
def squared_error(x, x_hat, n_clusters):
    """Inertia in float64, of the reconstruction as it was returned."""
    parts = zip(np.array_split(x, 64), np.array_split(np.asarray(x_hat).reshape(x.shape), 64))
    return {"inertia": float(sum(np.square(a.astype(np.float64) - b).sum() for a, b in parts))}


def table_of(bytes_per_entry, limit=4e9):
    """Leave out a solver whose dynamic programme stores a table of N x K entries larger than the limit."""

    def skip(x, params):
        size = bytes_per_entry * x.size * params["n_clusters"]
        return f"its N x K table takes {size / 1e9:.1f} GB" if size > limit else None

    return skip


@bench.solver("skfactor solver")
def skfactor_solver():
    """`kmeans_1d`, `assign_1d` and the look-up of the centroids."""
    from skfactor.solvers.kmeans1d import assign_1d, kmeans_1d

    def run(x, n_clusters):
        centers = kmeans_1d(x, n_clusters).centers.astype(x.dtype)
        return centers.take(assign_1d(x, centers))

    return run


@bench.solver("skfactor estimator")
def skfactor_estimator():
    """`KMeansWeightSharer.fit` with everything it checks and reports, and `inverse_transform`."""
    from skfactor import KMeansWeightSharer

    def run(x, n_clusters):
        sharer = KMeansWeightSharer(n_clusters).fit(x.reshape(-1, 16))
        return sharer.inverse_transform(sharer.labels_)

    return run


@bench.solver("skfactor certified")
def skfactor_certified():
    """`kmeans_1d(certify=True)`: its lower bound is the reference of the column "above the optimum"."""
    from skfactor.solvers.kmeans1d import assign_1d, kmeans_1d

    def run(x, n_clusters):
        result = kmeans_1d(x, n_clusters, certify=True)
        centers = result.centers.astype(x.dtype)
        figures = {"solver_inertia": result.inertia, "lower_bound": result.lower_bound}
        return centers.take(assign_1d(x, centers)), figures

    return run


@bench.solver("np.sort alone")
def sort_alone():
    """The floor of every method that sorts; reconstructs nothing, its error means nothing."""

    def run(x, n_clusters):
        return np.sort(x)

    return run


@bench.solver("flash1dkmeans")
def flash1dkmeans():
    from flash1dkmeans import kmeans_1d

    def run(x, n_clusters):
        centers, labels = kmeans_1d(x, n_clusters, random_state=0)
        return centers.take(labels)

    return run


def _coremltools(fast):
    import torch
    from coremltools.optimize.torch._utils.k_means import KMeans, KMeansConfig

    def run(x, n_clusters):
        config = KMeansConfig(n_bits=int(np.log2(n_clusters)), enable_fast_kmeans_mode=fast)
        centers, labels = KMeans._cluster_weights_1d(torch.from_numpy(x), None, config)
        return centers[labels].to(torch.float32).numpy()

    return run


@bench.solver("coremltools, fast mode")
def coremltools_fast():
    """The clustering of the post-training palettizer, its default mode, without its handling of modules."""
    return _coremltools(True)


@bench.solver("coremltools, exact mode", skip=table_of(16))
def coremltools_exact():
    return _coremltools(False)


@bench.solver("kmeans1d", skip=table_of(16))
def kmeans1d():
    from kmeans1d import cluster

    def run(x, n_clusters):
        labels, centers = cluster(x, n_clusters)
        return np.asarray(centers).take(labels)

    return run


@bench.solver("ckwrap", skip=table_of(16))
def ckwrap():
    from ckwrap import ckmeans

    def run(x, n_clusters):
        result = ckmeans(x, n_clusters)
        return result.centers.take(result.labels)

    return run


@bench.solver("faiss, all points")
def faiss_all():
    """25 iterations, its default, on all points instead of its default of 256 for each centroid."""
    import faiss

    def run(x, n_clusters):
        model = faiss.Kmeans(1, n_clusters, niter=25, seed=0, max_points_per_centroid=x.size, min_points_per_centroid=1)
        model.train(x[:, None])
        return model.centroids[:, 0].take(model.index.search(x[:, None], 1)[1][:, 0])

    return run


@bench.solver("scikit-learn MiniBatchKMeans")
def sklearn_minibatch():
    from sklearn.cluster import MiniBatchKMeans

    def run(x, n_clusters):
        model = MiniBatchKMeans(n_clusters, n_init=1, random_state=0).fit(x[:, None])
        return model.cluster_centers_[:, 0].take(model.labels_)

    return run


@bench.solver("scikit-learn KMeans")
def sklearn_kmeans():
    """Its defaults (300 iterations at most, tol 1e-4) with one start."""
    from sklearn.cluster import KMeans

    def run(x, n_clusters):
        model = KMeans(n_clusters, n_init=1, random_state=0).fit(x[:, None])
        return model.cluster_centers_[:, 0].take(model.labels_)

    return run


if __name__ == "__main__":
    bench.main()
