# SPDX-License-Identifier: BSD-3-Clause
"""CP decomposition of all filters at once beside TensorLy's `parafac` filter by filter, and the distances of all pairs.

Weights are Gaussian, as of a network before its training: the hardest case for a decomposition, the same for both.
TensorLy runs as the published code of NORTON runs it: on torch tensors, random start, at most 300 sweeps; on the
first 64 of the filters, scaled up. CPU seconds of one thread, all in one run. TensorLy is optional
(`pip install tensorly packaging`).

    OMP_NUM_THREADS=1 python cp_speed.py                 # measures, writes results/cp_speed.json
    python cp_speed.py --docs FILE                       # writes the tables into FILE, between their markers
"""

import argparse
import json
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from harness import environment
from scipy.linalg import subspace_angles as angles_of_pair

from skfactor.solvers.cp import cp_filters
from skfactor.solvers.subspaces import eliminate_similar, orthonormal_bases, subspace_angles, subspace_distances

RANK = 4
VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256), *[(512, 512)] * 5]
#: name -> parameters of the solver: as many sweeps as give TensorLy's error, and until filters gain little
MODES = {**{f"{n} sweeps": {"tol": 0.0, "max_iter": n} for n in (50, 100)},
         "tol = 1e-5 (the estimator)": {"tol": 1e-5, "max_iter": 300}}
N_PEER, N_PAIRS, REPEATS = 64, 100, 2
BEGIN, END = "<!-- cp speed: begin -->", "<!-- cp speed: end -->"


def gaussian(n, c, seed=0):
    """He weights of a 3 x 3 convolution, as rows."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, c * 9)) * np.sqrt(2 / (9 * c))).astype(np.float32)


def timed(function, repeats=REPEATS):
    """Least CPU seconds of some repeats, and the result."""
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return best, result


def extra_memory(function):
    """Bytes allocated at the peak of a call, its result included."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure_decomposition():
    X, rows, layers = gaussian(512, 512), [], [gaussian(n, c) for n, c in VGG16]
    for name, given in MODES.items():
        seconds, cp = timed(lambda given=given: cp_filters(X, (512, 3, 3), RANK, **given))
        vgg, _ = timed(lambda given=given: [cp_filters(W, (W.shape[1] // 9, 3, 3), RANK, **given) for W in layers])
        rows.append({"method": f"skfactor, {name}", "cpu_seconds": seconds, "rel_error": float(cp.rel_error.mean()),
                     "rel_error_sample": float(cp.rel_error[:N_PEER].mean()),
                     "above_bound": float((cp.rel_error / cp.svd_bound).mean() - 1), "sweeps": cp.n_iter,
                     "vgg16_cpu_seconds": vgg,
                     "extra_bytes": extra_memory(lambda given=given: cp_filters(X, (512, 3, 3), RANK, **given))})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_tensorly():
    try:
        import tensorly
        import torch
        from tensorly.decomposition import parafac
    except ImportError as error:
        print(f"TensorLy is left out: {error}", file=sys.stderr)
        return []
    tensorly.set_backend("pytorch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    filters = torch.from_numpy(gaussian(512, 512).reshape(512, 512, 3, 3))[:N_PEER]
    parafac(filters[0], rank=RANK, n_iter_max=300, init="random")  # warm-up
    seconds, found = timed(lambda: [parafac(W, rank=RANK, n_iter_max=300, init="random") for W in filters])
    seconds *= 512 / N_PEER
    errors = [float(torch.linalg.norm(W - tensorly.cp_to_tensor(cp)) / torch.linalg.norm(W))
              for W, cp in zip(filters, found, strict=True)]
    row = {"method": f"TensorLy {tensorly.__version__}, filter by filter", "cpu_seconds": seconds,
           "rel_error_sample": float(np.mean(errors)), "measured_filters": N_PEER}
    print(json.dumps(row), flush=True)
    return [row]


def measure_angles():
    """Distances of all pairs of 512 filters, for all three factors, and their agreement with scipy on some pairs."""
    cp = cp_filters(gaussian(512, 512), (512, 3, 3), RANK)
    factors = [cp.pointwise, *(F[:, :, :2] for F in cp.spatial)]  # four terms would fill the three pixels of an axis
    seconds, bases = timed(lambda: [orthonormal_bases(F) for F in factors])
    rows = [{"what": "orthonormal bases, three factors", "cpu_seconds": seconds}]
    for kind in ("chordal", "geodesic"):
        seconds, distances = timed(lambda kind=kind: [subspace_distances(Q, kind) for Q in bases])
        rows.append({"what": f"{kind} distances of all 130,816 pairs, three factors", "cpu_seconds": seconds})
    rows.append({"what": "removal of 256 filters",
                 "cpu_seconds": timed(lambda: eliminate_similar(sum(distances) / 3, 256))[0]})
    pairs, worst = np.random.default_rng(0).integers(0, 512, (N_PAIRS, 2)), 0.0
    for Q, F in zip(bases, factors, strict=True):
        found = subspace_angles(Q)
        for i, j in pairs:
            worst = max(worst, np.abs(found[i, j] - angles_of_pair(F[i], F[j])).max())
    rows.append({"what": f"largest difference from scipy.linalg.subspace_angles, {3 * N_PAIRS} pairs",
                 "radians": float(worst)})
    rows.append({"what": "extra memory of the chordal distances",
                 "extra_bytes": extra_memory(lambda: subspace_distances(bases[0], "chordal"))})
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def tables(found):
    """Markdown."""
    peer = next((r for r in found["decomposition"] if "measured_filters" in r), None)
    lines = ["| 512 filters of 512 x 3 x 3, R = 4 | CPU-s | less CPU time | error | error, sample | above the bound | "
             "extra memory | all 4,224 filters of VGG-16 |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for r in found["decomposition"]:
        if r is peer:
            lines.append(f"| {r['method']} (from {r['measured_filters']} filters) | {r['cpu_seconds']:.1f} | 1x | | "
                         f"{r['rel_error_sample']:.5f} | | | |")
            continue
        ratio = f"{peer['cpu_seconds'] / r['cpu_seconds']:.0f}x" if peer else ""
        lines.append(f"| {r['method']} | {r['cpu_seconds']:.3f} | {ratio} | {r['rel_error']:.5f} | "
                     f"{r['rel_error_sample']:.5f} | {100 * r['above_bound']:.2f} % | "
                     f"{r['extra_bytes'] / 1e6:.0f} MB | {r['vgg16_cpu_seconds']:.2f} s |")
    lines += ["", "| subspaces of 512 filters | |", "|---|--:|"]
    for r in found["angles"]:
        value = (f"{r['cpu_seconds']:.3f} CPU-s" if "cpu_seconds" in r else f"{r['radians']:.1e} rad" if "radians" in r
                 else f"{r['extra_bytes'] / 1e6:.0f} MB")
        lines.append(f"| {r['what']} | {value} |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=here / "results" / "cp_speed.json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the tables")
    args = parser.parse_args()
    if args.docs:
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        text = tables(json.loads(args.json.read_text()))
        args.docs.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    decomposition = measure_decomposition() + measure_tensorly()
    found = {"environment": environment(), "decomposition": decomposition, "angles": measure_angles()}
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
