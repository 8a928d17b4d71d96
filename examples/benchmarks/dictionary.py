# SPDX-License-Identifier: BSD-3-Clause
"""Dictionary learning: CPU seconds to an objective, with the codes solved again before objectives are compared.

Every solver gives snapshots of its dictionary with the CPU time they were ready at. The objective of a snapshot is
that of unit-norm atoms with optimal codes, from one lasso solver for all. scikit-learn's batch learner starts from
the SVD and so is the same for every seed: it runs once, up to `CAP` seconds; so does its default, which is only
followed up to `DEFAULT_CAP` seconds.
"""

import contextlib
import json
import statistics
import sys
import time
import warnings

import numpy as np
from datasets import network_layers
from harness import RESULTS, Benchmark

CAP, DEFAULT_CAP = 30.0, 30.0
SEEDS = range(5)
# Starts of the batch solver, one after the other, of which the best so far counts.
N_INIT = 6
# Rows of the large data set on which objectives are evaluated: every fourth.
STRIDE = 4

BATCH = [("digits", k, 1.0) for k in (32, 64, 128)] + [("low_rank", 128, 2.0), ("gauss", 128, 2.0)]
LARGE = [("kernels", k, 0.5) for k in (64, 256)]

bench = Benchmark(
    "dictionary",
    __doc__,
    cases=[{"dataset": d, "n_components": k, "alpha": a, "seed": s} for d, k, a in BATCH + LARGE for s in SEEDS],
    tiny_cases=[{"dataset": "digits", "n_components": 8, "alpha": 1.0, "seed": 0}],
    warm_up=lambda X: X[:200, :64],
)


def _unit(X):
    return X / X.std()


@bench.dataset
def digits(tiny):
    from sklearn.datasets import load_digits

    X = load_digits().data[: 200 if tiny else None]
    return _unit(X - X.mean(axis=0))


@bench.dataset
def low_rank(tiny):
    """512 rows of rank 64 in 4608 columns, and noise."""
    rng = np.random.default_rng(0)
    return _unit(rng.normal(size=(512, 64)) @ rng.normal(size=(64, 4608)) + 2.4 * rng.normal(size=(512, 4608)))


@bench.dataset
def gauss(tiny):
    return _unit(np.random.default_rng(0).normal(size=(512, 4608)))


@bench.dataset
def kernels(tiny):
    """262,144 draws from the 3 x 3 kernels of ResNet-56, each with 5 % noise."""
    layers = network_layers("cifar10_resnet56")
    if layers is None:
        return None
    K = np.concatenate([w.reshape(-1, 9) for name, w in layers.items() if w.shape[1] > 27 and w.shape[1] % 9 == 0])
    rng = np.random.default_rng(0)
    X = K[rng.integers(0, len(K), 262_144)].astype(np.float64)
    return _unit(X + 0.05 * X.std() * rng.normal(size=X.shape))


@bench.objective
def best_codes(X, snapshots, n_components, alpha, seed):
    from skfactor.solvers.lasso import lasso_blocks

    stride = STRIDE if len(X) > 100_000 else 1
    X = X[::stride]
    curve = []
    for seconds, V in snapshots:
        V = V / np.maximum(np.linalg.norm(V, axis=1, keepdims=True), 1e-12)
        total = 0.0
        for rows, part in lasso_blocks(X, V, alpha, tol=1e-5):
            total += 0.5 * np.square(X[rows] - part.codes @ V).sum() + alpha * np.abs(part.codes).sum()
        curve.append([round(seconds, 4), float(total * stride)])
    return {"seconds": curve[-1][0], "objective": min(j for _, j in curve), "curve": curve}


class _Clock:
    """Collects dictionaries at growing distances of time; its own time does not count."""

    def __init__(self, cap=np.inf):
        self.start, self.snapshots, self.cap = time.process_time(), [], cap

    def __call__(self, V, last=False):
        now = time.process_time()
        seconds = now - self.start
        if last or not self.snapshots or seconds > 1.1 * self.snapshots[-1][0]:
            self.snapshots.append((seconds, np.array(V() if callable(V) else V, dtype=np.float64)))
        if seconds > self.cap and not last:
            raise TimeoutError
        self.start += time.process_time() - now


def _large(X, n_components):
    return len(X) > 100_000


@bench.solver("skfactor")
def skfactor():
    from skfactor.solvers.dictionary import DictionaryOptions, canonical_rows, learn_dictionary

    def run(X, n_components, alpha, seed):
        rng = np.random.default_rng(seed)
        clock = _Clock()
        if _large(X, n_components):
            rows, weights = canonical_rows(X.astype(np.float32))
            options = DictionaryOptions(batch_size=max(1024, 8 * n_components), tol=3e-6)
            result = learn_dictionary(rows, n_components, alpha, rng=rng, sample_weight=weights, options=options,
                                      callback=clock)
            clock(result.components, last=True)
        else:
            for _ in range(N_INIT if len(X) > 1000 else 1):
                result = learn_dictionary(X, n_components, alpha, rng=rng, callback=clock)
                clock(result.components, last=True)
        return clock.snapshots

    return run


def _sklearn(cap, **options):
    from sklearn.decomposition import DictionaryLearning

    def run(X, n_components, alpha, seed):
        clock = _Clock(cap)
        model = DictionaryLearning(n_components, alpha=alpha, random_state=seed, tol=0.0,
                                   callback=lambda env: clock(env["dictionary"]), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(TimeoutError):
                clock(model.fit(X).components_, last=True)
        return clock.snapshots

    return run


def _not_batch(X, params):
    if len(X) > 100_000:
        return "too many rows"
    return "the same for every seed" if params["seed"] else None


@bench.solver("scikit-learn DictionaryLearning, cd", skip=_not_batch)
def sklearn_cd():
    return _sklearn(CAP, fit_algorithm="cd", max_iter=200)


@bench.solver("scikit-learn DictionaryLearning, defaults",
              skip=lambda X, params: "rows are long" if X.shape[1] > 1000 else _not_batch(X, params))
def sklearn_default():
    return _sklearn(DEFAULT_CAP, max_iter=1000)


@bench.solver("scikit-learn MiniBatchDictionaryLearning, cd",
              skip=lambda X, params: None if len(X) > 100_000 else "for many rows")
def sklearn_minibatch():
    from sklearn.decomposition import MiniBatchDictionaryLearning

    def run(X, n_components, alpha, seed):
        clock = _Clock()
        model = MiniBatchDictionaryLearning(n_components, alpha=alpha, random_state=seed, fit_algorithm="cd")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clock(model.fit(X).components_, last=True)
        return clock.snapshots

    return run


@bench.solver("SPAMS trainDL", skip=lambda X, params: None if len(X) > 1000 else "for more rows than atoms")
def spams_train():
    """Stopped after 1 and 2 seconds of its own clock; started anew each time."""
    import spams

    def run(X, n_components, alpha, seed):
        columns = np.asfortranarray(X.T)
        snapshots = []
        for limit in (1, 2):
            start = time.process_time()
            D = spams.trainDL(columns, K=n_components, lambda1=alpha, mode=2, iter=-limit, numThreads=1, verbose=False)
            snapshots.append((time.process_time() - start, D.T.copy()))
        return snapshots

    return run


def summary(runs):
    """Of every case: seconds of each peer to its lowest objective, ours to one no higher, medians over the seeds."""
    found = []
    for d, k, _ in BATCH + LARGE:
        here = [r for r in runs if r["status"] == "ok" and r["dataset"] == d and r["params"]["n_components"] == k]
        own = [r for r in here if r["solver"] == "skfactor"]
        for peer in sorted({r["solver"] for r in here} - {"skfactor"}):
            theirs = [r for r in here if r["solver"] == peer]
            ratios, seconds = [], []
            for r in own:
                other = next((t for t in theirs if t["params"]["seed"] == r["params"]["seed"]), theirs[0])["objective"]
                target = other["objective"]
                needed = next(t for t, j in other["curve"] if j <= target)
                reached = next((t for t, j in r["objective"]["curve"] if j <= target), None)
                seconds.append(reached)
                ratios.append(None if reached is None else needed / reached)
            ok = [x for x in ratios if x is not None]
            found.append({"dataset": d, "n_components": k, "peer": peer, "n_reached": len(ok), "n_seeds": len(ratios),
                          "median_ratio": statistics.median([x or 0.0 for x in ratios]),
                          "median_seconds": statistics.median(s for s in seconds if s) if ok else None,
                          "median_objective": statistics.median(r["objective"]["objective"] for r in own),
                          "peer_objective": statistics.median(t["objective"]["objective"] for t in theirs),
                          "extra_mb": max((r["extra_bytes"] or 0) for r in own) / 1e6,
                          "peer_extra_mb": max((t["extra_bytes"] or 0) for t in theirs) / 1e6})
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--summary" in arguments:
        path = RESULTS / "dictionary_1t.json"
        result = json.loads(path.read_text())
        result["summary"] = summary(result["runs"])
        path.write_text(json.dumps(result, indent=1) + "\n")
        for line in result["summary"]:
            print(json.dumps(line))
    else:
        bench.main([*arguments, "--repeat", "1"])
