# SPDX-License-Identifier: BSD-3-Clause
"""What NORTON's published selection of filters measures: evidence for docs/norton.md, in seconds.

    python norton_defects.py            # prints the figures and writes results/norton_defects.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
from norton_authors import cp_random, elimination, published_distances, selected


def evidence(W, rank, n_keep, rng):
    """Of one layer: how many distances vanish, the largest one, and how many filters are kept as intended.

    The chordal distance of channel factors that the angle is computed from is given beside it. `intended` counts
    filters that are kept and are not among the first to be eliminated; `chance` is what a random choice gives.
    """
    factors = cp_random(W, rank, rng, max_iter=30)
    D, Q = published_distances(factors), np.linalg.qr(factors[0].transpose(1, 2, 0).astype(float))[0]
    pairs = np.triu_indices(len(W), 1)
    cosines = np.einsum("nir,mis->nmrs", Q, Q) ** 2
    chordal = np.sqrt(np.maximum(0, rank - cosines.sum((2, 3))))[pairs]
    order, kept = elimination(D), selected(factors, n_keep)
    intended = np.setdiff1d(np.arange(len(W)), order[: len(W) - n_keep])
    return {"filters": len(W), "channels": W.shape[1], "rank": rank, "kept": n_keep,
            "vanishing_distances_percent": round(100 * float((D[pairs] < 1e-5).mean()), 1),
            "largest_distance": float(f"{D[pairs].max():.3g}"),
            "mean_chordal_distance_of_channel_factors": round(float(chordal.mean()), 3),
            "kept_as_intended": len(np.intersect1d(kept, intended)),
            "chance": round(n_keep * n_keep / len(W), 1)}


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=here / "results" / "norton_defects.json", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [evidence(rng.standard_normal((n, 64, 3, 3)).astype(np.float32), rank, n_keep, rng)
            for n, rank, n_keep in ((128, 1, 96), (128, 2, 96), (128, 4, 96), (128, 4, 64), (256, 4, 128))]
    for row in rows:
        print(json.dumps(row))
    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
