# SPDX-License-Identifier: BSD-3-Clause
"""Grid searches over the number of shared values K and the price of a code α of a dictionary, in one Pipeline.

The search that fits shared steps once, beside scikit-learn's `GridSearchCV` with the same scorer and the same rule, and
with its own `Pipeline.score`. `cpu_all_s` is the time of all processes of a search, their start included.
"""

import os
import tempfile

import numpy as np
from datasets import filter_rows, network_layers
from harness import Benchmark

_ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4)
_CLUSTERS = (4, 8, 12, 16, 24, 32, 64, 128)
_FIVE = {"alphas": _ALPHAS[1:6], "n_clusters": (4, 8, 16, 32, 64)}
_EIGHT = {"alphas": _ALPHAS, "n_clusters": _CLUSTERS}

bench = Benchmark(
    "grid_search",
    __doc__,
    cases=[{"dataset": "kernels", "n_components": 16, "coder": "auto", **_EIGHT},
           {"dataset": "kernels", "n_components": 32, "coder": "auto", **_EIGHT},
           {"dataset": "layer", "n_components": 16, "coder": "auto", **_FIVE},
           {"dataset": "layer", "n_components": 32, "coder": "auto", **_FIVE},
           {"dataset": "few_kernels", "n_components": 16, "coder": "auto", **_FIVE}],
    tiny_cases=[{"dataset": "few_kernels", "n_components": 4, "coder": "ans", "alphas": (0.5, 1.5),
                 "n_clusters": (4, 16)}],
    warm_up=lambda X: X[:8],
)


def _kernels():
    layers = network_layers("cifar10_resnet56")
    return layers and np.concatenate([w.reshape(-1, 9) for w in layers.values() if w.shape[1] % 9 == 0])


@bench.dataset
def kernels(tiny):
    """All 3 x 3 kernels of ResNet-56 as rows (94,256, 9)."""
    return _kernels()


@bench.dataset
def few_kernels(tiny):
    """Every fifth of them: small enough for the peers."""
    found = _kernels()
    return None if found is None else np.ascontiguousarray(found[:: 400 if tiny else 5])


@bench.dataset
def layer(tiny):
    """A layer of 512 x 4608 weights."""
    return filter_rows()


def _pipeline(n_components, coder):
    from sklearn.pipeline import Pipeline

    from skfactor import DictionaryFactorizer, KMeansWeightSharer

    return Pipeline([("dict", DictionaryFactorizer(n_components, vector_size=9, random_state=0)),
                     ("share", KMeansWeightSharer(preserve_zeros=True, coder=coder))])


def _search(make):
    from joblib.externals.loky import get_reusable_executor

    def run(X, n_components, coder, alphas, n_clusters):
        grid = {"dict__alpha": list(alphas), "share__n_clusters": list(n_clusters)}
        # each of the two jobs gets one thread, as joblib has it where no variable says otherwise
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        start = sum(os.times()[:4])
        search = make(_pipeline(n_components, coder), grid).fit(X)
        get_reusable_executor().shutdown(wait=True)  # ended processes are counted
        return search, {"cpu_all_s": round(sum(os.times()[:4]) - start, 2)}

    return run


@bench.objective
def outcome(X, search, **params):
    """What was chosen, and the size of its file beside what the search said."""
    from skfactor.selection import measure, save_tensor

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "X.skf")
        save_tensor(path, search, X)
        size = os.path.getsize(path)
    said, found = search.cv_results_.get("mean_test_bytes"), measure(search, X)
    return {"alpha": search.best_params_["dict__alpha"], "n_clusters": search.best_params_["share__n_clusters"],
            "candidates": len(search.cv_results_["params"]), "file_bytes": size,
            "bytes_said": None if said is None else int(said[search.best_index_]),
            "distortion": found["distortion"], "bits_per_weight": found["bits_per_weight"]}


@bench.solver("skfactor CompressionSearchCV")
def compression_search():
    from skfactor import CompressionSearchCV

    return _search(lambda pipe, grid: CompressionSearchCV(pipe, grid, n_jobs=2))


def _only_few(X, params):
    return "fits the dictionary for every candidate" if X.size > 200_000 else None


@bench.solver("scikit-learn GridSearchCV, same scorer and rule", skip=_only_few)
def grid_search():
    from sklearn.model_selection import GridSearchCV

    from skfactor.selection import WholeMatrixSplit, compression_scorer, elbow

    return _search(lambda pipe, grid: GridSearchCV(pipe, grid, n_jobs=2, cv=WholeMatrixSplit(),
                                                   scoring=compression_scorer, refit=elbow))


@bench.solver("scikit-learn GridSearchCV, Pipeline.score", skip=_only_few)
def naive_search():
    from sklearn.model_selection import GridSearchCV

    from skfactor.selection import WholeMatrixSplit

    return _search(lambda pipe, grid: GridSearchCV(pipe, grid, n_jobs=2, cv=WholeMatrixSplit()))


if __name__ == "__main__":
    bench.main()
