# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy of ResNet-56 on CIFAR-10 with all 55 convolutions CP-decomposed filter by filter, nothing retrained.

Rows differ in the rank and in what the factors are fitted to: the weights alone, the layers' outputs over 512
unlabelled training images (`input_gram`), or those outputs layer after layer, each for the inputs that the decomposed
layers before it give. Which of them is best is read off 2,000 other training images; the test images are for the table.

    python cp_accuracy.py                  # rows that results/cp_accuracy.json lacks
    python cp_accuracy.py --docs FILE      # write the table into FILE, between its markers
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from networks import accuracy, calibration_images, data_folder, held_back_images, original, test_set

import skfactor

NETWORK = "cifar10_resnet56"
RANKS = (4, 3, 2, 1)
#: what the factors are fitted to -> calibration
FITS = {
    "weights": lambda images: None,
    "outputs": lambda images: images,
    "outputs, layer after layer": lambda images: skfactor.Calibration(images, sequential=True),
}
N_CALIBRATION, N_HELD_BACK = 512, 2000
BEGIN, END = "<!-- cp accuracy: begin -->", "<!-- cp accuracy: end -->"


def measure(folder, rank, fit):
    model = original(folder, NETWORK)
    images = calibration_images(folder, NETWORK, N_CALIBRATION, 0)[0]
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = skfactor.compress(model, {"Conv2d": skfactor.CPDFilterPruner(rank=rank), "*": None},
                                   calibration=FITS[fit](images), progress=False)
    seconds = time.process_time() - start
    errors = [e.rel_error_**2 for e in result.estimators_.values()]
    bounds = [e.svd_bound_**2 for e in result.estimators_.values()]
    return {"network": NETWORK, "rank": rank, "fit": fit, "layers": len(errors),
            "nmse": round(float(np.mean([e.mean() for e in errors])), 4),
            "nmse_bound": round(float(np.mean([b.mean() for b in bounds])), 4),
            "held_back": round(accuracy(result.model, *held_back_images(folder, N_HELD_BACK)), 2),
            "accuracy": round(accuracy(result.model, *test_set(folder, NETWORK)), 2),
            "before": round(accuracy(model, *test_set(folder, NETWORK)), 2), "cpu_seconds": round(seconds, 1)}


def table(rows):
    """Markdown table of all rows."""
    found = {(r["rank"], r["fit"]): r for r in rows}
    lines = ["| factors fitted to | " + " | ".join(f"R = {r}" for r in sorted(RANKS)) + " |",
             "|---|" + "--:|" * len(RANKS)]
    for fit in FITS:
        cells = [found.get((r, fit)) for r in sorted(RANKS)]
        lines.append(f"| {fit} | " + " | ".join(f"{c['accuracy']:.2f} ({c['held_back']:.2f})" if c else ""
                                                for c in cells) + " |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "cp_accuracy.json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--ranks", nargs="*", type=int, default=RANKS)
    parser.add_argument("--fits", nargs="*", default=list(FITS), choices=list(FITS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    if args.docs:
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        args.docs.write_text(f"{head}{BEGIN}\n{table(found['rows'])}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    for rank in args.ranks:
        for fit in args.fits:
            if any(r["rank"] == rank and r["fit"] == fit for r in found["rows"]):
                continue
            row = measure(folder, rank, fit)
            print(json.dumps(row), flush=True)
            found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}  # others may have added
            found["rows"].append(row)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
