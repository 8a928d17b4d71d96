# SPDX-License-Identifier: BSD-3-Clause
"""Sparse codes for fixed atoms: lasso at a certified gap, and three non-zeros by matching pursuit."""

import functools

import numpy as np
from datasets import kernel_vectors, network_layers
from harness import Benchmark

LASSO = [{"dataset": "kernels_256", "alpha": 0.5}, {"dataset": "kernels_32", "alpha": 0.5},
         {"dataset": "digits_64", "alpha": 1.0}, {"dataset": "digits_128", "alpha": 1.0},
         {"dataset": "rows_4608", "alpha": 2.0}]
OMP = [{"dataset": d, "n_nonzero": 3} for d in ("kernels_256", "digits_64")]

bench = Benchmark(
    "sparse_codes",
    __doc__,
    cases=LASSO + OMP,
    tiny_cases=[{"dataset": "digits_64", "alpha": 1.0}, {"dataset": "digits_64", "n_nonzero": 3}],
    warm_up=lambda data: {"X": data["X"][:300], "V": data["V"]},
)


def _dictionary(X, n_atoms, alpha, n_steps=30, batch=1024):
    """Atoms fitted to rows by a few steps of online dictionary learning from sampled rows (Mairal 2010)."""
    from skfactor.solvers.lasso import lasso_codes

    rng = np.random.default_rng(0)
    energy = np.square(X, dtype=np.float64).sum(axis=1)
    V = X[rng.choice(len(X), n_atoms, p=energy / energy.sum())].astype(np.float64)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    A, B = np.zeros((n_atoms, n_atoms)), np.zeros(V.shape)
    for step in range(n_steps):
        rows = X[rng.integers(0, len(X), batch)].astype(np.float64)
        codes = lasso_codes(rows, V, alpha, tol=1e-3).codes
        forget = (step / (step + 1)) ** 5
        A, B = forget * A + codes.T @ codes, forget * B + codes.T @ rows
        for k in np.flatnonzero(np.diagonal(A) > 0):
            atom = V[k] + (B[k] - A[k] @ V) / A[k, k]
            V[k] = atom / np.linalg.norm(atom)
    return {"X": X, "V": V.astype(X.dtype)}


def _kernels(n_atoms, tiny):
    """262,144 3 x 3 kernels of ResNet-56 drawn with replacement, 5 % jitter, unit variance; made ones without it."""
    layers = network_layers("cifar10_resnet56")
    rng = np.random.default_rng(0)
    if layers is None:
        X = kernel_vectors(94_256)
    else:
        X = np.concatenate([w.reshape(-1, 9) for w in layers.values() if w.shape[1] % 9 == 0])
    X = X[rng.integers(0, len(X), 4096 if tiny else 262_144)]
    X = X + 0.05 * X.std() * rng.standard_normal(X.shape)
    return _dictionary((X / X.std()).astype(np.float32), n_atoms, 0.5)


@bench.dataset
def kernels_256(tiny):
    return _kernels(256, tiny)


@bench.dataset
def kernels_32(tiny):
    return _kernels(32, tiny)


def _digits(n_atoms):
    from sklearn.datasets import load_digits

    X = load_digits().data
    X = X - X.mean(axis=0)
    return _dictionary(X / X.std(), n_atoms, 1.0)


@bench.dataset
def digits_64(tiny):
    return _digits(64)


@bench.dataset
def digits_128(tiny):
    return _digits(128)


@bench.dataset
def rows_4608(tiny):
    """512 rows of rank 64 plus noise, 128 atoms."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((512, 64)) @ rng.standard_normal((64, 4608)) / 8 + 0.3 * rng.standard_normal((512, 4608))
    return _dictionary((X / X.std()).astype(np.float32), 128, 2.0, n_steps=10, batch=512)


@bench.objective
def quality(data, result, alpha=None, n_nonzero=None):
    """Objective (the part of all rows that a solver coded, scaled up), density, worst gap; or mean squared error."""
    from skfactor.solvers.lasso import duality_gap

    codes = result.toarray() if hasattr(result, "toarray") else result
    X, V = data["X"][: len(codes)].astype(np.float64), data["V"].astype(np.float64)
    step = 16384
    blocks = [slice(i, i + step) for i in range(0, len(codes), step)]
    error = sum(np.square(X[b] - codes[b] @ V).sum() for b in blocks)
    figures = {"non_zeros": np.count_nonzero(codes) / len(codes), "coded_rows": len(codes),
               "nan": int(np.isnan(codes).sum())}
    if n_nonzero is not None:
        return figures | {"mse": float(error / X.size)}
    size = sum(np.abs(codes[b], dtype=np.float64).sum() for b in blocks)
    gap = max(duality_gap(X[b], V, alpha, codes[b]).max() for b in blocks)
    return figures | {"objective": float((0.5 * error + alpha * size) * len(data["X"]) / len(codes)),
                      "largest_gap": float(gap)}


def _lasso_only(data, params):
    return None if "alpha" in params else "lasso only"


def _omp_only(data, params):
    return None if "n_nonzero" in params else "matching pursuit only"


@bench.solver("skfactor lasso_codes_sparse", skip=_lasso_only)
def skfactor_lasso():
    """The gap that the solver itself certifies."""
    from skfactor.solvers.lasso import lasso_codes_sparse

    def run(data, alpha):
        result = lasso_codes_sparse(data["X"], data["V"], alpha)
        return result.codes, {"certified_gap": float(result.gap.max()), "n_iter": result.n_iter}

    return run


@bench.solver("skfactor lasso_codes", skip=_lasso_only)
def skfactor_dense():
    from skfactor.solvers.lasso import lasso_codes

    return lambda data, alpha: lasso_codes(data["X"], data["V"], alpha).codes


@bench.solver("skfactor omp_codes", skip=_omp_only)
def skfactor_omp():
    from skfactor.solvers.omp import omp_codes

    return lambda data, n_nonzero: omp_codes(data["X"], data["V"], n_nonzero)


def _sklearn(algorithm, data, alpha=None, n_nonzero=None, most=20_000):
    """Codes of the first rows only, where all would take minutes: its time grows with the rows."""
    from sklearn.decomposition import sparse_encode

    X = data["X"][:most]
    return sparse_encode(X, data["V"], algorithm=algorithm, alpha=alpha, n_nonzero_coefs=n_nonzero), {
        "part_of_rows": len(X) / len(data["X"])}


@bench.solver("scikit-learn lasso_cd", skip=_lasso_only)
def sklearn_cd():
    return functools.partial(_sklearn, "lasso_cd")


@bench.solver("scikit-learn lasso_lars", skip=_lasso_only)
def sklearn_lars():
    return functools.partial(_sklearn, "lasso_lars")


@bench.solver("scikit-learn omp", skip=_omp_only)
def sklearn_omp():
    return functools.partial(_sklearn, "omp")


def _spams(name, **options):
    import spams

    def run(data, alpha=None, n_nonzero=None):
        X, V = (np.asfortranarray(data[key].T) for key in ("X", "V"))
        given = {"lambda1": alpha} if alpha is not None else {"L": n_nonzero}
        return getattr(spams, name)(X, D=V, **given, **options).T.tocsr()

    return run


@bench.solver("spams lasso (GPL, C++)", skip=_lasso_only)
def spams_lasso():
    return _spams("lasso", mode=2)


@bench.solver("spams omp (GPL, C++)", skip=_omp_only)
def spams_omp():
    return _spams("omp")


if __name__ == "__main__":
    bench.main()
