"""One-dimensional k-means: the globally optimal codebook, its labels, its elbow, and relatives.

The cells of an optimal scalar codebook are intervals, so every solver here works on sorted values with prefix
sums: a cell costs O(1) and the extra memory stays a small multiple of the data.
"""

# SPDX-License-Identifier: BSD-3-Clause
from skfactor.solvers._assign1d import assign_1d
from skfactor.solvers._elbow1d import elbow_1d
from skfactor.solvers._entropy1d import EntropyKMeans1DResult, assign_1d_entropy, entropy_kmeans_1d
from skfactor.solvers._lloyd1d import INIT_METHODS, init_1d, lloyd_1d
from skfactor.solvers._optimal1d import KMeans1DResult, kmeans_1d

__all__ = [
    "INIT_METHODS",
    "EntropyKMeans1DResult",
    "KMeans1DResult",
    "assign_1d",
    "assign_1d_entropy",
    "elbow_1d",
    "entropy_kmeans_1d",
    "init_1d",
    "kmeans_1d",
    "lloyd_1d",
]
