# SPDX-License-Identifier: BSD-3-Clause
"""Which filters to remove: accuracy of ResNet-56 with 40 % of the middle filters of every block zeroed, by criterion.

Only the selection differs: filters are not decomposed (rank None), and nothing is retrained or refitted. Accuracy on
1,000 training images that the calibrations of the other scripts do not use; the network was trained on them, so the
figures compare criteria and say nothing about new images.

    python cp_criteria.py                  # rows that results/cp_criteria.json lacks
    python cp_criteria.py --docs FILE      # write the table into FILE, between its markers
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from networks import accuracy, data_folder, held_back_images, original

import skfactor

NETWORK, RATIO, N_IMAGES = "cifar10_resnet56", 0.4, 1000
RULES = {
    "norm": {}, "principal angles": {"criterion": "principal_angles"}, "NORTON's published code":
    {"criterion": "norton-2024"}, "variance-based distance": {"criterion": "vbd"},
    **{f"random, seed {seed}": {"criterion": "random", "random_state": seed} for seed in range(3)},
}
BEGIN, END = "<!-- cp criteria: begin -->", "<!-- cp criteria: end -->"


def measure(folder, name):
    pruner = skfactor.CPDFilterPruner(rank=None, prune_ratio=RATIO, **RULES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = skfactor.compress(original(folder, NETWORK), {"layer*.conv1": pruner, "*": None}, progress=False)
    return {"criterion": name, "held_back": round(accuracy(result.model, *held_back_images(folder, N_IMAGES)), 2)}


def table(rows):
    """Markdown."""
    return "\n".join(["| criterion | held-back training images |", "|---|--:|",
                      *(f"| {r['criterion']} | {r['held_back']:.1f} |" for r in rows)])


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "cp_criteria.json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    if args.docs:
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        args.docs.write_text(f"{head}{BEGIN}\n{table(found['rows'])}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    for name in RULES:
        if not any(r["criterion"] == name for r in found["rows"]):
            found["rows"].append(measure(folder, name))
            print(json.dumps(found["rows"][-1]), flush=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
