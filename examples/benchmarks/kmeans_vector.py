# SPDX-License-Identifier: BSD-3-Clause
"""Vector k-means (product quantisation, row-wise sharing): centroids, codes and reconstruction."""

import numpy as np
from datasets import filter_rows, heavy_weights, kernel_vectors
from harness import Benchmark

bench = Benchmark(
    "kmeans_vector",
    __doc__,
    cases=[{"dataset": d, "n_clusters": k} for d in ("kernels_9", "blocks_8") for k in (256, 1024)]
    + [{"dataset": "rows_4608", "n_clusters": 64}],
    tiny_cases=[{"dataset": "kernels_9", "n_clusters": 16}],
    warm_up=lambda X: X[:2048] if len(X) > 2048 else X,
)


@bench.dataset
def kernels_9(tiny):
    return kernel_vectors(2048 if tiny else 262_144)


@bench.dataset
def blocks_8(tiny):
    return heavy_weights(8 * (2048 if tiny else 262_144)).reshape(-1, 8)


@bench.dataset
def rows_4608(tiny):
    return filter_rows(64 if tiny else 512)


@bench.objective
def squared_error(X, X_hat, n_clusters):
    return {"inertia": float(np.square(X.astype(np.float64) - X_hat).sum())}


@bench.solver("skfactor solver")
def skfactor_solver():
    from skfactor.solvers.kmeans import kmeans

    def run(X, n_clusters):
        result = kmeans(X, n_clusters, rng=np.random.RandomState(0))
        return result.centers[result.labels], {"n_iter": int(result.n_iter)}

    return run


@bench.solver("skfactor estimator")
def skfactor_estimator():
    from skfactor import KMeansWeightSharer

    def run(X, n_clusters):
        sharer = KMeansWeightSharer(n_clusters, vector_size=X.shape[1], random_state=0).fit(X)
        return sharer.inverse_transform(sharer.labels_), {"n_iter": int(sharer.n_iter_)}

    return run


def _faiss(n_per_centroid):
    import faiss

    def run(X, n_clusters):
        model = faiss.Kmeans(X.shape[1], n_clusters, niter=25, seed=0, min_points_per_centroid=1,
                             max_points_per_centroid=n_per_centroid or len(X))
        model.train(X)
        return model.centroids[model.index.search(X, 1)[1][:, 0]]

    return run


@bench.solver("faiss, all points")
def faiss_all():
    return _faiss(None)


@bench.solver("faiss, its default sample")
def faiss_default():
    """256 points for each centroid."""
    return _faiss(256)


@bench.solver("scikit-learn MiniBatchKMeans")
def sklearn_minibatch():
    from sklearn.cluster import MiniBatchKMeans

    def run(X, n_clusters):
        model = MiniBatchKMeans(n_clusters, n_init=1, random_state=0).fit(X)
        return model.cluster_centers_[model.labels_], {"n_iter": int(model.n_iter_)}

    return run


@bench.solver("scikit-learn KMeans")
def sklearn_kmeans():
    """Its defaults (300 iterations at most, tol 1e-4) with one start."""
    from sklearn.cluster import KMeans

    def run(X, n_clusters):
        model = KMeans(n_clusters, n_init=1, random_state=0).fit(X)
        return model.cluster_centers_[model.labels_], {"n_iter": int(model.n_iter_)}

    return run


if __name__ == "__main__":
    bench.main()
