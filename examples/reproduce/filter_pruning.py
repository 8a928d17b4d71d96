# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-56 on CIFAR-10 without 40 % of the middle filters of every block, without any fine-tuning.

Every criterion removes filters of `layer*.conv1`; then nothing, or the layers behind are refit for inputs of the
original network ("refit"), or layer after layer for what the smaller network gives ("sequential"). Calibration is 512
unlabelled training images. Settings are compared on 1,000 other training images ("held back"; the network was trained
on them, so they overstate accuracy, but order the settings); the test images are used for the final figure only.

    python filter_pruning.py                       # rows that results/filter_pruning.json lacks
    python filter_pruning.py --criteria norm --refits refit
    python filter_pruning.py --docs FILE           # write the table into FILE, between its markers
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from networks import _cifar, accuracy, calibration_images, data_folder, original, test_set

import skfactor
from skfactor.bridge import count_macs

AMOUNT = {"layer*.conv1": 0.4}
N_CALIBRATION, N_HELD_BACK = 512, 1000
MAX_VECTORS = 65536
CRITERIA = ("norm", "batchnorm", "least_squares", "random", "principal_angles", "norton-2024", "vbd")
REFITS = {"plain": {"refit": False}, "refit": {"sequential": False}, "sequential": {"sequential": True}}
BEGIN, END = "<!-- filter pruning: begin -->", "<!-- filter pruning: end -->"


def held_back(folder, n):
    """Training images that the calibration does not use, with labels."""
    import numpy as np

    with np.load(folder / "cifar10_train.npz") as file:
        picked = np.random.default_rng(0).permutation(len(file["X"]))[N_CALIBRATION : N_CALIBRATION + n]
        return _cifar(file["X"][picked]), torch.from_numpy(file["y"][picked]).long()


@torch.no_grad()
def divergence(model, reference, images):
    """Mean KL divergence of the predictions from those of the original network, in nats."""
    total = 0.0
    for x in images.split(250):
        p, q = reference(x).log_softmax(1), model(x).log_softmax(1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(images)


def measure(folder, criterion, refit):
    """One setting: prune, count, measure."""
    model = original(folder, "cifar10_resnet56")
    (inputs,) = calibration_images(folder, "cifar10_resnet56", N_CALIBRATION, 0)
    start = time.process_time()
    pruned = skfactor.prune_filters(model, AMOUNT, criterion=criterion, random_state=0, progress=False,
                                    calibration=skfactor.Calibration(inputs, max_vectors=MAX_VECTORS), **REFITS[refit])
    seconds = time.process_time() - start
    images, labels = held_back(folder, N_HELD_BACK)
    x = torch.zeros(1, 3, 32, 32)
    row = {"criterion": criterion, "refit": refit, "held_back": round(accuracy(pruned.model, images, labels), 2),
           "held_back_divergence": round(divergence(pruned.model, model, images), 4)}
    images, labels = test_set(folder, "cifar10_resnet56")
    return row | {"test": round(accuracy(pruned.model, images, labels), 2), "difference_from_mask": pruned.difference,
                  "parameters": [pruned.parameters_before, pruned.parameters_after],
                  "macs": [count_macs(model, x), count_macs(pruned.model, x)], "cpu_seconds": round(seconds, 1)}


def table(rows):
    """Markdown: a line for each criterion."""
    found = {(row["criterion"], row["refit"]): row for row in rows}
    lines = ["| criterion | " + " | ".join(f"{r}: test % (held back %, KL)" for r in REFITS) + " |",
             "|---|" + "--:|" * len(REFITS)]
    for criterion in CRITERIA:
        cells = [found.get((criterion, refit)) for refit in REFITS]
        if any(cells):
            lines.append(f"| {criterion} | " + " | ".join(
                f"{c['test']:.2f} ({c['held_back']:.1f}, {c['held_back_divergence']:.3f})" if c else "not run"
                for c in cells) + " |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "filter_pruning.json", type=Path)
    parser.add_argument("--criteria", nargs="*", default=CRITERIA, choices=CRITERIA)
    parser.add_argument("--refits", nargs="*", default=list(REFITS), choices=list(REFITS))
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    read = lambda: json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}  # noqa: E731
    if args.docs:
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        args.docs.write_text(f"{head}{BEGIN}\n{table(read()['rows'])}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    for refit in args.refits:
        for criterion in args.criteria:
            if (criterion, refit) in [(row["criterion"], row["refit"]) for row in read()["rows"]]:
                continue
            try:
                row = measure(folder, criterion, refit)
            except ValueError as error:  # a criterion whose estimator is not there
                print(f"{criterion}: {error}", flush=True)
                continue
            print(json.dumps(row), flush=True)
            found = read()  # again: another run may have added rows meanwhile
            found["rows"].append(row)
            found["machine"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
                                "threads": args.threads}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
