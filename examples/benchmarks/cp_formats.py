# SPDX-License-Identifier: BSD-3-Clause
"""Error of all formats of a convolution at equal numbers of parameters, on the three stages of ResNet-56.

Every estimator gets the same share of the layer's parameters. A format whose rank is a whole number per filter may stay
below it; the table says how much it uses. The error is the squared error of a filter over its squared norm, averaged
over filters and layers: weights alone, no data.

    python cp_formats.py                  # rows that results/cp_formats.json lacks
    python cp_formats.py --docs FILE      # writes the table into FILE, between its markers
"""

import argparse
import json
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from datasets import network_layers
from harness import environment

from skfactor import CoupledCPDFactorizer, CPDFilterPruner, LowRankFactorizer, SeparableFactorizer, TuckerFactorizer

LAYERS = {f"{c} x {c}": [f"layer{stage}.{block}.conv{i}.weight" for block, i in ((2, 1), (3, 2), (5, 1), (7, 2))]
          for stage, c in ((3, 64), (2, 32), (1, 16))}
SHARES = (0.5, 0.25)
FORMATS = {
    "CP per filter (NORTON)": lambda share, shape: CPDFilterPruner(share, kernel_shape=shape),
    "spatially separable": lambda share, shape: SeparableFactorizer(share, kernel_shape=shape),
    "depthwise separable": lambda share, shape: SeparableFactorizer(share, kernel_shape=shape, kind="depthwise"),
    "low rank": lambda share, shape: LowRankFactorizer(share),
    "Tucker-2": lambda share, shape: TuckerFactorizer(share, kernel_shape=shape),
    **{f"coupled CP, K = {k}": lambda share, shape, k=k: CoupledCPDFactorizer(share, n_clusters=k, kernel_shape=shape)
       for k in (1, 2, 4)},
}
BEGIN, END = "<!-- cp formats: begin -->", "<!-- cp formats: end -->"


def measure(weights, stage, share, name):
    errors, used, start = [], [], time.process_time()
    for layer in LAYERS[stage]:
        X = weights[layer]
        estimator = FORMATS[name](share, (X.shape[1] // 9, 3, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = estimator.fit_transform(X)
        E = np.square(X - estimator.inverse_transform(codes), dtype=np.float64).sum(axis=1)
        errors.append((E / np.square(X, dtype=np.float64).sum(axis=1)).mean())
        held = sum(a.size for a in estimator.decoder_.parts()[1].values()) + np.count_nonzero(codes)
        used.append(held / X.size)
    return {"stage": stage, "share": share, "format": name, "nmse": round(float(np.mean(errors)), 4),
            "used": round(float(np.mean(used)), 3), "cpu_seconds": round(time.process_time() - start, 2)}


def table(rows):
    """Markdown, the least error of each column in bold."""
    columns = [(share, stage) for share in SHARES for stage in LAYERS]
    cells = {(r["format"], r["share"], r["stage"]): r for r in rows}
    lines = ["| format | " + " | ".join(f"{stage}, {share:.0%}" for share, stage in columns) + " |",
             "|---|" + "--:|" * len(columns)]
    least = {c: min(cells[f, *c]["nmse"] for f in FORMATS if cells[f, *c]["used"] <= c[0] * 1.005) for c in columns}
    for name in FORMATS:
        texts = []
        for c in columns:
            r = cells[name, *c]
            text = f"{r['nmse']:.4f}"
            text = f"**{text}**" if r["nmse"] == least[c] else text
            texts.append(text if r["used"] > 0.93 * c[0] else f"{text} ({r['used']:.2f})")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=here / "results" / "cp_formats.json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    args = parser.parse_args()
    if args.docs:
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        text = table(json.loads(args.json.read_text())["rows"])
        args.docs.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    weights = network_layers("cifar10_resnet56")
    if weights is None:
        raise SystemExit("cp_formats.py needs the weights of ResNet-56: set SKFACTOR_DATA")
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    done = {(r["share"], r["stage"], r["format"]) for r in rows}
    for share, stage, name in product(SHARES, LAYERS, FORMATS):
        if (share, stage, name) not in done:
            rows.append(measure(weights, stage, share, name))
            print(json.dumps(rows[-1]), flush=True)
            args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
