# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy of ResNet-20 and ResNet-56 on CIFAR-10 with decomposed convolutions, without any fine-tuning.

One rule sets all ranks: every convolution but the first may hold a share of 1/2, 1/4 or 1/8 of its weights, codes and
decoder counted together (`rank=share`). The dictionary has atoms of one kernel, as many non-zeros per kernel as the
share allows and then as many atoms; of its codes the non-zeros count, not their places. Calibration is the second
moment of each layer's inputs over 512 training images; the test images are used for the final accuracy only.

    python decompositions.py                       # rows that results/decompositions.json lacks
    python decompositions.py --only cifar10_resnet20
    python decompositions.py --docs FILE           # write the table into FILE, between its markers
"""

import argparse
import json
import platform
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from networks import accuracy, calibration_images, data_folder, original, test_set

import skfactor
from skfactor.bridge import calibration_moments

N_CALIBRATION = 512
NETWORKS = ("cifar10_resnet20", "cifar10_resnet56")
SHARES = (1 / 2, 1 / 4, 1 / 8)
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


def dictionary(share, shape):
    """Non-zeros per kernel of `pixels` weights, then atoms, that keep to the share."""
    kernels, pixels = shape[0] * shape[1], shape[2] * shape[3]
    n_nonzero = max(1, int(share * pixels))
    atoms = max(1, int((share * pixels - n_nonzero) * kernels / pixels))
    return skfactor.DictionaryFactorizer(atoms, code_solver="omp", n_nonzero_coefs=min(n_nonzero, atoms),
                                         vector_size=pixels, random_state=0)


#: name -> estimator for a layer's share and shape
METHODS = {
    "low rank": lambda share, shape: skfactor.LowRankFactorizer(rank=share),
    "Tucker-2": lambda share, shape: skfactor.TuckerFactorizer(rank=share),
    "tensor train": lambda share, shape: skfactor.TensorTrainFactorizer(rank=share),
    "hierarchical Tucker": lambda share, shape: skfactor.HierarchicalTuckerFactorizer(rank=share),
    "block term, 4 blocks": lambda share, shape: skfactor.BlockTermFactorizer(4, rank=share),
    "separable, spatial": lambda share, shape: skfactor.SeparableFactorizer(rank=share, kind="spatial"),
    "separable, depthwise": lambda share, shape: skfactor.SeparableFactorizer(rank=share, kind="depthwise"),
    "dictionary": dictionary,
}


def measure(folder, network, method, share, calibrated):
    """Compress the convolutions, count what is stored, measure."""
    model = original(folder, network)
    layers = {name: m.weight for name, m in model.named_modules()
              if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3}
    rules = {name: METHODS[method](share, tuple(weight.shape)) for name, weight in layers.items()} | {"*": None}
    moments = moments_of(folder, network) if calibrated else None
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = skfactor.compress(model, rules, calibration=moments, progress=False)
    seconds = time.process_time() - start
    stored = sum(numbers(result.tensors[f"{name}.weight"]) for name in layers)
    images, labels = images_of(folder, network)
    return {"network": network, "method": method, "share": share, "calibrated": calibrated,
            "weights": sum(w.numel() for w in layers.values()), "stored": int(stored),
            "accuracy_before": accuracy_before(folder, network),
            "accuracy": round(accuracy(result.model, images, labels), 2), "cpu_seconds": round(seconds, 1),
            "test_images": len(labels)}


@cache
def moments_of(folder, network):
    """Second moments of all layers' inputs, measured once for all methods and shares."""
    inputs = calibration_images(folder, network, N_CALIBRATION, 0)
    return calibration_moments(original(folder, network), inputs)


@cache
def images_of(folder, network):
    return test_set(folder, network)


@cache
def accuracy_before(folder, network):
    return round(accuracy(original(folder, network), *images_of(folder, network)), 2)


def numbers(tensor):
    """Numbers of codes that are not zero, and of the decoders."""
    return np.count_nonzero(tensor.codes) + sum(a.size for d in tensor.decoders for a in d.parts()[1].values())


def table(rows):
    """Markdown table: a line for each network and method, without and with calibration side by side."""
    found = {_key(row): row for row in rows}
    header = " | ".join(f"1/{round(1 / s)} {c}" for s in SHARES for c in ("without", "with"))
    lines = [f"| network | method | {header} | CPU s at 1/4 without, with |", "|---|---|" + "--:|" * 7]
    for network in NETWORKS:
        for method in METHODS:
            cells = [found.get((network, method, s, c)) for s in SHARES for c in (False, True)]
            if not any(cells):
                continue
            shown = [f"{c['accuracy']:.2f}" if c else "" for c in cells]
            times = ", ".join(f"{c['cpu_seconds']:.0f}" for c in cells[2:4] if c)
            lines.append(f"| {network} | {method} | {' | '.join(shown)} | {times} |")
    before = {row["network"]: row["accuracy_before"] for row in rows}
    intro = "; ".join(f"{name}: {value:.2f} before" for name, value in sorted(before.items()))
    worst = max((row["stored"] / row["weights"] / row["share"] for row in rows), default=0.0)
    return f"{intro}. Stored numbers over the share that is allowed, at most: {worst:.3f}.\n\n" + "\n".join(lines)


def read(path):
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def _key(row):
    return row["network"], row["method"], row["share"], row["calibrated"]


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "decompositions.json", type=Path)
    parser.add_argument("--only", nargs="*", default=NETWORKS, choices=NETWORKS, help="networks to measure")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        shown = table(read(args.json)["rows"])
        args.docs.write_text(f"{head}{BEGIN}\n{shown}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    todo = [(n, m, s, c) for n in args.only for s in SHARES for m in args.methods for c in (False, True)]
    for setting in todo:
        if setting in map(_key, read(args.json)["rows"]):
            continue
        row = measure(folder, *setting)
        print(json.dumps(row), flush=True)
        found = read(args.json)  # again: another run may have added rows meanwhile
        found["rows"].append(row)
        found["machine"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
                            "threads": args.threads}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
