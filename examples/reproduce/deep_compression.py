# SPDX-License-Identifier: BSD-3-Clause
"""Deep Compression's three stages on LeNet-300-100 and MNIST: prune, train, share, train, Huffman. Minutes on a CPU.

Han, Mao, Dally (ICLR 2016, arXiv:1510.00149) publish 40x at 1.58 % error. Here the pruning is gradual, with amounts by
layer from what pruning each layer does to the output on unlabelled images, and weights may grow back; shared weights
are trained by their codebooks. Amounts, epochs and rates are first guesses; nothing has been tuned.

    python deep_compression.py               # rows, into results/deep_compression.json
    python deep_compression.py --docs FILE   # write the table into FILE, between its markers
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from networks import accuracy, data_folder, fresh, original, test_set, weights_path
from sklearn.pipeline import Pipeline

import skfactor
from skfactor.codec.huffman import code_lengths

NAME, N_HELD_BACK = "mnist_lenet300100_original", 5000
AMOUNT, N_CLUSTERS = 0.94, 16
PRUNE_EPOCHS, SHARE_EPOCHS, BATCH = 12, 4, 128
PUBLISHED = {"method": "Deep Compression (published)", "bytes": 27 * 1024, "ratio": 40.0, "error_before": 1.64,
             "error_after": 1.58}
MARKS = "<!-- deep compression: begin -->", "<!-- deep compression: end -->"


def shifted(x, generator):
    """Images moved by up to one pixel."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(x, (down, right), (2, 3))


def training_set(folder):
    with np.load(folder / "mnist.npz") as file:
        x, y = torch.from_numpy(file["X_train"])[:, None].float() / 256, torch.from_numpy(file["y_train"]).long()
    return (x[:-N_HELD_BACK], y[:-N_HELD_BACK]), (x[-N_HELD_BACK:], y[-N_HELD_BACK:])


def error(model, images):
    return round(100 - accuracy(model, *images), 2)


def stages(folder, epochs_prune, epochs_share, seed):
    """(name, network, result) after each stage."""
    train, held_back = training_set(folder)
    model = original(folder, NAME)
    yield "original", model, None
    amounts = skfactor.sensitivity(model, train[0][:1000]).amounts(AMOUNT)
    n_steps = (len(train[0]) // BATCH) * epochs_prune * 2 // 3
    pruning = skfactor.GradualPruning(model, amounts, n_steps=n_steps, regrow=True)
    options = {"batch_size": BATCH, "augment": shifted, "random_state": seed,
               "validate": lambda m: accuracy(m, *held_back)}
    skfactor.finetune(pruning, train, epochs=epochs_prune, lr=0.05, **options)
    pruned = pruning.finish()
    yield "pruned and trained", pruned.model, pruned
    chain = Pipeline([("prune", skfactor.MagnitudePruner(threshold=0.0)),
                      ("share", skfactor.KMeansWeightSharer(N_CLUSTERS, preserve_zeros=True))])
    shared = skfactor.compress(pruned.model, {"*": chain, "*.bias": skfactor.MantissaRounder(8)}, progress=False)
    yield "shared", shared.model, shared
    method = skfactor.TrainedSharing(shared, grad="mean")
    skfactor.finetune(method, train, epochs=epochs_share, lr=0.05, **options)
    trained = method.finish()
    yield "shared and trained", trained.model, trained


def relative_index_bytes(result, index_bits=5):
    """Estimated bytes in the published format: Huffman codes of values and of gaps of at most 2**index_bits."""
    total = 0.0
    for tensor in result.tensors.values():
        if tensor.kind != "compressed" or len(tensor.shape) < 2:
            total += 4 * np.prod(tensor.shape)
            continue
        codes = tensor.codes.ravel()
        book = tensor.decoders[-1].codebooks.ravel()
        where = np.flatnonzero(book[codes] != 0)
        gaps = np.diff(where, prepend=-1) - 1
        fillers = gaps >> index_bits  # a zero is stored where a gap is too long
        gap_symbols = np.concatenate([gaps & ((1 << index_bits) - 1), np.repeat((1 << index_bits) - 1, fillers.sum())])
        values = np.concatenate([codes[where], np.full(fillers.sum(), len(book))])
        for symbols in (gap_symbols, values):
            counts = np.bincount(symbols)
            if (counts > 0).sum() > 1:
                total += float((counts * code_lengths(counts)).sum()) / 8 + len(counts) / 2
        total += 4 * len(book)
    return round(total)


def measured(folder, epochs_prune=PRUNE_EPOCHS, epochs_share=SHARE_EPOCHS, seed=0):
    """A row for every stage; the file of the last one is loaded into a fresh network first."""
    _, held_back = training_set(folder)
    images, rows, start = test_set(folder, NAME), [], time.process_time()
    n_before = os.path.getsize(weights_path(folder, NAME))
    for stage, model, result in stages(folder, epochs_prune, epochs_share, seed):
        row = {"stage": stage, "error": error(model, images), "held_back_error": error(model, held_back)}
        if result is not None:
            with tempfile.TemporaryDirectory() as scratch:
                path = result.save(os.path.join(scratch, "network.skf"))
                row |= {"bytes": os.path.getsize(path), "ratio": round(n_before / os.path.getsize(path), 1)}
                row["error"] = error(skfactor.load_into(fresh(NAME), path), images)
            weights = [t for t in result.model.parameters() if t.dim() > 1]
            row["zeros"] = round(1 - sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights), 4)
            if stage.startswith("shared"):
                row["huffman_relative_index_bytes_estimated"] = relative_index_bytes(result)
        rows.append(row | {"cpu_seconds": round(time.process_time() - start)})
        print(json.dumps(rows[-1]), flush=True)
    return {"seed": seed, "float32_file": n_before, "rows": rows}


def table(found):
    lines = ["| stage | zeros | bytes of the file | smaller | in the published format (estimated) | error |",
             "|---|--:|--:|--:|--:|--:|"]
    for row in found["runs"][0]["rows"]:
        estimated = row.get("huffman_relative_index_bytes_estimated")
        lines.append(f"| {row['stage']} | {row['zeros']:.2%} | {row['bytes']:,} | {row['ratio']:.1f}x "
                     f"| {f'{estimated:,}' if estimated else ''} | {row['error']:.2f} |" if "bytes" in row else
                     f"| {row['stage']} | | {found['runs'][0]['float32_file']:,} | | | {row['error']:.2f} |")
    lines.append(f"| {PUBLISHED['method']} | 92 % | about {PUBLISHED['bytes']:,} | {PUBLISHED['ratio']:.0f}x | "
                 f"| {PUBLISHED['error_after']:.2f} (before: {PUBLISHED['error_before']:.2f}) |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "deep_compression.json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        head, _, rest = text.partition(MARKS[0])
        shown = table(json.loads(args.json.read_text()))
        args.docs.write_text(f"{head}{MARKS[0]}\n{shown}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    runs = [measured(folder, seed=seed) for seed in args.seeds]
    found = {"published": PUBLISHED, "runs": runs,
             "machine": {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}}
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
