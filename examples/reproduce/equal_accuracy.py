# SPDX-License-Identifier: BSD-3-Clause
"""How small a file can be at equal accuracy without fine-tuning: real networks, `skfactor.allocate` beside NNCodec.

Every row starts from one target, the size of the file. The test images are used once per row, for the accuracy of the
network that is loaded back from the file.

    python equal_accuracy.py                 # rows of skfactor, into results/equal_accuracy.json
    python equal_accuracy.py --peers         # rows of NNCodec (pip install nncodec), beside those that are there
    python equal_accuracy.py --docs FILE     # write the table into FILE, between its markers
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from networks import accuracy, calibration_images, data_folder, fresh, original, test_set, weights_path

N_CALIBRATION = 512
#: Crops of each of these images: more take out noise, and time in proportion.
VIEWS = {"cifar10_resnet20": 4}
#: (network, size wanted, seed of the 512 images or None for no images)
ROWS = [
    ("cifar10_resnet20", "17x", 0), ("cifar10_resnet20", "17x", 1), ("cifar10_resnet20", "17x", 2),
    ("cifar10_resnet56", "20.5x", 0), ("cifar10_resnet56", "20.5x", 1), ("cifar10_resnet56", "20.5x", 2),
    ("cifar10_resnet20", "12x", None), ("cifar10_resnet56", "15x", None),
    ("mnist_lenet300100_original", "20x", 0), ("mnist_lenet5_original", "20x", 0),
]
#: Operating points of NNCodec nearest to half a point lost, found by trying qp -18 to -28 on the test images.
PEERS = [
    ("cifar10_resnet20", {"qp": -24, "use_dq": True, "nonweight_qp": -40}),
    ("cifar10_resnet20", {"qp": -23, "use_dq": True, "nonweight_qp": -40}),
    ("cifar10_resnet56", {"qp": -22, "use_dq": True, "nonweight_qp": -40}),
    ("cifar10_resnet56", {"qp": -21, "use_dq": True, "nonweight_qp": -40}),
    ("cifar10_resnet56", {"qp": -20, "use_dq": True, "nonweight_qp": -40}),
]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def our_row(folder, name, budget, seed):
    """Compress to the size wanted, load the file into a fresh network, measure."""
    import skfactor

    model = original(folder, name)
    inputs = None if seed is None else calibration_images(folder, name, N_CALIBRATION, seed, VIEWS.get(name, 1))
    start = time.perf_counter()
    allocation = skfactor.allocate(model, budget=budget, calibration=inputs)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        path = allocation.result.save(os.path.join(scratch, "network.skf"))
        restored = skfactor.load_into(fresh(name), path)
        row = _row(folder, name, "skfactor.allocate", os.path.getsize(path), model, restored)
        parts = _parts(path)
    return row | {"target": budget, "seed": seed, "calibration_images": 0 if seed is None else N_CALIBRATION,
                  "views": 0 if seed is None else VIEWS.get(name, 1), "seconds": round(seconds, 1),
                  "bytes_by_part": parts, "files_encoded": len(allocation.history)}


def peer_row(folder, name, options):
    """NNCodec at one operating point."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from nncodec_peer import load_nncodec

    compress, decompress = load_nncodec()
    model = original(folder, name)
    tensors = {k: v.numpy() for k, v in model.state_dict().items() if v.is_floating_point()}
    start = time.perf_counter()
    stream = compress(tensors, **options)
    seconds = time.perf_counter() - start
    restored = fresh(name)
    restored.load_state_dict({k: torch.as_tensor(v) for k, v in decompress(stream).items()}, strict=False)
    label = "NNCodec, " + ", ".join(f"{k}={v}" for k, v in options.items())
    return _row(folder, name, label, len(stream), model, restored) | {"seconds": round(seconds, 1),
                                                                      "calibration_images": 0}


def _row(folder, name, method, n_bytes, model, restored):
    images, labels = test_set(folder, name)
    before, after = accuracy(model, images, labels), accuracy(restored, images, labels)
    n_before = os.path.getsize(weights_path(folder, name))
    return {"network": name, "method": method, "bytes": n_bytes, "float32_file": n_before,
            "ratio": round(n_before / n_bytes, 2), "accuracy_before": round(before, 2),
            "accuracy_after": round(after, 2), "points_lost": round(before - after, 2), "test_images": len(labels)}


def _parts(path):
    """Bytes of the file by what they hold."""
    from skfactor.codec.container import SkfFile

    parts = {"weights": 0, "biases": 0, "normalisation": 0, "header": 0}
    with SkfFile(path) as file:
        for name in file.names:
            own = name.rpartition(".")[2]
            is_weight = own == "weight" and len(file.entry(name)["shape"]) > 1
            parts["weights" if is_weight else "biases" if own == "bias" else "normalisation"] += file.nbytes(name)
    parts["header"] = os.path.getsize(path) - sum(parts.values())
    return parts


def table(rows):
    """Markdown table of all rows; rows that differ in the draw of the images only are joined."""
    lines = ["| network | method | images | bytes | smaller | accuracy before | after | lost | seconds |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    groups = {}
    for row in rows:
        groups.setdefault((row["network"], row["method"], row.get("target"), row["calibration_images"]), []).append(row)
    for (network, method, target, n_images), group in sorted(groups.items(), key=_place):
        first = group[0]
        after = [r["accuracy_after"] for r in group]
        draws = "" if len(group) == 1 else f" (mean of {len(group)} draws: {_mean(after):.2f}, " \
                                           f"{min(after):.2f} to {max(after):.2f})"
        lines.append(f"| {network} | {method}{f', {target}' if target else ''} | {n_images} | {first['bytes']:,} "
                     f"| {first['ratio']:.2f}x | {first['accuracy_before']:.2f} | {first['accuracy_after']:.2f}{draws} "
                     f"| {first['points_lost']:.2f} | {first['seconds']:.0f} |")
    return "\n".join(lines)


def _place(item):
    (network, method, _, _), group = item
    return network.startswith("mnist"), network, not method.startswith("skfactor"), group[0]["bytes"]


def _mean(values):
    return sum(values) / len(values)


def _key(row):
    return row["network"], row["method"], row.get("target"), row.get("seed")


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "equal_accuracy.json", type=Path)
    parser.add_argument("--peers", action="store_true", help="measure NNCodec instead")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the rows to measure")
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        args.docs.write_text(f"{head}{BEGIN}\n{table(found['rows'])}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    todo = PEERS if args.peers else ROWS
    for number, setting in enumerate(todo):
        if args.only is not None and number not in args.only:
            continue
        row = (peer_row if args.peers else our_row)(folder, *setting)
        print(json.dumps(row), flush=True)
        # read again: another run may have added rows meanwhile
        found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
        found["rows"] = [r for r in found["rows"] if _key(r) != _key(row)] + [row]
        found["machine"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
                            "threads": args.threads}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
